"""Meshes that divide a model and those that do not; where each array goes."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from grok1.config import GROK_1
from grok1.nn.sharding import abstract_cache, abstract_stack, make_mesh
from grok1.planning.memory import released_weights

pytestmark = pytest.mark.devices(16)


@functools.cache
def stacked(sizes):
    return abstract_stack(released_weights(GROK_1), GROK_1, make_mesh(GROK_1, sizes))


def test_none_takes_every_device_with_as_many_on_model_as_divide():
    assert make_mesh(GROK_1).devices.shape == (1, 16)
    # 12 devices: 12 would divide the 48 heads but neither divides nor is divided by 8 KV heads.
    assert make_mesh(GROK_1, devices=jax.devices()[:12]).devices.shape == (3, 4)


def test_a_given_mesh_keeps_its_devices_and_gets_automatic_axes():
    given = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    mesh = make_mesh(GROK_1, given)
    np.testing.assert_array_equal(mesh.devices, given.devices)
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)


@pytest.mark.parametrize("sizes", [(np.int64(2), np.int32(4)), np.array([2, 4]), [2, 4], "2x4"])
def test_sizes_are_numbers_of_numpy_too(sizes):
    assert make_mesh(GROK_1, sizes).devices.shape == (2, 4)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ((1, 32), r"mesh 1x32 needs 32 devices, found 16 \(cpu\); give a smaller mesh"),
        ((1, 5), r"mesh 1x5 does not divide the model: num_q_heads 48 is no multiple of the mod"),
        ((1, 12), r"ffn_size 32768 is no multiple of the model axis 12"),
        ((0, 1), r"mesh must be two sizes above 0, \(data, model\), as 1x8, found \(0, 1\)"),
        ((8,), r"mesh must be two sizes above 0"),
        ("2x", r"mesh must be two sizes above 0, \(data, model\), as 1x8, found '2x'"),
        ("all", r"as 1x8, found 'all'"),
        # What was no number between two that are was left out.
        ("1xnonex8", r"as 1x8, found '1xnonex8'"),
        ("1xx8", r"as 1x8, found '1xx8'"),
        ("1x8x-1", r"as 1x8, found '1x8x-1'"),
        ("1x" + "8" * 5000, r"as 1x8, found '1x888"),
        ((True, True), r"as 1x8, found \(True, True\)"),
        ((1, np.float32(8)), r"as 1x8, found \(1, 8.0\)"),
        (
            Mesh(np.array(jax.devices()[:2]), ("x",)),
            r"the mesh must have the axes \('data', 'model'\), found \('x',\)",
        ),
    ],
)
def test_mesh_errors_say_what_does_not_fit(mesh, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(GROK_1, mesh)


def test_kv_heads_that_neither_divide_nor_are_divided_are_refused():
    config = dataclasses.replace(GROK_1, num_kv_heads=3, num_q_heads=48)
    with pytest.raises(ValueError, match=r"num_kv_heads 3 is neither a multiple nor a divisor"):
        make_mesh(config, (1, 2))


def test_each_device_holds_an_eighth_of_the_large_weights():
    params = stacked((1, 8))
    shard = {
        name: leaf.sharding.shard_shape(leaf.shape)
        for name, leaf in params.layers.experts._asdict().items()
        for leaf in [leaf.values]
    }
    assert shard == {
        "gate": (64, 8, 6144, 4096),
        "up": (64, 8, 6144, 4096),
        "down": (64, 8, 4096, 6144),
    }
    assert params.embedding.sharding.spec == P("model", None)
    assert params.layers.router.sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("model_size", "groups", "local"), [(1, 8, 8), (2, 8, 4), (4, 8, 2), (8, 8, 1), (16, 16, 1)]
)
def test_scale_groups_follow_the_mesh(model_size, groups, local):
    params = stacked((1, model_size))
    scales = params.layers.experts.down.scales
    assert scales.shape == (64, 8, groups, 6144)
    assert scales.sharding.shard_shape(scales.shape)[2] == local
    assert params.layers.experts.gate.scales.shape == (64, 8, 1, 32768)


def test_more_devices_than_kv_heads_share_heads():
    mesh = make_mesh(GROK_1, (1, 16))
    params = stacked((1, 16))
    assert params.layers.key.values.sharding.is_fully_replicated
    cache = abstract_cache(GROK_1, mesh, batch=1, capacity=8192, dtype="bfloat16")
    assert cache.k.sharding.shard_shape(cache.k.shape) == (64, 1, 1, 8192, 128)
