"""Processes that measure, and the memory that they may have."""

import types

import pytest

from benchmarks import machine
from benchmarks.machine import BenchmarkError, Worker


def test_worker_reports_a_refusal_and_its_own_end():
    with Worker() as worker:
        with pytest.raises(BenchmarkError, match="there is no such directory"):
            worker.call("load", path="absent")
        with pytest.raises(BenchmarkError, match="ended with status 1 in 'decode'"):
            worker.call("decode", batch=1, prompt=1, steps=1)  # no model: a fault of the caller


def test_memory_that_cannot_be_used_is_one_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"1")
    monkeypatch.setattr(machine, "host_bytes_available", lambda: None)
    monkeypatch.setattr(
        machine.subprocess, "run", lambda *_, **__: types.SimpleNamespace(returncode=-9)
    )
    with pytest.raises(BenchmarkError, match=r"could not use 0\.0 GB .*status -9.*leave out"):
        machine.use_memory(tmp_path)
