"""Devices a plan can be about: those of data sheets by name, and those present."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from grok1.machine.host_memory import host_bytes_available
from grok1.machine.startup import start_jax
from grok1.planning.memory import GPU_PLATFORMS, MOST_PREALLOCATED, preallocated_share
from grok1.planning.report import Estimate


class DeviceKind(NamedTuple):
    """A device as its vendor describes it.

    Attributes:
      name: For people.
      platform: "gpu", "tpu" or "cpu".
      memory: GB, of 1e9 bytes.
      bandwidth: Of that memory, GB/s.
    """

    name: str
    platform: str
    memory: float
    bandwidth: float


DEVICE_KINDS = {
    "a100-80": DeviceKind("A100 80GB SXM", "gpu", 80, 2039),
    "h100": DeviceKind("H100 SXM", "gpu", 80, 3350),
    "h200": DeviceKind("H200 SXM", "gpu", 141, 4800),
    "b200": DeviceKind("B200", "gpu", 180, 8000),
    "mi300x": DeviceKind("MI300X", "gpu", 192, 5300),
    "tpu-v5p": DeviceKind("TPU v5p", "tpu", 95, 2765),
    "tpu-v6e": DeviceKind("TPU v6e", "tpu", 32, 1638),
}
"""Data sheets: NVIDIA A100, H100 and H200 Tensor Core GPU; NVIDIA DGX B200 (1,440 GB and 64 TB/s on
8 GPUs); AMD Instinct MI300X; docs.cloud.google.com/tpu/docs/v5p and .../v6e."""


class Devices(NamedTuple):
    """Some devices, all alike.

    Attributes:
      number: How many.
      platform: "gpu", "tpu" or "cpu".
      memory_bytes: Memory of each.
      usable_share: Share of it that JAX uses.
    """

    number: int
    platform: str
    memory_bytes: float
    usable_share: float

    @property
    def usable_bytes(self) -> float:
        """What JAX uses of each as things are."""
        return self.usable_share * self.memory_bytes

    @property
    def most_bytes(self) -> float:
        """What JAX can be told to use of each."""
        if self.platform != "gpu":
            return self.usable_bytes
        return max(self.usable_bytes, MOST_PREALLOCATED * self.memory_bytes)

    def needed_share(self, needed: float) -> float | None:
        """Returns the share to be set for so many bytes to fit; None if they do or cannot."""
        return MOST_PREALLOCATED if self.usable_bytes < needed <= self.most_bytes else None


def find(devices: int | Sequence[Any] | None, memory: float | None, device: str | None) -> Devices:
    """Returns the devices that a caller of `plan` means; its arguments are those of `plan`.

    Raises:
      ValueError: If the memory of a device is unknown.
    """
    if isinstance(devices, int) or device is not None:
        kind = DEVICE_KINDS.get(device or "")
        platform = kind.platform if kind else device or "gpu"
        present = None
        count = devices if isinstance(devices, int) else len(devices or ()) or None
        count = count or (1 if platform == "cpu" else 8)
        if memory is None and kind is not None:
            memory = kind.memory
    else:
        start_jax()
        present = jax.devices() if devices is None else list(devices)
        platform = "gpu" if present[0].platform in GPU_PLATFORMS else present[0].platform
        count = len(present)
    share = preallocated_share() if platform == "gpu" else 1.0
    each = memory and memory * 1e9
    if platform == "cpu":
        each = (each or host_bytes_available() or 0) / count
    elif each is None and present is not None:
        # What it says is the share that JAX takes.
        local = next(d for d in present if d.process_index == jax.process_index())
        each = (local.memory_stats() or {}).get("bytes_limit", 0) / share
    if not each:
        raise ValueError(
            "the memory of a device is not known; give memory= (GB), or device=, one of "
            f"{', '.join(DEVICE_KINDS)}"
        )
    return Devices(count, platform, each, share)


def estimates(
    found: Devices,
    num_devices: int,
    needed: int,
    batch: int,
    decode_bytes: int,
    bandwidth: float | None,
) -> tuple[Estimate, ...]:
    """Returns bounds on the speed: of these devices if their bandwidth is known, and of known ones.

    Args:
      found: The devices of the plan.
      num_devices: How many of them are in the mesh.
      needed: Bytes that each has to hold.
      batch: Rows that are decoded side by side.
      decode_bytes: Bytes that each reads for a step.
      bandwidth: GB/s of a device's memory, on a CPU of all of them; None if that is unknown.
    """

    def estimate(name: str, devices: Devices, gigabytes_per_second: float) -> Estimate:
        share = devices.needed_share(needed)
        fits = needed <= devices.usable_bytes
        bound = batch * gigabytes_per_second * 1e9 / decode_bytes
        can_run = fits or share is not None
        memory = devices.memory_bytes / 1e9
        return Estimate(name, memory, gigabytes_per_second, fits, share, bound if can_run else None)

    result = []
    if bandwidth is not None:
        each = bandwidth / num_devices if found.platform == "cpu" else bandwidth
        result = [estimate("yours", found, each)]
    if found.platform != "cpu":
        usual = preallocated_share()
        for kind in DEVICE_KINDS.values():
            share = usual if kind.platform == "gpu" else 1.0
            alike = Devices(num_devices, kind.platform, kind.memory * 1e9, share)
            result.append(estimate(kind.name, alike, kind.bandwidth))
    return tuple(result)
