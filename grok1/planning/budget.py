"""How much a process may take when the experts of its model stay on disk, and what must fit."""

from typing import Any

from grok1.engine.base import EngineBase
from grok1.keywords import shown
from grok1.machine.host_memory import gigabytes_apart, host_bytes_available
from grok1.nn.transformer import Params
from grok1.ops.experts import FetchedExperts, FetchedInt4Experts
from grok1.ops.quantized import QuantizedArray
from grok1.planning.memory import WORKING_BYTES, screening_table_bytes, shard_bytes

SHARE = 0.8
"""Of the memory that is available, for the budget when none is given."""


def without_experts(params: Params) -> Params:
    """Returns a tree of parameters with what is not fetched of the experts."""
    experts = params.layers.experts
    if isinstance(experts.gate, QuantizedArray):
        fetched: Any = FetchedExperts(None, *(weight.scales for weight in experts))
    else:
        fetched = FetchedInt4Experts(None, None)
    return params._replace(layers=params.layers._replace(experts=fetched))


def resident_bytes(engine: EngineBase) -> int:
    """Returns what this process takes beside keys, values and experts.

    Args:
      engine: With parameters `without_experts`, which may be abstract; on a CPU.
    """
    return shard_bytes(engine.params) + screening_table_bytes(engine) + WORKING_BYTES


def budget(memory: float | str | None) -> int:
    """Returns the bytes that a process may take.

    Args:
      memory: GB, of 1e9 bytes, as a number or as "16GB"; None for most of what is available.

    Raises:
      ValueError: If it is no such number, or more than is available.
    """
    available = host_bytes_available()
    if memory is None:
        if available is None:
            raise ValueError("how much memory there is cannot be found out here; give memory=")
        return int(SHARE * available)
    try:
        found = float(memory.upper().removesuffix("GB") if isinstance(memory, str) else memory)
    except (TypeError, ValueError):
        found = 0.0
    if not 0 < found < float("inf"):
        raise ValueError(
            f"memory must be a number of GB above 0, as 16 or '16GB', found {shown(memory)}"
        )
    if available is not None and found * 1e9 > available:
        asked, there_are = gigabytes_apart(found * 1e9, available)
        raise ValueError(
            f"a memory budget of {asked} is more than the {there_are} that are available; give "
            "less, or free what is in use"
        )
    return int(found * 1e9)
