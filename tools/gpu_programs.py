"""Compiles the steps of Grok-1 for NVIDIA GPUs that are not here, and says what they hold.

    pip install jax==0.11.2 jaxlib==0.11.2
    pip install --no-deps jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2 nvidia-cuda-nvrtc
    python -m tools.gpu_programs --device h200 --devices 1 8

It needs no GPU, and none of NVIDIA's libraries but NVRTC: XLA compiles for a description of a
device. Nothing is tuned and nothing can be timed. A line for each program:

    loops      whose number of turns is data, which the host would have to ask for
    copies     of weights, or of floats as large as one
    graphs     CUDA graphs, and how many launches are outside of them
    kernels    that run in a layer
    vanished   subtractions of a number from itself: a rounding that XLA has dropped

A step is "decode", which draws from all logits, "greedy", which finds the most probable token by
way of an int8 copy of the output head, or the length of a prompt's chunk.
"""

import argparse
import os
import pathlib
import re
import sys
import tempfile
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from benchmarks.device import copies_of, shapes_of_weights
from grok1.config import GROK_1
from grok1.engine import graphs
from grok1.nn.sharding import DATA_AXIS, MODEL_AXIS
from grok1.ops.cpu import bindings
from grok1.ops.cuda import presence
from tools.abstract_steps import add_options, lowered

DEVICES = pathlib.Path(__file__).parent / "devices"

_THUNK = re.compile(r"^( *)\d+: (\w+)\s+\[[^\]]*\]\s*(\S*)")
_LAUNCHES = {"kCustomKernel", "kKernel", "kCopy", "kGemm", "kCublasLtMatmul", "kCustomCall"}
_COLLECTIVES = ("kNccl", "kAll", "kCollective", "kReduceScatter")
_DIGEST = re.compile(r"_[0-9a-f]{8}$")  # at the end of a CUDA kernel's name
_SAME = re.compile(r"= \S+ subtract\((%?[\w.\-]+), \1\)")


class Report(NamedTuple):
    """What a compiled program holds; see the module.

    Attributes:
      unknown_loops: Names of loops of unknown length.
      copies: As `benchmarks.device.copies_of` lists them.
      graphs: CUDA graphs.
      outside: Launches that are in none.
      layer: Kernels of a turn of the loop over layers, in order.
      vanished: Instructions that subtract a number from itself.
    """

    unknown_loops: list[str]
    copies: list[str]
    graphs: int
    outside: int
    layer: list[str]
    vanished: list[str]


def mesh_of(device: str, count: int) -> Mesh:
    """Returns a mesh (1, count) of devices that are described, not here.

    Args:
      device: A file's name in `devices`, without its ending.
      count: How many, connected with each other.
    """
    text = (DEVICES / f"{device}.txtpb").read_text()
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=text, topology=f"1x1x{count}"
        )
    except NotImplementedError:
        raise SystemExit("JAX has no plugin for CUDA here; see the top of this file") from None
    grid = np.array(topology.devices).reshape(1, count)
    return Mesh(grid, (DATA_AXIS, MODEL_AXIS), axis_types=(AxisType.Auto,) * 2)


def report(program: Any, devices: list[Any], weights: Any = ()) -> Report:
    """Compiles a lowered program for its devices and looks at what came out."""
    options = graphs.compiler_options(devices)
    with tempfile.TemporaryDirectory() as directory:
        compiled = program.compile(compiler_options={**options, "xla_dump_to": directory})
        (thunks,) = pathlib.Path(directory).glob("*.thunk_sequence_after_thunk_passes.txt")
        sequence = thunks.read_text()
    text = compiled.as_text()
    loops = [line for line in text.splitlines() if re.search(r"\bwhile\(", line)]
    return Report(
        [line.split("=")[0].strip() for line in loops if "known_trip_count" not in line],
        copies_of(text, shapes_of_weights(weights)),
        *launches(sequence),
        [match[0] for match in _SAME.finditer(text)],
    )


def launches(sequence: str) -> tuple[int, int, list[str]]:
    """Counts in XLA's list of what a program does.

    Args:
      sequence: The file that XLA writes.

    Returns:
      Graphs, launches outside of them, and the kernels of a turn of the first loop.
    """
    graph_indents, outside, layer, num_graphs = [], 0, [], 0
    loop, body, is_over = None, None, False
    for line in sequence.splitlines():
        indent = len(line) - len(line.lstrip())
        if loop is not None and body is None and line.strip() == "body:":
            body = indent
            continue
        match = _THUNK.match(line)
        if not match:
            continue
        graph_indents = [of for of in graph_indents if of < indent]
        if match[2] == "kCommandBuffer":
            num_graphs += 1
            graph_indents.append(indent)
        elif match[2] == "kWhile" and loop is None:
            loop = indent
        elif match[2] in _LAUNCHES or match[2].startswith(_COLLECTIVES):
            outside += not graph_indents
            is_over |= body is not None and loop is not None and indent <= loop
            if body is not None and not is_over:
                layer.append(_DIGEST.sub("", match[3]))
    return num_graphs, outside, layer


def main() -> int:
    """Prints the table; 1 if a program has what it should not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", nargs="+", default=["h200"], help="h100, h200")
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 8], help="how many")
    add_options(parser)
    parser.add_argument("--names", action="store_true", help="name the kernels of a layer")
    options = parser.parse_args()
    bindings.turn_off()
    faults = 0
    head = f"jax {jax.__version__}"
    print(f"{head:28} loops copies graphs outside kernels vanished", flush=True)
    for device in options.device:
        for count in options.devices:
            mesh = mesh_of(device, count)
            for step in options.steps:
                for rows in options.rows:
                    with presence.assumed():
                        program, engine = lowered(
                            GROK_1,
                            mesh,
                            step,
                            rows,
                            options.capacity,
                            cache_dtype=options.cache_dtype,
                            experts=options.experts,
                        )
                    found = report(program, mesh.devices.flatten().tolist(), engine.weights)
                    name = f"{count} x {device} {step} {rows}"
                    numbers = (
                        len(found.unknown_loops),
                        len(found.copies),
                        found.graphs,
                        found.outside,
                        len(found.layer),
                        len(found.vanished),
                    )
                    print(
                        f"{name:28} {numbers[0]:5} {numbers[1]:6} {numbers[2]:6} "
                        f"{numbers[3]:7} {numbers[4]:7} {numbers[5]:8}",
                        flush=True,
                    )
                    if options.names:
                        print(*(f"    {kernel}" for kernel in found.layer), sep="\n")
                    for what in (*found.unknown_loops, *found.copies, *found.vanished):
                        print(f"    {what}")
                    if step in ("decode", "greedy"):
                        faults += bool(found.unknown_loops or found.copies or found.outside)
                        faults += found.graphs != 1
                    faults += bool(found.vanished)
    return min(faults, 1)


if __name__ == "__main__":
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        # What is described needs no device, and one that is here would be taken.
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    raise SystemExit(main())
