"""Checkpoints that several modules convert and verify."""

import pathlib
import shutil

import pytest

from grok1.care.conversion import convert
from tests.conftest import TOY


@pytest.fixture(scope="session")
def toy_safetensors(tmp_path_factory) -> pathlib.Path:
    target = tmp_path_factory.mktemp("safetensors") / "toy"
    convert(TOY, target, to="safetensors", progress=False)
    return target


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """The journal of an interrupted run lies in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def nano_copy(nano_path, tmp_path) -> pathlib.Path:
    shutil.copytree(nano_path / "ckpt-0", tmp_path / "nano" / "ckpt-0")
    shutil.copy(nano_path / "config.json", tmp_path / "nano")
    for path in (tmp_path / "nano" / "ckpt-0").iterdir():
        path.chmod(0o644)
    return tmp_path / "nano"
