"""What a plan says, as data, as a table for people and for notebooks."""

import dataclasses
import html
import math
from typing import Any, NamedTuple

from grok1 import reprs
from grok1.generate.scheduler import MAX_ROWS
from grok1.planning.memory import MOST_PREALLOCATED, RAISE_FRACTION


class Estimate(NamedTuple):
    """What some devices could do at most, reading memory being all that takes time.

    Attributes:
      name: The devices.
      memory: GB of each.
      bandwidth: GB/s of each.
      fits: Whether weights, cache and working memory fit in what JAX takes there by default.
      needed_share: What XLA_PYTHON_CLIENT_MEM_FRACTION has to be for it to fit; None where it fits
        already or does not matter.
      tokens_per_second: Of all rows together, with every position of the cache filled; None where
        the model does not fit, whatever is set.
    """

    name: str
    memory: float
    bandwidth: float
    fits: bool
    needed_share: float | None
    tokens_per_second: float | None


class Streaming(NamedTuple):
    """How a CPU would run a model that does not fit, its experts read when they are needed.

    Attributes:
      budget_bytes: What the process takes of the memory.
      least_bytes: The least it can take.
      num_held: Experts that fit beside everything else.
      read_bytes: Read from files for a token, with experts chosen evenly.
      files: GB/s at which the files can be had: the disk's if it was given or there are no files,
        otherwise measured.
      memory: GB/s of memory: those given, otherwise measured.
      measured: Which of the two were measured here, "files" and "memory".
      seconds: For a token.
    """

    budget_bytes: int
    least_bytes: int
    num_held: int
    read_bytes: int
    files: float
    memory: float
    measured: tuple[str, ...]
    seconds: float

    @property
    def budget(self) -> float:
        """The budget in GB, with few digits, and no less than is taken."""
        return max(round(self.budget_bytes / 1e9, 1), math.ceil(self.least_bytes / 1e6) / 1000)

    def note(self, rate: str) -> str:
        """Returns where a rate is from, if it was found out here."""
        return " (measured here)" if rate in self.measured else ""


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Plan:
    """How a model lies on some devices. Bytes are those of one device.

    Attributes:
      num_weights: Weights of the model.
      num_devices: Devices in the mesh.
      mesh: Its sizes (data, model).
      wider_mesh: Sizes that share the model among more of the devices, but leave some of them idle;
        None if there are none, or if the mesh was asked for.
      platform: "gpu", "tpu" or "cpu".
      dtype: Type of the products with weights.
      cache_dtype: Type of cached keys and values.
      batch: Rows, those asked for rounded up as `generate` does.
      context: Positions in the cache, those asked for rounded up as `generate` does.
      model_context: The most positions that the model can have.
      memory_bytes: Memory of a device.
      usable_share: Share of it that JAX uses; on GPUs what XLA_PYTHON_CLIENT_MEM_FRACTION says.
      usable_bytes: That share in bytes.
      weights_bytes: Weights, each scale and replica counted.
      cache_bytes: Cache and tokens of the batch.
      working_bytes: What decoding or the largest chunk of prefill takes besides, from XLA's
        `memory_analysis` of the programs compiled for CPU devices, without the native kernels;
        on CPUs and GPUs also the output head's copies.
      fits: Whether all three together fit in what is usable.
      needed_share: What XLA_PYTHON_CLIENT_MEM_FRACTION has to be for it to fit; None where it fits
        already or does not matter. The largest batch and context are then for this share.
      largest_batch: Most rows with caches of this context that fit, up to the 32 that run side by
        side; 0 for none.
      largest_context: Most positions that fit at this batch, up to the model's context; 0 for none.
      fewest_devices: Devices of this memory that hold the weights and the smallest cache; None for
        more than 64.
      checkpoint_bytes: The layers' share of the checkpoint on disk, embedding and norm included.
      disk: GB/s that the disk is taken to deliver.
      load_seconds: Time to read all of it once at that rate.
      decode_bytes: What a device reads for one token of every row: attention, the experts chosen,
        the output head, or its int8 copy where greedy decoding reads that, and a full cache. Rows
        are taken to choose evenly among the experts.
      estimates: Bounds for devices known by name, and for these if their bandwidth is known.
      streaming: How it would run with its experts on disk; None where it fits, or is not for one
        CPU, or for more than one row.
    """

    num_weights: int
    num_devices: int
    mesh: tuple[int, int]
    wider_mesh: tuple[int, int] | None
    platform: str
    dtype: str
    cache_dtype: str
    batch: int
    context: int
    model_context: int
    memory_bytes: int
    usable_share: float
    usable_bytes: int
    weights_bytes: int
    cache_bytes: int
    working_bytes: int
    fits: bool
    needed_share: float | None
    largest_batch: int
    largest_context: int
    fewest_devices: int | None
    checkpoint_bytes: int
    disk: float
    load_seconds: float
    decode_bytes: int
    estimates: tuple[Estimate, ...]
    streaming: Streaming | None

    @property
    def needed_bytes(self) -> int:
        """Weights, cache and working memory of a device."""
        return self.weights_bytes + self.cache_bytes + self.working_bytes

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        estimates = [estimate._asdict() for estimate in self.estimates]
        found = {**dataclasses.asdict(self), "estimates": estimates}
        if self.streaming is not None:
            found["streaming"] = self.streaming._asdict()
        return {**found, "needed_bytes": self.needed_bytes}

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def __repr__(self) -> str:
        data, model = self.mesh
        return (
            f"Plan({'fits' if self.fits else 'does not fit'}, {_size(self.needed_bytes)} needed of "
            f"{_size(self.usable_bytes)} on each of {_count(self.num_devices)}, "
            f"mesh {data}x{model} {self.platform})"
        )

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def lines(self) -> list[str]:
        """The same for people."""
        data, model = self.mesh
        usable = f"usable of {_size(self.memory_bytes)}"
        if self.platform == "gpu":
            usable += f": JAX takes {self.usable_share:.0%}"
        table = [
            ("weights", self.weights_bytes),
            (f"cache of {self.context} positions, batch {self.batch}", self.cache_bytes),
            ("working memory", self.working_bytes),
            ("needed", self.needed_bytes),
            (usable, self.usable_bytes),
        ]
        return [
            f"{self.num_weights / 1e6:,.0f} million weights on {_count(self.num_devices)} "
            f"({self.platform.upper()}), mesh {data}x{model},",
            f"products in {self.dtype}, cache in {self.cache_dtype}",
            *self._sharing(),
            *_table(table),
            "",
            *self._verdict(),
            *self._streaming(),
            f"Loading takes {reprs.figures(self.load_seconds)} s if the disk delivers "
            f"{reprs.figures(self.disk)} GB/s ({_size(self.checkpoint_bytes)}).",
            "",
            *self._speed(),
            "Working memory is XLA's figure for the programs compiled for CPU devices.",
        ]

    def _verdict(self) -> list[str]:
        excess = _size(abs(self.usable_bytes - self.needed_bytes))
        raised = ""
        if self.fits:
            lines = [f"It fits, with {excess} to spare on each device."]
        elif self.needed_share is not None:
            lines = [f"It fits only where JAX takes more: {RAISE_FRACTION}."]
        else:
            lines = [f"It does not fit: {excess} too much for each device.", self._advice()]
        if not self.fits and self.platform == "gpu":
            raised = f" with {MOST_PREALLOCATED:.0%} of the memory"
        if self.largest_batch or self.largest_context:
            # What bounds them is memory, unless it is said.
            batch, context = str(self.largest_batch or "none"), str(self.largest_context or "none")
            if self.largest_batch >= MAX_ROWS:
                batch = f"all {MAX_ROWS} that run side by side"
            if self.largest_context == self.model_context:
                context = f"the model's whole {context}"
            lines += [
                f"Largest batch at context {self.context}{raised}: {batch};",
                f"largest context at batch {self.batch}: {context}.",
            ]
        return lines

    def _sharing(self) -> list[str]:
        if self.wider_mesh is None:
            return [""]
        (data, model), (copies, wider) = self.mesh, self.wider_mesh
        each = f"each {model} of them hold" if model > 1 else "each of them holds"
        return [
            f"The model does not divide over {data * model} devices: {each} a whole copy;",
            f"--mesh {copies}x{wider} shares one among {wider}.",
            "",
        ]

    def _streaming(self) -> list[str]:
        if self.streaming is None:
            return []
        found = self.streaming
        if found.budget_bytes < found.least_bytes:
            return [f"With its experts on disk it takes {_size(found.least_bytes)} at least."]
        return [
            f"With its experts on disk (--offload disk --memory {found.budget:g}GB) "
            f"it runs: {reprs.figures(found.seconds)} s a token,",
            f"with {_size(found.read_bytes)} from files at {reprs.figures(found.files)} GB/s"
            f"{found.note('files')}, and memory at {reprs.figures(found.memory)} GB/s"
            f"{found.note('memory')}.",
        ]

    def _advice(self) -> str:
        if self.largest_batch or self.largest_context:
            return "A smaller batch or context does, or perhaps --cache-dtype int8."
        if self.platform == "cpu":
            total = self.needed_bytes * self.num_devices
            return f"The machine needs {_size(total)} of memory for this."
        if self.fewest_devices is None:
            return "Devices with more memory are needed."
        return f"{_count(self.fewest_devices)} of this memory would hold the weights."

    def _speed(self) -> list[str]:
        read = f"{_size(self.decode_bytes)} on each device for a step of decoding"
        if not self.estimates:
            return [f"It reads {read}; --bandwidth GB/s gives a bound on the speed."]
        return [
            f"{'tokens/s, at most':24}{'GB':>6}{'GB/s':>8}{'fits':>8}{'tokens/s':>12}",
            *(self._estimate_line(estimate) for estimate in self.estimates),
            "",
            *(
                [f"An upper bound: the time to read {read}."]
                if any(estimate.tokens_per_second for estimate in self.estimates)
                else [f"It would read {read}."]
            ),
            *(
                ["Rows are taken to choose their experts evenly."]
                if self.batch > self.mesh[0]
                else []
            ),
        ]

    def _estimate_line(self, estimate: Estimate) -> str:
        fits = "yes" if estimate.fits else "no"
        if estimate.needed_share is not None:
            fits = f"at {estimate.needed_share:.0%}"
        bound = estimate.tokens_per_second
        return (
            f"  {f'{self.num_devices} x {estimate.name}':22}{reprs.figures(estimate.memory):>6}"
            f"{estimate.bandwidth:8.0f}{fits:>8}"
            f"{'-' if bound is None else f'{bound:,.1f}':>12}"
        )


def _table(rows: list[tuple[str, int]]) -> list[str]:
    """In GB, or each row in its own unit where that would show too little of one."""
    if all(num_bytes >= 5e6 for _, num_bytes in rows):
        return [
            f"{'on each device':40}{'GB':>10}",
            *(f"  {what:38}{num_bytes / 1e9:10.2f}" for what, num_bytes in rows),
        ]
    return ["on each device", *(f"  {what:38}{_size(num_bytes):>10}" for what, num_bytes in rows)]


def _size(num_bytes: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.2f} {name}"
    return f"{num_bytes:.0f} bytes"


def _count(num_devices: int) -> str:
    return f"{num_devices} device" + ("s" if num_devices > 1 else "")
