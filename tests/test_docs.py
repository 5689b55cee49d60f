"""The documentation is built by a gate that can fail."""

import os
import pathlib
import re
import subprocess
import sys

import yaml

ROOT = pathlib.Path(__file__).parent.parent


def test_the_gate_refuses_a_broken_link_and_a_missing_image(tmp_path):
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    # Two pages, without those that are made of notebooks and docstrings.
    for name in ("hooks", "watch", "extra_css"):
        del config[name]
    config |= {"nav": ["index.md", "laboratory.md"], "plugins": []}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(config))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "laboratory.md").write_text("# Laboratory\n")
    (tmp_path / "docs" / "index.md").write_text(
        "[gone](no-such-page.md), [here](laboratory.md#nowhere), ![](images/none.png)\n"
    )
    gate = (ROOT / ".ci" / "run").read_text()
    command = re.findall(r'^[^#\n]*"\$venv/bin/mkdocs"( build .*)$', gate, re.MULTILINE)
    assert len(command) == 1
    python = f'"{sys.executable}" -m mkdocs'
    result = subprocess.run(
        ["bash", "-c", python + command[0]],
        cwd=tmp_path,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "venv": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode != 0
    for broken in ("no-such-page.md", "#nowhere", "images/none.png"):
        assert broken in result.stdout
    assert "Aborted with 3 warnings in strict mode!" in result.stdout
