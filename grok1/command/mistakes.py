"""What a command line that nobody understands may have been meant to be."""

import argparse
import difflib
import pathlib
import shlex
from collections.abc import Sequence
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser that says what a mistake may have been meant to be."""

    def __init__(self, **settings):
        super().__init__(
            **settings,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30),
        )

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Ends the program with what is unknown, and the option next to it."""
        message = f"unrecognized arguments: {' '.join(unknown)}"
        options = [name for action in self._actions for name in action.option_strings]
        for word in unknown:
            near = difflib.get_close_matches(word.partition("=")[0], options, n=1)
            if word.startswith("-") and near:
                message += f"; did you mean {near[0]}?"
                break
        else:
            if not unknown[0].startswith("-") and (meant := _option_for(unknown[0], options)):
                message += f"; did you mean {meant} {shlex.quote(unknown[0])}?"
        self.error(message)


def _option_for(word: str, options: Sequence[str]) -> str | None:
    """The option that takes what a word without one seems to be."""
    likely = ("--prompt", "--checkpoint")
    try:
        is_directory = pathlib.Path(word).is_dir()
    except (OSError, ValueError):  # too long, or no path at all
        is_directory = False
    return next((name for name in likely[:: -1 if is_directory else 1] if name in options), None)
