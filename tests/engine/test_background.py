"""Programs in the making: interrupted, shared by threads, in processes where JAX cannot run."""

import gc
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import weakref

import jax
import numpy as np
import pytest

from grok1.engine import compilation
from grok1.engine.compilation import Program, Programs
from grok1.machine import background, startup
from tests.helpers import slow as slow_tier

REPOSITORY = pathlib.Path(__file__).parents[2]


def slow(seconds: float, error: Exception | None = None) -> tuple[Program, list[float]]:
    """A program that takes a while to trace, and when it was traced."""
    traced = []

    def double(x):
        traced.append(time.perf_counter())
        time.sleep(seconds)
        if error is not None and len(traced) == 1:
            raise error
        return x * 2

    return Program(jax.jit(double), jax.devices()[:1], None, lambda x: "slow"), traced


def interrupt_after(seconds: float) -> None:
    threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGINT)).start()


def test_a_wait_is_interrupted_at_once_and_the_next_call_has_the_program():
    traced, may_end = [], threading.Event()

    def double(x):
        traced.append(x)
        assert may_end.wait(600)
        return x * 2

    program = Program(jax.jit(double), jax.devices()[:1], None, lambda x: "slow")
    interrupt_after(0.1)
    with pytest.raises(KeyboardInterrupt):
        program(np.ones(2, np.float32))
    # It is still being traced: only the wait for it is over.
    may_end.set()
    assert program(np.ones(2, np.float32)).tolist() == [2, 2]
    assert len(traced) == 1


def test_an_interruption_that_python_only_prints_is_raised_instead(monkeypatch):
    class Failing:
        def __del__(self):
            raise ValueError("this is printed")

    class Interrupting:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    settings_of_thread, printed = compilation.settings_of_thread, []

    def without_a_wait(function):
        with background.interruptible(), background.interruptible():
            function()

    def with_garbage():
        Failing()
        Interrupting()
        return settings_of_thread()

    def note(lost):
        printed.append(lost.exc_type)

    monkeypatch.setattr(sys, "unraisablehook", note)
    program, _ = slow(0.1)
    with monkeypatch.context() as patch:
        patch.setattr(compilation, "settings_of_thread", with_garbage)
        with pytest.raises(KeyboardInterrupt):
            program(np.ones(2, np.float32))
        with pytest.raises(KeyboardInterrupt):
            without_a_wait(with_garbage)
    without_a_wait(settings_of_thread)
    assert printed == 2 * [ValueError]
    assert sys.unraisablehook == note
    assert program(np.ones(2, np.float32)).tolist() == [2, 2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def in_threads(number: int, function) -> list:
    """What a function returns, or raises, in several threads at once."""
    found, barrier = [], threading.Barrier(number)

    def run(n):
        barrier.wait()
        try:
            found.append(function(n))
        except ValueError as error:
            found.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("is_interrupted", [True, False])
def test_an_interruption_that_comes_out_as_an_error_of_a_lock_is_still_one(
    monkeypatch, is_interrupted
):
    release = threading.Condition._release_save

    def interrupted(condition):
        # Between giving its lock back and the block that takes it again.
        state = release(condition)
        if is_interrupted:
            signal.raise_signal(signal.SIGINT)
        raise RuntimeError(state)

    future = background.in_background(lambda: time.sleep(0.2))
    monkeypatch.setattr(future._condition, "_release_save", interrupted.__get__(future._condition))
    with (
        pytest.raises(KeyboardInterrupt if is_interrupted else RuntimeError),
        background.interruptible() as wait,
    ):
        wait(future)


def test_threads_that_need_the_same_program_wait_for_one():
    program, traced = slow(0.2)
    found = in_threads(12, lambda n: program(np.ones(2, np.float32)).tolist())
    assert found == [[2, 2]] * 12
    assert len(traced) == 1


def test_threads_that_need_programs_of_other_shapes_do_not_wait_for_one_another():
    program, traced = slow(0.5)
    in_threads(3, lambda n: program(np.ones(n + 1, np.float32)).tolist())
    assert len(traced) == 3
    assert max(traced) - min(traced) < 0.5


def test_all_who_wait_hear_of_an_error_and_the_next_call_tries_again():
    program, traced = slow(0.2, ValueError("no luck"))
    found = in_threads(3, lambda n: program(np.ones(2, np.float32)))
    assert [str(error) for error in found] == ["no luck"] * 3
    assert program(np.ones(2, np.float32)).tolist() == [2, 2]
    assert len(traced) == 2


def test_threads_that_ask_for_a_program_get_the_same_one():
    programs, made = Programs(), []

    def make():
        made.append(1)
        time.sleep(0.01)
        return object()

    found = in_threads(8, lambda n: programs.find(("key",), make))
    assert len(made) == 1
    assert len(set(map(id, found))) == 1


def test_programs_with_functions_of_the_users_are_few():
    programs = Programs()
    own = programs.find(("decode", None), object)
    for _ in range(50):
        last = programs.find(("decode", lambda logits: logits), object)
    assert len(programs) == compilation._MOST_OF_USERS + 1
    assert programs["decode", None] is own
    assert last in programs.values()


def test_views_of_a_model_are_few_and_those_in_use_stay():
    programs = Programs()
    used = programs.of_view("used")
    for number in range(50):
        programs.of_view(f"view {number}")
        assert programs.of_view("used") is used
    assert len(programs._views) == compilation._MOST_VIEWS
    assert programs.of_view("") is programs


def test_a_function_of_the_users_that_is_given_up_is_forgotten(nano):
    def processor(n):
        return lambda logits, tokens, length: logits + n

    references = []
    for n in range(compilation._MOST_OF_USERS + 2):
        function = processor(n)
        references.append(weakref.ref(function))
        nano.engine.decode_program(None, function)
    del function
    gc.collect()
    alive = [reference() is not None for reference in references]
    assert alive == [False] * 2 + [True] * compilation._MOST_OF_USERS


# --- the end of a process ------------------------------------------------------------------------

COMPILING = """
import ctypes, os, sys, threading
from grok1.engine.compilation import Program

def made(self, args):
    print("not flushed")
    os.write(1, b"compiling\\n")
    ctypes.CDLL(None).sleep({seconds})  # as a compiler does: no Python until it is over
    print("compiled", flush=True)
    sys.exit  # Python is still there
    return lambda *args: args

Program._executable = made
"""
SCRIPT = """
import jax
Program(jax.jit(lambda x: x), jax.devices()[:1], None, str)(1.0 * jax.numpy.ones(2))
"""
COMMAND = """
sys.path.insert(0, {repository!r})
sys.argv = ["run.py", "--max-new-tokens", "2"]
import runpy
runpy.run_path({run!r}, run_name="__main__")
"""


def interrupted(program: str) -> tuple[int, float, str]:
    """Status, seconds and output of a process that is interrupted while it compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        start = time.perf_counter()
        output, said = process.communicate()
    assert first == "compiling\n"
    return process.returncode, time.perf_counter() - start, output + said


@pytest.mark.not_on_gpu("it starts a process, of which no device is asked")
def test_ctrl_c_ends_the_command_at_once_while_a_program_compiles():
    program = COMPILING.format(seconds=60) + COMMAND.format(
        repository=str(REPOSITORY), run=str(REPOSITORY / "run.py")
    )
    status, seconds, said = interrupted(program)
    assert status == 130, said
    assert seconds < 30
    assert "not flushed" in said
    assert "run.py: interrupted" in said
    assert "Traceback" not in said


@pytest.mark.not_on_gpu("it starts a process, of which no device is asked")
def test_ctrl_c_ends_a_script_as_python_does_while_a_program_compiles():
    status, seconds, said = interrupted(COMPILING.format(seconds=60) + SCRIPT)
    assert status == -signal.SIGINT, said
    assert seconds < 30
    assert "not flushed" in said
    assert said.rstrip().endswith("KeyboardInterrupt")


@slow_tier
@pytest.mark.not_on_gpu("it starts a process, of which no device is asked")
def test_a_script_that_goes_on_is_over_when_the_program_is_compiled():
    program = COMPILING.format(seconds=1) + (
        "try:" + SCRIPT.replace("\n", "\n    ").rstrip() + "\nexcept KeyboardInterrupt: pass\n"
        "print('went on', flush=True)"
    )
    status, _, said = interrupted(program)
    assert status == 0, said
    assert "went on" in said
    assert "compiled" in said


# --- fork ----------------------------------------------------------------------------------------

FORK = """
import os, sys, warnings
warnings.simplefilter("ignore")
import jax
{before}
{start}
child = os.fork()
if child == 0:
    try:
        import grok1
        {call}
        print("no error")
    except RuntimeError as error:
        print(error)
    sys.stdout.flush()
    os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.not_on_gpu("it starts a process, of which no device is asked")
@pytest.mark.parametrize(
    ("before", "start", "call", "expected"),
    [
        pytest.param(
            "",
            "jax.numpy.ones(2)",
            "grok1.random_model(grok1.TOY)",
            "forked from one in which",
            marks=slow_tier,
        ),
        (
            "import grok1",
            "jax.numpy.ones(2)",
            "grok1.load('checkpoints/toy')",
            "forked from one in which",
        ),
        pytest.param("import grok1", "", "assert len(jax.devices())", "no error", marks=slow_tier),
    ],
    ids=["imported in the child", "imported before", "before JAX ran"],
)
def test_a_process_forked_after_jax_has_run_is_told(before, start, call, expected):
    program = FORK.format(before=before, start=start, call=call)
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert expected in result.stdout, result.stderr


def test_a_call_in_a_forked_process_is_told(monkeypatch):
    monkeypatch.setattr(startup, "_is_forked", True)
    program, traced = slow(0)
    with pytest.raises(RuntimeError, match=re.escape('multiprocessing.get_context("spawn")')):
        program(np.ones(2, np.float32))
    assert traced == []


@pytest.mark.not_on_gpu("it starts a process, of which no device is asked")
@pytest.mark.parametrize(
    ("platforms", "cause"),
    [
        ("cuda", ""),
        pytest.param("tpu", "libtpu", marks=slow_tier),
        pytest.param("nonsense", "'nonsense' is not in the list", marks=slow_tier),
    ],
)
def test_a_platform_that_is_not_there_is_one_line(platforms, cause):
    result = subprocess.run(
        [sys.executable, "run.py"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": platforms},
    )
    assert result.returncode == 1
    line = result.stderr.splitlines()[-1]
    assert line.startswith("run.py: JAX cannot start on the platform that is asked for, ")
    assert f"JAX_PLATFORMS={platforms}" in line
    assert cause in line
    assert "Traceback" not in result.stderr


# --- threads that go on -------------------------------------------------------------------------

ENDLESS = """
import threading, time
from grok1.machine import background
told = threading.Event()
def turns():
    told.wait()
    time.sleep(0.2)  # in the middle of a turn
    print("ended")
def end():
    told.set()
    return {seconds}
background.start_endless(turns, "turns", end)
{more}
"""


@pytest.mark.parametrize(
    ("seconds", "more", "status", "printed"),
    [
        (None, "", 0, "ended\n"),
        (5.0, "", 0, "ended\n"),
        (0.01, "", 0, ""),  # it may never end
        (None, "background.do_not_wait(143); raise SystemExit(143)", 143, ""),
    ],
)
def test_a_thread_that_goes_on_is_told_to_end_with_python(seconds, more, status, printed):
    program = ENDLESS.format(seconds=seconds, more=more)
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert (result.returncode, result.stdout, result.stderr) == (status, printed, "")


# --- what an interruption leaves behind ----------------------------------------------------------


def test_a_stream_that_is_left_between_two_pieces_goes_on(toy):
    stream = toy.stream("The first", max_new_tokens=12, temperature=0, stop=["unlikely stop"])
    first = next(stream)  # and Ctrl-C, before the next one
    text = first + "".join(stream)
    assert text == stream.completion.text
    with pytest.raises(StopIteration):
        next(stream)
