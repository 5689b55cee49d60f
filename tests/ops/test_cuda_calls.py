"""The CUDA kernels behind their operations, on a CPU in place of a device."""

import jax.numpy as jnp
import pytest

from grok1.ops.cuda import calls, check, presence
from tests.ops import standin


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(calls, "call", standin.call)


@pytest.mark.parametrize("operation", presence.OPERATIONS)
def test_the_check_of_a_device_finds_no_fault(operation):
    assert check.problem_of(operation) == ""


def test_the_check_of_a_device_names_a_fault(monkeypatch):
    def wrong(kernel, *inputs):
        return [jnp.zeros(array.shape, array.dtype) for array in kernel.outputs]

    monkeypatch.setattr(calls, "call", wrong)
    assert check.problem_of("norm") == "on 3 rows it is 1.0e+00 away"

    def not_a_number(kernel, *inputs):
        return [jnp.full(array.shape, jnp.nan, array.dtype) for array in kernel.outputs]

    monkeypatch.setattr(calls, "call", not_a_number)
    assert check.problem_of("add_norm") == "on 1 norms it is nan away"

    def fails(kernel, *inputs):
        raise RuntimeError("CUDA_ERROR_INVALID_PTX\nand more")

    monkeypatch.setattr(calls, "call", fails)
    assert check.problem_of("route") == "RuntimeError: CUDA_ERROR_INVALID_PTX"
