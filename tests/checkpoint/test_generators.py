"""Seeds mean the same whatever generator JAX is set to."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import numpy as np
import grok1
config = grok1.ModelConfig(
    vocab_size=64, emb_size=16, widening_factor=2, key_size=8, num_q_heads=2, num_kv_heads=1,
    num_layers=1, num_experts=2, num_selected_experts=1, sequence_len=256)
model = grok1.random_model(config, mesh=(1, 1), seed=3)
drawn = model.generate([[1, 2], [5]], max_new_tokens=6, temperature=1.0, ignore_eos=True, seed=4)
print([d.tokens for d in drawn], np.asarray(model.params.embedding).sum(), flush=True)
"""


def outcome(native: str, **settings: str) -> str:
    environment = {**os.environ, "GROK1_NATIVE": native, **settings}
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


@pytest.fixture(scope="module")
def expected() -> str:
    return outcome("1")


@pytest.mark.parametrize(
    ("native", "settings"),
    [
        ("1", {"JAX_DEFAULT_PRNG_IMPL": "rbg"}),
        ("1", {"JAX_THREEFRY_PARTITIONABLE": "0"}),
        ("0", {"JAX_DEFAULT_PRNG_IMPL": "unsafe_rbg", "JAX_THREEFRY_PARTITIONABLE": "0"}),
    ],
)
def test_weights_and_draws_of_a_seed(expected, native, settings):
    assert outcome(native, **settings) == expected
