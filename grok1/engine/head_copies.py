"""Copies of the output head that decoding reads instead of it, on CPUs and on NVIDIA GPUs."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from grok1.engine.compilation import Program
from grok1.engine.programs import Key, Kind, Programs, Weights
from grok1.machine.agreement import exchange
from grok1.machine.device_memory import device_bytes_available
from grok1.machine.pages import use_huge_pages
from grok1.nn.sharding import MODEL_AXIS, specs_of
from grok1.ops import forms
from grok1.ops.screening import Remainders, ScreeningTable, remainders, screening_table

LEFT_FREE = 4_000_000_000
"""Bytes of an accelerator that a copy leaves free for larger caches and what programs take."""


def table_bytes(num_rows: int, width: int) -> int:
    """Returns what a `ScreeningTable` of so many rows takes."""
    return num_rows * (width + 8)


def fits_beside(num_bytes: int, free: float) -> bool:
    """Whether a copy of the head is made on an accelerator, of which so many bytes are free."""
    return num_bytes + LEFT_FREE <= free


class HeadCopies:
    """What is made of the embedding, on the devices that hold it, when it is first asked for."""

    def __init__(self, programs: Programs, weights: Weights, has_room: bool):
        """Makes nothing yet.

        Args:
          programs: Those of the engine.
          weights: What is copied.
          has_room: Whether accelerators have memory for copies.
        """
        self._programs, self._has_room = programs, has_room
        self._embedding = weights.params.embedding

    @functools.cached_property
    def table(self) -> ScreeningTable | None:
        """What is read instead of the whole embedding to decode; None where that cannot be.

        On accelerators it is there for the kernels that read it, where `LEFT_FREE` stays free
        beside it on each device when it is first asked for. A model whose experts are fetched has
        none there: they take what memory there is, and much longer than the head.
        """
        if not self.is_read_by(1) or not (self._is_on_cpu or self._fits()):
            return None
        made = self.table_program()(self._embedding)
        if self._is_on_cpu:
            use_huge_pages(made)
        return made

    def table_program(self) -> Program:
        """The program that makes a table of the embedding."""
        make = self._programs.per_device(screening_table, (self._spec,), self.table_specs)
        key = Key(kind=Kind.SCREENING_TABLE)
        return self._programs.get(key, lambda: self._programs.compiled(key, jax.jit(make)))

    @property
    def _spec(self) -> P:
        return specs_of(self._embedding)

    @property
    def table_specs(self) -> ScreeningTable:
        """How it lies, or would lie, over the devices."""
        return ScreeningTable(self._spec, P(self._spec[0]), P(self._spec[0]))

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn at random by way of the table too, as there are kernels for."""
        return self._is_on_cpu and self.table is not None

    @functools.cached_property
    def remainders(self) -> Remainders:
        """What is read beside the table, if there is one, for log-probabilities."""
        specs = self._spec, self.table_specs
        copies = Remainders(self._spec, P(self._spec[0]))
        make = self._programs.per_device(remainders, specs, copies)
        key = Key(kind=Kind.REMAINDERS)
        program = self._programs.get(key, lambda: self._programs.compiled(key, jax.jit(make)))
        made = program(self._embedding, self.table)
        use_huge_pages(made)
        return made

    def is_read_by(self, num_rows: int) -> bool:
        """Whether so many rows of a device find the most probable token by way of the table."""
        rows, width = self._embedding.shape
        here = rows // self._programs.setup.mesh.shape[MODEL_AXIS]

        def abstract(dtype, *shape):
            return jax.ShapeDtypeStruct(shape, dtype)

        scales = abstract(jnp.float32, here)
        table = ScreeningTable(abstract(jnp.int8, here, width), scales, scales)
        embedding = abstract(self._embedding.dtype, here, width)
        arguments = abstract(jnp.float32, num_rows, width), embedding, table, abstract(bool, here)
        platform = "cuda" if self._platform == "gpu" else self._platform
        return forms.chosen("most_probable", platform, *arguments) != "direct"

    @property
    def _platform(self) -> str:
        return self._programs.setup.mesh.devices.flat[0].platform

    @property
    def _is_on_cpu(self) -> bool:
        return self._platform == "cpu"

    def _fits(self) -> bool:
        """Whether there is memory for it on every device of every process."""
        if not self._has_room:
            return False
        mesh = self._programs.setup.mesh
        free = min(device_bytes_available(device) or 0 for device in mesh.local_devices)
        words = exchange("a copy of the output head", lambda: {"free": str(free)}, mesh)
        rows, width = self._embedding.shape
        needed = table_bytes(rows // mesh.shape[MODEL_AXIS], width)
        return fits_beside(needed, min([free, *(int(each["free"]) for each in words.values())]))
