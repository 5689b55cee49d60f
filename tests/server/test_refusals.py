"""What a request over HTTP is refused for or fails by, in which words."""

import json
import socket

import numpy as np
import pytest

import grok1
from grok1.engine.engine import Engine
from grok1.generate.completion import CompletionBuilder
from grok1.generate.request import Request, ScoredPart, Wishes
from grok1.server import app, asks
from grok1.server.errors import NoTokenError
from grok1.server.handle import Handle
from tests.server.helpers import events_of

V = 1280


BAD = [
    ({}, "there is no prompt", "prompt"),
    ({"prompt": ""}, "the prompt is empty", "prompt"),
    ({"prompt": []}, "the prompt is empty", "prompt"),
    ({"prompt": [[]]}, "the prompt is empty", "prompt"),
    ({"prompt": ["a", 1]}, "prompt must be one kind", "prompt"),
    ({"prompt": ["a"] * 129}, "at most 128 prompts, found 129", "prompt"),
    ({"prompt": "a", "max_tokens": -1}, "there is no -1 for no limit", "max_tokens"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens 0 needs echo", "max_tokens"),
    ({"prompt": "a", "max_tokens": True}, "got `bool`", "max_tokens"),
    ({"prompt": "a", "temperature": -1}, "temperature must be from 0", "temperature"),
    ({"prompt": "a", "top_p": 0}, "top_p must be above 0", "top_p"),
    ({"prompt": "a", "n": 0}, "n must be from 1 to 128", "n"),
    ({"prompt": "a", "n": 2, "best_of": 1}, "best_of must be from n", "best_of"),
    ({"prompt": "a", "best_of": 2, "stream": True}, "without stream", "best_of"),
    ({"prompt": "a", "logprobs": 21}, "logprobs must be from 0 to 20, found 21", "logprobs"),
    ({"prompt": "a", "stop": ""}, "stop must be texts of 1 to 256", "stop"),
    ({"prompt": "a", "stop": ["a"] * 17}, "at most 16", "stop"),
    ({"prompt": "a", "suffix": "b"}, "only continues", "suffix"),
    ({"prompt": "a", "stream_options": {}}, "stream_options needs stream", "stream_options"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias must be by token id", "logit_bias"),
    ({"prompt": "a", "logit_bias": {"5": 1, "05": 2}}, "one number for each", "logit_bias"),
    ({"prompt": "a", "logit_bias": {"1": 101}}, "from -100 to 100", "logit_bias"),
    ({"prompt": "a", "logit_bias": {"9" * 5000: 1}}, "from 0 to 1279, found 9999", "logit_bias"),
    ({"prompt": "a", "logit_bias": {"0" * 30 + "1280": 1}}, "found 1280", "logit_bias"),
    ({"prompt": "a", "skip_special_tokens": False}, "must be true", "skip_special_tokens"),
    ({"prompt": "a", "min_tokens": 17}, "min_tokens must be from 0 to 16", "min_tokens"),
    ({"prompt": "a", "repetition_penalty": 1e-40}, "must be from 0.01", "repetition_penalty"),
    ({"prompt": "a", "priority": 1}, "priority must be 0", "priority"),
    ({"prompt": "a", "use_beam_search": True}, "no beam search", "use_beam_search"),
    ({"prompt": "a", "allowed_token_ids": []}, "at least one token id", "allowed_token_ids"),
    ({"prompt": "a", "temprature": 1}, "the field 'temprature' is unknown", "temprature"),
    (
        {"prompt": [5] * 1024},
        "has 1024 tokens and the context holds 1024, of which one must stay free for a new token; "
        "shorten it by 1",
        "prompt",
    ),
    (
        {"prompt": [5] * 1027, "max_tokens": 0, "echo": True},
        "has 1027 tokens and the context holds 1024; shorten it by 3",
        "prompt",
    ),
    ({"prompt": "a", "stream": True, "prompt_logprobs": 1}, "without stream", "prompt_logprobs"),
    (
        {"prompt": "a", "allowed_token_ids": [2], "min_tokens": 1},
        "min_tokens forbids the ends, and allowed_token_ids all else",
        "min_tokens",
    ),
    (
        {"prompt": "a", "stop_token_ids": [*range(10, 18)], "min_tokens": 1},
        "fewer than 8 with min_tokens, found 9",
        "stop_token_ids",
    ),
    (
        {"prompt": "a", "logit_bias": {str(token): 1 for token in range(301)}},
        "logit_bias must be for at most 300 tokens, found 301",
        "logit_bias",
    ),
    # To come again, as 429 says, would not help.
    (
        {"prompt": ["a", "b"], "n": 128},
        "256 requests are asked for at once, of at most 68",
        "prompt",
    ),
    ({"prompt": "a", "n": 69}, "69 requests are asked for at once, of at most 68", "prompt"),
]


@pytest.mark.parametrize(("body", "words", "param"), BAD, ids=[words for _, words, _ in BAD])
def test_what_is_wrong_with_a_request_is_said(complete, body, words, param):
    error = complete(400, **body)["error"]
    assert words in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    if "context holds" in words:
        assert error["code"] == "context_length_exceeded"


def test_a_score_needs_two_tokens(complete):
    error = complete(400, path="/v1/score", prompt=[[5, 6], [5]])["error"]
    assert error["message"] == "a text of one token has nothing to score; give at least two"
    assert error["param"] == "prompt"


def test_a_model_without_a_tokenizer_takes_and_gives_ids(http, complete, server, monkeypatch):
    monkeypatch.setattr(server.model, "tokenizer", None)
    told = complete(prompt=[5, 6], max_tokens=2, echo=True, return_token_ids=True)["choices"][0]
    assert (told["text"], told["prompt_token_ids"], len(told["token_ids"])) == ("", [5, 6], 2)
    texts = {"messages": [{"role": "user", "content": "a"}]}
    for path, body, status in (
        ("/v1/completions", {"prompt": "a"}, 400),
        ("/v1/completions", {"prompt": [5], "stop": "a"}, 400),
        ("/v1/chat/completions", texts, 400),
        ("/v1/score", {"prompt": "ab"}, 400),
        ("/v1/trace", {"prompt": "ab"}, 400),
        ("/tokenize", {"prompt": "a"}, 404),
        ("/detokenize", {"tokens": [5]}, 404),
    ):
        error = complete(status, path=path, **body)["error"]
        assert "this model has no" in error["message"] or "this model has none" in error["message"]
    assert http.get("/tokenizer_info").status_code == 404


def test_no_token_outside_the_vocabulary_reaches_the_engine(http):
    for bad in ("-1", str(V), str(2**31), str(2**63), "1e400", "NaN", "true", '"1"', "1.5", "[1]"):
        for body in (
            f'{{"prompt": [{bad}]}}',
            f'{{"prompt": [[{bad}, 1]]}}',
            f'{{"prompt": "a", "stop_token_ids": [{bad}]}}',
            f'{{"prompt": "a", "allowed_token_ids": [{bad}]}}',
            f'{{"prompt": "a", "logit_bias": {{"{bad.strip(chr(34))}a": 1}}}}',
        ):
            if body == '{"prompt": ["1"]}' or (bad == "[1]" and body == '{"prompt": [[1]]}'):
                continue  # a text, a list of ids
            headers = {"content-type": "application/json"}
            answer = http.post("/v1/completions", content=body, headers=headers)
            assert answer.status_code == 400, (body, answer.text)
    body = {"tokens": [V]}
    assert http.post("/detokenize", json=body).status_code == 400
    assert (
        http.post("/v1/completions", json={"prompt": "a", "logit_bias": {str(V): 1}}).status_code
        == 400
    )


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/..%2f..%2fetc/passwd", 404),
    ],
)
def test_what_is_no_path_is_an_error(http, method, path, status):
    answer = http.request(method, path, json={})
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_without_a_token_is_told_why(http, complete, server, monkeypatch, stream):
    monkeypatch.setattr(asks, "_wishes", lambda *_: Wishes(repetition=1e-40))
    answer = http.post("/v1/completions", json={"prompt": "A", "stream": stream})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (500, "no_token")
    assert "the model's logits must be finite" in error["message"]
    assert answer.headers["x-should-retry"] == "false"
    request = Request(tokens=[5], max_tokens=2, wishes=Wishes(repetition=1e-40))
    handle = Handle(request, CompletionBuilder(None, max_tokens=2, limit_reason="length"))
    server.enqueue([handle])
    with pytest.raises(NoTokenError, match="logits must be finite"):
        handle.result(20)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/score"])
def test_a_prompt_that_cannot_be_scored_is_told_why(complete, monkeypatch, path):
    on_host = ScoredPart.on_host

    def damaged(part):
        found = on_host(part)
        return found._replace(logprobs=np.where(np.arange(len(found.logprobs)) == 1, np.nan, 0.0))

    monkeypatch.setattr(ScoredPart, "on_host", damaged)
    body = {"echo": True, "logprobs": 1, "max_tokens": 0} if "completions" in path else {}
    error = complete(500, path=path, prompt=[5, 6, 7, 8], **body)["error"]
    assert error["message"].startswith("token 2 of the prompt has no log-probability")
    assert error["code"] == "no_token"


def test_a_body_that_does_not_come_is_not_waited_for(http, monkeypatch):
    monkeypatch.setattr(app, "_BODY_SECONDS", 0.05)
    with socket.create_connection(("127.0.0.1", http.base_url.port)) as one:
        one.settimeout(20)
        one.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
            b'content-type: application/json\r\ncontent-length: 15\r\n\r\n{"prompt"'
        )
        answer = one.makefile("rb").readline()
    assert answer == b"HTTP/1.1 408 Request Timeout\r\n"


def test_what_nobody_foresaw_is_an_answer_like_the_others(http, monkeypatch, caplog):
    def failing(*_, **__):
        raise ZeroDivisionError("of ours")

    def count():
        line = 'grok1_http_requests_total{handler="/tokenize",status="500"}'
        text = http.get("/metrics").text
        return float(text.partition(line)[2].partition("\n")[0] or 0)

    before = count()
    monkeypatch.setattr(app, "encode_text", failing)
    with socket.create_connection(("127.0.0.1", http.base_url.port)) as one:
        one.settimeout(20)
        reader = one.makefile("rb")
        for _ in range(2):  # the connection is as good as before
            one.sendall(
                b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\nx-request-id: my-own\r\n"
                b'content-type: application/json\r\ncontent-length: 15\r\n\r\n{"prompt": "A"}'
            )
            assert reader.readline() == b"HTTP/1.1 500 Internal Server Error\r\n"
            head = dict(line.split(b": ", 1) for line in iter(reader.readline, b"\r\n"))
            assert head[b"x-request-id"] == b"my-own\r\n"
            error = json.loads(reader.read(int(head[b"content-length"])))["error"]
            assert error["message"].endswith("its log has the cause under my-own")
    assert count() == before + 2
    assert [record.name for record in caplog.records] == ["grok1.server"] * 2
    assert "ZeroDivisionError: of ours" in caplog.text


def test_a_position_that_was_not_generated_is_told(http, complete, server, monkeypatch):
    acting = (grok1.ScaleHeads(1, positions=(2, 7)),)
    monkeypatch.setattr(Engine, "interventions", property(lambda _: acting))
    message = (
        "ScaleHeads: nothing was changed at position 7, which the text did not reach: it ended by "
        "'stop' with 5 tokens run; give ignore_eos=True or fewer stops, or name all positions from "
        "one on as slice(10, None)"
    )
    body = {"prompt": [5, 6, 7, 8, 9], "max_tokens": 8, "n": 2, "allowed_token_ids": [77]}
    assert not any("warnings" in one for one in complete(**body)["choices"])
    for path, more in (("trace", {}), ("score", {}), ("completions", {"max_tokens": 2})):
        error = complete(400, path=f"/v1/{path}", prompt=body["prompt"], **more)["error"]
        assert error["message"].startswith("ScaleHeads: positions must be from 0 to ")
        assert error["param"] == "prompt"
    body["stop_token_ids"] = [77]
    assert [one["warnings"] for one in complete(**body)["choices"]] == [[message]] * 2
    parts = events_of(http.post("/v1/completions", json={**body, "stream": True}).text)
    told = [one.get("warnings") for part in parts for one in part["choices"]]
    assert [words for words in told if words is not None] == [[message]] * 2
    handle = server.submit(body["prompt"], max_new_tokens=8, allowed_tokens=[77], stop=[77])
    with pytest.warns(UserWarning, match="^ScaleHeads: nothing was changed at position 7"):
        assert handle.result(20).tokens == [77]
