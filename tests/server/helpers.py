"""What several tests of the server need."""

import json
import time

from grok1.server.core import Server

PROMPTS = [
    "The answer",
    "Once upon a time",
    "def f(x):",
    "A" * 60,
    "import os\n",
    "x = 1",
    "It",
    "1 2 3",
]
LONG = {"max_new_tokens": 900, "ignore_eos": True}


def idle(server: Server) -> None:
    """Waits until no request is left, and sees that no slot is lost."""
    deadline = time.monotonic() + 20
    while (load := server.load()).num_running or load.num_waiting or server._replica._requests:
        assert time.monotonic() < deadline, load
        time.sleep(0.01)
    assert not server._desk.num_open


def events_of(text: str) -> list:
    lines = [line for line in text.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
