"""Every notebook runs from top to bottom on the toy, and what its text says is so."""

import pathlib
import re
import subprocess
import sys

import nbformat
import pytest

from tools.run_notebooks import NOTEBOOKS, ROOT

PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
CLAIMS: dict[str, str] = {}


def test_there_are_five():
    assert [path.stem[0] for path in PATHS] == list("12345")


# In a process of its own: Jupyter's libraries warn of each other, and warnings are errors here.
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook_runs_and_its_claims_hold(path):
    arguments = ["--check", "--then", CLAIMS.get(path.stem, ""), path.stem]
    result = subprocess.run(
        [sys.executable, "-m", "tools.run_notebooks", *arguments],
        cwd=ROOT,
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
