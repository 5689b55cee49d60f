"""How a thread waits for those that compute."""

import errno
import os
import time

import pytest

import grok1
from grok1.generate import pace
from grok1.machine import processor
from grok1.machine.processor import waiting_politely

needs_policies = pytest.mark.skipif(
    not hasattr(os, "SCHED_BATCH"), reason="this system has no scheduling policies"
)


@pytest.mark.parametrize(
    ("files", "own", "expected"),
    [
        ({"job/cpu.max": "200000 100000"}, "0::/job", 2),
        ({"job/cpu.max": "350000 100000"}, "0::/job", 3),
        ({"job/cpu.max": "50000 100000"}, "0::/job", 1),
        ({"job/cpu.max": "max 100000"}, "0::/job", 64),
        ({"job/cpu.max": "max 100000", "cpu.max": "400000 100000"}, "0::/job", 4),
        # In a container without a namespace of its own the path is the host's.
        ({"cpu.max": "400000 100000"}, "0::/docker/abc", 4),
        ({"job/cpu.max": "9900000 100000"}, "0::/job", 64),
        ({"job/cpu.max": "nonsense"}, "0::/job", 64),
        (
            {"cpu/job/cpu.cfs_quota_us": "600000", "cpu/job/cpu.cfs_period_us": "200000"},
            "1:name=systemd:/\n4:cpu,cpuacct:/job\n5:memory:/other",
            3,
        ),
        (
            {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"},
            "4:cpu:/job",
            64,
        ),
        ({}, "0::/job", 64),
    ],
)
def test_a_container_has_no_more_threads_than_time(tmp_path, monkeypatch, files, own, expected):
    monkeypatch.setattr(processor, "schedulable_cores", lambda: 64)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    (tmp_path / "own").write_text(f"{own}\n")
    assert processor.available_cores(tmp_path, tmp_path / "own") == expected


def test_where_nothing_is_known_of_groups_there_is_no_limit(tmp_path):
    absent = tmp_path / "absent"
    assert processor.available_cores(absent, absent) == processor.schedulable_cores()


@needs_policies
def test_the_policy_is_another_one_while_waiting():
    before = os.sched_getscheduler(0)
    with waiting_politely():
        assert os.sched_getscheduler(0) == os.SCHED_BATCH
    assert os.sched_getscheduler(0) == before
    with pytest.raises(KeyboardInterrupt), waiting_politely():
        raise KeyboardInterrupt
    assert os.sched_getscheduler(0) == before


@needs_policies
def test_a_chosen_policy_stays():
    before = os.sched_getscheduler(0)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        with waiting_politely():
            assert os.sched_getscheduler(0) == os.SCHED_BATCH
        assert os.sched_getscheduler(0) == os.SCHED_BATCH
    finally:
        os.sched_setscheduler(0, before, os.sched_param(0))


@needs_policies
@pytest.mark.parametrize("call", ["sched_getscheduler", "sched_setscheduler"])
def test_a_sandbox_that_forbids_it_is_no_error(call, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(processor.os, call, refuse)
    with waiting_politely():
        pass


def test_without_policies_there_is_nothing_to_do(monkeypatch):
    monkeypatch.delattr(processor.os, "SCHED_BATCH", raising=False)
    with waiting_politely():
        pass


@needs_policies
@pytest.mark.parametrize("is_long", [False, True])
def test_only_long_waits_are_polite(toy: grok1.Model, is_long, monkeypatch):
    policies = []
    get = pace.jax.device_get

    def slow_get(step):
        policies.append(os.sched_getscheduler(0))
        time.sleep(0.01 if is_long else 0)
        return get(step)

    monkeypatch.setattr(pace.jax, "device_get", slow_get)
    if not is_long:
        monkeypatch.setattr(pace, "_LONG_WAIT", float("inf"))
    toy.generate([1], max_new_tokens=4, temperature=0, ignore_eos=True)
    polite = os.SCHED_BATCH if is_long else os.SCHED_OTHER
    # Whether a wait is long is known from the one before.
    assert policies == [os.SCHED_OTHER, polite, polite, polite]
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
