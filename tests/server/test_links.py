"""A server of several processes: the same answers, and no process that outlives another."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest

from grok1.engine.sampling import SamplingParams
from grok1.generate.request import Request, Wishes
from grok1.server.links import Connection, _packed, _unpacked
from tests.conftest import TOY
from tests.helpers import flags_with_devices, slow

pytestmark = pytest.mark.not_on_gpu("it starts processes with CPU devices of their own")

ROOT = pathlib.Path(__file__).parents[2]


def test_a_request_is_the_same_on_the_other_side():
    request = Request(
        tokens=[5, 6],
        max_tokens=7,
        seed=2**32 - 1,
        stream=3,
        sampling=SamplingParams(temperature=0.5, top_k=4),
        allowed=np.arange(13) % 3 == 0,
        ends=(2, 9),
        one_by_one=True,
        num_top=20,
        wishes=Wishes(biases={5: -1.5}, min_tokens=2),
        scores_prompt=True,
        salt=b"\xff",
    )
    found = _unpacked(json.loads(json.dumps(_packed(request))))
    for name, value in vars(request).items():
        np.testing.assert_array_equal(getattr(found, name), value, err_msg=name)


def test_messages_are_signed_and_in_order():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ours = socket.create_connection(listening.getsockname())
        theirs, _ = listening.accept()
    with ours, theirs:
        one, other = Connection(ours, b"key"), Connection(theirs, b"key")
        for number in range(3):
            one.send({"number": number})
            assert other.receive() == {"number": number}
        Connection(ours, b"key").send({"number": 3})  # as the first of its own
        with pytest.raises(OSError, match="is not signed"):
            other.receive()
        Connection(ours, b"other").send({})
        with pytest.raises(OSError, match="is not signed"):
            Connection(theirs, b"key").receive()
        ours.close()
        with pytest.raises(OSError, match="has ended"):
            other.receive()


def start(count: int, num_devices: int, port: int) -> list[subprocess.Popen]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environment = dict(
        os.environ,
        XLA_FLAGS=flags_with_devices(num_devices),
        PYTHONPATH=str(ROOT),
    )
    arguments = [
        "--checkpoint", str(TOY), "--name", "toy", "--port", str(port), "--max-slots", "2",
        "--capacity", "256", "--chunk", "16", "--mesh", f"1x{count * num_devices}",
        "--prefix-tokens", "32", "--host-prefix-tokens", "128",
        "--coordinator", coordinator, "--num-processes", str(count),
    ]  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-m", "grok1", "serve", *arguments, "--process-id", str(rank)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


@slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP])
def test_processes_answer_as_one_and_end_together(how, toy):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = start(2, 4, port)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            deadline = time.monotonic() + 300
            while True:
                assert time.monotonic() < deadline
                assert processes[0].poll() is None, processes[0].communicate()[1]
                try:
                    if client.get("/health").status_code == 200:
                        break
                except httpx.ConnectError:
                    pass
                time.sleep(0.2)
            body = {"prompt": "The answer", "max_tokens": 8, "temperature": 0}
            found = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
            expected = toy.generate("The answer", max_new_tokens=8, temperature=0)
            assert found == expected.text
            scored = client.post("/v1/score", json={"prompt": "The answer is"}).json()
            total = toy.score("The answer is").total_logprob
            assert scored["data"][0]["total_logprob"] == pytest.approx(total, abs=1e-3)
            if how == signal.SIGTERM:
                prompts = [[number] * 80 for number in (5, 6)]
                asked = [
                    client.post("/v1/completions", json={**body, "prompt": prompt}).json()
                    for prompt in (*prompts, *prompts)
                ]
                texts = [one["choices"][0]["text"] for one in asked]
                assert texts[:2] == texts[2:]
                cached = [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in asked]
                assert cached == [0, 0, 64, 64]
                tier = 'grok1_prefix_cache_tier_hits_total{tier="host"}'
                assert f"{tier} 0.0" not in client.get("/metrics").text
                processes[0].send_signal(how)
            else:
                body = {"prompt": "A", "max_tokens": 200, "ignore_eos": True, "stream": True}
                with client.stream("POST", "/v1/completions", json=body) as answer:
                    lines = answer.iter_lines()
                    next(lines)
                    processes[1].send_signal(how)
                    said = "\n".join(lines)
                assert '"error"' in said
        ended = [process.wait(60) for process in processes if process.poll() is None and not (
            how == signal.SIGSTOP and process is processes[1])]  # fmt: skip
        assert all(status == 0 for status in ended) == (how == signal.SIGTERM)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
