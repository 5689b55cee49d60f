"""Connections: who comes in, hangs up, does not read, or sends what is no HTTP."""

import asyncio
import concurrent.futures
import json
import os
import re
import socket
import threading
import time

import pytest

from grok1.files import CheckpointError
from grok1.server import gate, protocol, running
from grok1.study import tracing
from tests.server.helpers import LONG, PROMPTS, idle


def posted(body, path="/v1/completions") -> bytes:
    data = json.dumps(body).encode()
    kind = b"host: localhost\r\ncontent-type: application/json\r\n"
    head = b"POST %b HTTP/1.1\r\n" + kind + b"content-length: %d\r\n\r\n"
    return head % (path.encode(), len(data)) + data


def test_who_hangs_up_frees_their_slot(http, server):
    port = http.base_url.port

    def begin(**body):
        one = socket.create_connection(("127.0.0.1", port))
        one.sendall(posted({"prompt": "A", "max_tokens": 900, "ignore_eos": True, **body}))
        return one

    def until(condition):
        deadline = time.monotonic() + 10
        while not condition(server.load()):
            assert time.monotonic() < deadline, server.load()
            time.sleep(0.005)

    prefilling = {"prompt": [7] * 1000, "max_tokens": 20}
    scoring = {"prompt": [8] * 1000, "max_tokens": 0, "echo": True, "logprobs": 1}
    for body in ({}, {"stream": True}, {"n": 3}, prefilling, scoring):
        one = begin(**body)
        until(lambda load: load.num_running)
        one.close()
        until(lambda load: not load.num_running)
        idle(server)
    running = [server.submit("A", **LONG) for _ in range(4)]
    for body in ({}, {"stream": True}):
        one = begin(**body)
        until(lambda load: load.num_waiting)
        one.close()
        until(lambda load: not load.num_waiting)
    assert not any(handle.is_over for handle in running)
    for handle in running:
        handle.cancel()
    idle(server)


def test_traces_wait_for_their_turn_and_for_nobody_who_is_gone(start, server, monkeypatch):
    client, runs, _ = start(lambda: server)
    traced, may_end, trace = [], threading.Event(), tracing.trace

    def slow(engine, tokenizer, tokens, *more, **options):
        traced.append(list(tokens))
        assert may_end.wait(20)
        return trace(engine, tokenizer, tokens, *more, **options)

    monkeypatch.setattr(tracing, "trace", slow)
    waiting = []
    for number in range(17):
        one = socket.create_connection(("127.0.0.1", client.base_url.port))
        one.sendall(posted({"prompt": [5, number]}, "/v1/trace"))
        waiting.append(one)
        deadline = time.monotonic() + 20
        while runs._app._traces._num_waiting + len(traced) <= number:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    answer = client.post("/v1/trace", json={"prompt": [5, 99]})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "5")
    assert answer.json()["error"]["message"] == "16 traces wait and at most 16 may"
    # They hold no threads, which other requests may need.
    assert client.post("/tokenize", json={"prompt": "a"}).status_code == 200
    for one in waiting[:-1]:
        one.close()
    while runs._app._traces._num_waiting > 1:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert traced == [[5, 0]]
    may_end.set()
    with waiting[-1] as last:
        last.settimeout(20)
        assert last.recv(100).startswith(b"HTTP/1.1 200 OK")
    assert traced == [[5, 0], [5, 16]]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_does_not_read_is_cut_off(start, server, monkeypatch, caplog, stream):
    monkeypatch.setattr(protocol, "_READ_SECONDS", 0.2)
    client, runs, _ = start(lambda: server)
    loop = runs.servers[0].get_loop()
    body = {"prompt": "A" * 4000, "max_tokens": 4, "stream": stream, "ignore_eos": True, "n": 16,
            "echo": True, "logprobs": 20, "truncate_prompt_tokens": 900}  # fmt: skip
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        one.connect(("127.0.0.1", client.base_url.port))
        one.sendall(posted(body))
        deadline = time.monotonic() + 20
        while not server.load().num_running:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        # It keeps its end open, and nothing else.
        while runs.server_state.connections or len(asyncio.all_tasks(loop)) > 1:
            assert time.monotonic() < deadline, asyncio.all_tasks(loop)
            time.sleep(0.005)
        idle(server)
    assert not caplog.records


def test_a_client_that_reads_slowly_gets_all(start, server, monkeypatch):
    monkeypatch.setattr(protocol, "_READ_SECONDS", 0.2)
    client, _, _ = start(lambda: server)
    body = {"prompt": [7] * 900, "max_tokens": 0, "echo": True, "logprobs": 20, "n": 4}
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        one.connect(("127.0.0.1", client.base_url.port))
        one.sendall(posted(body))
        answer = one.recv(4096)
        began = time.monotonic()
        while b"\r\n\r\n" not in answer:
            answer += one.recv(4096)
        head, _, read = answer.partition(b"\r\n\r\n")
        size = int(re.search(rb"content-length: (\d+)", head)[1])
        left = size - len(read)
        while left:
            # A third of a second and more for what the server still holds.
            time.sleep(0.001)
            count = len(one.recv(min(left, size // 500)))
            assert count, left
            left -= count
    assert time.monotonic() - began > 2 * protocol._READ_SECONDS


def test_who_may_come_in(start, server, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# ours\nalpha\nbeta\n")
    client, _, _ = start(lambda: server, api_key="gamma", api_key_file=keys, max_body=1000)

    def status(key=None, path="/v1/models", **options):
        headers = {} if key is None else {"authorization": f"Bearer {key}".strip()}
        return client.get(path, headers={**headers, **options}).status_code

    while status(path="/health") != 200:
        time.sleep(0.01)
    assert [status(), status(""), status("x"), status("alpha"), status("gamma")] == [
        401, 401, 401, 200, 200,
    ]  # fmt: skip
    keys.write_text("\ufeffbeta and more\nlà\n", encoding="utf-8")
    in_bytes = [b"Bearer beta and more", "Bearer là".encode(), b"Bearer l\xe0"]
    assert [status("alpha"), *(status(authorization=key) for key in in_bytes)] == [
        401, 200, 200, 401,
    ]  # fmt: skip
    assert status("gamma", host="evil.example") == 421
    assert [status(path="/"), status(path="/metrics")] == [200, 200]
    # Without a redirection, which would leave TLS behind a proxy, and with the same keys.
    assert [status(path=f"{path}//") for path in ("", "/health", "/v1/models", "/metrics")] == [
        200, 200, 401, 200,
    ]  # fmt: skip
    assert status("gamma", path="/v1/models/") == 200
    answer = client.post("/v1/completions", content="{}", headers={"authorization": "Bearer gamma"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (415, "invalid_request_error")
    own = {"authorization": "Bearer gamma", "x-request-id": "mine"}
    answer = client.post("/v1/completions", json={"prompt": "a" * 2000}, headers=own)
    assert (answer.status_code, answer.headers["x-request-id"]) == (413, "mine")

    def chunks():
        yield b'{"prompt": "'
        yield b"a" * 2000

    headers = {**own, "content-type": "application/json"}
    assert client.post("/v1/completions", content=chunks(), headers=headers).status_code == 413
    assert (
        "access-control-allow-origin"
        not in client.get("/health", headers={"origin": "http://a"}).headers
    )
    for options, words in (
        ({"host": "0.0.0.0"}, "is reached by other machines, and there is no key"),
        ({"api_key": [""]}, "api_key must not be empty"),
        ({"port": 70000}, "port must be from 0 to 65535"),
        ({"max_body": 0}, "max_body must be 1 or more, found 0"),
        ({"max_tokens": 0}, "max_tokens must be 1 or more, found 0"),
        ({"request_timeout": 0}, "request_timeout must be above 0 seconds"),
        ({"drain": float("nan")}, "drain must be 0 seconds or more, found nan"),
        ({"name": ""}, "^name must not be empty"),
        ({"metrics_key": ""}, "^metrics_key must not be empty"),
        ({"api_key": ["a", "b "]}, "^api_key must not begin or end with a space"),
        ({"metrics_key": " "}, "^metrics_key must not begin or end with a space"),
        ({"cors": ["http://a", "b.example"]}, "cors must be .*, found 'b.example'"),
        ({"cors": "http://a/"}, "cors must be .*, found 'http://a/'"),
        ({"cors": ""}, "cors must be .*, found ''"),
        ({"allowed_host": ["http://a"]}, "allowed_host must be a name .*, found 'http://a'"),
        (
            {"allowed_host": "a", "host": "0.0.0.0", "api_key": "k"},
            "host 0.0.0.0 is reached by other machines, and under any name; allowed_host adds",
        ),
        ({"no_auth": True, "api_key": "k"}, "no_auth is for a server that needs no key, and"),
        ({"allowed_host": ""}, "allowed_host must be a name .*, found ''"),
    ):
        with pytest.raises(ValueError, match=words):
            running.HttpOptions(**options).app()


@pytest.mark.parametrize("way", ["moved away", "emptied", "a directory"])
def test_keys_are_taken_again_when_their_file_is_back_as_it_was(tmp_path, capsys, way):
    path, away = tmp_path / "keys", tmp_path / "away"
    path.write_text("\n \n")
    with pytest.raises(ValueError, match=r"keys: holds no key; write one a line$"):
        gate.Keys(file=path)
    assert capsys.readouterr().err == ""
    path.write_text("alpha\nbeta\n")
    keys = gate.Keys(file=path)
    assert keys.has(b"alpha")
    assert capsys.readouterr().err == ""
    path.rename(away)
    if way == "emptied":
        path.touch()
        said = f"grok1: {path}: read again, keys: 0\n"
    elif way == "a directory":
        path.mkdir()
        said = f"grok1: {path}: not a regular file but a directory; move it away; none of its keys"
    else:
        said = f"grok1: {path}: cannot be read: No such file or directory; check the path"
    for _ in range(3):
        assert not keys.has(b"alpha")
    err = capsys.readouterr().err
    assert err.startswith(said)
    assert len(err.splitlines()) == 1
    if way == "a directory":
        path.rmdir()
    away.rename(path)
    for _ in range(3):
        assert keys.has(b"alpha")
    assert capsys.readouterr().err == f"grok1: {path}: read again, keys: 2\n"


def test_one_host_and_one_origin_need_no_list(start, server):
    client, _, _ = start(lambda: server, cors="http://a", allowed_host="grok.example")
    headers = {"origin": "http://a", "host": "grok.example"}
    answer = client.get("/version", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "http://a"
    assert client.get("/version", headers={"host": "g"}).status_code == 421
    # As OpenAI's own client in a page asks, and reads what it is told.
    asked = "authorization,content-type,x-stainless-os,x-stainless-retry-count"
    preflight = {**headers, "access-control-request-headers": asked}
    preflight["access-control-request-method"] = "POST"
    answer = client.options("/v1/completions", headers=preflight)
    assert (answer.status_code, answer.headers["access-control-allow-headers"]) == (200, asked)
    answer = client.post("/v1/completions", json={}, headers=headers)
    assert answer.status_code == 400
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    preflight["origin"] = "http://b"
    assert client.options("/v1/completions", headers=preflight).status_code == 400


def test_a_request_that_comes_slowly_is_given_up(start, server, monkeypatch):
    monkeypatch.setattr(protocol, "_HEADER_SECONDS", 0.2)
    client, _, _ = start(lambda: server)
    with socket.create_connection(("127.0.0.1", client.base_url.port)) as one:
        one.sendall(b"POST /v1/completions HTTP/1.1\r\nhost:")
        one.settimeout(10)
        assert one.recv(100) == b""


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\ncontent-length: b\r\n\r\n",
    ],
    ids=["TLS", "no length"],
)
def test_what_is_no_http_gets_an_error_like_the_others_and_is_not_logged(http, sent, caplog):
    with socket.create_connection(("127.0.0.1", http.base_url.port)) as one:
        one.settimeout(10)
        one.sendall(sent)
        answer = b"".join(iter(lambda: one.recv(1000), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n")
    assert f"content-length: {len(body)}\r\n".encode() in head
    assert json.loads(body)["error"]["code"] == "invalid_http"
    assert not caplog.records


@pytest.mark.parametrize("protocol", ["websocket", "h2c"])
def test_a_wish_for_another_protocol_is_not_logged(http, protocol, caplog):
    headers = {"connection": "Upgrade", "upgrade": protocol}
    assert http.get("/health", headers=headers).status_code == 200
    assert not caplog.records


def test_a_full_queue_says_when_to_come_again(http, server):
    handles = [server.submit("A", **LONG) for _ in range(68)]
    answer = http.post("/v1/completions", json={"prompt": "A"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
    assert int(answer.headers["retry-after"]) >= 1
    for handle in handles:
        handle.cancel()
    idle(server)


@pytest.mark.parametrize("kind", ["missing", "directory", "pipe"])
def test_a_file_of_keys_that_is_none_is_said_by_name(tmp_path, kind):
    path = tmp_path / "keys"
    if kind == "directory":
        path.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(CheckpointError, match=r"keys: "):
        running.HttpOptions(api_key_file=path).app()


def test_clients_at_once(http, server):
    """More than there are slots, with options of all kinds; each as alone."""
    bodies = [
        {
            "prompt": PROMPTS[n % 8],
            "max_tokens": 4 + n % 7,
            "temperature": [0, 1, 0.5][n % 3],
            "seed": n,
            "stop": ["\n"] if n % 4 == 0 else None,
            "logprobs": 2 if n % 5 == 0 else None,
            "frequency_penalty": 1.0 if n % 6 == 1 else 0,
        }
        for n in range(24)
    ]

    def ask(body):
        return http.post("/v1/completions", json=body).json()["choices"]

    alone = [ask(body) for body in bodies]
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        together = list(pool.map(ask, bodies))
    for one, other in zip(alone, together, strict=True):
        assert one[0]["text"] == other[0]["text"]
        if one[0]["logprobs"]:
            assert one[0]["logprobs"]["token_logprobs"] == pytest.approx(
                other[0]["logprobs"]["token_logprobs"], abs=1e-5
            )
    idle(server)
