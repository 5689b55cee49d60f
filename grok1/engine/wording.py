"""What a program is, in words for people who wait until it is compiled."""

from collections.abc import Sequence
from typing import Any

from grok1.engine.programs import Key, Kind
from grok1.nn.capture import NOTHING

_LONGEST = 60  # characters of an intervention


def in_words(interventions: Sequence[Any], key: Key, *args: Any) -> str:
    """Names a program: "sampled decode for batch 8, cache 1024, with log-probabilities".

    Args:
      interventions: What acts in it.
      key: What it is compiled for.
      *args: The arguments.
    """
    if key.kind in (Kind.SCREENING_TABLE, Kind.REMAINDERS, Kind.REQUEST_KEYS):
        return f"the {key.kind.value}"
    if key.kind == Kind.ASSIGN:
        batch, capacity = args[0].tokens.shape
        return f"the start of a request for batch {batch}, cache {capacity}"
    if key.kind == Kind.EMPTY_BLOCKS:
        return f"the memory of {key.shape[0]} blocks of {key.shape[1]} positions"
    if key.kind in (Kind.KEEP_BLOCK, Kind.PUT_BLOCK, Kind.TAKE_BLOCK, Kind.PLACE_BLOCK):
        return "the copy of a block"
    if key.kind == Kind.PIECE:
        words = f"the {key.piece} of a step of {key.length} tokens"
    else:
        batch, capacity = args[1].tokens.shape if args else key.shape
        num_rows = len(args[2].slots) if len(args) > 2 else batch
        rows = f"batch {batch}" if num_rows == batch else f"{num_rows} rows of batch {batch}"
        words = f"{_kind(key)} for {rows}, cache {capacity}"
    more = _details(key)
    if key.capture != NOTHING:
        more.append(f"capturing {' and '.join(key.capture.names)}")
    for intervention in interventions:
        more.append(f"under {repr(intervention)[:_LONGEST]}")
    return ", ".join([words, *more])


def _kind(key: Key) -> str:
    return {
        Kind.PREFILL: f"prefill of {key.length} tokens",
        Kind.SCORE: f"scoring of {key.length} tokens",
        Kind.SCORE_TOKENS: f"scoring of {key.length} tokens one by one",
        Kind.DECODE_GREEDILY: "greedy decode",
        Kind.DECODE: "sampled decode",
    }.get(key.kind, key.kind.value)


def _details(key: Key) -> list[str]:
    more = []
    if key.kind == Kind.SCORE_TOKENS and key.num_top:
        more.append(f"with {key.num_top} alternatives")
    if key.kind == Kind.DECODE and key.num_top is not None:
        also = f" and {key.num_top} alternatives" if key.num_top else ""
        more.append(f"with log-probabilities{also}")
    if key.decodes and key.processor is not None:
        name = getattr(key.processor, "__name__", type(key.processor).__name__)
        more.append(f"with the logits_processor {name}")
    if key.adjusts:
        more.append("with biases and penalties")
    if key.decodes and key.masks_differ:
        more.append("with allowed tokens for each row")
    return more
