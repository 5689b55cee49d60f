"""Samples from a Grok-1 checkpoint: `python run.py`, or `python run.py --help`."""

import argparse
import dataclasses
import io
import json
import pathlib
import sys

import grok1

CHECKPOINTS = pathlib.Path(__file__).parent / "checkpoints"
PROMPT = "The answer to life the universe and everything is of course"
NO_CHECKPOINT = (
    "run.py: no checkpoints/ckpt-0 here, so this is the bundled toy; for the real model put the "
    "318 GB of huggingface.co/xai-org/grok-1 (its ckpt-0/) into checkpoints/"
)


def device_ids(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Continue a prompt with a Grok-1 model.")
    parser.add_argument("--checkpoint", type=pathlib.Path, help="directory that holds ckpt-0/")
    parser.add_argument("--tokenizer", type=pathlib.Path, help="a tokenizer.model kept elsewhere")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", default=PROMPT, help="text to continue")
    source.add_argument("--prompt-file", type=pathlib.Path, help="file with the text to continue")
    source.add_argument("--interactive", action="store_true", help="a prompt from each input line")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--stop", action="append", help=r"text that ends it; \n is a new line")
    parser.add_argument("--mesh", help="DATAxMODEL devices, as 1x8; default: all")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: by device")
    parser.add_argument("--cache-dtype", choices=["float32", "float16", "int8"])
    parser.add_argument("--layers", type=int, metavar="N", help="only the first ones; default: all")
    parser.add_argument("--embedding-dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--offload", choices=["auto", "none", "host", "disk"], default="auto")
    parser.add_argument("--memory", metavar="16GB", help="for the process, with experts on disk")
    parser.add_argument("--logprobs", type=int, metavar="N", help="with N alternatives a token")
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0, if no launcher says it")
    for option in ("--num-processes", "--process-id"):
        parser.add_argument(option, type=int, help="with --coordinator; see docs/many-hosts.md")
    parser.add_argument(
        "--local-devices", type=device_ids, metavar="0,1,...", help="GPUs of the host to take"
    )
    return parser.parse_args()


def complete(model: grok1.Model, prompt: str, arguments: argparse.Namespace) -> None:
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "logprobs")
    stop = [text.replace("\\n", "\n") for text in arguments.stop or []]
    stream = model.stream(prompt, stop=stop, **{name: getattr(arguments, name) for name in names})
    # With the first piece, not before: what compiles or loads until then says so on stderr.
    echo = "" if arguments.json or arguments.interactive else prompt
    for piece in stream:
        print("" if arguments.json else echo + piece, end="", flush=True)
        echo = ""
    completion, tokenizer = stream.completion, model.tokenizer
    assert completion is not None
    assert tokenizer is not None
    if arguments.json:
        print(json.dumps({"prompt": prompt, **dataclasses.asdict(completion)}), flush=True)
        return
    print(echo)
    for token, logprob, alternatives in zip(
        completion.tokens, completion.logprobs or [], completion.top_logprobs or [], strict=False
    ):
        best = (f"{tokenizer.piece(t)} {p:.2f}" for t, p in alternatives.items())
        print(f"{tokenizer.piece(token):>16} {logprob:7.2f}   {'  '.join(best)}")


def main() -> None:
    arguments = parse_arguments()
    names = ("coordinator", "num_processes", "process_id", "local_devices")
    if grok1.initialize_distributed(*(getattr(arguments, name) for name in names)) > 0:
        sys.stdout = io.StringIO()  # one process prints
    checkpoint = arguments.checkpoint or CHECKPOINTS
    if not arguments.checkpoint and not (CHECKPOINTS / "ckpt-0").exists():
        print(NO_CHECKPOINT, file=sys.stderr)
        checkpoint = CHECKPOINTS / "toy"
    names = ("mesh", "dtype", "cache_dtype", "tokenizer", "layers", "embedding_dtype", "offload",
             "memory")  # fmt: skip
    model = grok1.load(checkpoint, **{name: getattr(arguments, name) for name in names})
    file, prompts = arguments.prompt_file, [arguments.prompt]
    if file or arguments.interactive:
        lines = iter(lambda: input("> " if sys.stdin.isatty() else ""), "")
        prompts = [file.read_text(encoding="utf-8")] if file else lines
    for prompt in prompts:
        complete(model, prompt, arguments)
        if stats := model.offload_stats:
            print(f"run.py: {stats}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nrun.py: interrupted")
    except EOFError:
        pass
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"run.py: {error}")
