"""`grok1 serve`: listens at once, loads the model, and answers until it is told to end."""

import argparse
import io
import os
import sys

from grok1.checkpoint.directory import load_config, tokenizer_path
from grok1.command.generate import MODEL_OPTIONS, checkpoint_of
from grok1.factory import load
from grok1.machine import processes
from grok1.machine.processes import OtherProcessError
from grok1.tokenizer import Tokenizer

try:
    from grok1.server import sizing
    from grok1.server.core import Server
    from grok1.server.running import HttpOptions
    from grok1.server.running import run as run_http
except ImportError as error:
    raise ImportError(
        f"grok1 serve needs the package {error.name}: pip install 'grok1[serve]'"
    ) from error

_HTTP = ("host", "port", "name", "api_key", "api_key_file", "metrics_key", "no_auth",
         "allowed_host", "cors", "chat_template", "add_bos", "ignore_unknown", "request_timeout",
         "drain", "max_tokens", "max_body")  # fmt: skip
_SERVER = ("max_slots", "capacity", "max_queue", "max_stall", "chunk", "prefix_tokens",
           "host_prefix_tokens", "step_timeout")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Runs the command and returns the exit status."""
    names = ("coordinator", "num_processes", "process_id", "local_devices")
    rank = processes.initialize_distributed(*(getattr(arguments, name) for name in names))
    if rank > 0:
        sys.stdout = io.StringIO()  # one process prints
    with processes.together():
        checkpoint = checkpoint_of(arguments)
        config = load_config(checkpoint).first_layers(arguments.layers)
        path = arguments.tokenizer or tokenizer_path(checkpoint, config)
        tokenizer = None if path is None else Tokenizer.load(path)
        options = HttpOptions(
            **{name: getattr(arguments, name) for name in _HTTP},
            page=not arguments.no_page,
        )
        server_options = {name: getattr(arguments, name) for name in _SERVER}
        # Whatever is wrong with the options is said before a weight is read.
        sizing.check(server_options, config.sequence_len)
        options.app()
    model_options = {name: getattr(arguments, name) for name in MODEL_OPTIONS}

    def make() -> Server:
        model = load(checkpoint, tokenizer=tokenizer, **model_options)
        return Server(model, **server_options)

    try:
        run_http(make, options, arguments.program)
    except OtherProcessError as error:
        # What waits for a process that is gone would not end.
        print(f"{arguments.program}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    return 0
