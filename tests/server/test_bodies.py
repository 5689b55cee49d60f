"""Bodies of requests: a field that is not known is an error, unless the server takes it."""

import pytest

from grok1.server.bodies import ChatBody, CompletionBody, decode
from grok1.server.refusals import RefusalError

UNKNOWN = b'{"prompt": "a", "max_tokens": 3, "temprature": 1}'


def test_an_unknown_field_is_named_unless_it_is_to_be_ignored():
    with pytest.raises(RefusalError, match="the field 'temprature' is unknown here") as caught:
        decode(UNKNOWN, CompletionBody)
    assert caught.value.param == "temprature"
    body = decode(UNKNOWN, CompletionBody, ignore_unknown=True)
    assert isinstance(body, CompletionBody)
    assert (body.prompt, body.max_tokens, body.temperature) == ("a", 3, None)
    inside = b'{"prompt": "a", "stream_options": {"include_usage": true, "include_usages": true}}'
    with pytest.raises(RefusalError, match="the field 'include_usages' is unknown here"):
        decode(inside, CompletionBody)
    body = decode(inside, CompletionBody, ignore_unknown=True)
    assert isinstance(body, CompletionBody)
    assert body.stream_options is not None
    assert body.stream_options.include_usage


@pytest.mark.parametrize("ignore_unknown", [False, True])
def test_a_field_of_another_type_is_an_error_all_the_same(ignore_unknown):
    with pytest.raises(RefusalError, match="Expected `int") as caught:
        decode(b'{"prompt": "a", "max_tokens": "b"}', CompletionBody, ignore_unknown)
    assert caught.value.param == "max_tokens"


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_an_error(data):
    with pytest.raises(RefusalError, match=r"the body must be a JSON object: |Expected `object`"):
        decode(data, CompletionBody)


@pytest.mark.parametrize("ignore_unknown", [False, True])
@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b'{"prompt": "a", "max_tokens": 3, "max_tokens" : 4}', "max_tokens"),
        (b'{"prompt": "a", "logit_bias": {"5": 1, "5": 2}}', "5"),
        (b'{"prompt": "a", "prompt": "b"}', "prompt"),
    ],
)
def test_a_name_that_an_object_has_twice_is_an_error(data, name, ignore_unknown):
    with pytest.raises(RefusalError, match=f"must have each name once, found '{name}' twice"):
        decode(data, CompletionBody, ignore_unknown)


def test_texts_and_other_objects_may_have_the_same_names():
    message = rb'{"role": "user", "content": "\"role\": 1, \"role\": 2"}'
    body = decode(b'{"messages": [' + message + b", " + message + b"]}", ChatBody)
    assert isinstance(body, ChatBody)
    assert len(body.messages) == 2
