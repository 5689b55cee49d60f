"""`grok1 generate`: everything is checked, then the model is loaded, then it runs."""

import argparse
import dataclasses
import io
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax

from grok1 import bundled
from grok1.checkpoint.directory import is_safetensors, load_config, tokenizer_path
from grok1.command import answers, batch_file, interactive, streams
from grok1.command.report import print_logprobs, print_usage
from grok1.config import ModelConfig
from grok1.factory import load
from grok1.generate.options import GenerationOptions
from grok1.generate.requests import check_options, prompt_tokens
from grok1.machine import processes
from grok1.machine.background import interruptible
from grok1.machine.startup import start_jax
from grok1.model import Model
from grok1.tokenizer import Tokenizer

PROMPT = "The answer to life the universe and everything is of course"

_SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop",
             "ignore_eos", "logprobs", "add_bos")  # fmt: skip
MODEL_OPTIONS = ("mesh", "dtype", "cache_dtype", "layers", "embedding_dtype", "offload", "memory",
          "router_softcap", "renormalize_gates")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Job:
    """What a command line asks for, checked against the files that it names.

    Attributes:
      checkpoint: The model's directory.
      config: Its configuration.
      tokenizer: Its tokenizer.
      options: Those of every prompt.
      texts: The prompts' texts; none where lines are given or typed.
      tokens: Their token ids.
      lines: Of the batch file; None without one.
    """

    checkpoint: pathlib.Path
    config: ModelConfig
    tokenizer: Tokenizer
    options: GenerationOptions
    texts: Sequence[str] = ()
    tokens: Sequence[list[int]] = ()
    lines: list[batch_file.Line] | None = None


def run(arguments: argparse.Namespace) -> int:
    """Runs the command and returns the exit status."""
    names = ("coordinator", "num_processes", "process_id", "local_devices")
    if processes.initialize_distributed(*(getattr(arguments, name) for name in names)) > 0:
        sys.stdout = io.StringIO()  # one process prints
    with processes.together():
        job = _job(arguments)
    options = {name: getattr(arguments, name) for name in MODEL_OPTIONS}
    with interruptible():
        model = load(job.checkpoint, tokenizer=job.tokenizer, **options)
    if arguments.interactive:
        return interactive.Session(model, job.options, arguments.program).run()
    told = _tell_lines(model, job) if job.lines else _tell(model, job, arguments.json)
    if not arguments.json or job.lines:
        print_usage(arguments.program, model, told)
    return 0


def _job(arguments: argparse.Namespace) -> _Job:
    """Checks everything that can be wrong before a weight is read."""
    given = {name: getattr(arguments, name) for name in _SAMPLING}
    options = GenerationOptions(**given)
    checkpoint = checkpoint_of(arguments)
    config = load_config(checkpoint).first_layers(arguments.layers)
    path = arguments.tokenizer or tokenizer_path(checkpoint, config)
    if path is None:
        raise ValueError(f"{checkpoint}: there is no tokenizer.model; give one with --tokenizer")
    tokenizer = Tokenizer.load(path)
    check_options(options, config, tokenizer)

    def encode(prompt: Any, options: GenerationOptions) -> list[int]:
        check_options(options, config, tokenizer)
        return prompt_tokens(prompt, tokenizer, config, options)

    job = _Job(checkpoint, config, tokenizer, options)
    if arguments.interactive:
        return job
    if arguments.batch_file is not None:
        name = "standard input" if arguments.batch_file == "-" else arguments.batch_file
        text = streams.read_text(arguments.batch_file)
        return dataclasses.replace(job, lines=batch_file.parse(text, name, options, encode))
    texts = _texts(arguments)
    return dataclasses.replace(job, texts=texts, tokens=[encode(text, options) for text in texts])


def checkpoint_of(arguments: argparse.Namespace) -> pathlib.Path:
    """Returns the directory of the model that is meant, and says so if it is the toy."""
    if arguments.checkpoint is not None:
        return arguments.checkpoint
    usual = arguments.checkpoints
    if (usual / "ckpt-0").exists() or is_safetensors(usual):
        return usual
    if processes.is_first():
        print(
            f"{arguments.program}: no checkpoints/ckpt-0 here, so this is the bundled toy; for the "
            "real model put the 318 GB of huggingface.co/xai-org/grok-1 (its ckpt-0/) into "
            "checkpoints/",
            file=sys.stderr,
            flush=True,
        )
    return bundled.toy()


def _texts(arguments: argparse.Namespace) -> list[str]:
    if arguments.prompt is not None:
        return arguments.prompt
    if arguments.prompt_file is not None:
        return [streams.read_text(arguments.prompt_file)]
    # Not every one of several processes has the same input.
    start_jax()
    piped = streams.piped_text() if jax.process_count() == 1 else None
    return [PROMPT if piped is None else piped]


def _tell(model: Model, job: _Job, as_json: bool) -> list[answers.Answer]:
    """Prints each prompt with its continuation."""
    told: list[answers.Answer] = []
    # With the first piece, not before: what compiles or loads until then says so on stderr.
    echo = job.texts[0]
    for piece, answer in answers.answers(model, job.tokens, job.options):
        if not as_json:
            print(echo + piece, end="", flush=True)
            echo = ""
        if answer is None:
            continue
        if as_json:
            streams.print_json({"prompt": job.texts[len(told)], **answer.to_dict()})
        else:
            print()
            print_logprobs(job.tokenizer, answer)
        told.append(answer)
        if len(told) < len(job.texts):
            echo = "\n" + job.texts[len(told)]
    return told


def _tell_lines(model: Model, job: _Job) -> list[answers.Answer]:
    """Prints an object for each line of the batch file."""
    told = []
    for line, answer in batch_file.run(model, job.lines or []):
        given = {name: line.given[name] for name in ("id", "prompt") if name in line.given}
        streams.print_json({**given, **answer.to_dict()})
        told.append(answer)
    return told
