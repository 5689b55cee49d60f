"""A server in Python: each request gets what it gets alone, and nothing that fails takes others."""

import asyncio
import dataclasses
import itertools
import math
import random
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import pytest

import grok1
from grok1.engine import compilation
from grok1.generate.completion import CompletionBuilder
from grok1.generate.prefix import PrefixStore
from grok1.generate.request import Request
from grok1.machine import background
from grok1.server import warmup
from grok1.server.core import Server
from grok1.server.errors import (
    CancelledError,
    DeadlineError,
    QueueFullError,
    SlowReaderError,
    StepError,
    UnavailableError,
)
from grok1.server.handle import Handle
from grok1.server.replica import Sizes
from tests.server.conftest import SIZES
from tests.server.helpers import LONG, PROMPTS, idle


def options_of(number: int) -> dict:
    return {
        "max_new_tokens": 6 + number % 9,
        "temperature": [0, 0.8, 1.3][number % 3],
        "top_p": 0.9 if number % 2 else 1.0,
        "seed": number,
        "stop": ["e ", "\n\n"] if number % 5 == 0 else None,
        "logprobs": 3 if number % 4 == 0 else None,
        "allowed_tokens": range(300) if number % 7 == 3 else None,
    }


def test_an_answer_is_that_of_generate(server, toy):
    options = {"max_new_tokens": 12, "temperature": 0.8}
    expected = toy.generate(PROMPTS, seed=list(range(8)), **options)
    handles = [server.submit(p, seed=n, **options) for n, p in enumerate(PROMPTS)]
    for handle, one in zip(handles, expected, strict=True):
        found = handle.result(60)
        assert (found.text, found.tokens, found.stop_reason) == (
            one.text,
            one.tokens,
            one.stop_reason,
        )
        assert found.num_prompt_tokens == one.num_prompt_tokens


def test_answers_do_not_depend_on_who_comes_and_goes(server):
    count = 32
    alone = [server.submit(PROMPTS[n % 8], **options_of(n)).result(60) for n in range(count)]
    found, errors = {}, []

    def ask(numbers):
        try:
            for number in numbers:
                if number % 6 == 5:
                    victim = server.submit(PROMPTS[0], **LONG)
                    threading.Timer(random.random() / 20, victim.cancel).start()
                handle = server.submit(PROMPTS[number % 8], **options_of(number))
                text = "".join(handle)
                found[number] = handle.result()
                assert text == found[number].text
        except Exception as error:
            errors.append(error)

    order = random.Random(0).sample(range(count), count)
    threads = [threading.Thread(target=ask, args=(order[n::8],)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for number in range(count):
        one, other = alone[number], found[number]
        assert (one.tokens, one.text, one.stop_match) == (
            other.tokens,
            other.text,
            other.stop_match,
        )
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    idle(server)


def test_requests_in_asyncio(server):
    async def main():
        whole = server.submit(PROMPTS[0], max_new_tokens=8, temperature=0)
        streamed = server.submit(PROMPTS[0], max_new_tokens=8, temperature=0)
        text = [piece async for piece in streamed]
        assert "".join(text) == (await whole).text
        given_up = asyncio.ensure_future(server.submit(PROMPTS[1], **LONG).wait())
        await asyncio.sleep(0.05)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        handle = server.submit(PROMPTS[1], **LONG)
        handle.cancel()
        with pytest.raises(CancelledError, match="was cancelled"):
            await handle

    asyncio.run(main())
    # What one loop has begun another one ends.
    handle = server.submit(PROMPTS[0], max_new_tokens=300, ignore_eos=True)

    async def begin():
        async for _ in handle:
            return

    asyncio.run(begin())
    assert len(asyncio.run(asyncio.wait_for(handle.wait(), 20)).tokens) == 300
    idle(server)


def test_a_deadline_ends_what_waits_and_what_runs(server):
    expected = server.submit(PROMPTS[2], max_new_tokens=9, temperature=0).result().text
    running = [server.submit("A", timeout=0.3, **LONG) for _ in range(4)]
    waiting = server.submit("A", timeout=0.1, **LONG)
    for bad in NO_SECONDS:
        with pytest.raises(TypeError, match=r"^timeout must be a number of seconds"):
            waiting.result(bad)
    behind = server.submit(PROMPTS[2], max_new_tokens=9, temperature=0)
    for handle in (waiting, *running):
        with pytest.raises(DeadlineError, match=r"was not over after its 0\.[13] s"):
            handle.result(20)
    assert not waiting.times.admitted
    assert behind.result(20).text == expected
    idle(server)


def test_the_cancel_of_one_that_waits_leaves_the_others(server):
    running = [server.submit("A", max_new_tokens=60, ignore_eos=True) for _ in range(4)]
    waiting = [server.submit(p, max_new_tokens=5, temperature=0) for p in PROMPTS]
    waiting[1].cancel()
    with pytest.raises(CancelledError):
        waiting[1].result(20)
    for number in (0, 2, 3, 4, 5, 6, 7):
        again = server.submit(PROMPTS[number], max_new_tokens=5, temperature=0)
        assert waiting[number].result(20).tokens == again.result(20).tokens
    assert all(len(handle.result(20).tokens) == 60 for handle in running)
    idle(server)


def test_the_queue_is_bounded(server):
    handles = [server.submit("A", **LONG) for _ in range(64)]
    with pytest.raises(QueueFullError, match=r"requests wait and at most 64 may; 9 more") as caught:
        server.enqueue([handles[0]] * 9)
    assert 1 <= caught.value.retry_after <= 60
    for handle in handles:
        handle.cancel()
    idle(server)


NO_SECONDS = ("5", float("nan"), True, [1])


def test_what_no_request_may_ask(server, toy):
    for options, words in (
        ({"logprobs": 21}, "logprobs must be at most 20 here, found 21"),
        ({"logits_processor": lambda *_: 0}, "takes no logits_processor"),
        ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
        ({"max_new_token": 1}, "did you mean 'max_new_tokens'"),
        ({"prompt": ["a", "b"]}, "found a sequence of texts"),
        *(({"timeout": bad}, "^timeout must be a number of seconds") for bad in NO_SECONDS),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            server.submit(**{"prompt": "A", **options})
    for options, words in (
        ({"max_slots": 0}, "max_slots must be 1 or more"),
        ({"capacity": 5000}, "capacity must be from 2 to the context of 1024"),
        ({"chunk": 17}, "chunk must be one of 16, 64, 256 and 1024"),
        ({"max_stall": 0}, "max_stall must be above 0"),
        ({"max_stall": 0.1, "chunk": 64}, "chunk=64 and max_stall=0.1, but pauses are as long"),
        ({"max_queue": 0}, "max_queue must be 1 or more"),
        ({"prefix_tokens": -1}, "prefix_tokens must be 0"),
        ({"max_slots": 10**7}, "10000000 slots of 1024 tokens and .* GB left; give a smaller max_"),
        ({"max_slots": 1, "prefix_tokens": 10**11}, "1 slots of 1024 .* left; give a smaller max_"),
        ({"host_prefix_tokens": -1}, "host_prefix_tokens must be 0"),
        ({"host_prefix_tokens": 9, "prefix_tokens": 0}, "9 and prefix_tokens 0.* some of both"),
    ):
        with pytest.raises(ValueError, match=words):
            Server(toy, **options)


def test_prompts_move_to_the_host_and_back(toy, server, monkeypatch):
    one = Server(toy, **{**SIZES, "prefix_tokens": 32}, host_prefix_tokens=160)
    long = [[number] * 100 for number in (305, 306)]
    options = {"max_new_tokens": 4, "logprobs": 2, "temperature": 0}
    with one:
        assert one.sizes.host_prefix_tokens == 160
        assert one.load().prefix_tiers == {"device": (2, 0, 0), "host": (10, 0, 0)}

        def compiled(self, *_):
            raise AssertionError("a program was not compiled before")

        with monkeypatch.context() as patch:
            patch.setattr(compilation.Program, "_compiled", compiled)
            found = [one.submit(prompt, **options).result(60) for prompt in (*long, *long)]
        load = one.load()
    expected = [server.submit(prompt, **options).result(60) for prompt in long]
    for answer, other in zip(found, [*expected, *expected], strict=True):
        assert (answer.tokens, answer.logprobs) == (other.tokens, other.logprobs)
    assert load.prefix_found == sum(tier.num_found for tier in load.prefix_tiers.values()) > 0
    assert load.prefix_tiers["host"].num_kept == 10
    assert load.prefix_tiers["host"].num_found > 0


def test_a_host_without_memory_makes_a_smaller_server(toy, monkeypatch, capsys):
    monkeypatch.setattr(PrefixStore, "reserve", lambda self: 3)
    with Server(toy, **SIZES, host_prefix_tokens=160) as one:
        assert one.sizes.host_prefix_tokens == 48
        assert one.load().prefix_tiers["host"].num_blocks == 3
        one.submit("A", max_new_tokens=1).result(60)
    assert (
        "48 tokens of prompts are kept in the host's memory instead of 160"
        in capsys.readouterr().err
    )


@pytest.fixture
def own(toy):
    """A server that a test may break."""
    with Server(toy, **SIZES) as one:
        yield one


def test_a_failed_step_fails_its_requests_alone(own, monkeypatch, caplog):
    scheduler = own._replica.scheduler
    step, fails = scheduler.step, threading.Event()

    def failing():
        if fails.is_set() and scheduler.num_running:
            fails.clear()
            scheduler._forget()
            raise RuntimeError("the device is on fire")
        return step()

    monkeypatch.setattr(scheduler, "step", failing)
    running = [own.submit("A", **LONG) for _ in range(4)]
    waiting = own.submit(PROMPTS[0], max_new_tokens=5, temperature=0)
    while not running[3].times.first:
        time.sleep(0.005)
    fails.set()
    for handle in running:
        with pytest.raises(StepError, match="server's log has the cause under") as caught:
            handle.result(20)
        assert caught.value.reference in caplog.text
    assert "the device is on fire" in caplog.text
    assert len(waiting.result(20).tokens) == 5
    idle(own)


def test_a_server_that_cannot_go_on_says_so(own, monkeypatch):
    def failing():
        if own._desk.num_open:
            own._replica.scheduler._forget()
            raise RuntimeError("for good")
        return []

    monkeypatch.setattr(own._replica.scheduler, "step", failing)
    for _ in range(3):
        with pytest.raises((StepError, UnavailableError)):
            own.submit("A").result(20)
    own._thread.join(20)
    assert own.state == "dead"
    with pytest.raises(UnavailableError, match="the server is dead and takes no requests"):
        own.submit("A")


@pytest.mark.parametrize("num_good", [0, 1])
def test_requests_that_fail_one_by_one_are_steps_in_a_row(own, monkeypatch, num_good):
    step, is_failing = own._replica.scheduler.step, True

    def failing():
        if is_failing and own._desk.num_open:
            drawn = step()
            if not drawn or not own._desk._handles[drawn[0][0]].handle.times.first:
                return drawn  # parts of the prompt and the first token, which go well
            own._replica.scheduler._forget()
            raise RuntimeError("for good")
        return step()

    monkeypatch.setattr(own._replica.scheduler, "step", failing)
    for number in range(4):
        is_failing = not (number == 2 and num_good)
        try:
            own.submit([881] * 40, max_new_tokens=30, ignore_eos=True).result(20)
        except (StepError, UnavailableError):
            assert is_failing
        if number < 2 or num_good:
            idle(own)  # by a turn with nothing in it but the end of the request
    if num_good:
        assert own.state == "ready"
        return
    own._thread.join(20)
    assert own.state == "dead"


def test_a_server_that_cannot_start_says_why(toy, monkeypatch):
    def failing(*_, **__):
        raise MemoryError("no room for 4 slots")

    monkeypatch.setattr(warmup, "prepared", failing)
    one = Server(toy, **SIZES)
    with pytest.raises(UnavailableError, match=r"^the server cannot start: no room for") as caught:
        one.start()
    assert isinstance(caught.value.__cause__, MemoryError)
    assert one.state == "dead"
    one.close()


def test_who_reads_nothing_of_a_stream_is_cancelled(server, toy):
    builder = CompletionBuilder(toy.tokenizer, max_tokens=900, limit_reason="length")
    handle = Handle(Request(tokens=[5], max_tokens=900), builder, most_pending=8)
    server.enqueue([handle])
    with pytest.raises(SlowReaderError, match=r"^9 tokens wait to be read; the request was cancel"):
        handle.result(20)
    idle(server)


def test_a_prompt_has_to_leave_room_in_its_slot(server, monkeypatch):
    monkeypatch.setattr(server, "sizes", dataclasses.replace(server.sizes, capacity=4))
    server.submit([5, 6, 7], max_new_tokens=1).result(20)
    with pytest.raises(ValueError, match=r"has 4 tokens and a slot holds 4, .* the prompt by 1$"):
        server.submit([5, 6, 7, 8])


def test_to_wait_for_a_result_ends_no_request(server):
    handle = server.submit("A", **LONG)
    with pytest.raises(TimeoutError, match=r"^the request is not over after 0.01 s; it goes on$"):
        handle.result(0.01)
    assert not handle.is_over
    handle.cancel()
    idle(server)


def test_a_closed_server_lets_its_requests_end_or_ends_them(toy):
    one = Server(toy, **SIZES)
    with pytest.raises(UnavailableError, match=r"has not been started: call start\(\), or use it"):
        one.submit("A")
    one.start()
    ends = one.submit("A", max_new_tokens=40, ignore_eos=True)
    never = one.submit("A", **LONG)
    ends.result(math.inf)
    one.close(drain=0.05)
    with pytest.raises(UnavailableError, match="was closed"):
        never.result(20)
    for act in (one.start, lambda: one.submit("A")):
        with pytest.raises(UnavailableError, match="closed"):
            act()


@pytest.mark.parametrize("seconds", [math.inf, 1e300])
def test_a_server_closes_however_long_its_requests_may_take(toy, seconds):
    one = Server(toy, **SIZES)
    with one:
        ends = one.submit("A", max_new_tokens=40, ignore_eos=True)
        one.close(drain=seconds)
        assert len(ends.result(20).tokens) == 40


def test_positions_that_a_request_cannot_reach_are_refused(toy):
    one = Server(toy.intervene(grok1.ScaleHeads(1, positions=8)), **SIZES)
    message = (
        "^ScaleHeads: positions must be from 0 to 7, since the text has 5 tokens and at most 3 "
    )
    with pytest.raises(ValueError, match=message):
        one.submit([5, 6, 7, 8, 9], max_new_tokens=4)
    with pytest.raises(UnavailableError, match="has not been started"):
        one.submit([5, 6, 7, 8, 9], max_new_tokens=5)


def test_a_server_that_is_closed_compiles_no_more(toy, monkeypatch):
    asked, usual = [], warmup._requests

    def requests(*sizes):
        for one in usual(*sizes):
            asked.append(one)
            server.leave()
            yield one

    monkeypatch.setattr(warmup, "_requests", requests)
    server = Server(toy, **SIZES)
    server.start()
    server.close()
    assert (server.state, server.error, len(asked)) == ("closed", None, 1)


def test_a_turn_runs_a_chunk_and_a_step(server, monkeypatch):
    replica = server._replica
    first = server.submit("A", **LONG)
    while not first.times.first:
        time.sleep(0.005)
    prefills = []
    run = replica.scheduler._prefill.run

    def counted(state, prefilling, slots, num_decoding):
        prefills.append(len(first._pieces))
        return run(state, prefilling, slots, num_decoding)

    monkeypatch.setattr(replica.scheduler._prefill, "run", counted)
    long = server.submit([5] * 400 + [7], max_new_tokens=1, temperature=0)
    second = server.submit([6] * 20, max_new_tokens=1, temperature=0)
    second.result(20)
    assert not long.is_over, "a short prompt waits for a long one"
    long.result(20)
    # A token of the one that decodes between any two chunks.
    assert len(prefills) >= 25
    assert all(later > earlier for earlier, later in itertools.pairwise(prefills[2:]))
    first.cancel()
    idle(server)


class State(NamedTuple):
    cache: "State | None" = None
    length: object = None


@pytest.mark.parametrize(
    ("seconds_a_token", "max_stall", "expected"),
    [
        (1e-5, 0.5, (1024, 1024)),
        (0.001, 0.5, (256, 300)),
        (0.005, 0.5, (16, 60)),
        (0.004, 1.0, (64, 150)),
        (1.0, 0.5, (16, 16)),
    ],
)
def test_a_chunk_is_as_long_as_the_pause_allows(
    seconds_a_token, max_stall, expected, toy, monkeypatch
):
    now, filled = [0.0], []
    monkeypatch.setattr(warmup.time, "perf_counter", lambda: now[0])

    class Engine:
        mesh = toy.engine.mesh

        def new_state(self, tokens):
            return State(cache=State())

        def prefill(self, state, num_valid, chunk, slots):
            filled.append(int(state.cache.length[0]) + chunk)
            now[0] += chunk * seconds_a_token
            return state

    sizes = Sizes(4, 4096, (), 0, 0)
    assert warmup.chunks_for(Engine(), sizes, max_stall) == pytest.approx(expected, abs=1)
    assert set(filled) == {4096}, "not where it takes longest"


def test_a_server_that_nobody_closes_ends_with_python(server):
    # In the middle of a step, in C++, its thread would take the process with it.
    ends = {thread: end for thread, end in background._endless}
    assert ends[server._thread] == server._end


@pytest.mark.not_on_gpu("it starts a process, of which no device is asked")
def test_what_needs_more_packages_says_which(toy):
    program = (
        "import sys\n"
        "sys.modules['uvicorn'] = None\n"
        "from grok1 import *\n"
        "try:\n"
        "    serve(None)\n"
        "except ImportError as error:\n"
        "    print(error)\n"
        "from grok1.command.main import main\n"
        "main(['serve', '--checkpoint', 'toy'])\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    words = "needs the package uvicorn: pip install 'grok1[serve]'"
    assert found.stdout == f"grok1.serve {words}\n"
    assert f"grok1: grok1 serve {words}" in found.stderr
    with pytest.raises(TypeError, match="did you mean 'port'"):
        grok1.serve(toy, http={"prot": 1})
