"""The memory of the host: what is available, within a container's limits, and amounts in words."""

import pathlib
import sys

import pytest

from grok1.machine import host_memory


@pytest.mark.parametrize(
    ("amounts", "shown"),
    [
        ((1e9, 2e9), ["1.00 GB", "2.00 GB"]),
        ((1e9, 1e9), ["1.00 GB", "1.00 GB"]),
        ((1_000_000_000, 1_002_000_000), ["1.000 GB", "1.002 GB"]),
        ((1e12, 1e12 + 3e4), ["1000.00000 GB", "1000.00003 GB"]),
        ((10**9, 10**9 + 1), ["1,000,000,000 bytes", "1,000,000,001 bytes"]),
    ],
)
def test_amounts_are_told_apart(amounts, shown):
    assert host_memory.gigabytes_apart(*amounts) == shown


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_host_memory_is_at_most_the_machines_and_the_containers(monkeypatch):
    lines = [line.split() for line in pathlib.Path("/proc/meminfo").read_text().splitlines()]
    total = 1024 * sum(int(f[1]) for f in lines if f[0] in ("MemTotal:", "SwapTotal:"))
    available = host_memory.host_bytes_available()
    assert available is not None
    assert 0 < available <= total
    monkeypatch.setattr(host_memory, "_swap_limits", lambda: iter([0]))
    no_swap = host_memory.host_bytes_available()
    assert no_swap is not None
    fields = {f[0]: 1024 * int(f[1]) for f in lines}
    assert no_swap <= fields["MemTotal:"]
    monkeypatch.setattr(host_memory, "_group_limits", lambda swap: iter([12345 + swap]))
    limited = host_memory.host_bytes_available()
    assert limited is not None
    assert 12345 <= limited <= available


def test_a_control_group_leaves_its_limit_less_what_is_no_file(tmp_path):
    (tmp_path / "memory.max").write_text("max\n")
    group = tmp_path / "job"
    group.mkdir()
    (group / "memory.max").write_text("1000\n")
    (group / "memory.stat").write_text("anon 300\nfile 600\nshmem 50\n")
    own = tmp_path / "own"
    own.write_text("1:name=systemd:/\n0::/job\n")
    assert list(host_memory._group_limits(7, tmp_path, own)) == [1000 - 350 + 7]
    assert not list(host_memory._swap_limits(tmp_path, own))
    (group / "memory.swap.max").write_text("50\n")
    (group / "memory.swap.current").write_text("20\n")
    (tmp_path / "memory.swap.max").write_text("max\n")
    assert list(host_memory._swap_limits(tmp_path, own)) == [50 - 20]
    own.write_text("9:cpu,cpuacct:/job\n8:memory:/job\n")
    first = tmp_path / "memory" / "job"
    first.mkdir(parents=True)
    (first / "memory.limit_in_bytes").write_text("2000\n")
    (first / "memory.stat").write_text("cache 900\ntotal_rss 400\ntotal_shmem 60\ntotal_swap 5\n")
    assert list(host_memory._group_limits(7, tmp_path, own)) == [2000 - 460 + 7]
    (first / "memory.memsw.limit_in_bytes").write_text("2000\n")
    assert list(host_memory._swap_limits(tmp_path, own)) == [0]
    (first / "memory.memsw.limit_in_bytes").write_text("3000\n")
    assert list(host_memory._swap_limits(tmp_path, own)) == [1000 - 5]
    own.unlink()
    assert not list(host_memory._group_limits(7, tmp_path, own))


def test_swap_space_counts_as_far_as_a_control_group_leaves_it(monkeypatch, tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemAvailable: 4000 kB\nSwapFree: 2000 kB\n")
    monkeypatch.setattr(host_memory.pathlib, "Path", lambda _: meminfo)
    monkeypatch.setattr(host_memory, "_group_limits", lambda _: [])
    found = []
    for limits in ([], [500 << 10], [0]):
        monkeypatch.setattr(host_memory, "_swap_limits", lambda limits=limits: limits)
        found.append(host_memory.host_bytes_available() >> 10)
    assert found == [6000, 4500, 4000]
