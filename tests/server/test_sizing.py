"""Sizes of a server: slots, prompts that are kept, and what devices and the host have for them."""

import types

import numpy as np
import pytest

from grok1.server import sizing
from grok1.server.replica import Sizes

GIGABYTES = 10**9


@pytest.fixture
def leave(toy, monkeypatch):
    """Leaves the toy's device memory for so many slots of 1,024 positions."""
    each = sizing.state_bytes(toy.engine, 1, 1024)

    def leave(num_slots):
        monkeypatch.setattr(sizing, "host_bytes_available", lambda: num_slots * each)
        monkeypatch.setattr(sizing, "device_bytes_available", lambda device: num_slots * each)

    return leave


# Half of what is free is for slots and, half as much again, for prompts.
@pytest.mark.parametrize(
    ("room", "num_slots"), [(2, 1), (5.9, 1), (6.1, 2), (11.9, 2), (12.1, 4), (1000, 16)]
)
def test_there_are_as_many_slots_as_half_of_the_memory_holds(toy, leave, room, num_slots):
    leave(room)
    found = sizing.sizes_for(toy.engine, None, None, (None, None), (1, 4, 16, 64))
    assert (found.num_slots, found.capacity) == (num_slots, 1024)
    assert found.prefix_tokens == num_slots * 1024 // 2
    assert found.row_counts == tuple(n for n in (1, 4, 16, 64) if n < num_slots)


def test_more_slots_than_memory_holds_are_refused(toy, leave):
    leave(4)
    asked = toy.engine, 3, 1000, (1024, None), ()
    assert sizing.sizes_for(*asked).num_slots == 3
    leave(3.9)
    message = "^3 slots of 1024 tokens and 1024 tokens of prompts .*; give a smaller max_slots, cap"
    with pytest.raises(ValueError, match=message):
        sizing.sizes_for(*asked)


@pytest.mark.parametrize(
    ("platform", "left", "expected"),
    [("gpu", [5, 3], 3), ("gpu", [None, 7], 7), ("gpu", [None, None], 45), ("cpu", [5, 3], 45)],
)
def test_the_fullest_device_says_what_is_left(platform, left, expected, monkeypatch):
    devices = [types.SimpleNamespace(platform=platform, left=one) for one in left]
    engine = types.SimpleNamespace(mesh=types.SimpleNamespace(local_devices=devices))
    monkeypatch.setattr(sizing, "device_bytes_available", lambda device: device.left)
    monkeypatch.setattr(sizing, "host_bytes_available", lambda: 90)  # for both
    assert sizing._bytes_free(engine) == expected


@pytest.mark.parametrize(
    ("asked", "platform", "free", "expected"),
    [
        (None, "cpu", 100, 0),
        (None, "gpu", 100, 40_000),  # four times what the devices have
        (None, "gpu", 4, 20_000),  # a quarter, 50 kB each
        (None, "gpu", None, 0),
        (0, "gpu", 100, 0),
        (70_000, "cpu", 100, 70_000),
        (70_000, "cpu", 1, 16_000),
        (70_000, "gpu", None, 70_000),
    ],
)
def test_the_host_gives_what_it_can(asked, platform, free, expected, monkeypatch):
    monkeypatch.setattr(
        sizing, "host_bytes_available", lambda: None if free is None else free * GIGABYTES
    )
    monkeypatch.setattr(sizing, "state_bytes", lambda engine, groups, capacity: 50_000 * capacity)
    [memory, device, mesh, engine] = [types.SimpleNamespace() for _ in range(4)]
    memory.kind, device.platform, engine.mesh, engine.runs_ahead = (
        "pinned_host",
        platform,
        mesh,
        True,
    )
    device.addressable_memories = lambda: [memory]
    mesh.shape, mesh.local_devices, mesh.devices = {"data": 1}, [device], np.array([device])
    sizes = Sizes(4, 4096, (), 16, 10_000, host_prefix_tokens=asked)
    assert sizing.host_prefix_tokens(engine, sizes) == expected
    if asked == 70_000 and free:
        # Another process has less of the same machine's memory.
        words = {"free": str(free * GIGABYTES // 2), "bytes": "100000"}

        def exchange(what, own, mesh):
            return {0: own(), 1: {**own(), **words}}

        monkeypatch.setattr(sizing, "exchange", exchange)
        assert sizing.host_prefix_tokens(engine, sizes) == min(70_000, free * 2_000)


@pytest.mark.devices(8)
def test_slots_and_rows_are_as_many_for_each_group_of_devices(nano_on_mesh):
    engine = nano_on_mesh((2, 4)).engine
    found = sizing.sizes_for(engine, 3, 16, (0, 0), (1, 2, 3, 4, 8))
    assert (found.num_slots, found.row_counts) == (4, (2,))
