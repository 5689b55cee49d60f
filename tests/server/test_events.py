"""Streams over HTTP: events that every reader takes, and how they end."""

import asyncio

from grok1.server.events import EventStream
from tests.server.helpers import events_of


def test_a_stream_is_events_that_every_reader_takes(http, server):
    line_end = "\u2028"
    with http.stream(
        "POST", "/v1/completions", json={"prompt": f"a{line_end}b", "echo": True, "stream": True}
    ) as answer:
        text = answer.read().decode()
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["x-accel-buffering"] == "no"
    assert line_end not in text
    assert events_of(text)[0]["choices"][0]["text"].startswith(f"a{line_end}b")
    # What only spells an escape stays as it is.
    for prompt in ("\x85 \u2029 \u2028", r"\x85", r"\\x85 \u2028 \u0085", r'"\x85"', "\\\x85"):
        body = {"prompt": prompt, "echo": True, "max_tokens": 0}
        text = http.post("/v1/completions", json={**body, "stream": True}).text
        assert not {"\x85", line_end, "\u2029"} & set(text)
        told = "".join(part["choices"][0]["text"] for part in events_of(text))
        whole = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
        assert told == whole == prompt
    body = {"prompt": ["a", "b"], "n": 2, "stream": True, "logprobs": 1, "max_tokens": 5,
            "ignore_eos": True, "return_token_ids": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True}}  # fmt: skip
    parts = events_of(http.post("/v1/completions", json=body).text)
    ended = [one["index"] for part in parts for one in part["choices"] if one["finish_reason"]]
    assert sorted(ended) == [0, 1, 2, 3]
    assert parts[-1]["usage"]["completion_tokens"] == 20
    assert sum(len(one["logprobs"]["tokens"]) for part in parts for one in part["choices"]) == 20
    assert all("usage" in part for part in parts)
    told = [one for part in parts for one in part["choices"]]
    assert sum(len(one["token_ids"]) for one in told) == 20
    assert sum("prompt_token_ids" in one for one in told) == 4


def test_a_stream_that_fails_for_no_known_reason_is_logged(caplog):
    async def events():
        raise ZeroDivisionError("of ours")
        yield

    async def stream() -> bytes:
        sent = []

        async def send(message):
            sent.append(message.get("body", b""))

        async def receive():
            await asyncio.sleep(60)

        await EventStream(None, events(), lambda: None)({"type": "http"}, receive, send)
        return b"".join(sent)

    assert b"the server has failed to answer" in asyncio.run(stream())
    assert "ZeroDivisionError: of ours" in caplog.text


def test_what_makes_events_ends_with_the_stream():
    ended = []

    async def events():
        try:
            yield None
            yield None
        finally:
            ended.append(True)

    async def stream():
        async def send(message):
            if message["type"] == "http.response.body":
                raise OSError("the client is gone")

        async def receive():
            await asyncio.sleep(60)

        rest = events()
        await EventStream(await anext(rest), rest, lambda: None)({"type": "http"}, receive, send)
        assert ended

    asyncio.run(stream())
