"""Hooks of the documentation site: notebooks become pages of it, and modules say what they are.

A page holds a notebook's text, code and stored outputs, so that building the site runs nothing. A
page about a room lists its modules with the first lines of their docstrings.
"""

import ast
import html
import json
import pathlib
import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_ANSI_COLOR = re.compile(r"\x1b\[[0-9;]*m")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for each notebook."""
    root = pathlib.Path(config.config_file_path).parent
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        content = "\n\n".join(_cell(cell) for cell in notebook["cells"])
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads links to a notebook's file, as a reader of the repository needs them, to its page.

    Where a page has the comment `modules of ROOM`, the modules of that room are listed.
    """
    del page, files
    root = pathlib.Path(config.config_file_path).parent
    markdown = re.sub(
        r"<!-- modules of (\w+) -->", lambda found: _modules(root / "grok1" / found[1]), markdown
    )
    return re.sub(r"\]\(\.\./notebooks/([\w-]+)\.ipynb\)", r"](notebooks/\1.md)", markdown)


def _modules(folder: pathlib.Path) -> str:
    lines = ["| module | |", "|---|---|"]
    for path in sorted(folder.rglob("*.py")):
        if path.name != "__init__.py":
            first = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
            name = ".".join(path.relative_to(folder).with_suffix("").parts)
            lines.append(f"| `{name}` | {first} |")
    return "\n".join(lines)


def _cell(cell: dict[str, Any]) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        # From a notebook, the site's other pages are one directory up and in docs.
        return re.sub(r"\]\(\.\./docs/", "](../", source).replace(".ipynb)", ".md)")
    parts = [f"```python\n{source}\n```", *(_output(output) for output in cell["outputs"])]
    return "\n\n".join(parts)


def _output(output: dict[str, Any]) -> str:
    data = {kind: "".join(text) for kind, text in output.get("data", {}).items()}
    if "text/html" in data:
        # A blank line would end the block of HTML.
        return re.sub(r"\n(?=\n)", "\n&#8203;", data["text/html"])
    if "image/png" in data:
        png = data["image/png"].replace("\n", "")
        return (
            f'<img alt="The figure that the code above draws." src="data:image/png;base64,{png}">'
        )
    text = data.get("text/plain") or "".join(output.get("text", ""))
    return f"<pre><code>{html.escape(_ANSI_COLOR.sub('', text))}</code></pre>"
