"""Imports point one way, and importing does nothing."""

import ast
import dataclasses
import importlib
import pathlib
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from typing import Any

import pytest

import grok1

PACKAGE = pathlib.Path(grok1.__file__).parent

# Every room imports only from rooms in lines above its own; this is the diagram of the package.
ROOMS = [
    {"bundled", "files", "keywords", "reprs", "version"},
    {"config", "machine", "tokenizer"},
    {"ops"},
    {"nn"},
    {"checkpoint", "engine"},
    {"care", "generate"},
    {"planning"},
    {"study"},
    {"offload"},
    {"description"},
    {"model"},
    {"factory"},
    {"comparison", "lm_eval", "plots", "server"},
    {"command"},
    {"__init__", "__main__"},
]
# Arrays know nothing of a model.
FORBIDDEN = {"ops": {"config", "tokenizer"}}

MOST_LINES = 420
MOST_PARAMETERS = 6

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
}


def imports_of(path: pathlib.Path) -> set[str]:
    """Modules of the package that a module names, below `grok1.`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        assert not node.level, f"{path}: relative import"
        if (node.module or "").split(".")[0] == "grok1":
            room = (node.module or "").removeprefix("grok1").removeprefix(".")
            names = [f"{room}.{alias.name}".removeprefix(".") for alias in node.names]
            found |= {name if name in MODULES else room for name in names}
    return found


def room_of(module: str) -> str:
    return module.split(".")[0]


def test_imports_between_rooms_point_one_way():
    above: set[str] = set()
    for rooms in ROOMS:
        for name, path in MODULES.items():
            if room_of(name) in rooms:
                allowed = above - FORBIDDEN.get(room_of(name), set())
                outside = {room_of(other) for other in imports_of(path)} - {room_of(name)}
                assert outside <= allowed, f"{name} imports {outside - allowed}"
        above |= rooms
    assert above == {room_of(name) for name in MODULES}


def test_the_page_shows_the_rooms_and_their_order():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    table = re.search(r"\| rooms \| .*?\n\|---\|---\|\n(.*?)\n\n", page, re.DOTALL)
    assert table, "docs/architecture.md: the table of rooms is gone"
    shown = [set(re.findall(r"`(\w+)`", line.split("|")[1])) for line in table[1].splitlines()]
    assert shown == ROOMS, "docs/architecture.md: give its table of rooms the lines of ROOMS here"
    for room in (path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()):
        about = PACKAGE.parent / "docs" / "design" / f"{room}.md"
        assert about.exists(), f"{about.relative_to(PACKAGE.parent)}: write why {room} is as it is"
        assert f"`{room}`](design/{room}.md)" in table[1]


def test_imports_have_no_circles():
    waiting = {name: imports_of(path) & set(MODULES) for name, path in MODULES.items()}
    while ready := {name for name, others in waiting.items() if not others & set(waiting)}:
        waiting = {name: others for name, others in waiting.items() if name not in ready}
    assert not waiting, f"modules that import one another, or what does: {sorted(waiting)}"


def test_no_module_is_too_long_to_read_at_a_sitting():
    sources = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".cc", ".h")]
    long = {path.name: length for path in sources
            if (length := len(path.read_text().splitlines())) > MOST_LINES}  # fmt: skip
    assert not long, f"divide by what they do: {long}"


def parameters_of(module: str, path: pathlib.Path) -> Iterator[tuple[str, int]]:
    """Every function of a module, with how many parameters a caller sees."""

    def walk(node: ast.AST, name: str, is_method: bool) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                of = child.args
                is_static = any(ast.unparse(one) == "staticmethod" for one in child.decorator_list)
                count = len(of.posonlyargs + of.args + of.kwonlyargs)
                yield f"{name}.{child.name}", count - (is_method and not is_static)
                yield from walk(child, f"{name}.{child.name}", False)
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, f"{name}.{child.name}", True)
            else:
                yield from walk(child, name, is_method)

    yield from walk(ast.parse(path.read_text()), f"grok1.{module}", False)


def test_what_is_not_shown_to_users_takes_few_parameters():
    reference = (PACKAGE.parent / "docs" / "reference.md").read_text()
    shown = set(re.findall(r"^::: (\S+)", reference, re.MULTILINE))
    shown |= {f"{room}.{name}" for room, names in re.findall(
        r"^::: (\S+)\n(?:    .*\n)*?      members: \[(.*)\]", reference, re.MULTILINE
    ) for name in names.split(", ")}  # fmt: skip
    # As `grok1` shows them, or where they are.
    values = {name: getattr(grok1, name) for name in grok1.__all__ if f"grok1.{name}" in shown}
    public = shown | {
        f"{getattr(value, '__module__', '')}.{name}" for name, value in values.items()
    }
    many = {
        name: count
        for module, path in MODULES.items()
        for name, count in parameters_of(module, path)
        if count > MOST_PARAMETERS and name not in public and name.rpartition(".")[0] not in public
    }
    assert not many, f"gather what belongs together: {many}"


def classes_of(hint: Any) -> Iterator[type]:
    """The classes that a type is made of."""
    if isinstance(hint, type) and not typing.get_args(hint):
        yield hint
    for part in typing.get_args(hint):
        yield from classes_of(part)


def test_what_the_fields_of_a_result_hold_is_in_the_reference_too():
    reference = (PACKAGE.parent / "docs" / "reference.md").read_text()
    shown = re.findall(r"^::: (\S+)", reference, re.MULTILINE)
    for name in shown:
        if name.removeprefix("grok1.") in MODULES:
            continue
        holder, _, last = name.rpartition(".")
        value = getattr(importlib.import_module(holder), last)
        if not dataclasses.is_dataclass(value) and not hasattr(value, "_fields"):
            continue
        bases = getattr(value, "__bases__", ())  # none of a value, such as GROK_1
        hints = [*typing.get_type_hints(value).items(), *(("base", base) for base in bases)]
        for field, hint in hints:
            for one in classes_of(hint):
                is_data = dataclasses.is_dataclass(one) or hasattr(one, "_fields")
                if one.__module__.startswith("grok1.") and is_data and field[0] != "_":
                    names = {f"{one.__module__}.{one.__name__}", f"grok1.{one.__name__}"}
                    assert names & set(shown), f"{name}.{field} is a {one.__name__}; show it"


def test_importing_starts_no_device_and_says_nothing():
    program = (
        "import sys, grok1\n"
        "assert 'jax' not in sys.modules, 'JAX was imported before it is needed'\n"
        "from grok1 import *\n"
        "import jax, logging\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'a device was initialised'\n"
        "assert not logging.getLogger('grok1').handlers\n"
        "assert 'matplotlib' not in sys.modules, 'an optional extra was imported'\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_everything_promised_is_there_and_nothing_else_is_shown():
    for name in grok1.__all__:
        assert getattr(grok1, name) is not None
    assert dir(grok1) == sorted(grok1.__all__)


def test_what_checkers_read_of_the_facade_is_what_is_imported():
    (block,) = (node for node in ast.parse(MODULES["__init__"].read_text()).body
                if isinstance(node, ast.If))  # fmt: skip
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        module = importlib.import_module(node.module or "")
        for alias in node.names:
            assert getattr(module, alias.name) is getattr(grok1, alias.name)
    named = {alias.name for node in block.body for alias in node.names}
    assert named | {"__version__"} == set(grok1.__all__)


@pytest.mark.parametrize(("name", "meant"), [("lod", "load"), ("modelConfig", "ModelConfig")])
def test_a_name_that_is_none_gets_a_suggestion(name, meant):
    program = f"import grok1\ngrok1.{name}"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    said = result.stderr.splitlines()[-1]
    assert said.startswith(f"AttributeError: module 'grok1' has no attribute '{name}'")
    assert f"Did you mean: '{meant}'?" in said
