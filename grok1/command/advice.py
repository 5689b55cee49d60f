"""The library's words about its arguments, for people who type options."""

import re
from collections.abc import Collection

_ARGUMENT = re.compile(
    r"""(?<![\w/.'"-])(?P<name>[a-z][a-z_]*)=(?P<value>'[^']*'|"[^"]*"|[\w.-]*)"""
)
_NAME = re.compile(r"(?<![\w/.'\"=-])[a-z]+(?:_[a-z]+)+(?![\w/.'\"=])")
_SUBJECT = re.compile(r"^(?P<name>[a-z_]+)(?= (?:must|takes|needs|of|holds)\b)")


class FileError(ValueError):
    """Something wrong in a file that has words of its own, which are not those of options."""


def in_options(message: str, names: Collection[str]) -> str:
    """Returns a message with `add_bos=True` as `--add-bos` and `top_p must` as `--top-p must`.

    Args:
      message: What the library says.
      names: The arguments that are options of the command.
    """

    def argument(found: re.Match[str]) -> str:
        value = found["value"].strip("'\"")
        return _with_value(found["name"], value) if found["name"] in names else found[0]

    def name(found: re.Match[str]) -> str:
        return _option(found[0]) if found[0] in names else found[0]

    message = _ARGUMENT.sub(argument, message)
    message = _SUBJECT.sub(name, message)
    return _NAME.sub(name, message)


def _with_value(name: str, value: str) -> str:
    return _option(name) if value in ("", "True") else f"{_option(name)} {value}"


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
