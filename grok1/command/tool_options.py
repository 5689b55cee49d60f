"""The options of the commands about checkpoints: plan, verify, inspect, convert and compare."""

import argparse
import pathlib

from grok1.command import values

# What the library's own modules take, which are not imported before they are needed.
FORMATS = ("grok1", "safetensors", "int4", "gguf")
EMBEDDING_TYPES = ("f32", "f16", "bf16", "q8_0")
DEVICES = ("a100-80", "h100", "h200", "b200", "mi300x", "tpu-v5p", "tpu-v6e", "cpu")


def plan(parser: argparse.ArgumentParser) -> None:
    """Adds those of plan."""
    parser.add_argument(
        "directory",
        type=values.directory,
        nargs="?",
        help="a model's, for its sizes; default: Grok-1",
    )
    parser.add_argument(
        "--devices", type=int, metavar="N", help="default: those present; of --device 8, of cpu 1"
    )
    parser.add_argument("--memory", type=float, metavar="GB", help="of each; of a CPU, all of it")
    parser.add_argument("--device", choices=DEVICES, help="what they are")
    parser.add_argument("--mesh", help="DATAxMODEL devices, as 1x8; default: all")
    parser.add_argument("--batch", type=int, default=1, help="prompts, up to 32; default: 1")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="default: the model's")
    parser.add_argument("--dtype", choices=values.TYPES, help="default: by device")
    parser.add_argument("--cache-dtype", choices=values.CACHE_TYPES, help="default: by --dtype")
    parser.add_argument("--bandwidth", type=float, metavar="GB/s", help="of their memory")
    parser.add_argument(
        "--disk", type=float, metavar="GB/s", help="what it delivers; default: 2, or as measured"
    )
    parser.add_argument("--layers", type=int, metavar="N", help="only the first; default: all")
    parser.add_argument(
        "--embedding-dtype", choices=values.TYPES, default="float32", help="default: %(default)s"
    )
    parser.add_argument(
        "--weights", choices=["int8", "int4"], help="of the experts; default: as the directory has"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def verify(parser: argparse.ArgumentParser) -> None:
    """Adds those of verify."""
    parser.add_argument(
        "directory", type=values.directory, help="directory with ckpt-0/ or safetensors"
    )
    parser.add_argument("--deep", action="store_true", help="read the weights too; SHA-256 of each")
    parser.add_argument(
        "--manifest",
        type=pathlib.Path,
        metavar="FILE",
        help="checksums to compare and add to with --deep, as sha256sum writes them; default: "
        "SHA256SUMS in the directory",
    )


def inspect(parser: argparse.ArgumentParser) -> None:
    """Adds those of inspect."""
    parser.add_argument(
        "directory", type=values.directory, help="directory with ckpt-0/ or safetensors"
    )
    parser.add_argument("--layer", type=int, metavar="N", help="only this layer")
    parser.add_argument("--full", action="store_true", help="statistics of all rows, not a sample")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def convert(parser: argparse.ArgumentParser) -> None:
    """Adds those of convert."""
    parser.add_argument("source", type=values.directory, help="directory that holds the checkpoint")
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


def compare(parser: argparse.ArgumentParser) -> None:
    """Adds those of compare."""
    for side in "ab":
        parser.add_argument(
            side,
            type=values.directory,
            metavar=side.upper(),
            help="a model's directory, or logits [T, V] in .npz (with tokens) or .npy",
        )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", metavar="FILE", help="the text, in UTF-8; - is standard input")
    source.add_argument("--prompt", type=values.text, metavar="TEXT", help="the text itself")
    for side in "ab":
        which = f"of {side.upper()}"
        parser.add_argument(f"--dtype-{side}", choices=values.TYPES, help=which)
        parser.add_argument(f"--mesh-{side}", help=f"{which}, as 1x8; default: all")
        parser.add_argument(f"--cache-dtype-{side}", choices=values.CACHE_TYPES, help=which)
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
