"""Imports point one way, and importing does nothing."""

import ast
import pathlib
import subprocess
import sys

import grok1

PACKAGE = pathlib.Path(grok1.__file__).parent

# Every module imports only from lines above its own; this is the diagram of the package.
LAYERS = [
    {"html"},
    {
        "announcement",
        "cache_directory",
        "config",
        "expert_cache",
        "layers",
        "precision",
        "processor",
        "symbolic_pickle",
        "version",
    },
    {"distributed"},
    {"native", "sampling", "tokenizer"},
    {"compilation", "quantization"},
    {"attention", "moe"},
    {"transformer"},
    {"manifest", "sharding"},
    {"tensor_file", "stacking", "capture", "intervention", "unembedding"},
    {"decoder"},
    {"checkpoint", "contents", "steps", "storage", "staging"},
    {"engine"},
    {"mapping", "reading"},
    {
        "bandwidth",
        "expert_store",
        "loading",
        "generation",
        "memory",
        "options",
        "safetensors_file",
        "gguf_file",
    },
    {"compiled_memory", "completion", "device_experts", "directory"},
    {"layerwise"},
    {"offloading"},
    {"batch", "conversion", "inspection", "planning", "verification"},
    {"scoring", "tracing"},
    {"model"},
    {"factory"},
    {"comparison", "lm_eval", "plots"},
    {"__init__", "__main__"},
]


def imports_of(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("grok1."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "grok1":
            found |= {alias.name for alias in node.names}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
    return found


def test_imports_point_one_way():
    seen: set[str] = set()
    for layer in LAYERS:
        for name in layer:
            outside = imports_of(PACKAGE / f"{name}.py") - seen
            assert not outside, f"{name} imports {outside} from its own layer or above"
        seen |= layer
    assert seen == {path.stem for path in PACKAGE.glob("*.py")}


def test_importing_starts_no_device_and_says_nothing():
    program = (
        "import grok1, jax, logging\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'a device was initialised'\n"
        "assert not logging.getLogger('grok1').handlers\n"
        "import sys\n"
        "assert 'matplotlib' not in sys.modules, 'an optional extra was imported'\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_everything_promised_is_there():
    for name in grok1.__all__:
        assert getattr(grok1, name) is not None
