"""One server on the toy for all tests, in Python and over HTTP."""

import threading
import time

import httpx
import pytest

from grok1.server.core import Server
from grok1.server.running import HttpOptions, Running

SIZES = {"max_slots": 4, "chunk": 16, "decode_rows": (), "capacity": 1024, "prefix_tokens": 1024}
"""Of every server here, so that all run the same programs."""


@pytest.fixture(scope="session")
def server(toy):
    with Server(toy, max_queue=64, **SIZES) as one:
        yield one


@pytest.fixture(scope="session")
def start():
    """Starts HTTP for a server; returns a client, and what runs."""
    running = []

    def begin(make, **options):
        one = Running(make, HttpOptions(port=0, name="toy", **options))
        thread = threading.Thread(target=one.run_all, daemon=True)
        thread.start()
        while one.port is None:
            assert thread.is_alive()
            time.sleep(0.01)
        client = httpx.Client(base_url=f"http://127.0.0.1:{one.port}", timeout=60)
        running.append((one, thread, client))
        return client, one, thread

    yield begin
    for one, thread, client in running:
        client.close()
        one.should_exit = True
        thread.join(20)


@pytest.fixture(scope="session")
def http(server, start):
    client, _, _ = start(lambda: server, chat_template="transcript")
    while client.get("/health").status_code != 200:
        time.sleep(0.05)
    return client


@pytest.fixture(scope="session")
def client(http):
    """OpenAI's own."""
    openai = pytest.importorskip("openai")  # what it imports in turn may be missing, too
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="any", max_retries=0) as one:
        yield one


@pytest.fixture
def complete(http):
    """Posts a completion; returns its JSON."""

    def ask(status=200, path="/v1/completions", **body):
        answer = http.post(path, json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    return ask
