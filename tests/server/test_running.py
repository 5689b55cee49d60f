"""The process that serves, from its start to its end."""

import concurrent.futures
import io
import socket
import sys
import threading
import time

import httpx
import pytest

from grok1.server import running
from grok1.server.core import Server
from grok1.server.errors import UnavailableError
from tests.server.conftest import SIZES


def test_the_end_does_not_wait_for_a_client_that_does_not_read(start, toy, monkeypatch, caplog):
    monkeypatch.setattr(running, "_END_SECONDS", 0.5)
    client, one, thread = start(lambda: Server(toy, **SIZES))
    while client.get("/health").status_code != 200:
        time.sleep(0.01)
    with socket.socket() as unread:
        unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        unread.connect(("127.0.0.1", client.base_url.port))
        unread.sendall(b"GET /metrics HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n" * 2000)
        deadline = time.monotonic() + 20
        while not any(each.flow.write_paused for each in list(one.server_state.connections)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        began = time.monotonic()
        one.should_exit = True
        thread.join(20)
    assert not thread.is_alive()
    assert time.monotonic() - began < 4
    assert not caplog.records


def test_states_and_the_end(start, toy, monkeypatch):
    may_load = threading.Event()

    def make():
        may_load.wait(30)
        return Server(toy, **SIZES)

    client, one, thread = start(make, drain=20.0)
    answer = client.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "loading")
    answer = client.post("/v1/completions", json={"prompt": "A"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    may_load.set()
    while client.get("/health").status_code != 200:
        time.sleep(0.01)
    server = one._app.server
    monkeypatch.setattr(server, "_step_timeout", 0.0)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        body = {"prompt": "A", "max_tokens": 400, "ignore_eos": True}
        asked = [pool.submit(client.post, "/v1/completions", json=body) for _ in range(3)]
        while server.load().num_running < 3:
            assert not any(each.done() for each in asked)
            time.sleep(0.005)
        assert any(client.get("/health").json()["status"] == "stuck" for _ in range(50))
        # What read its messages, as tee does, may have ended at the same key.
        unread = io.StringIO()
        unread.close()
        monkeypatch.setattr(sys, "stderr", unread)
        one.handle_exit(15, None)
        answer = client.get("/health")
        assert (answer.status_code, answer.json()["status"]) in [(503, "draining"), (503, "stuck")]
        assert client.post("/v1/completions", json=body).status_code == 503
        assert [each.result(20).status_code for each in asked] == [200] * 3
    thread.join(20)
    assert not thread.is_alive()


def test_a_second_signal_waits_for_nobody(start, toy, caplog):
    server = Server(toy, **SIZES)
    client, one, thread = start(lambda: server, drain=float("inf"))
    while client.get("/health").status_code != 200:
        time.sleep(0.01)
    body = {"prompt": "A", "max_tokens": 900, "ignore_eos": True}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        asked = [
            pool.submit(client.post, "/v1/completions", json={**body, "stream": stream})
            for stream in (True, False)
        ]
        while server.load().num_running < 2:
            assert not any(each.done() for each in asked)
            time.sleep(0.005)
        began = time.monotonic()
        one.handle_exit(15, None)
        one.handle_exit(15, None)
        thread.join(20)
        assert time.monotonic() - began < 3
        for each in asked:
            with pytest.raises(httpx.HTTPError):
                each.result(20)
    assert server.state == "closed"
    assert not caplog.records


def test_a_model_that_cannot_be_loaded_ends_the_program(capsys):
    def make():
        raise FileNotFoundError("nowhere: there is no such directory")

    with pytest.raises(FileNotFoundError, match="nowhere"):
        running.run(make, running.HttpOptions(port=0))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        loads = []
        with pytest.raises(OSError, match=rf"^127.0.0.1:{port}: .*in use; give another port"):
            running.run(lambda: loads.append(1), running.HttpOptions(port=port))
        assert not loads
    assert not capsys.readouterr().err.count("in use")


def test_a_model_that_cannot_go_on_ends_the_program(toy, monkeypatch):
    servers, answers = [], []

    def make():
        servers.append(Server(toy, **SIZES))
        return servers[-1]

    one = running.Running(make, running.HttpOptions(port=0))

    def ask():
        while not servers or servers[0].state in ("loading", "compiling"):
            time.sleep(0.01)

        def failing():
            if servers[0]._desk.num_open:
                servers[0]._replica.scheduler._forget()
                raise RuntimeError("for good")
            return []

        monkeypatch.setattr(servers[0]._replica.scheduler, "step", failing)
        url = f"http://127.0.0.1:{one.port}/v1/completions"
        answers.append(httpx.post(url, json={"prompt": "A"}).status_code)

    asking = threading.Thread(target=ask)
    asking.start()
    with pytest.raises(UnavailableError, match="3 steps failed, and no request was"):
        one.run_all()
    asking.join(20)
    assert answers == [503]  # before the end


def test_a_signal_before_it_is_ready_ends_it_at_once(monkeypatch):
    statuses, may_load = [], threading.Event()
    monkeypatch.setattr(running, "do_not_wait", statuses.append)

    def interrupt(one, number):
        while one.port is None:
            time.sleep(0.01)
        one.handle_exit(number, None)

    for number, ending in ((2, KeyboardInterrupt), (15, SystemExit)):
        one = running.Running(may_load.wait, running.HttpOptions(port=0))
        threading.Thread(target=interrupt, args=(one, number)).start()
        with pytest.raises(ending):
            one.run_all()
    assert statuses == [130, 143]
    may_load.set()
