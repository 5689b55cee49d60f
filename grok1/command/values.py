"""What the words of a command line stand for."""

import argparse
import os
import pathlib
import re

from grok1 import bundled
from grok1.command import escapes

TYPES = ("float32", "bfloat16")
CACHE_TYPES = ("float32", "float16", "int8")

_UNREAD = re.compile("[\udc80-\udcff]")  # bytes that were not of the locale's encoding


def directory(words: str) -> pathlib.Path:
    """A directory, or the bundled toy by its name."""
    return bundled.named(words)


def device_ids(words: str) -> list[int]:
    """Numbers with commas between them."""
    try:
        return [int(number) for number in words.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be numbers of devices, as 0,1, found {words!r}"
        ) from None


def text(words: str) -> str:
    """A text: UTF-8 whatever the locale says, unless that has read it."""
    try:
        data = os.fsencode(words)
        return data.decode() if _UNREAD.search(words) else words
    except UnicodeEncodeError:
        return words  # None of a shell's.
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(
            f"must be UTF-8, found the byte 0x{error.object[error.start]:02x} at {error.start}; "
            "convert it, for instance with: iconv -f ISO-8859-1 -t UTF-8"
        ) from None


def stop(words: str) -> str:
    """A text with Python's escapes."""
    try:
        return escapes.decoded(text(words))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
