"""The order of the files, against the listing of the released checkpoint."""

import json

from grok1.checkpoint.tensor_file import tensor_file_size
from grok1.config import GROK_1, ModelConfig
from grok1.nn.manifest import abstract_params, arrange, file_name, manifest
from grok1.nn.transformer import naming
from tests.conftest import GOLDEN


def test_grok_1_maps_one_to_one_onto_the_released_files():
    released = json.loads((GOLDEN / "grok1_manifest.json").read_text())
    tensors = manifest(GROK_1)
    assert len(tensors) == 770
    for index, (spec, entry) in enumerate(zip(tensors, released["tensors"], strict=True)):
        assert file_name(index) == entry["file"]
        assert spec.name == entry["name"]
        assert list(spec.shape) == entry["shape"]
        assert spec.dtype == entry["dtype"]
        assert (spec.scales_shape and list(spec.scales_shape)) == entry["scales_shape"]
    assert sum(tensor_file_size(spec) for spec in tensors) == released["total_bytes"]


def test_layers_sort_as_text(nano_config: ModelConfig):
    layers = [spec.name for spec in manifest(nano_config) if spec.name.endswith("router/w")]
    numbers = [int(name.split("_")[2].split("/")[0]) for name in layers]
    assert numbers == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]


def test_names_are_arranged_as_haiku_arranges_them(nano_config: ModelConfig):
    named = abstract_params(nano_config)
    assert arrange(named, nano_config) == naming(nano_config).apply(named, None)
