"""Compiles the steps of Grok-1 for TPUs that are not here, and says what they hold.

    pip install 'jax[tpu]'
    python -m tools.tpu_programs --topology v5p:2x2x2 v6e:4x4 --cache-dtype int8 --rows 1 32

It needs no TPU: libtpu, 0.2 GB, compiles for a description of one. Nothing can be timed. A line for
each program:

    needed     memory of a device, in GB, and how much of it is temporary
    copies     of all that is cached, and in a decode step of weights

and with --cycles the computations that take the longest by XLA's own estimate: of a loop one turn,
without the loops within it.

A step is "decode", which draws a token for each row, or the length of a prompt's chunk.
"""

import argparse
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from benchmarks.device import copies_of, shapes_of_weights
from grok1.config import GROK_1
from grok1.nn.sharding import DATA_AXIS, MODEL_AXIS
from grok1.ops.cpu import bindings
from tools.abstract_steps import add_options, lowered

# What libtpu asks a machine for that has TPUs; any kind does where they are described.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(")
_COPY = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = \(?(\w+\[([\d,]+)\]).* (copy|transpose)\(")
# What is fetched into a core's own memory ahead of its use.
_FETCHED = (" copy-start", " copy-done")
_FUSED = re.compile(r"\bfusion\(.*?\bcalls=%?([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_UNKNOWN = 2**63 - 1


class Report(NamedTuple):
    """What a compiled program holds; see the module.

    Attributes:
      needed: Bytes on a device.
      temporary: Those of them that are neither arguments nor results.
      copies: Instructions that copy weights or all that is cached.
      cycles: XLA's estimate for each computation.
    """

    needed: int
    temporary: int
    copies: list[str]
    cycles: Counter[str]


def mesh_of(topology: str) -> Mesh:
    """Returns a mesh (1, count) of devices that are described, not here.

    Args:
      topology: As libtpu names it: the kind of device, and how many in each direction.
    """
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except RuntimeError as error:  # libtpu is missing, or does not know the name
        raise SystemExit(f"{topology}: {str(error).splitlines()[0]}") from None
    grid = np.array(devices).reshape(1, len(devices))
    return Mesh(grid, (DATA_AXIS, MODEL_AXIS), axis_types=(AxisType.Auto,) * 2)


def report(program: Any, weights: Any = (), cached: Iterable[Any] = ()) -> Report:
    """Compiles a lowered program and looks at what came out.

    Args:
      program: Lowered for the devices of a mesh.
      weights: Of which no copy is wanted.
      cached: Arrays, or their shapes, of which none is either.
    """
    compiled = program.compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    sizes = {math.prod(array.sharding.shard_shape(array.shape)) for array in cached}
    copies = [name for name, size in copied(text) if size in sizes]
    of_weights = copies_of(text, shapes_of_weights(weights))
    return Report(
        memory.peak_memory_in_bytes,
        memory.temp_size_in_bytes,
        [*(copy for copy in of_weights if not copy.endswith(_FETCHED)), *copies],
        cycles_of(text),
    )


def copied(text: str) -> Iterator[tuple[str, int]]:
    """Yields the copies that a program writes to memory, each with how many numbers it has."""
    fused, computation = set(_FUSED.findall(text)), ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match[1]
        match = _COPY.match(line)
        if match and computation not in fused:
            yield f"{match[1]} = {match[2]} {match[4]}", math.prod(map(int, match[3].split(",")))


def cycles_of(text: str) -> Counter[str]:
    """XLA's estimate for each computation of a program, without what it calls."""
    found, computation = Counter[str](), ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match[1]
        match = _CYCLES.search(line)
        if match and int(match[1]) < _UNKNOWN:
            found[computation] += int(match[1])
    return found


def main() -> int:
    """Prints the table; 1 if a program has what it should not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--topology", nargs="+", default=["v5p:2x2x2"])
    add_options(parser)
    parser.add_argument("--cycles", type=int, default=0, help="how many computations to name")
    options = parser.parse_args()
    bindings.turn_off()
    faults = 0
    print(f"{'jax ' + jax.__version__:28} needed temporary copies", flush=True)
    for topology in options.topology:
        mesh = mesh_of(topology)
        for step in options.steps:
            for rows in options.rows:
                name = f"{topology} {step} {rows}"
                program, engine = lowered(
                    GROK_1,
                    mesh,
                    step,
                    rows,
                    options.capacity,
                    cache_dtype=options.cache_dtype,
                    experts=options.experts,
                )
                cache = engine.abstract_state(rows, options.capacity).cache
                # A chunk's activations are as large as weights are.
                weights = engine.weights if step == "decode" else ()
                try:
                    found = report(program, weights, (cache.k,))
                except jax.errors.JaxRuntimeError as error:
                    print(f"{name:28} {str(error).splitlines()[0]}", flush=True)
                    faults += 1
                    continue
                print(
                    f"{name:28} {found.needed / 1e9:6.2f} {found.temporary / 1e9:9.3f} "
                    f"{len(found.copies):6}",
                    flush=True,
                )
                for computation, cycles in found.cycles.most_common(options.cycles):
                    print(f"    {cycles:8} cycles in {computation}")
                for what in found.copies:
                    print(f"    {what}")
                faults += bool(found.copies)
    return min(faults, 1)


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.environ.update(ENVIRONMENT)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    raise SystemExit(main())
