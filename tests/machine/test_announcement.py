"""What is said on stderr, to whom, and what variables of the environment may say."""

import io
import os
import re
import subprocess
import sys
import types

import pytest

import grok1
from grok1.machine import announcement, environment, progress, startup
from grok1.machine.announcement import announced, hint
from grok1.machine.progress import progress_bar
from grok1.machine.startup import check_environment, start_jax
from tests.conftest import TOY
from tests.helpers import slow


@pytest.fixture(autouse=True)
def unsaid():
    hint.cache_clear()


# --- hints ---------------------------------------------------------------------------------------


def test_a_hint_is_said_once(capfd):
    for _ in range(3):
        hint("mind the gap")
    hint("mind the step")
    assert capfd.readouterr().err == "grok1: mind the gap\ngrok1: mind the step\n"


def test_of_processes_that_say_the_same_one_speaks(capfd, monkeypatch):
    noted = {}

    class Service:
        """What the processes share: a key is set once."""

        def key_value_set(self, key, value):
            if key in noted:
                raise RuntimeError("ALREADY_EXISTS")
            noted[key] = value

    shared = types.SimpleNamespace(client=Service())
    monkeypatch.setattr(announcement.jax_distributed, "global_state", shared)
    for _ in range(16):
        hint.cache_clear()  # another process
        hint("no compiler here")
    hint("no space left on host 7")
    said = "grok1: no compiler here\ngrok1: no space left on host 7\n"
    assert capfd.readouterr().err == said


class Closed(io.StringIO):
    def write(self, text):
        raise OSError(9, "Bad file descriptor")


def closed_in_python():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [lambda: None, Closed, closed_in_python])
def test_without_a_stderr_nothing_is_said_and_nothing_fails(monkeypatch, capfd, stream):
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setattr(announcement, "PATIENCE", 0.0)
    hint("mind the gap")
    with announced("making tea"):
        pass
    with progress_bar(10, "reading"):
        pass
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("closing", ["2>&- <&-", pytest.param("2>/dev/full", marks=slow)])
def test_a_command_runs_with_standard_error_closed(closing):
    result = subprocess.run(
        ["sh", "-c", f'"$0" -m grok1 inspect "$1" --layer 0 {closing}', sys.executable, str(TOY)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0
    assert "rms is that of 16 rows" in result.stdout
    assert result.stderr == ""


# --- progress ------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


# As the one of an IPython kernel, and what is derived from it.
Notebook = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})
Derived = type("Tee", (Notebook,), {})


@pytest.mark.parametrize(
    ("stream", "is_shown"),
    [(Terminal, True), (Notebook, True), (Derived, True), (io.StringIO, False)],
)
def test_progress_is_shown_where_somebody_sees_it(monkeypatch, stream, is_shown):
    monkeypatch.setattr(progress, "_NOTEBOOK_SECONDS", 0)
    monkeypatch.setattr(sys, "stderr", stream())
    with progress_bar(10, "reading") as bar:
        bar.update(10)
    assert ("reading: 100%" in sys.stderr.getvalue()) == is_shown


def test_a_notebook_keeps_nothing_of_what_was_quick(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Notebook())
    with progress_bar(10, "reading") as bar:
        bar.update(10)
    assert sys.stderr.getvalue() == ""


def test_unwanted_progress_is_not_shown(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_bar(10, "reading", is_wanted=False) as bar:
        bar.update(10)
    assert sys.stderr.getvalue() == ""


# --- variables of the environment ----------------------------------------------------------------


@pytest.mark.parametrize("setting", ["abc", "0", "-1", "2.5", "1e3", " 2", "²", "9" * 5000])
def test_a_number_of_threads_that_is_none_is_an_error(monkeypatch, setting):
    monkeypatch.setenv("GROK1_NUM_THREADS", setting)
    expected = "GROK1_NUM_THREADS must be a whole number from 1 to 4096, found "
    with pytest.raises(ValueError, match=re.escape(expected)) as raised:
        grok1.random_model(grok1.TOY)
    assert len(str(raised.value)) < 250


@pytest.mark.parametrize(("setting", "found"), [("", None), ("1", 1), ("4096", 4096)])
def test_a_number_of_threads(monkeypatch, setting, found):
    monkeypatch.setenv("GROK1_NUM_THREADS", setting)
    assert environment.num_threads() == found


@pytest.mark.parametrize("name", ["GROK1_NATIVE", "GROK1_COMPILATION_CACHE"])
def test_a_switch_is_on_or_off(monkeypatch, name):
    for setting, is_on in [("", True), ("1", True), ("0", False)]:
        monkeypatch.setenv(name, setting)
        assert environment.is_on(name) is is_on
    monkeypatch.setenv(name, "off")
    with pytest.raises(ValueError, match=f"{name} must be 0 or 1, found 'off'; set one of them"):
        grok1.load(TOY)


def test_graphs_have_a_third_way(monkeypatch):
    name = "GROK1_CUDA_GRAPHS"
    for setting, expected in [("", "1"), ("1", "1"), ("0", "0"), ("unrolled", "unrolled")]:
        monkeypatch.setenv(name, setting)
        assert environment.choice(name) == expected
        assert environment.is_on(name) is (expected != "0")
    for setting in ("Unrolled", "2", " "):
        monkeypatch.setenv(name, setting)
        expected = f"{name} must be 0, 1 or unrolled, found {setting!r}; set one of them or unset"
        with pytest.raises(ValueError, match=expected):
            grok1.load(TOY)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("GROK1_NATVIE", "did you mean GROK1_NATIVE?"),
        ("grok1_native", "did you mean GROK1_NATIVE?"),
        ("GROK1_THREADS", "did you mean GROK1_NUM_THREADS?"),
        ("GROK1_COMPILE_CACHE", "did you mean GROK1_COMPILATION_CACHE?"),
        ("GROK1_HOME", "there are GROK1_NATIVE, GROK1_COMPILATION_CACHE, GROK1_CUDA_GRAPHS, "),
    ],
)
def test_a_variable_that_is_not_known_is_told(monkeypatch, capsys, name, said):
    monkeypatch.setenv(name, "0")
    for _ in range(2):
        check_environment()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"grok1: the variable '{name}' of the environment is not known; {said}")


def test_variables_that_are_known_are_not_told(monkeypatch, capsys):
    for name in (*environment.CHOICES, "GROK1_NUM_THREADS", "GROK1_SLOW_TESTS"):
        monkeypatch.setenv(name, "1")
    check_environment()
    assert capsys.readouterr().err == ""


def test_a_missing_proc_is_told(monkeypatch, capsys):
    for path in ("/proc/cpuinfo", "/absent/cpuinfo"):
        monkeypatch.setattr(startup, "_PROCESSOR", path)
        start_jax()
    assert capsys.readouterr().err == (
        "grok1: there is no /absent/cpuinfo, without which XLA fails on CPUs; mount /proc\n"
    )


def test_every_variable_is_in_the_documentation():
    page = (TOY.parent.parent / "docs" / "running-grok-1.md").read_text()
    table = page[page.index("| variable |") :].partition("\n\n")[0]
    for name in (*environment.CHOICES, "GROK1_NUM_THREADS", "XDG_CACHE_HOME"):
        assert f"| `{name}` |" in table


# As any other error that a command ends with.
@slow
def test_a_command_says_in_a_line_what_is_wrong_with_a_variable():
    result = subprocess.run(
        [sys.executable, "run.py"],
        capture_output=True,
        text=True,
        cwd=TOY.parent.parent,
        env={**os.environ, "GROK1_NUM_THREADS": "abc"},
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("run.py: GROK1_NUM_THREADS must be a whole ")
    assert "Traceback" not in result.stderr
