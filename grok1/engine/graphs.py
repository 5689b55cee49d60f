"""How XLA records a step as one CUDA graph: options of a program, none of the user's process.

A step that is one graph is started by one call of the driver, and nothing in it waits for the host.
What a graph may hold has to be named; the layer loop is otherwise kept out of it by a pass that
takes slices apart.

Environment: GROK1_CUDA_GRAPHS=0 leaves programs as XLA makes them by itself. With
GROK1_CUDA_GRAPHS=unrolled the layers are recorded one after the other rather than as a loop, whose
condition the device looks at before each turn; the program is the same, its graph 64 times as long.
"""

from importlib.metadata import version
from typing import Any

import jax

from grok1.machine import environment

_HELD = (
    "FUSION",
    "CUBLAS",
    "CUBLASLT",
    "CUDNN",
    "CUSTOM_CALL",
    "DYNAMIC_SLICE_FUSION",
    "CONDITIONAL",
    "WHILE",
)


def compiler_options(devices: list[Any]) -> dict[str, Any]:
    """Returns XLA's options for a program on these devices; none where they are no NVIDIA GPUs."""
    is_cuda = devices[0].platform == "gpu" and hasattr(devices[0], "compute_capability")
    setting = environment.choice("GROK1_CUDA_GRAPHS")
    if not is_cuda or setting == "0":
        return {}
    if not str(devices[0].compute_capability).replace(".", "").isdecimal():
        return {}
    held: list[str] = [*_HELD]
    more: dict[str, Any] = {}
    if len(devices) > 1:
        numbers = tuple(int(part) for part in version("jaxlib").split(".")[:2])
        if numbers >= (0, 12):
            held.append("COLLECTIVES_KERNEL")
        else:
            held.append("COLLECTIVES")
        if numbers == (0, 11):
            # Its own all-reduce stays out of a graph, NCCL's does not.
            more["xla_gpu_experimental_use_collective_kernels"] = ""
    if setting == "unrolled":
        more["xla_gpu_command_buffer_unroll_loops"] = True
    return {
        "xla_gpu_enable_command_buffer": ",".join(held),
        "xla_disable_hlo_passes": "dynamic-slice-annotator",
        "xla_gpu_graph_min_graph_size": 1,
        **more,
    }


def compiled(lowered: Any, devices: list[Any]) -> Any:
    """Compiles a program, with the options of its devices.

    A version of XLA that does not know one of them compiles without.
    """
    options = compiler_options(devices)
    if not options:
        return lowered.compile()
    try:
        return lowered.compile(compiler_options=options)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if "option" not in str(error).lower() and "flag" not in str(error).lower():
            raise
        return lowered.compile()
