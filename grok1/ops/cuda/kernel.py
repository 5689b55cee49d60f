"""What a kernel is: sources in CUDA C++, made for the shapes of one call.

All sizes are constants of the source, so that a kernel has pointers alone for arguments: those of
its inputs, then those of its outputs.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

SOURCES = pathlib.Path(__file__).parent

TYPES = {
    "float32": "float",
    "float16": "unsigned short",
    "bfloat16": "unsigned short",
    "int8": "signed char",
    "uint8": "unsigned char",
    "int32": "int",
    "bool": "unsigned char",
}
"""The type in C of an array's numbers; kernels read the bits of short floats."""


class Array(NamedTuple):
    """An array that a kernel writes."""

    shape: tuple[int, ...]
    dtype: str


class Kernel(NamedTuple):
    """One launch.

    Attributes:
      name: Of the function.
      headers: The sources that it is made of, in this order.
      structs: Sizes, by the name of the struct that holds them; see `struct`.
      call: What the function runs: a C++ expression, which is called with all arguments.
      inputs: Types of the arrays that it reads.
      outputs: The arrays that it writes.
      aliases: Which output is the memory of which input.
      grid: Blocks in x and y.
      threads: Of a block.
      shared_bytes: Of its shared memory beside what the sources declare.
      resident: How many blocks a multiprocessor's registers are to hold at once.
      architecture: What it is compiled for: the oldest compute capability, or the only one.
    """

    name: str
    headers: tuple[str, ...]
    structs: tuple[tuple[str, str], ...]
    call: str
    inputs: tuple[str, ...]
    outputs: tuple[Array, ...]
    grid: tuple[int, int]
    threads: int
    aliases: tuple[tuple[int, int], ...] = ()
    shared_bytes: int = 0
    resident: int = 1
    architecture: str = "80"

    @property
    def parameters(self) -> list[str]:
        """The types in C of its arguments, but for the inputs that an output takes the place of."""
        aliased = {of for of, _ in self.aliases}
        reads = [
            f"{'' if i in aliased else 'const '}{TYPES[dtype]}*"
            for i, dtype in enumerate(self.inputs)
        ]
        return [*reads, *(f"{TYPES[array.dtype]}*" for array in self.outputs)]


def struct(sizes: Mapping[str, int | float | str]) -> str:
    """The members of a struct.

    Args:
      sizes: Constants by their names in capitals, numbers or the names of numbers; structs by names
        that have small letters.
    """
    members = []
    for name, value in sizes.items():
        if not name.isupper():
            members.append(f"using {name} = {value};")
        elif isinstance(value, float):
            members.append(f"static constexpr float {name} = {value!r}f;")
        else:
            members.append(f"static constexpr int {name} = {value};")
    return " ".join(members)


def text_of(headers: Sequence[str]) -> str:
    """The sources, one after the other."""
    return "\n".join((SOURCES / name).read_text().replace("#pragma once", "") for name in headers)


def function_of(kernel: Kernel) -> str:
    """The C++ function of a kernel, behind its headers."""
    space = f"of_{kernel.name}"
    structs = " ".join(f"struct {name} {{ {members} }};" for name, members in kernel.structs)
    parameters = ", ".join(f"{of} p{i}" for i, of in enumerate(kernel.parameters))
    arguments = ", ".join(f"p{i}" for i in range(len(kernel.parameters)))
    return (
        f"namespace {space} {{ {structs} }}\n"
        f'extern "C" __global__ void __launch_bounds__({kernel.threads}, {kernel.resident}) '
        f"{kernel.name}({parameters}) {{\n"
        f"  using namespace {space};\n  {kernel.call}({arguments});\n}}\n"
    )
