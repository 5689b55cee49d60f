"""Copies of the output head that decoding reads on CPUs instead of it."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from grok1.engine.programs import Key, Kind, Programs, Weights
from grok1.machine.pages import use_huge_pages
from grok1.nn.sharding import specs_of
from grok1.nn.unembedding import Remainders, ScreeningTable, remainders, screening_table
from grok1.ops import forms


class HeadCopies:
    """What is made of the embedding, on the devices that hold it, when it is first asked for."""

    def __init__(self, programs: Programs, weights: Weights):
        """Makes nothing yet."""
        self._programs, self._embedding = programs, weights.params.embedding
        self._weights = weights

    @functools.cached_property
    def table(self) -> ScreeningTable | None:
        """What is read instead of the whole embedding to decode; None where that cannot be."""
        if not forms.has_kernels(self._programs.setup.mesh.devices.flat[0].platform):
            return None
        if self._embedding.dtype != jnp.float32:
            return None
        spec = specs_of(self._weights).params.embedding
        specs = ScreeningTable(spec, P(spec[0]), P(spec[0]))
        make = self._programs.per_device(screening_table, (spec,), specs)
        key = Key(kind=Kind.SCREENING_TABLE)
        program = self._programs.get(key, lambda: self._programs.compiled(key, jax.jit(make)))
        made = program(self._embedding)
        use_huge_pages(made)
        return made

    @functools.cached_property
    def remainders(self) -> Remainders:
        """What is read beside the table, if there is one, for log-probabilities."""
        spec = specs_of(self._weights).params.embedding
        specs = spec, specs_of(self.table)
        make = self._programs.per_device(remainders, specs, Remainders(spec, P(spec[0])))
        key = Key(kind=Kind.REMAINDERS)
        program = self._programs.get(key, lambda: self._programs.compiled(key, jax.jit(make)))
        made = program(self._embedding, self.table)
        use_huge_pages(made)
        return made
