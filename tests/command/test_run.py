"""`python run.py` as a user runs it."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import flags_with_devices, slow

RUN = pathlib.Path(__file__).parent.parent.parent / "run.py"
PROMPT = "The answer to life the universe and everything is of course"


@pytest.fixture(autouse=True)
def one_device(monkeypatch, optimisations):
    """A user's machine, on which all of these share their compiled programs."""
    monkeypatch.setenv("XLA_FLAGS", flags_with_devices(1))


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, str(RUN), *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300)


def test_no_arguments_runs_the_toy_and_says_so():
    result = run()
    assert result.returncode == 0
    assert result.stdout.startswith(PROMPT)
    assert len(result.stdout) > len(PROMPT) + 50
    # Other lines may say what compiles, or why there are no native kernels.
    first, *more = result.stderr.splitlines()
    assert "checkpoints/ckpt-0" in first
    assert "bundled toy" in first
    assert all(line.startswith(("grok1: ", "run.py: ")) for line in more)


def test_experts_on_disk_give_the_same_text_and_say_what_it_cost(toy):
    result = run("--prompt", "The ", "--max-new-tokens", "5", "--temperature", "0", "--mesh", "1x1",
                 "--dtype", "float32", "--offload", "disk", "--memory", "2GB")  # fmt: skip
    expected = toy.generate("The ", max_new_tokens=5, temperature=0)
    assert result.stdout == f"The {expected.text}\n"
    said = result.stderr.splitlines()[-1]
    assert said.startswith("run.py: ")
    assert " s a token, 0.00 GB read, expert hit rate " in said
    assert said.endswith(" of 48 experts in memory")


# Of tests/command/test_command.py, in a process of its own.
@slow
def test_interactive_continues_every_line_and_a_stop_ends_it():
    arguments = ("--interactive", "--max-new-tokens", "40", "--stop", r"\n", "--mesh", "1x1")
    result = run(*arguments, stdin="The first\nA second\n")
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--checkpoint", "absent"), r"absent: there is no such directory"),
        pytest.param(("--mesh", "1x99"), "mesh 1x99 needs 99 devices", marks=slow),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_errors_are_one_line(arguments, message):
    result = run(*arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("run.py: ")


def test_ctrl_c_ends_cleanly():
    command = [sys.executable, str(RUN), "--interactive", "--mesh", "1x1"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr
    process.stderr.readline()  # the model is being loaded: the interpreter is past its imports
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().endswith("run.py: interrupted")
    assert "Traceback" not in errors


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(
    "module", ["jax", *(pytest.param(name, marks=slow) for name in ("numpy", "grok1.factory"))]
)
def test_ctrl_c_while_it_imports_ends_without_a_traceback(module):
    # A module of that name in front of the real one: the program is interrupted in its midst.
    program = (
        "import builtins, os, signal, sys\n"
        "original = builtins.__import__\n"
        "def interrupted(name, *rest):\n"
        f"    if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return original(name, *rest)\n"
        "builtins.__import__ = interrupted\n"
        "from grok1.__main__ import main\n"
        "sys.exit(main(['generate', '--checkpoint', 'toy']))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


@slow
@pytest.mark.parametrize("closed", ["1", "2"])
def test_a_stream_that_nobody_reads_or_that_is_closed_ends_nothing(closed):
    short = "--max-new-tokens 2 --mesh 1x1 --temperature 0 --prompt A"
    command = f"exec {sys.executable} {RUN} {short} {closed}>&-"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert result.returncode == 0
    assert "Traceback" not in result.stderr + result.stdout
    assert "run.py: " not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("generate --prompt-file -", "the prompt is empty"),
        pytest.param("generate --batch-file -", "standard input: no prompts", marks=slow),
        pytest.param("compare toy toy --text -", "the text is empty", marks=slow),
        pytest.param("generate --interactive", "bundled toy", marks=slow),
    ],
)
def test_a_closed_standard_input_holds_nothing(arguments, said):
    command = f'exec "$0" -m grok1 {arguments} <&-'
    result = subprocess.run(["sh", "-c", command, sys.executable], capture_output=True, text=True)
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert "AttributeError" not in result.stderr


# As it ends `inspect`, in tests/care/test_inspection.py.
@slow
def test_a_reader_that_has_enough_ends_it_quietly():
    command = f"{sys.executable} {RUN} --mesh 1x1 --max-new-tokens 40 | head -c 1"
    result = subprocess.run(["bash", "-c", command + "; exit ${PIPESTATUS[0]}"],
                            capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 141
    assert "Broken pipe" not in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    ("option", "arguments"),
    [
        ("", "verify toy"),
        ("", "serve --help"),
        pytest.param("", "--version", marks=slow),
        pytest.param("-u", "verify toy", marks=slow),
        pytest.param("-u", "--help", marks=slow),
    ],
)
def test_standard_output_is_named_where_it_is_full(option, arguments):
    command = f'"$0" {option} -m grok1 {arguments} >/dev/full'
    result = subprocess.run(["sh", "-c", command, sys.executable], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "grok1: standard output: No space left on device\n"


@pytest.mark.parametrize("optimisation", ["1", pytest.param("2", marks=slow)])
def test_without_asserts_it_says_so_and_calls_no_checkpoint_incomplete(monkeypatch, optimisation):
    monkeypatch.setenv("PYTHONOPTIMIZE", optimisation)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    command = [sys.executable, "-m", "grok1", "verify", "toy"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("grok1: grok1 needs Python's asserts, by which Haiku names the")
