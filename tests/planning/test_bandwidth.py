"""Rates that are measured."""

import pytest

import grok1
from grok1.checkpoint import mapping
from grok1.checkpoint.directory import load_config, open_tensors
from grok1.planning import bandwidth


@pytest.mark.parametrize("is_mapped", [True, False])
def test_files_and_memory_have_a_rate(nano_path, monkeypatch, is_mapped):
    monkeypatch.setattr(bandwidth, "_SECONDS", 0.05)
    if not is_mapped:
        monkeypatch.setattr(mapping, "is_available", lambda: False)
    tensors, _ = open_tensors(nano_path, load_config(nano_path))
    arrays = [tensor.values for tensor in tensors]
    assert 1e5 < bandwidth.file_bandwidth(arrays) < 1e13
    assert 1e8 < bandwidth.memory_bandwidth() < 1e13


def test_a_file_that_vanishes_is_an_error(nano_path):
    tensors, _ = open_tensors(nano_path, load_config(nano_path))
    array = tensors[2].values
    file, span = array.parts[0]
    gone = array._replace(parts=((file._replace(path=nano_path / "gone"), span),))
    with pytest.raises(grok1.CheckpointError, match="gone: cannot be read: No such file"):
        bandwidth.file_bandwidth([gone])


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_on_a_starved_machine_each_thread_still_reads_once(nano_path, monkeypatch, seconds):
    # As where the time is over before the first thread has had a processor.
    monkeypatch.setattr(bandwidth, "_SECONDS", seconds)
    tensors, _ = open_tensors(nano_path, load_config(nano_path))
    assert bandwidth.file_bandwidth([tensor.values for tensor in tensors]) > 0
    assert bandwidth.memory_bandwidth() > 0
    read: list[int] = []
    bandwidth._rate(lambda number: read.append(number) or 1, 5)
    assert sorted(read) == list(range(5))
