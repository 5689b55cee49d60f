"""The command line: `grok1 --help`, or `python -m grok1 --help`."""

import sys


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    try:
        from grok1.command import main as command

        return command.main(arguments)
    except KeyboardInterrupt:
        # Before the command's own care begins.
        return 130


if __name__ == "__main__":
    sys.exit(main())
