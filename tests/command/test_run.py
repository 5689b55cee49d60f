"""`python run.py` as a user runs it."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

RUN = pathlib.Path(__file__).parent.parent.parent / "run.py"
PROMPT = "The answer to life the universe and everything is of course"


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


def test_json_is_one_object_with_everything(toy):
    result = run("--json", "--prompt", "The ", "--max-new-tokens", "5", "--temperature", "0",
                 "--logprobs", "2", "--mesh", "1x1", "--dtype", "float32")  # fmt: skip
    found = json.loads(result.stdout)
    expected = toy.generate("The ", max_new_tokens=5, temperature=0, logprobs=2)
    assert found["prompt"] == "The "
    assert found["text"] == expected.text
    assert found["tokens"] == expected.tokens
    assert found["stop_reason"] == expected.stop_reason
    assert found["logprobs"] == pytest.approx(expected.logprobs, abs=1e-4)
    assert [len(top) for top in found["top_logprobs"]] == [2] * len(expected.tokens)


def test_an_int8_cache_is_near_a_float_one_and_not_equal(toy):
    result = run("--json", "--prompt", "The ", "--max-new-tokens", "5", "--temperature", "0",
                 "--logprobs", "2", "--mesh", "1x1", "--dtype", "float32",
                 "--cache-dtype", "int8")  # fmt: skip
    found = json.loads(result.stdout)["logprobs"]
    expected = toy.generate("The ", max_new_tokens=5, temperature=0, logprobs=2).logprobs
    assert found == pytest.approx(expected, abs=0.2)
    assert found != pytest.approx(expected, abs=1e-4)


def test_experts_on_disk_give_the_same_text_and_say_what_it_cost(toy):
    result = run("--prompt", "The ", "--max-new-tokens", "5", "--temperature", "0", "--mesh", "1x1",
                 "--dtype", "float32", "--offload", "disk", "--memory", "2GB")  # fmt: skip
    expected = toy.generate("The ", max_new_tokens=5, temperature=0)
    assert result.stdout == f"The {expected.text}\n"
    said = result.stderr.splitlines()[-1]
    assert said.startswith("run.py: ")
    assert " s a token, 0.00 GB read, expert hit rate " in said
    assert said.endswith(" of 48 experts in memory")


def test_interactive_continues_every_line_and_a_stop_ends_it():
    arguments = ("--interactive", "--max-new-tokens", "40", "--stop", r"\n", "--mesh", "1x1")
    result = run(*arguments, stdin="The first\nA second\n")
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) == 2


def test_prompt_file_and_logprobs_table(tmp_path):
    (tmp_path / "prompt.txt").write_text("Return the", encoding="utf-8")
    result = run("--prompt-file", str(tmp_path / "prompt.txt"), "--max-new-tokens", "3",
                 "--logprobs", "1", "--seed", "4", "--top-k", "5", "--mesh", "1x1")  # fmt: skip
    assert result.stdout.startswith("Return the")
    table = result.stdout.splitlines()[-3:]
    assert all(float(line.split()[1]) <= 0 for line in table)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--checkpoint", "absent"), r"absent: there is no such directory"),
        (("--temperature", "-1"), "temperature must be 0"),
        (("--mesh", "1x99"), "mesh 1x99 needs 99 devices"),
        (("--mesh", "8"), "mesh must be two sizes above 0, (data, model), as 1x8, found '8'"),
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt-file", "absent.txt"), "absent.txt"),
        (("--tokenizer", "absent.model"), "absent.model: no such file"),
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
