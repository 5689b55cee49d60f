"""The commands and their options, without JAX: help and mistakes are answered at once."""

import argparse
import os
import pathlib
import re
import textwrap
from collections.abc import Sequence

from grok1 import bundled
from grok1.command import escapes
from grok1.command.mistakes import Parser
from grok1.version import __version__

# What the library's own modules take, which are not imported before they are needed.
FORMATS = ("grok1", "safetensors", "int4", "gguf")
EMBEDDING_TYPES = ("f32", "f16", "bf16", "q8_0")
DEVICES = ("a100-80", "h100", "h200", "b200", "mi300x", "tpu-v5p", "tpu-v6e", "cpu")

_UNREAD = re.compile("[\udc80-\udcff]")  # bytes that were not of the locale's encoding
_TYPES = ("float32", "bfloat16")
_CACHE_TYPES = ("float32", "float16", "int8")
_COMMANDS = {
    "generate": "Continue a prompt, a file of prompts, or prompts typed one by one.",
    "serve": "Answer requests over HTTP, in OpenAI's protocol.",
    "plan": "Say whether and how a model fits some devices, and how fast it can be.",
    "verify": "Check every file of a checkpoint and list what is wrong.",
    "inspect": "Show the tensors of a checkpoint and their statistics.",
    "convert": "Write a checkpoint in another format.",
    "compare": "Say how far two models, or saved logits, are apart over a text.",
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


def _directory(text: str) -> pathlib.Path:
    return bundled.named(text)


def _device_ids(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be numbers of devices, as 0,1, found {text!r}"
        ) from None


def _text(text: str) -> str:
    """The text of an argument: UTF-8 whatever the locale says, unless that has read it."""
    try:
        data = os.fsencode(text)
        return data.decode() if _UNREAD.search(text) else text
    except UnicodeEncodeError:
        return text  # None of a shell's.
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(
            f"must be UTF-8, found the byte 0x{error.object[error.start]:02x} at {error.start}; "
            "convert it, for instance with: iconv -f ISO-8859-1 -t UTF-8"
        ) from None


def _stop(text: str) -> str:
    try:
        return escapes.decoded(_text(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _generate(parser: argparse.ArgumentParser) -> None:
    parser.epilog = textwrap.fill(
        "Without a prompt, text that is piped in is one; without that too, the program shows what "
        "the model makes of a sentence of its own."
    )
    group = parser.add_argument_group("prompts")
    prompts = group.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt", action="append", type=_text, metavar="TEXT",
        help="text to continue; several run as a batch",
    )  # fmt: skip
    prompts.add_argument(
        "--prompt-file", metavar="FILE", help="UTF-8 text to continue, to its last line end; - is "
        "standard input"
    )  # fmt: skip
    prompts.add_argument(
        "--interactive", action="store_true", help="prompts typed one by one; /help there says more"
    )
    prompts.add_argument(
        "--batch-file", metavar="FILE",
        help='a JSON object a line, as {"prompt": "text", "temperature": 0}; prints one for each; '
        "- is standard input",
    )  # fmt: skip
    group.add_argument("--add-bos", action="store_true", help="begin prompts with [BOS]")

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--max-new-tokens", type=int, default=100, metavar="N", help="default: %(default)s"
    )
    sampling.add_argument(
        "--temperature", type=float, default=0.7, metavar="T", help="0 is greedy; default: 0.7"
    )
    sampling.add_argument(
        "--top-p", type=float, default=0.95, metavar="P", help="1 is off; default: %(default)s"
    )
    sampling.add_argument("--top-k", type=int, metavar="K", help="default: off")
    sampling.add_argument(
        "--min-p", type=float, metavar="P", help="of the most probable token's; default: off"
    )
    sampling.add_argument(
        "--seed", type=int, default=13, metavar="N", help="of the draws; default: %(default)s"
    )
    sampling.add_argument(
        "--stop", action="append", type=_stop, metavar="TEXT",
        help=r"text that ends a continuation, with Python's escapes as \n; may be repeated",
    )  # fmt: skip
    sampling.add_argument("--ignore-eos", action="store_true", help="go on after end of sequence")

    output = parser.add_argument_group("output")
    output.add_argument(
        "--logprobs", type=int, metavar="N", help="with N alternatives a token; default: none"
    )
    output.add_argument("--json", action="store_true", help="print one JSON object a prompt")

    _model(parser)
    _hosts(parser)


def _model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument(
        "--checkpoint",
        type=_directory,
        metavar="DIR",
        help="directory with ckpt-0/ or safetensors; default: ./checkpoints, or the bundled toy",
    )
    model.add_argument(
        "--tokenizer", type=pathlib.Path, metavar="FILE", help="a tokenizer.model kept elsewhere"
    )
    model.add_argument("--mesh", help="DATAxMODEL devices, as 1x8; default: all")
    model.add_argument("--dtype", choices=_TYPES, help="default: by device")
    model.add_argument("--cache-dtype", choices=_CACHE_TYPES, help="default: by --dtype")
    model.add_argument("--layers", type=int, metavar="N", help="only the first; default: all")
    model.add_argument(
        "--embedding-dtype", choices=_TYPES, default="float32", help="default: %(default)s"
    )
    model.add_argument(
        "--offload",
        choices=["auto", "none", "host", "disk"],
        default="auto",
        help="where experts are; default: on disk if they do not fit",
    )
    model.add_argument("--memory", metavar="16GB", help="for the process, with experts on disk")
    model.add_argument(
        "--router-softcap",
        type=float,
        metavar="CAP",
        help="cap the router's logits; default: as the configuration says",
    )
    model.add_argument(
        "--renormalize-gates",
        action=argparse.BooleanOptionalAction,
        help="divide expert weights by their sum; default: as the configuration says",
    )


def _hosts(parser: argparse.ArgumentParser) -> None:
    hosts = parser.add_argument_group("several hosts (docs/many-hosts.md)")
    hosts.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of process 0, if no launcher says it"
    )
    hosts.add_argument("--num-processes", type=int, metavar="N", help="with --coordinator")
    hosts.add_argument("--process-id", type=int, metavar="N", help="with --coordinator")
    hosts.add_argument(
        "--local-devices", type=_device_ids, metavar="0,1,...", help="GPUs of the host to take"
    )


def _serve(parser: argparse.ArgumentParser) -> None:
    parser.epilog = textwrap.fill(
        "Takes the requests of OpenAI's clients at http://HOST:PORT/v1, and shows a page at "
        "http://HOST:PORT/. docs/serving.md says more."
    )
    http = parser.add_argument_group("where, and for whom")
    http.add_argument("--host", default="127.0.0.1", help="to listen at; default: %(default)s")
    http.add_argument("--port", type=int, default=8000, help="0 is any; default: %(default)s")
    http.add_argument("--name", default="grok-1", help="of the model; default: %(default)s")
    http.add_argument(
        "--api-key", action="append", default=[], metavar="KEY", help="may be repeated"
    )
    http.add_argument(
        "--api-key-file", type=pathlib.Path, metavar="FILE", help="a key a line; read as it changes"
    )
    http.add_argument("--metrics-key", metavar="KEY", help="of /metrics; default: anybody reads it")
    http.add_argument(
        "--no-auth", action="store_true", help="listen to other machines without a key"
    )
    http.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME",
        help="a name that the server is reached by, behind a proxy of this machine",
    )  # fmt: skip
    http.add_argument(
        "--cors", action="append", default=[], metavar="ORIGIN", help="whose pages may ask"
    )
    http.add_argument("--no-page", action="store_true", help="no page at /")

    protocol = parser.add_argument_group("what clients may ask")
    protocol.add_argument(
        "--chat-template", metavar="FILE", help="in Jinja's language, or transcript; default: none"
    )
    protocol.add_argument(
        "--add-bos", action="store_true", help="[BOS] first where add_special_tokens is true"
    )
    protocol.add_argument(
        "--ignore-unknown", action="store_true", help="take fields that are not known"
    )
    protocol.add_argument("--max-tokens", type=int, metavar="N", help="most that may be asked for")
    protocol.add_argument(
        "--max-body", type=int, default=4 << 20, metavar="BYTES", help="default: 4 MiB"
    )
    protocol.add_argument(
        "--request-timeout", type=float, default=600.0, metavar="S",
        help="after which a request that is not over is given up; default: %(default)s",
    )  # fmt: skip
    protocol.add_argument(
        "--drain", type=float, default=30.0, metavar="S",
        help="that requests have to end once the program is told to; default: %(default)s",
    )  # fmt: skip

    scheduling = parser.add_argument_group("requests side by side")
    scheduling.add_argument(
        "--max-slots", type=int, metavar="N", help="default: up to 16, as memory allows"
    )
    scheduling.add_argument(
        "--capacity", type=int, metavar="TOKENS",
        help="of a request, rounded up to a power of two; default: the context",
    )  # fmt: skip
    scheduling.add_argument(
        "--max-queue", type=int, default=256, metavar="N", help="that wait; default: %(default)s"
    )
    scheduling.add_argument(
        "--max-stall", type=float, default=0.5, metavar="S",
        help="longest pause that a prompt makes for others; default: %(default)s",
    )  # fmt: skip
    scheduling.add_argument(
        "--chunk", type=int, choices=[16, 64, 256, 1024], help="of prompts; default: by --max-stall"
    )
    scheduling.add_argument(
        "--step-timeout", type=float, default=60.0, metavar="S",
        help="after which a step that has not ended makes /health 503; default: %(default)s",
    )  # fmt: skip
    scheduling.add_argument(
        "--prefix-tokens", type=int, metavar="N",
        help="of prompts to keep for others that begin alike; default: half of the slots'",
    )  # fmt: skip
    scheduling.add_argument(
        "--host-prefix-tokens", type=int, metavar="N",
        help="of these to keep in the host's memory behind the devices'; default: as memory "
        "allows, on a CPU 0",
    )  # fmt: skip
    _model(parser)
    _hosts(parser)


def _plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory", type=_directory, nargs="?", help="a model's, for its sizes; default: Grok-1"
    )
    parser.add_argument(
        "--devices", type=int, metavar="N", help="default: those present; of --device 8, of cpu 1"
    )
    parser.add_argument("--memory", type=float, metavar="GB", help="of each; of a CPU, all of it")
    parser.add_argument("--device", choices=DEVICES, help="what they are")
    parser.add_argument("--mesh", help="DATAxMODEL devices, as 1x8; default: all")
    parser.add_argument("--batch", type=int, default=1, help="prompts, up to 32; default: 1")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="default: the model's")
    parser.add_argument("--dtype", choices=_TYPES, help="default: by device")
    parser.add_argument("--cache-dtype", choices=_CACHE_TYPES, help="default: by --dtype")
    parser.add_argument("--bandwidth", type=float, metavar="GB/s", help="of their memory")
    parser.add_argument(
        "--disk", type=float, metavar="GB/s", help="what it delivers; default: 2, or as measured"
    )
    parser.add_argument("--layers", type=int, metavar="N", help="only the first; default: all")
    parser.add_argument(
        "--embedding-dtype", choices=_TYPES, default="float32", help="default: %(default)s"
    )
    parser.add_argument(
        "--weights", choices=["int8", "int4"], help="of the experts; default: as the directory has"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=_directory, help="directory with ckpt-0/ or safetensors")
    parser.add_argument("--deep", action="store_true", help="read the weights too; SHA-256 of each")
    parser.add_argument(
        "--manifest",
        type=pathlib.Path,
        metavar="FILE",
        help="checksums to compare and add to with --deep, as sha256sum writes them; default: "
        "SHA256SUMS in the directory",
    )


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=_directory, help="directory with ckpt-0/ or safetensors")
    parser.add_argument("--layer", type=int, metavar="N", help="only this layer")
    parser.add_argument("--full", action="store_true", help="statistics of all rows, not a sample")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=_directory, help="directory that holds the checkpoint")
    parser.add_argument("target", type=pathlib.Path, help="new directory; for gguf a new file")
    parser.add_argument(
        "--to",
        choices=FORMATS,
        required=True,
        help="int4: safetensors with 4-bit experts; gguf: for llama.cpp, and no way back",
    )
    parser.add_argument(
        "--dtype", choices=["int8", "bfloat16"], help="of the weights; default: as in the source"
    )
    parser.add_argument(
        "--emb", choices=EMBEDDING_TYPES, help="of the embedding in gguf; default: f32"
    )
    parser.add_argument(
        "--calibrate",
        metavar="TEXT",
        help='with int4: file whose text the weights are rounded for; "-" for standard input; for '
        "Grok-1 64,000 tokens do, with 10 GB of memory",
    )


def _compare(parser: argparse.ArgumentParser) -> None:
    for side in "ab":
        parser.add_argument(
            side,
            type=_directory,
            metavar=side.upper(),
            help="a model's directory, or logits [T, V] in .npz (with tokens) or .npy",
        )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", metavar="FILE", help="the text, in UTF-8; - is standard input")
    source.add_argument("--prompt", type=_text, metavar="TEXT", help="the text itself")
    for side in "ab":
        which = f"of {side.upper()}"
        parser.add_argument(f"--dtype-{side}", choices=_TYPES, help=which)
        parser.add_argument(f"--mesh-{side}", help=f"{which}, as 1x8; default: all")
        parser.add_argument(f"--cache-dtype-{side}", choices=_CACHE_TYPES, help=which)
        parser.add_argument(
            f"--router-softcap-{side}",
            type=float,
            metavar="CAP",
            help=f"cap the router's logits {which}; default: as its configuration says",
        )
        parser.add_argument(
            f"--renormalize-gates-{side}",
            action=argparse.BooleanOptionalAction,
            help=f"divide expert weights {which} by their sum; default: as its configuration says",
        )
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="default: 5")
    parser.add_argument(
        "--force-experts",
        action="store_true",
        help="run B again with A's experts: its divergence without near ties of the router",
    )
    parser.add_argument(
        "--save-logits", type=pathlib.Path, metavar="FILE", help="write A's to a .npz, for later"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


_ADD = {
    "generate": _generate,
    "serve": _serve,
    "plan": _plan,
    "verify": _verify,
    "inspect": _inspect,
    "convert": _convert,
    "compare": _compare,
}
