"""More layers than there are files of, run out of core."""

import dataclasses
import os
import types

import numpy as np

from benchmarks import deep
from grok1.checkpoint.directory import open_tensors
from grok1.checkpoint.released import open_checkpoint
from grok1.checkpoint.storage import from_header
from grok1.nn.manifest import file_name, manifest
from grok1.offload import expert_store


def test_more_layers_than_files_are_those_of_links(tmp_path, nano_path, nano_config):
    config = dataclasses.replace(nano_config, num_layers=2 * nano_config.num_layers + 1)
    numbers = {spec.name: number for number, spec in enumerate(manifest(nano_config))}
    for number, spec in enumerate(manifest(config)):
        own = spec.name
        for layer in range(nano_config.num_layers, config.num_layers):
            of_file = f"decoder_layer_{layer % nano_config.num_layers}/"
            own = own.replace(f"decoder_layer_{layer}/", of_file)
        source = nano_path / "ckpt-0" / file_name(numbers[own])
        (tmp_path / file_name(number)).symlink_to(source)
    linked = [from_header(header) for header in open_checkpoint(tmp_path, manifest(config))]
    found = deep.repeated(open_tensors(nano_path, nano_config), nano_config, config)
    assert [spec.name for spec in found.specs] == [spec.name for spec in manifest(config)]
    for tensor, link in zip(found.tensors, linked, strict=True):
        [(file, span)], [(of_link, span_of_link)] = tensor.values.parts, link.values.parts
        assert (file.path, span) == (of_link.path.resolve(), span_of_link)


def test_pages_are_forgotten_before_each_part_of_a_file_is_mapped(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 256)
    forgotten = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *what: forgotten.append(what))
    file = types.SimpleNamespace(path=path, file_size=1 << 16, modified=path.stat().st_mtime_ns)
    with deep.from_disk():
        window = expert_store.Window(file, 5000, 300)
    assert forgotten == [(5000, 300, os.POSIX_FADV_DONTNEED)]
    np.testing.assert_array_equal(window.bytes().view(np.uint8), np.arange(5000, 5300) % 256)
    window.close()
    expert_store.Window(file, 0, 8).close()
    assert len(forgotten) == 1


def test_tokens_out_of_core_are_counted_alone(nano_path, nano_config):
    layers = nano_config.num_layers + 1
    model = deep.load(nano_path, layers, 4)
    first = deep.decode(model, 1, 3, cached=True)
    assert first["seconds"] > 0
    assert first["held"][1] == layers * nano_config.num_experts
    assert 0 < first["hit_rate"] <= 1  # all that was read once is held
    assert deep.decode(model, 3, 1, cached=False)["bytes_read"] == 0
