"""The command line in one process: options, prompts, what is printed, and how errors read."""

import argparse
import io
import json
import os
import runpy
import subprocess
import sys
from unittest import mock

import pytest

from grok1 import bundled
from grok1.care import conversion, gguf_file
from grok1.command import (
    advice,
    answers,
    escapes,
    generate,
    interactive,
    parser,
    report,
    streams,
    tool_options,
)
from grok1.command.main import main
from grok1.generate.completion import Completion
from grok1.offload.runner import is_offloaded
from grok1.planning import planning
from grok1.server import sizing
from grok1.tokenizer import Tokenizer
from tests.conftest import GOLDEN


@pytest.fixture(scope="module", autouse=True)
def _loaded(toy):
    """Every command runs the model that the tests share; what it would load is not at issue."""
    with mock.patch.object(generate, "load", return_value=toy):
        yield


def run(capsys, *arguments: str, stdin: str | bytes = "") -> tuple[int, str, str]:
    """Runs `grok1 generate` on the toy: status, stdout and stderr."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    given = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")
    with mock.patch.object(sys, "stdin", given):
        status = main(["generate", "--checkpoint", str(bundled.toy()), *arguments])
    return status, *capsys.readouterr()


GREEDY = ("--temperature", "0", "--max-new-tokens", "6")


# --- the parser -------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--prompt", "--stop"])
def test_a_text_is_utf_8_whatever_the_locale_reads(monkeypatch, option):
    # As Python has arguments under LC_ALL=C without its UTF-8 mode.
    unread = "caf\u00e9".encode().decode("ascii", "surrogateescape")
    for given in (unread, "caf\u00e9"):
        (found,) = vars(parser.parse(["generate", option, given], "grok1"))[option[2:]]
        assert found == "caf\u00e9"


@pytest.mark.parametrize("option", ["--prompt", "--stop"])
def test_a_text_that_is_not_utf_8_is_refused(capsys, option):
    latin = os.fsdecode(b"caf\xe9")
    with pytest.raises(SystemExit):
        parser.parse(["generate", option, latin], "grok1")
    assert f"argument {option}: must be UTF-8, found the byte 0xe9 at 3; convert it" in (
        capsys.readouterr().err
    )


def test_devices_are_numbers(capsys):
    parsed = parser.parse(["serve", "--local-devices", "1,0"], "grok1")
    assert parsed.local_devices == [1, 0]
    with pytest.raises(SystemExit):
        parser.parse(["serve", "--local-devices", "0,x"], "grok1")
    assert "must be numbers of devices, as 0,1, found '0,x'" in capsys.readouterr().err


def test_choices_are_the_librarys():
    assert tool_options.FORMATS == conversion.FORMATS
    assert tool_options.EMBEDDING_TYPES == gguf_file.EMBEDDING_TYPES
    assert (*planning.DEVICE_KINDS, "cpu") == tool_options.DEVICES


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--help"], 0, "generate"),
        (["--version"], 0, "grok1 0."),
        ([], 2, "usage: grok1"),
        (["generate", "--temprature", "1"], 2, "--temprature 1; did you mean --temperature?"),
        (["plan", "--contxt=5"], 2, "--contxt=5; did you mean --context?"),
        (["generate", "Once upon"], 2, "Once upon; did you mean --prompt 'Once upon'?"),
        (["generate", "."], 2, "unrecognized arguments: .; did you mean --checkpoint .?"),
        (["serve", "model"], 2, "model; did you mean --checkpoint model?"),
        (["generate", "a" * 5000], 2, "did you mean --prompt aaaa"),
        (["generate", "--checkpoint", "absent"], 1, "absent: there is no such directory"),
        (["inspect", "absent"], 1, "absent: there is no such directory"),
        (["plan", "~/absent"], 1, "~/absent: there is no such directory"),
        (["generate", "--interactive", "--json"], 2, "--json: not allowed with argument --inter"),
        (["verify", "toy", "--manifest", "sums"], 2, "--manifest: compared with what --deep reads"),
        (["compare", "absent.npz", "b"], 1, "absent.npz: there is no such directory, nor file of"),
        (["generate", "--stop", r"\d"], 2, r"holds \d, which is no escape"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_needs_no_model_is_answered_without_jax(arguments, status, said):
    program = (
        "import sys\nfrom grok1.__main__ import main\n"
        "try:\n    status = main(sys.argv[1:])\n"
        "except SystemExit as end:\n    status = end.code\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules\n"
        "sys.exit(status)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True
    )
    assert result.returncode == status
    assert said in " ".join((result.stdout + result.stderr).split())
    assert "Traceback" not in result.stderr


def test_defaults_are_shown():
    with pytest.raises(SystemExit), mock.patch("sys.stdout", io.StringIO()) as shown:
        parser.parse(["generate", "--help"], "grok1")
    text = " ".join(shown.getvalue().split())
    for option in ("--max-new-tokens N default: 100", "--top-p P 1 is off; default: 0.95",
                   "--seed N of the draws; default: 13", "0 is greedy; default: 0.7"):  # fmt: skip
        assert option in text


def test_the_options_of_loading_are_the_librarys(capsys, toy):
    options = {"mesh": "1x1", "dtype": "float32", "cache_dtype": "int8", "layers": 6,
               "embedding_dtype": "bfloat16", "offload": "disk", "memory": "2GB"}  # fmt: skip
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    with mock.patch.object(generate, "load", return_value=toy) as load:
        status, _, err = run(capsys, *GREEDY, "--prompt", "The", *arguments)
    assert status == 0, err
    assert options.items() <= load.call_args.kwargs.items()


# --- escapes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        r"\n",
        r"a\tb",
        r"\\n",
        r"\x41é",
        r"\u00e9",
        r"\U0001f600",
        r"\N{BULLET}",
        r"\101",
        r"\'\"",
        "é",
    ],
)
def test_escapes_are_pythons(text):
    assert escapes.decoded(text) == eval(f'"{text}"' if '"' not in text else f"'''{text}'''")


@pytest.mark.parametrize("text", [r"\d", r"\x4", "a\\", r"\u12", r"\ud800", r"\N{NO SUCH}", "\\é"])
def test_other_backslashes_are_refused(text):
    with pytest.raises(ValueError, match=r"which is no (escape|character)"):
        escapes.decoded(text)


# --- advice -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("the prompt is empty; use add_bos=True", "the prompt is empty; use --add-bos"),
        ("temperature must be 0 or above", "--temperature must be 0 or above"),
        ("top_p must be above 0", "--top-p must be above 0"),
        ("or load it with tokenizer=", "or load it with --tokenizer"),
        ("load it with offload='none'", "load it with --offload none"),
        ("set memory=\"16GB\" and max_new_tokens", "set --memory 16GB and --max-new-tokens"),
        ("/data/layers=3/ckpt-0: there is none", "/data/layers=3/ckpt-0: there is none"),
        ("window=5 is no option of this command", "window=5 is no option of this command"),
        ("the temperature of the room", "the temperature of the room"),
        ("mesh 1x99 needs 99 devices", "mesh 1x99 needs 99 devices"),
        ("one device; give mesh='1x1'", "one device; give --mesh 1x1"),
    ],
)  # fmt: skip
def test_advice_speaks_of_options(message, expected):
    names = ("add_bos", "temperature", "top_p", "tokenizer", "offload", "memory", "layers", "mesh",
             "max_new_tokens")  # fmt: skip
    assert advice.in_options(message, names) == expected


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [("grok1.lm_eval", "lm_eval", "grok1[lm-eval]"), ("tools.run_notebooks", "nbclient", ".[note")],
)
def test_a_module_that_is_a_command_says_in_a_line_what_it_needs(
    module, package, extra, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as left:
        runpy.run_module(module, run_name="__main__")
    words = str(left.value)
    assert words.startswith(f"{module}")
    assert package in words
    assert f"pip install '{extra}" in words
    assert "\n" not in words


def test_what_the_library_says_of_two_arguments_names_two_options():
    names = ("memory", "offload", "chunk", "max_stall")
    pauses = {"chunk": 64, "max_stall": 1.0}
    calls = lambda: is_offloaded(None, "host", 3), lambda: sizing.check(pauses, 1024)
    said = []
    for call in calls:
        with pytest.raises(ValueError, match="found") as caught:
            call()
        said.append(advice.in_options(str(caught.value), names).partition(", but pauses")[0])
    assert said == [
        "--memory must be left out, or given as a budget for --offload disk or --offload auto, "
        "found it with --offload host",
        "found --chunk 64 and --max-stall 1.0",
    ]


# --- prompts ----------------------------------------------------------------------------------


def test_several_prompts_are_a_batch_in_their_order(capsys, toy):
    prompts = ["The first", "A list of"]
    status, out, err = run(capsys, *GREEDY, "--prompt", prompts[0], "--prompt", prompts[1])
    texts = [found.text for found in toy.generate(prompts, temperature=0, max_new_tokens=6)]
    assert status == 0
    assert out == f"The first{texts[0]}\n\nA list of{texts[1]}\n"
    assert err.splitlines()[-1].startswith("grok1: 2 prompts, 5 prompt tokens, 12 new tokens, the ")


@pytest.mark.parametrize("stdin", ["The é", "\ufeffThe é"])
@pytest.mark.parametrize("way", ["-", "file"])
def test_text_from_a_file_and_from_standard_input(stdin, way, tmp_path, capsys, toy):
    path = tmp_path / "prompt.txt"
    path.write_text(stdin, encoding="utf-8")
    status, out, _ = run(capsys, *GREEDY, "--json", "--prompt-file",
                         str(path) if way == "file" else "-", stdin=stdin)  # fmt: skip
    found = json.loads(out)
    expected = toy.generate("The é", temperature=0, max_new_tokens=6)
    assert status == 0
    assert (found["prompt"], found["tokens"]) == ("The é", expected.tokens)
    assert "é" in out
    assert found["usage"]["prompt_tokens"] == len(toy.tokenizer.encode("The é"))
    assert found["usage"]["completion_tokens"] == 6
    assert found["usage"]["seconds_to_first_token"] > 0
    assert found["usage"]["tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"caf\xe9", "not UTF-8: byte 0xe9 at 3; convert it, for instance with: iconv -f ISO-8859"),
        ("The".encode("utf-16"), "not UTF-8: byte 0xff at 0; convert it, for instance with: iconv "
                                 "-f UTF-16"),
        (b"", "the prompt is empty; give at least one token, or use --add-bos"),
        (b"x" * ((1 << 26) + 1), "more than 64 MB"),
    ],
    ids=["latin-1", "utf-16", "empty", "huge"],
)  # fmt: skip
def test_text_that_is_none_is_named(data, message, tmp_path, capsys):
    path = tmp_path / "prompt.txt"
    path.write_bytes(data)
    status, out, err = run(capsys, "--prompt-file", str(path))
    assert (status, out) == (1, "")
    assert message in err
    assert str(path) in err or not data


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "No such file or directory"),
        (".", "Is a directory"),
        ("file/in", "Not a directory"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_in_words(name, message, tmp_path, capsys):
    (tmp_path / "file").write_text("text")
    path = tmp_path / name
    status, out, err = run(capsys, "--prompt-file", str(path))
    assert (status, out) == (1, "")
    assert f": {path}: {message}\n" in err
    assert "Errno" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--temperature", "-1"), "--temperature must be 0"),
        (("--min-p", "2"), "--min-p must be from 0 to 1"),
        (("--seed", "-1"), "--seed must be a whole number from 0"),
        (("--max-new-tokens", "0"), "--max-new-tokens must be a whole number above 0"),
        (("--logprobs", "999999"), "--logprobs must be at most the vocabulary"),
        (("--prompt", ""), "the prompt is empty; give at least one token, or use --add-bos"),
        (("--prompt", "word " * 9000), "shorten the prompt by"),
        (("--prompt-file", "absent.txt"), "absent.txt"),
        (("--tokenizer", "absent.model"), "absent.model: no such file"),
        (("--tokenizer", str(bundled.toy() / "config.json")), "not a SentencePiece model"),
        (("--batch-file", "absent.jsonl"), "absent.jsonl"),
        (("--batch-file", os.devnull), f"{os.devnull}: no prompts; give a JSON object a line"),
        (
            ("--checkpoint", str(GOLDEN / "nano")),
            "there is no tokenizer.model; give one with --tok",
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_everything_is_checked_before_the_model_is_loaded(arguments, message, capsys):
    with mock.patch.object(generate, "load", side_effect=AssertionError("loaded")):
        status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, "")
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("text", ["", "piped \n"])
def test_a_silent_pipe_is_not_waited_for_and_a_speaking_one_is_read(text, capsys):
    reading, writing = os.pipe()
    os.write(writing, text.encode())
    if text:
        os.close(writing)
    with (
        open(reading, encoding="utf-8") as reader,
        mock.patch.object(sys, "stdin", reader),
        mock.patch.object(streams, "_PATIENCE", 0.05),
    ):
        assert streams.piped_text() == (text or None)
    if not text:
        os.close(writing)
    assert ("nothing came from standard input" in capsys.readouterr().err) == (not text)


# --- batch files ------------------------------------------------------------------------------


def test_a_batch_file_gives_each_line_its_own_options(capsys, toy, tmp_path):
    lines = [
        {"prompt": "The first", "max_new_tokens": 2, "id": {"mine": 1}},
        {"prompt": toy.tokenizer.encode("A list"), "temperature": 1.5},
        {"prompt": "The first", "seed": 7, "max_new_tokens": 2},
        {"prompt": "The first"},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    status, out, err = run(capsys, "--max-new-tokens", "5", "--batch-file", str(path))
    assert status == 0, err
    found = [json.loads(line) for line in out.splitlines()]
    assert [one["prompt"] for one in found] == [line["prompt"] for line in lines]
    assert [one.get("id") for one in found] == [{"mine": 1}, None, None, None]
    defaults = {"max_new_tokens": 5}
    for index, (line, one) in enumerate(zip(lines, found, strict=True)):
        options = {name: value for name, value in line.items() if name not in ("prompt", "id")}
        options = defaults | {"seed": 13 + index} | options
        expected = toy.generate([line["prompt"]], **{**options, "seed": [options["seed"]]})[0]
        assert one["tokens"] == expected.tokens
        assert one["usage"]["prompt_tokens"] > 0
    assert "grok1: 4 prompts, " in err.splitlines()[-1]


def test_runs_one_after_another_are_counted_as_such():
    def answer(*times):
        return answers.Answer(Completion("", [5] * 11, None, None, "length"), *times)

    together = [answer(4.0, 5.0, 100.0), answer(4.0, 5.0, 100.0)]
    alone = answer(1.0, 2.0, 105.0)
    assert answers.cost([alone]).endswith("the first after 1.00 s, then 10 tokens/s")
    assert answers.cost(together).endswith("the first after 4.00 s, then 20 tokens/s")
    assert answers.cost([*together, alone]).endswith("the first after 4.00 s, then 15 tokens/s")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: no JSON: "),
        ("[1]", 'line 2: expected an object with a "prompt"'),
        ('{"text": "a"}', 'line 2: expected an object with a "prompt"'),
        (
            '{"prompt": "a", "temprature": 0}',
            "no argument 'temprature'; did you mean 'temperature'?",
        ),
        ('{"prompt": "a", "metadata": 0}', "has no argument 'metadata'; it takes id, add_bos"),
        ('{"prompt": "a", "temperature": "0"}', "line 2: temperature must be a number, found '0'"),
        ('{"prompt": "a", "seed": 1, "seed": 2}', "must have each name once, found 'seed' twice"),
        ('{"prompt": ""}', "line 2: the prompt is empty"),
        ('{"prompt": [-1]}', "line 2: the prompt must be token ids"),
        ('{"prompt": 5}', "line 2: the prompt must be text or a list of token ids, found 5"),
        ('{"prompt": "\\ud800"}', "line 2: text holds the lone surrogate"),
        ('{"prompt": "a", "seed": [1]}', "line 2: seed must be one whole number"),
        ("[" * 100_000, "line 2: "),
    ],
    ids=lambda value: value[:30],
)
def test_a_line_that_is_none_is_named_before_anything_runs(line, message, capsys):
    with mock.patch.object(generate, "load", side_effect=AssertionError("loaded")):
        status, out, err = run(capsys, "--batch-file", "-", stdin=f'{{"prompt": "a"}}\n{line}\n')
    assert (status, out) == (1, "")
    assert err.startswith("grok1: standard input, line 2: ")
    assert "--" not in err  # a file has names, not options
    assert message in err


# --- what is printed --------------------------------------------------------------------------


def test_log_probabilities_are_a_line_a_token_whatever_it_is_spelt_as(capsys):
    released = Tokenizer.load(bundled.tokenizer())
    tokens = [5, 24, 32, released.encode("a list")[-1]]
    completion = Completion("", tokens, [-1.0] * 4, [{5: -1.0, token: -2.0} for token in tokens],
                            "length")  # fmt: skip
    report.print_logprobs(released, answers.Answer(completion, 1.0, 2.0))
    lines = capsys.readouterr().out.splitlines()
    ends, tab, spaces = (repr(piece) for piece in ("\n\n", "\t", "  "))
    assert [line.split("-1.00")[0].strip() for line in lines] == [ends, tab, spaces, "\u2581list"]
    assert lines[3].endswith(f"{ends} -1.00  \u2581list -2.00")


def test_json_has_no_number_that_json_has_not(capsys):
    streams.print_json({"a": float("-inf"), "b": [float("nan"), 1.5], "ü": {"1": float("inf")}})
    assert capsys.readouterr().out == '{"a": null, "b": [null, 1.5], "ü": {"1": null}}\n'


@pytest.mark.parametrize(
    ("encoding", "errors"), [("cp1252", "strict"), ("ascii", "surrogateescape")]
)
def test_output_in_another_encoding_is_replaced_and_json_escaped(toy, encoding, errors):
    for arguments, expected in (([], "The ?"), (["--json"], r"The \u2192")):
        data = io.BytesIO()
        shown = io.TextIOWrapper(data, encoding=encoding, errors=errors)
        with mock.patch.object(sys, "stdout", shown):
            status = main(
                ["generate", "--checkpoint", "toy", *GREEDY, "--prompt", "The →", *arguments]
            )
            shown.flush()
        assert status == 0
        assert expected in data.getvalue().decode(encoding)


@pytest.mark.parametrize(
    ("words", "said"), [((), "out of memory; "), (("no 3 GB",), "out of memory: no 3 GB; ")]
)
def test_memory_that_is_not_there_is_one_line(capsys, words, said):
    with mock.patch.object(generate, "run", side_effect=MemoryError(*words)):
        assert main(["generate"]) == 1
    assert capsys.readouterr().err == f"grok1: {said}`grok1 plan` says what it takes\n"


def test_a_warning_is_one_line_of_the_program():
    program = (
        "import sys, warnings\n"
        "from unittest import mock\n"
        "from grok1.command import main\n"
        "tell = lambda *_: warnings.warn('text holds something') or 0\n"
        "with mock.patch.object(main, '_run', tell):\n"
        "    sys.exit(main.main(['generate']))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "grok1: text holds something\n")


# --- interactive ------------------------------------------------------------------------------


def session(toy, capsys, *typed: str | BaseException, is_terminal=True) -> tuple[int, str, str]:
    """Types lines, or raises what they are, and returns status, stdout and stderr."""

    def answer(mark):
        if not waiting:
            raise EOFError
        if isinstance(waiting[0], BaseException):
            raise waiting.pop(0)
        return waiting.pop(0)

    waiting = list(typed)
    options = generate.GenerationOptions(temperature=0, max_new_tokens=4)
    one = interactive.Session(toy, options, "grok1")
    one._is_terminal = is_terminal
    with mock.patch("builtins.input", answer):
        status = one.run()
    assert not waiting
    return status, *capsys.readouterr()


def test_a_session_outlives_what_is_wrong(toy, capsys):
    text = toy.generate("The first", temperature=0, max_new_tokens=4).text
    status, out, err = session(
        toy, capsys, "", "   ", "word " * 9000, KeyboardInterrupt(), "/temprature 1",
        "/temperature x", "/temperature -1", "/ignore-eos maybe", "/top-k off", "/nothing",
        "The first",
    )  # fmt: skip
    assert status == 0
    assert text in out
    for words in ("shorten the prompt by", "did you mean /temperature?", "give a number",
                  "--temperature must be 0", "say on or off", "/nothing is no command", "top-k off",
                  "2 prompt tokens, 4 new tokens, the first after "):  # fmt: skip
        assert words in err


def test_of_several_processes_the_first_speaks(toy, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("grok1.machine.processes.is_first", lambda: False)
    typed = ("/help", "/options", "/temperature x", "/nothing", "word " * 9000)
    assert session(toy, capsys, *typed, is_terminal=False) == (1, "", "")
    arguments = argparse.Namespace(program="grok1", checkpoint=None, checkpoints=tmp_path)
    assert generate.checkpoint_of(arguments) == bundled.toy()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("typed", [b"caf\xe9", b'"""\n\xff"""', b"/stop \xff"])
def test_a_session_outlives_bytes_that_are_no_text(toy, capsys, typed):
    given = io.TextIOWrapper(io.BytesIO(typed + b"\nThe first\n"), encoding="utf-8")
    with mock.patch.object(sys, "stdin", given):
        streams.prepare()
        options = generate.GenerationOptions(temperature=0, max_new_tokens=4)
        status = interactive.Session(toy, options, "grok1").run()
    out, err = capsys.readouterr()
    assert (status, out) == (
        1,
        toy.generate("The first", temperature=0, max_new_tokens=4).text + "\n",
    )
    assert f"what is typed must be UTF-8, found the byte 0x{max(typed):02x} at " in err


def test_ctrl_c_ends_an_answer_alone(toy, capsys):
    calls = []

    def once(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return whole(*arguments)

    whole = interactive.answers.answers
    with mock.patch.object(interactive.answers, "answers", once):
        status, out, err = session(toy, capsys, "The first", "The first")
    assert (status, len(calls)) == (0, 2)
    assert "grok1: interrupted" in err
    assert toy.generate("The first", temperature=0, max_new_tokens=4).text in out


def test_a_block_of_several_lines_is_one_prompt(toy, capsys):
    quotes = '"' * 3
    for typed, left_out in (
        ((f"{quotes}/A", f"B:{quotes}"), ""),
        ((quotes, "/A", f"B:{quotes}"), ""),
        ((f"{quotes}/A B{quotes}",), ""),
        ((f"{quotes}/A B{quotes} C",), " C"),
    ):
        prompt = "\n".join(typed).replace(quotes, "").removesuffix(left_out)
        with mock.patch.object(interactive, "prompt_tokens", wraps=interactive.prompt_tokens) as p:
            _, _, err = session(toy, capsys, *typed)
        assert p.call_args.args[0] == prompt
        said = f"what stands after {quotes} is left out: {left_out.strip()!r}"
        assert (said in err) == bool(left_out)


def test_options_change_between_answers(toy, capsys):
    options = {"temperature": 0.5, "seed": 9, "stop": "\n", "max_new_tokens": 7, "min_p": 0.1}
    typed = ["/temperature 0.5", "/seed 9", r"/stop \n", "/max_new_tokens 7", "/min-p 0.1"]
    _, out, err = session(toy, capsys, *typed, "The first", "/options", "/help")
    assert out.startswith(f"{toy.generate('The first', **options).text}\n")
    assert "max-new-tokens 7" in err
    assert "Ctrl-D the program" in err
    _, _, err = session(toy, capsys, "/ignore-eos on", "/add-bos on", "/add-bos off", "/seed 4")
    assert [line.strip() for line in err.splitlines() if " o" in line] == [
        "ignore-eos on", "add-bos on", "add-bos off",
    ]  # fmt: skip


def test_piped_lines_are_prompts_and_a_bad_one_is_the_status(toy, capsys):
    status, out, _ = session(toy, capsys, "The first", "A list", is_terminal=False)
    assert (status, len(out.splitlines()) >= 2) == (0, True)
    status, _, err = session(toy, capsys, "word " * 9000, "A list", is_terminal=False)
    assert status == 1
    assert "shorten the prompt by" in err
