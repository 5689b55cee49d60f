"""Runs the notebooks from top to bottom and stores what they print: python -m tools.run_notebooks.

With `--check` nothing is stored: the exit status says whether every cell ran, and showed what is
stored. It needs the extra `notebooks`.
"""

import argparse
import math
import os
import pathlib
import re
import sys
import tempfile

try:
    import nbformat
    from nbclient import NotebookClient  # pyright: ignore[reportMissingImports]
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"tools.run_notebooks: {error}; pip install '.[notebooks]' brings it")

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?")


def run(path: pathlib.Path, *, then: str = "") -> nbformat.NotebookNode:
    """Runs a notebook in a fresh kernel and returns it with its outputs.

    Args:
      path: The notebook; its working directory is the one it lies in.
      then: Code to run in the same kernel after the last cell; it is not part of the result.

    Raises:
      nbclient.exceptions.CellExecutionError: If a cell raises; the message holds its traceback.
    """
    notebook = nbformat.read(path, as_version=4)
    num_cells = len(notebook.cells)
    if then:
        notebook.cells.append(nbformat.v4.new_code_cell(then))
    flags = os.environ.get("XLA_FLAGS", "").split()
    with tempfile.TemporaryDirectory() as private:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            # Notebooks show one device unless they ask for more, and leave nothing behind.
            "XLA_FLAGS": " ".join(flag for flag in flags if "device_count" not in flag),
            "JAX_PLATFORMS": "cpu",
            "IPYTHONDIR": private,
            "JUPYTER_RUNTIME_DIR": private,
        }
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            timeout=600,
            startup_timeout=300,
            resources={"metadata": {"path": str(path.parent)}},
        )
        client.execute(env=environment)
    del notebook.cells[num_cells:]
    return _reproducible(notebook)


def _reproducible(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Leaves out what differs from machine to machine: versions, times, talk of compiling."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        if cell.cell_type == "code":
            cell.outputs = _joined([out for out in cell.outputs if out.get("name") != "stderr"])
    return notebook


def differences(stored: nbformat.NotebookNode, found: nbformat.NotebookNode) -> list[str]:
    """Returns the texts and tables that differ, as far as machines round alike; no pictures."""
    different = []
    for before, after in zip(stored.cells, found.cells, strict=True):
        shown, printed = _shown(before), _shown(after)
        pairs = zip(_NUMBER.findall(shown), _NUMBER.findall(printed), strict=False)
        is_near = all(
            # What has an exponent is a difference of roundings.
            "e" in one or math.isclose(float(one), float(other), rel_tol=0.01, abs_tol=0.02)
            for one, other in pairs
        )
        if not is_near or _NUMBER.sub("#", shown) != _NUMBER.sub("#", printed):
            different.append(f"stored:\n{shown}\nfound:\n{printed}")
    return different


def _shown(cell: nbformat.NotebookNode) -> str:
    outputs = cell.get("outputs", [])
    texts = [output.get("text", output.get("data", {}).get("text/html", "")) for output in outputs]
    return re.sub(" +", " ", "\n".join(texts))


def _joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Pieces that a cell printed one after the other, as one; they are cut by time."""
    joined: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream" and joined and joined[-1].output_type == "stream":
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def main() -> None:
    """Runs the notebooks that are named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="such as 3-experts; by default all")
    parser.add_argument("--check", action="store_true", help="store nothing")
    parser.add_argument("--then", default="", help="code to run after the last cell")
    options = parser.parse_args()
    names = options.names or sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    for path in (NOTEBOOKS / f"{name}.ipynb" for name in names):
        notebook = run(path, then=options.then)
        if options.check:
            different = differences(nbformat.read(path, as_version=4), notebook)
            if different:
                sys.exit("\n".join([f"{path.name}: the outputs are not those stored", *different]))
        else:
            nbformat.write(notebook, path)
        print(f"{path.name}: {len(notebook.cells)} cells")


if __name__ == "__main__":
    main()
