"""What a program is, in words for people who wait until it is compiled."""

from collections.abc import Sequence
from typing import Any

from grok1.nn.capture import NOTHING, Capture

_LONGEST = 60  # characters of an intervention


def in_words(key: tuple, capture: Capture, interventions: Sequence[Any], *args: Any) -> str:
    """Names a program: "sampled decode for batch 8, cache 1024, with log-probabilities".

    Args:
      key: That of the engine's programs: its kind, and what else it is compiled for.
      capture: What the engine captures.
      interventions: What acts in it.
      *args: The arguments.
    """
    kind, *details = key
    more = []
    if kind in ("screening table", "request keys"):
        return f"the {kind}"
    if kind == "assign":
        batch, capacity = args[0].tokens.shape
        return f"the start of a request for batch {batch}, cache {capacity}"
    if kind == "piece of a step":
        name, length, capture, *_ = details
        words = f"the {name} of a step of {length} tokens"
    else:
        if kind == "prefill":
            kind = f"prefill of {details[0]} tokens"
        elif kind == "score":
            capture = details[1]
            kind = f"scoring of {details[0]} tokens"
        elif kind == "score tokens":
            more = [f"with {details[1]} alternatives"] if details[1] else []
            kind = f"scoring of {details[0]} tokens one by one"
        elif kind == "decode greedily":
            (masks_differ,) = details
            kind = "greedy decode"
            more = ["with allowed tokens for each row"] if masks_differ else []
        elif kind == "decode":
            num_top, processor, masks_differ = details
            kind = "sampled decode"
            if num_top is not None:
                more.append("with log-probabilities")
            if num_top:
                more[-1] += f" and {num_top} alternatives"
            if processor is not None:
                name = getattr(processor, "__name__", type(processor).__name__)
                more.append(f"with the logits_processor {name}")
            if masks_differ:
                more.append("with allowed tokens for each row")
        batch, capacity = args[1].tokens.shape if args else details[0]
        num_rows = len(args[2].slots) if len(args) > 2 else batch
        rows = f"batch {batch}" if num_rows == batch else f"{num_rows} rows of batch {batch}"
        words = f"{kind} for {rows}, cache {capacity}"
    if capture != NOTHING:
        more.append(f"capturing {' and '.join(capture.names)}")
    for intervention in interventions:
        more.append(f"under {repr(intervention)[:_LONGEST]}")
    return ", ".join([words, *more])
