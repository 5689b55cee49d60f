"""Prompts typed one by one, to a model that stays loaded whatever is typed."""

import contextlib
import dataclasses
import difflib
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from grok1.command import advice, answers, escapes
from grok1.command.report import print_logprobs, print_usage
from grok1.generate.options import GenerationOptions
from grok1.generate.requests import check_options, prompt_tokens
from grok1.machine import processes
from grok1.machine.cache_directory import private_directory
from grok1.model import Model

_HISTORY_LINES = 1000
_QUOTES = '"""'
_UNREAD = re.compile("[\udc80-\udcff]")  # bytes that were not of the input's encoding

_HELP = r"""A line is a prompt; what the model makes of it follows. Three quotes begin a prompt of
several lines, and three quotes end it; all between is taken as it is.
Ctrl-C ends an answer, Ctrl-D the program.

  /options               what is set
  /temperature 0.2       set it; so are /top-p /top-k /min-p /seed /max-new-tokens /logprobs
  /stop \n\n             text that ends an answer, with Python's escapes
  /ignore-eos on         so is /add-bos
  /top-k off             not any more; so are /min-p /stop /logprobs
  /help                  this"""


def _switch(text: str) -> bool:
    words = {"on": True, "off": False}
    if text not in words:
        raise ValueError("say on or off")
    return words[text]


_SETTINGS: dict[str, Callable[[str], Any]] = {
    "max_new_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "seed": int,
    "stop": escapes.decoded,
    "ignore_eos": _switch,
    "logprobs": int,
    "add_bos": _switch,
}
_CAN_BE_OFF = ("top_k", "min_p", "stop", "logprobs")


class _Typed(NamedTuple):
    """What was typed: a prompt, or a command that begins with "/"."""

    text: str
    is_command: bool


class Session:
    """The prompts of one person, and the options that they change."""

    def __init__(self, model: Model, options: GenerationOptions, program: str):
        self._model, self._options, self._program = model, options, program
        self._is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._failed = False

    def run(self) -> int:
        """Answers until the input ends; returns the exit status, 1 if a piped prompt failed."""
        if not self._is_terminal:
            for typed in self._inputs():
                self._serve(typed)
            return int(self._failed)
        print("/help says what can be typed; Ctrl-D ends.", file=sys.stderr, flush=True)
        with _line_editing():
            for typed in self._inputs():
                self._serve(typed)
        return 0

    def _inputs(self) -> Iterator[_Typed]:
        while (line := self._line("> ")) is not None:
            if line.startswith(_QUOTES):
                text = self._block(line.removeprefix(_QUOTES))
                if text is not None:
                    yield _Typed(text, False)
            elif line.strip():
                yield _Typed(line, line.startswith("/"))

    def _block(self, text: str) -> str | None:
        """The lines up to the next three quotes; None if Ctrl-C takes them back."""
        while _QUOTES not in text:
            line = self._line("... ")
            if line is None:
                return None if self._is_terminal else text
            text += "\n" + line
        text, _, rest = text.partition(_QUOTES)
        if rest.strip():
            self._say(f"what stands after {_QUOTES} is left out: {rest.strip()!r}")
        return text

    def _line(self, mark: str) -> str | None:
        """One line without its end; None at the end of the input, and for Ctrl-C in a block."""
        while True:
            try:
                return input(mark if self._is_terminal else "")
            except EOFError:
                if self._is_terminal:
                    print()
                return None
            except KeyboardInterrupt:
                if not self._is_terminal:
                    raise
                print()
                if mark != "> ":
                    return None

    def _serve(self, typed: _Typed) -> None:
        # Of several processes, each would have to be interrupted, or fail, at the same place.
        stays = jax.process_count() == 1
        try:
            _check_was_read(typed.text)
            self._command(typed.text) if typed.is_command else self._answer(typed.text)
        except KeyboardInterrupt:
            if not (stays and self._is_terminal):
                raise
            print(flush=True)
            self._say("interrupted")
        except (ValueError, TypeError) as error:
            self._fail(error)
        except RuntimeError as error:
            if not stays:
                raise
            self._fail(error)

    def _answer(self, text: str) -> None:
        model, tokenizer = self._model, self._model.tokenizer
        assert tokenizer is not None  # the command has checked it
        tokens = prompt_tokens(text, tokenizer, model.config, self._options)
        for piece, answer in answers.answers(model, [tokens], self._options):
            print(piece, end="", flush=True)
            if answer is not None:
                print(flush=True)
                print_logprobs(tokenizer, answer)
                print_usage(self._program, model, [answer])

    def _command(self, typed: str) -> None:
        word, _, value = typed[1:].partition(" ")
        name, value = word.replace("-", "_"), value.strip()
        if name == "help":
            _tell(_HELP)
        elif name == "options":
            for each in _SETTINGS:
                self._show(each)
        elif name in _SETTINGS:
            if value:
                self._set(name, value)
            self._show(name)
        else:
            near = difflib.get_close_matches(name, [*_SETTINGS, "help", "options"], n=1)
            hint = f"did you mean /{_dashed(near[0])}?" if near else "/help lists them"
            raise ValueError(
                f"/{word} is no command; {hint} (a prompt that begins with / goes in {_QUOTES})"
            )

    def _set(self, name: str, value: str) -> None:
        if value == "off" and name in _CAN_BE_OFF:
            found = None
        else:
            try:
                found = _SETTINGS[name](value)
            except ValueError as error:
                in_words: dict[Any, str] = {int: "a whole number", float: "a number"}
                number = in_words.get(_SETTINGS[name])
                reason = f"give {number}" if number else str(error)
                raise ValueError(f"/{_dashed(name)} {value}: {reason}") from None
        options = dataclasses.replace(self._options, **{name: found})
        check_options(options, self._model.config, self._model.tokenizer)
        self._options = options

    def _show(self, name: str) -> None:
        value = getattr(self._options, name)
        words = {None: "off", True: "on", False: "off"}
        shown = words[value] if value is None or isinstance(value, bool) else repr(value)
        _tell(f"{_dashed(name):>16} {shown}")

    def _fail(self, error: Exception) -> None:
        self._failed = True
        self._say(advice.in_options(str(error), _SETTINGS))

    def _say(self, message: str) -> None:
        _tell(f"{self._program}: {message}")


def _tell(text: str) -> None:
    """Prints to stderr; of several processes, which are given the same lines, the first does."""
    if processes.is_first():
        print(text, file=sys.stderr, flush=True)


def _check_was_read(text: str) -> None:
    if found := _UNREAD.search(text):
        raise ValueError(
            f"what is typed must be {sys.stdin.encoding.upper()}, found the byte "
            f"0x{ord(found[0]) - 0xDC00:02x} at {found.start()}; type or convert it again"
        )


def _dashed(name: str) -> str:
    return name.replace("_", "-")


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """Gives `input` the keys of a shell, and a history that the next session finds again."""
    try:
        import readline
    except ImportError:  # some Pythons are built without
        yield
        return
    readline.set_auto_history(True)
    kept: pathlib.Path | None = None
    with contextlib.suppress(OSError, RuntimeError):
        kept = private_directory() / "history"
        readline.read_history_file(kept)
    try:
        yield
    finally:
        if kept is not None:
            readline.set_history_length(_HISTORY_LINES)
            with contextlib.suppress(OSError):
                readline.write_history_file(kept)
