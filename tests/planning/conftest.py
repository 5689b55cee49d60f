"""The plan that several modules hold to what it says."""

import json
import subprocess
import sys

import pytest


@pytest.fixture(scope="session")
def on_eight_gpus() -> dict:
    """The real model, by the command as a user types it."""
    command = ["plan", "--devices", "8", "--memory", "80", "--json"]
    result = subprocess.run(
        [sys.executable, "-m", "grok1", *command], capture_output=True, text=True, check=True
    )
    return json.loads(result.stdout)
