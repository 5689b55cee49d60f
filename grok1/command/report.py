"""What is told about an answer beside its text."""

import sys
from collections.abc import Sequence

import jax

from grok1.command.answers import Answer, cost
from grok1.model import Model
from grok1.tokenizer import Tokenizer


def print_usage(program: str, model: Model, told: Sequence[Answer]) -> None:
    """Prints what a run cost on stderr; the first of several processes speaks."""
    if told and jax.process_index() == 0:
        print(f"{program}: {cost(told)}", file=sys.stderr, flush=True)
    if stats := model.offload_stats:
        print(f"{program}: {stats}", file=sys.stderr, flush=True)


def print_logprobs(tokenizer: Tokenizer, answer: Answer) -> None:
    """Prints a line a token, with its alternatives, if they were asked for."""
    found = answer.completion
    for token, logprob, alternatives in zip(
        found.tokens, found.logprobs or [], found.top_logprobs or [], strict=False
    ):
        best = (f"{_in_a_column(tokenizer.piece(t))} {p:.2f}" for t, p in alternatives.items())
        piece = _in_a_column(tokenizer.piece(token))
        print(f"{piece:>16} {logprob:7.2f}   {'  '.join(best)}", flush=True)


def _in_a_column(piece: str) -> str:
    """A piece as it is, in quotes where it would break the line or could not be seen."""
    return piece if piece.isprintable() and piece.strip(" ") == piece != "" else repr(piece)
