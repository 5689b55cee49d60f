"""A server under load: clients that ask side by side or one after the other, and pauses."""

import contextlib
import http.client
import itertools
import json
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import grok1
from benchmarks.machine import BenchmarkError
from benchmarks.workload import random_prompts
from grok1.engine.sampling import SamplingParams
from grok1.generate.request import Request
from grok1.server.replica import Plan, Replica

_SECONDS = 600.0  # that an answer may take
_SMALL = 8  # tokens of a prompt that comes in between


def tokens_per_second(
    port: int, prompts: Sequence[Sequence[int]], num_tokens: int, clients: int
) -> float:
    """Generated tokens per second of requests to `/v1/completions`.

    Args:
      port: Of a server on this machine.
      prompts: Token ids, a request each.
      num_tokens: That each gets.
      clients: How many ask at the same time, each for one after the other.

    Raises:
      BenchmarkError: If an answer is none, or has another number of tokens.
    """
    turns, errors = iter(list(prompts)), []
    lock = threading.Lock()

    def ask_all():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_SECONDS)
        try:
            while not errors:
                with lock:
                    prompt = next(turns, None)
                if prompt is None:
                    break
                _ask(connection, prompt, num_tokens)
        except (OSError, http.client.HTTPException, BenchmarkError) as error:
            errors.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=ask_all, daemon=True) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise BenchmarkError(f"a request to port {port} failed: {errors[0]}")
    return len(prompts) * num_tokens / (time.perf_counter() - start)


def _ask(connection: http.client.HTTPConnection, prompt: Sequence[int], num_tokens: int) -> None:
    body = {"prompt": list(prompt), "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    answer = response.read()
    if response.status != 200:
        raise BenchmarkError(f"status {response.status}: {answer[:200].decode(errors='replace')}")
    found = json.loads(answer)["usage"]["completion_tokens"]
    if found != num_tokens:
        raise BenchmarkError(f"{num_tokens} tokens were asked for, and {found} came")


class Served:
    """A model behind HTTP in this process, and its scheduler without all that."""

    def __init__(self, model: grok1.Model, **options: Any):
        """Starts the server.

        Args:
          model: The model.
          **options: Of `Server`.

        Raises:
          BenchmarkError: If it does not become ready.
        """
        # Only here: the packages that it needs are not installed everywhere.
        from grok1.server.running import HttpOptions, Running

        self._server = grok1.Server(model, **options)
        self._running = Running(lambda: self._server, HttpOptions(port=0), "benchmarks")
        self._thread = threading.Thread(target=self._running.run_all, daemon=True)
        self._thread.start()
        while self._server.state != "ready":
            if not self._thread.is_alive():
                raise BenchmarkError(f"the server did not start: {self._server.error}")
            time.sleep(0.05)
        self.sizes = self._server.sizes
        self._scheduler = Replica(model.engine, self.sizes)

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._running.port
        return self._running.port

    def without(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        """Tokens per second of the same requests when a scheduler alone has them."""
        start = time.perf_counter()
        requests = [
            Request(tokens=prompt, max_tokens=num_tokens, sampling=SamplingParams(temperature=0))
            for prompt in prompts
        ]
        self._scheduler.turn(Plan(dict(enumerate(requests)), []))
        while not self._scheduler.scheduler.is_idle:
            self._scheduler.turn(Plan({}, []))
        seconds = time.perf_counter() - start
        self._scheduler.turn(Plan({}, list(range(len(requests)))))
        return len(prompts) * num_tokens / seconds

    def close(self) -> None:
        """Ends it."""
        self._running.should_exit = True
        self._thread.join()


def pauses(model: grok1.Model, length: int, max_stall: float) -> dict[str, Any]:
    """How long those that run wait for tokens while a long prompt comes in, and one behind three.

    Args:
      model: The model.
      length: Tokens of the long prompts.
      max_stall: As of `Server`.

    Returns:
      The "longest" pause and the "seconds" that the prompt took; seconds to the "first" token of a
      short request that came behind three long prompts, and how many of these were "done" before.
    """
    vocab_size = model.config.vocab_size
    small = random_prompts(vocab_size, 3, _SMALL).tolist()
    large = random_prompts(vocab_size, 4, length).tolist()
    options = {"max_slots": 4, "decode_rows": (1,), "prefix_tokens": 0, "max_stall": max_stall}
    with grok1.Server(model, **options) as server, _turns(server) as times:
        room = server.sizes.capacity - _SMALL

        def submit(prompt, num_tokens):
            return server.submit(prompt, max_new_tokens=num_tokens, ignore_eos=True, temperature=0)

        running = [submit(one, room) for one in small[:2]]
        while not all(handle.times.first for handle in running):
            time.sleep(0.01)
        start = time.monotonic()
        submit(large[0], 1).result()
        end = time.monotonic()
        if any(handle.is_over for handle in running):
            raise BenchmarkError(
                f"{room} tokens were drawn before a prompt of {length} had been run"
            )
        before = max(moment for moment in times if moment <= start)
        within = [moment for moment in times if before <= moment <= end]
        for handle in running:
            handle.cancel()
        behind = [submit(one, 1) for one in large[1:]]
        asked = time.monotonic()
        submit(small[2], 1).result()
        first = time.monotonic() - asked
        done = sum(handle.is_over for handle in behind)
        for handle in behind:
            handle.cancel()
        chunk = server.sizes.chunk
    longest = max(later - earlier for earlier, later in itertools.pairwise(within))
    return {
        "longest": longest,
        "seconds": end - start,
        "chunk": chunk,
        "first": first,
        "done": done,
    }


@contextlib.contextmanager
def _turns(server: grok1.Server) -> Iterator[list[float]]:
    """Keeps when turns ended that brought tokens."""
    times: list[float] = []

    def note(seconds: float, num_drawn: int, num_of_prompts: int) -> None:
        if num_drawn:
            times.append(time.monotonic())

    server.on_turn.append(note)
    yield times
    server.on_turn.remove(note)
