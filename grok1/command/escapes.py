r"""Text typed in a shell, where `\n` is two characters."""

import codecs
import re

_ESCAPE = re.compile(
    r"""\\(?:[\\'"abfnrtv]|[0-7]{1,3}|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|N\{[^}]+\}"""
    r"|(?P<unknown>.?))",
    re.DOTALL,
)


def decoded(text: str) -> str:
    r"""Returns a text with its escapes as those of a Python string: "\\n" is a line end.

    Raises:
      ValueError: If there is a backslash that begins none of them, or one for no character.
    """

    def character(found: re.Match[str]) -> str:
        if found["unknown"] is not None:
            raise ValueError(
                rf"{text!r} holds {found[0]}, which is no escape of Python's; they are \n, \t, "
                r"\xhh, \uhhhh and so on, and a backslash is \\"
            )
        try:
            one = codecs.decode(found[0], "unicode_escape")
            one.encode()
        except UnicodeError:
            raise ValueError(f"{text!r} holds {found[0]}, which is no character") from None
        return one

    return _ESCAPE.sub(character, text)
