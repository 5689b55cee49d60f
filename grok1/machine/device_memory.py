"""How much memory of an accelerator JAX can still have."""

from typing import Any


def device_bytes_available(device: Any) -> int | None:
    """Returns the memory that JAX can still have on an accelerator; None if it does not say."""
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    return None if limit is None else limit - stats.get("bytes_in_use", 0)
