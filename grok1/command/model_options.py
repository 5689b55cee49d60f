"""The options of the commands that run one model: generate and serve."""

import argparse
import pathlib
import textwrap

from grok1.command import values


def generate(parser: argparse.ArgumentParser) -> None:
    """Adds those of generate, which `run.py` is too."""
    parser.epilog = textwrap.fill(
        "Without a prompt, text that is piped in is one; without that too, the program shows what "
        "the model makes of a sentence of its own."
    )
    group = parser.add_argument_group("prompts")
    prompts = group.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt", action="append", type=values.text, metavar="TEXT",
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
        "--batch-file",
        metavar="FILE",
        help='a JSON object a line, as {"prompt": "text", "temperature": 0}; prints one for each; '
        "- is standard input",
    )
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
        "--stop",
        action="append",
        type=values.stop,
        metavar="TEXT",
        help=r"text that ends a continuation, with Python's escapes as \n; may be repeated",
    )
    sampling.add_argument("--ignore-eos", action="store_true", help="go on after end of sequence")

    output = parser.add_argument_group("output")
    output.add_argument(
        "--logprobs", type=int, metavar="N", help="with N alternatives a token; default: none"
    )
    output.add_argument("--json", action="store_true", help="print one JSON object a prompt")

    _model(parser)
    _hosts(parser)


def serve(parser: argparse.ArgumentParser) -> None:
    """Adds those of serve."""
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


def _model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument(
        "--checkpoint",
        type=values.directory,
        metavar="DIR",
        help="directory with ckpt-0/ or safetensors; default: ./checkpoints, or the bundled toy",
    )
    model.add_argument(
        "--tokenizer", type=pathlib.Path, metavar="FILE", help="a tokenizer.model kept elsewhere"
    )
    model.add_argument("--mesh", help="DATAxMODEL devices, as 1x8; default: all")
    model.add_argument("--dtype", choices=values.TYPES, help="default: by device")
    model.add_argument("--cache-dtype", choices=values.CACHE_TYPES, help="default: by --dtype")
    model.add_argument("--layers", type=int, metavar="N", help="only the first; default: all")
    model.add_argument(
        "--embedding-dtype", choices=values.TYPES, default="float32", help="default: %(default)s"
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
        "--local-devices",
        type=values.device_ids,
        metavar="0,1,...",
        help="GPUs of the host to take",
    )
