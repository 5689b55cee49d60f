"""The documentation is built by a gate that can fail."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def test_the_gate_refuses_a_broken_link_and_a_missing_image(tmp_path):
    for name in ("docs", "notebooks", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    (tmp_path / "grok1").symlink_to(ROOT / "grok1")
    with (tmp_path / "docs" / "index.md").open("a") as page:
        page.write("[gone](no-such-page.md), [here](laboratory.md#nowhere), ![](images/none.png)\n")
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
