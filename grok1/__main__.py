"""Tools for checkpoints: `python -m grok1 --help`."""

import argparse
import json
import pathlib
import sys

import jax

from grok1 import conversion, gguf_file, inspection, verification


def _verify(arguments: argparse.Namespace) -> int:
    report = verification.verify(
        arguments.directory, deep=arguments.deep, sums_file=arguments.manifest
    )
    print("\n".join(report.lines()))
    return 0 if report.is_good else 1


def _inspect(arguments: argparse.Namespace) -> int:
    report = inspection.inspect(arguments.directory, layer=arguments.layer, full=arguments.full)
    print(json.dumps(report.to_dict()) if arguments.json else "\n".join(report.lines()))
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    notes = conversion.convert(
        arguments.source,
        arguments.target,
        to=arguments.to,
        dtype=arguments.dtype,
        embedding=arguments.emb,
    )
    print("\n".join([f"{arguments.target}: written and read back", *notes]))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m grok1", description="Tools for checkpoints.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, text):
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    verify = command("verify", _verify, "Check every file of a checkpoint and list what is wrong.")
    verify.add_argument("directory", type=pathlib.Path, help="directory that holds ckpt-0/")
    verify.add_argument("--deep", action="store_true", help="read the weights too; SHA-256 of each")
    verify.add_argument(
        "--manifest",
        type=pathlib.Path,
        metavar="FILE",
        help="checksums as sha256sum writes them; default: SHA256SUMS in the directory",
    )

    inspect = command("inspect", _inspect, "Show the tensors of a checkpoint and their statistics.")
    inspect.add_argument("directory", type=pathlib.Path, help="directory that holds ckpt-0/")
    inspect.add_argument("--layer", type=int, metavar="N", help="only this layer")
    inspect.add_argument("--full", action="store_true", help="statistics of all rows, not a sample")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")

    convert = command("convert", _convert, "Write a checkpoint in another format.")
    convert.add_argument("source", type=pathlib.Path, help="directory that holds the checkpoint")
    convert.add_argument("target", type=pathlib.Path, help="new directory; for gguf a new file")
    convert.add_argument("--to", choices=conversion.FORMATS, required=True)
    convert.add_argument(
        "--dtype", choices=["int8", "bfloat16"], help="of the weights; default: as in the source"
    )
    convert.add_argument(
        "--emb", choices=gguf_file.EMBEDDING_TYPES, help="of the embedding in gguf; default: f32"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    parsed = _parser().parse_args(arguments)
    # These commands only read shapes from the model; an accelerator is left to who needs it.
    jax.config.update("jax_platforms", "cpu")
    try:
        return parsed.run(parsed)
    except KeyboardInterrupt:
        print("\ngrok1: interrupted; the same command starts or continues it", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"grok1: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
