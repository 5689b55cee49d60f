"""Every notebook runs from top to bottom on the toy, and what its text says is so."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import nbformat
import pytest

from tests.helpers import flags_with_devices, slow

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
# What the notebooks' text says of their output, in their own names.
CLAIMS = {
    "1-generate": """
assert batch[2].tokens == alone.tokens
assert stream.completion.stop_reason == "stop"
""",
    "2-score": """
bits = {name: one.bits_per_byte for name, one in zip(texts, model.score(list(texts.values())))}
assert bits["the same words, shuffled"] > bits["documentation"] + 1
assert model.score(documentation, window=16, stride=1).bits_per_byte < found.bits_per_byte + 0.01
assert choice.best == 0
""",
    "3-experts": """
purities = [purity(trace.expert_indices[layer, :, 0], trace.tokens) for layer in range(6)]
assert purities[0] == 1 and purities[0] > purities[1] > purities[5]
left = 1 - trace.expert_weights.sum(-1).mean(-1)
assert left[0] > left[5] and 0.3 < left.mean() < 0.4
""",
    "4-intervene": """
assert whole > 5 and preference(model, single) < -5
assert all(turned[:4, 2] > 4) and turned[4:, 2].max() < -2
assert all(turned[:4, -1] < -2) and turned[4:, -1].min() > 3
assert (layer_of_head, left.min() > 4) == (3, True)
assert mapped.attention_probs[0, head_missed, -1].argmax() == 2
with model.intervene(CapLayers(3)) as three, model.intervene(CapLayers(5)) as five:
    assert preference(three, double) < 0 < preference(five, double)
assert all(after > before + 5 for before, after in steered_by.values())
assert sorted(after > 0 for _, after in steered_by.values()) == [False, True, True]
assert cost.max() < 0.06 and np.corrcoef(cost.ravel(), load.ravel())[0, 1] < 0.4
""",
    "5-from-toy-to-314b": """
assert difference < 1e-5
assert hosts[0].returncode == hosts[1].returncode == 0
""",
}


def test_there_are_five():
    assert [path.stem[0] for path in PATHS] == list("12345")


# In a process of its own: Jupyter's libraries warn of each other, and warnings are errors here.
@slow
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook_runs_and_its_claims_hold(path):
    for package in ("ipykernel", "nbclient"):
        if importlib.util.find_spec(package) is None:
            pytest.skip("Jupyter is not installed: pip install '.[notebooks]'")
    arguments = ["--check", "--then", CLAIMS.get(path.stem, ""), path.stem]
    result = subprocess.run(
        [sys.executable, "-m", "tools.run_notebooks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


SCRIPT = """
import ast, json, sys
sys.displayhook = lambda value: value is None or getattr(value, "_repr_html_", value.__repr__)()
name, *cells = json.loads(sys.argv[1])
names = {"__name__": "__main__"}
for cell in cells:
    for statement in ast.parse(cell).body:
        # As Jupyter does, it shows what an expression is.
        exec(compile(ast.Interactive([statement]), name, "single"), names)
"""


def test_the_cells_of_a_notebook_run_as_a_script_and_its_claims_hold():
    # What the others call, tests of `study`, `planning` and `machine` do.
    path = PATHS[0]
    cells = nbformat.read(path, as_version=4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    script = [path.name, *code, CLAIMS[path.stem]]
    environment = {
        **os.environ,
        "MPLBACKEND": "agg",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": flags_with_devices(1),
    }
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(script)],
        cwd=NOTEBOOKS,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_stored_notebook_is_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    first, last = notebook.cells[0].source, notebook.cells[-1].source
    assert "You will learn" in first
    assert last.startswith("## Try")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any(cell.outputs for cell in code)
    assert not re.search(r"/(home|root|tmp|usr|work|Users)/", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\((\S+?)\)", "".join(cell.source for cell in notebook.cells)):
        assert (path.parent / pathlib.PurePosixPath(target)).exists(), target


def test_stored_notebooks_are_small():
    assert sum(path.stat().st_size for path in PATHS) < 1_000_000
