"""The commands and their options, without JAX: help and mistakes are answered at once."""

import argparse
from collections.abc import Sequence

from grok1.command import model_options, tool_options
from grok1.command.mistakes import Parser
from grok1.version import __version__

_COMMANDS = {
    "generate": "Continue a prompt, a file of prompts, or prompts typed one by one.",
    "serve": "Answer requests over HTTP, in OpenAI's protocol.",
    "plan": "Say whether and how a model fits some devices, and how fast it can be.",
    "verify": "Check every file of a checkpoint and list what is wrong.",
    "inspect": "Show the tensors of a checkpoint and their statistics.",
    "convert": "Write a checkpoint in another format.",
    "compare": "Say how far two models, or saved logits, are apart over a text.",
}
_ADD = {
    "generate": model_options.generate,
    "serve": model_options.serve,
    "plan": tool_options.plan,
    "verify": tool_options.verify,
    "inspect": tool_options.inspect,
    "convert": tool_options.convert,
    "compare": tool_options.compare,
}


def parse(arguments: Sequence[str], program: str, command: str | None = None) -> argparse.Namespace:
    """Returns the options of a command line, with `command` and `parser` beside them.

    Args:
      arguments: What follows the program's name.
      program: That name.
      command: The command that the program is, where it is one alone.
    """
    if command is not None:
        parser = Parser(prog=program, description=_COMMANDS[command])
        _ADD[command](parser)
        _version(parser)
        parser.set_defaults(command=command, parser=parser)
    else:
        parser = Parser(
            prog=program, description="JAX inference for the Grok-1 checkpoint, and its tools."
        )
        _version(parser)
        commands = parser.add_subparsers(metavar="COMMAND", dest="command")
        for name, text in _COMMANDS.items():
            added = commands.add_parser(name, help=text, description=text)
            _ADD[name](added)
            added.set_defaults(parser=added)
    parsed, unknown = parser.parse_known_args(arguments)
    if parsed.command is None:
        if not unknown:
            parser.exit(2, parser.format_help())
        parser.refuse(unknown)
    if unknown:
        parsed.parser.refuse(unknown)
    if parsed.command == "generate" and parsed.interactive and parsed.json:
        parsed.parser.error("argument --json: not allowed with argument --interactive")
    if parsed.command == "verify" and parsed.manifest is not None and not parsed.deep:
        parsed.parser.error("argument --manifest: compared with what --deep reads; give both")
    return parsed


def _version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", action="version", version=f"grok1 {__version__}")
