"""What the compiled steps hold in memory, and what a device does in them, kernel by kernel.

The first is XLA's own account, the second what JAX's profiler saw. The question on an accelerator
is whether XLA fuses the conversion of int8 weights into the products, and reads a layer's matrix
where it lies in the stack. Where it does not, the optimised program has an instruction, outside any
fusion, whose result is an array as large as a weight matrix, of floats or of bytes; such
instructions are listed.
"""

import collections
import math
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import jax

import grok1
from grok1.engine.shapes import CHUNK_LENGTHS
from grok1.ops.formats import is_quantized

Kernels = dict[str, tuple[int, float]]
"""For each kernel how often it ran and its seconds in all, the longest first."""

_MOST = 15  # kernels to name; the rest are one
_FUSED = re.compile(r"\bfusion\(.*\bcalls=%?([\w.\-]+)")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+)\s.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?(%?[\w.\-]+) = (.+?) ([\w\-]+)\(")
_ARRAY = re.compile(r"\b(?:bf16|f16|f32|s8|u8)\[([\d,]+)\]")
# These only pass on what another instruction has made.
_NO_WORK = frozenset(
    {"bitcast", "call", "conditional", "get-tuple-element", "parameter", "tuple", "while"}
)


def decode_report(model: grok1.Model, batch: int, capacity: int) -> dict[str, Any]:
    """Compiles the decode step and says what it holds; see `_report`."""
    engine = model.engine
    state = engine.abstract_state(batch, capacity)
    arguments = engine.abstract_decode_arguments(batch)
    program = engine.decode_program(None, None)
    return _report(model, program.lower(engine.weights, state, *arguments).compile())


def prefill_report(model: grok1.Model, capacity: int) -> dict[str, Any]:
    """Compiles the largest prefill step that fits the context and says what it holds."""
    engine = model.engine
    chunk = max(length for length in CHUNK_LENGTHS if length <= capacity)
    state = engine.abstract_state(1, capacity)
    program = engine.prefill_program(chunk)
    found = _report(model, program.lower(engine.weights, state, engine.abstract_rows(1)).compile())
    return {"chunk": chunk, **found}


def _report(model: grok1.Model, compiled: Any) -> dict[str, Any]:
    memory = compiled.memory_analysis()
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "copies_of_weights": copies_of(compiled.as_text(), shapes_of_weights(model.params.layers)),
    }


def shapes_of_weights(tree: Any) -> set[tuple[int, int]]:
    """Returns the shapes of the values of one matrix of each quantised weight, on one device."""
    return {
        leaf.values.sharding.shard_shape(leaf.values.shape)[-2:]
        for leaf in jax.tree.leaves(tree, is_leaf=is_quantized)
        if is_quantized(leaf)
    }


def copies_of(program: str, weights: Iterable[tuple[int, int]]) -> list[str]:
    """Lists the instructions whose result is an array of a weight's shape, floats or bytes.

    Args:
      program: Text of an optimised XLA program.
      weights: Shapes `(K, N)` of the matrices' values; an array of shape `[..., N]` whose other
        axes hold a multiple of K is taken for a copy of one or more of them, grouped or not. So is
        an activation of a model that is as narrow as its chunks are long, the toy.

    Returns:
      For each, its name, type, shape and operation.
    """
    lines = program.splitlines()
    fused = {match[1] for line in lines if (match := _FUSED.search(line))}
    weights = list(weights)
    computation, found = "", []
    for line in lines:
        if match := _COMPUTATION.match(line):
            computation = match[1]
        match = _INSTRUCTION.match(line)
        if not match or computation in fused or match[3] in _NO_WORK:
            continue
        for array in _ARRAY.finditer(match[2]):
            *lead, columns = map(int, array[1].split(","))
            rows = math.prod(lead)
            if any(columns == n and rows and rows % k == 0 for k, n in weights):
                found.append(f"{match[1]} = {array[0]} {match[3]}")
    return found


def profile(work: Callable[[], Any]) -> Kernels:
    """What `launches` sees, summed."""
    return summed(launches(work))


def launches(work: Callable[[], Any]) -> list[tuple[str, float]]:
    """Profiles a function that has run before.

    Args:
      work: What to run; returns arrays to wait for.

    Returns:
      Name and seconds of each kernel that ran.

    Raises:
      ValueError: If the profiler saw nothing on an accelerator.
    """
    with tempfile.TemporaryDirectory(prefix="grok1-benchmark-profile-") as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(work())
        files = pathlib.Path(directory).rglob("*.xplane.pb")
        kernels = [
            (event.name, event.duration_ns / 1e9)
            for file in files
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes
            if plane.name.startswith("/device:")
            for line in plane.lines
            if _is_of_kernels(line.name)
            for event in line.events
        ]
    if not kernels:
        raise ValueError("the profiler saw no kernel; it does on GPUs and TPUs, not on CPUs")
    return kernels


def summed(kernels: list[tuple[str, float]]) -> Kernels:
    """Adds up the runs of each kernel, of (name, seconds) each; those after the longest are one."""
    times: dict[str, int] = collections.defaultdict(int)
    seconds: dict[str, float] = collections.defaultdict(float)
    for name, duration in kernels:
        times[name] += 1
        seconds[name] += duration
    longest = sorted(seconds, key=lambda name: seconds[name], reverse=True)
    found = {name: (times[name], seconds[name]) for name in longest[:_MOST]}
    if rest := longest[_MOST:]:
        found["others"] = sum(times[n] for n in rest), sum(seconds[n] for n in rest)
    return found


def _is_of_kernels(line: str) -> bool:
    # GPUs have a line a stream, beside lines that group the same kernels by module or by scope; of
    # a TPU's lines the operations are one.
    return line.startswith("Stream") or line == "XLA Ops"
