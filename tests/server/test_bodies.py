"""Bodies of requests: a field that is not known is an error, unless the server takes it."""

import pytest

from grok1.server.bodies import CompletionBody, decode
from grok1.server.refusals import RefusalError

UNKNOWN = b'{"prompt": "a", "max_tokens": 3, "temprature": 1}'


def test_an_unknown_field_is_named_unless_it_is_to_be_ignored():
    with pytest.raises(RefusalError, match="the field 'temprature' is unknown here") as caught:
        decode(UNKNOWN, CompletionBody)
    assert caught.value.param == "temprature"
    body = decode(UNKNOWN, CompletionBody, ignore_unknown=True)
    assert isinstance(body, CompletionBody)
    assert (body.prompt, body.max_tokens, body.temperature) == ("a", 3, None)


@pytest.mark.parametrize("ignore_unknown", [False, True])
def test_a_field_of_another_type_is_an_error_all_the_same(ignore_unknown):
    with pytest.raises(RefusalError, match="Expected `int") as caught:
        decode(b'{"prompt": "a", "max_tokens": "b"}', CompletionBody, ignore_unknown)
    assert caught.value.param == "max_tokens"


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_an_error(data):
    with pytest.raises(RefusalError, match=r"the body must be a JSON object: |Expected `object`"):
        decode(data, CompletionBody)
