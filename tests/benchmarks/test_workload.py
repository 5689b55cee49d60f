"""What is run for a figure, and the bytes and operations that it is held to."""

import jax
import numpy as np
import pytest

import grok1
from benchmarks import workload
from tests.helpers import slow


def test_draws_alone_are_timed_for_every_shape_and_number_of_filtered_rows(toy, monkeypatch):
    monkeypatch.setattr(workload, "_SECONDS", 0.01)
    sampler = workload.Sampler(toy, "The first argument is a list of all names. " * 3, size=4000)
    drawn = []
    monkeypatch.setattr(sampler, "_sample", lambda *given: drawn.append(given) or given[0])
    for shape in ("trained", "flat"):
        assert sampler(shape, 33, 2) > 0
        logits, allowed, state, _ = drawn[-1]
        assert logits.shape == (33, 4000)
        assert allowed.all()
        assert np.flatnonzero(state.temperature).tolist() == [0, 1]
        assert np.all(np.asarray(state.top_p) == np.float32(0.95))
    # What is trained has favourites.
    trained, flat = (np.asarray(sampler._logits[shape]) for shape in ("trained", "flat"))
    assert trained.std(axis=-1).mean() > 4 * flat.std(axis=-1).mean()


def test_the_spread_of_a_model_is_that_of_its_logits(toy):
    tokens = np.arange(1, 17)
    logits = np.asarray(toy.logits(tokens), np.float64) / 0.7
    probs = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probs /= probs.sum(axis=-1, keepdims=True)
    found = workload.spread(toy, tokens)
    assert found["most probable"] == pytest.approx(probs.max(axis=-1).mean())
    sizes = [np.searchsorted(np.cumsum(np.sort(row)[::-1]), 0.95) + 1 for row in probs]
    assert found["nucleus"] == np.median(sizes)


def test_workload_generates_what_generate_does(toy):
    prompts = workload.random_prompts(toy.config.vocab_size, 2, 5)
    timing = workload.run(toy, prompts, 4)
    expected = toy.generate(prompts.tolist(), max_new_tokens=4, temperature=0, ignore_eos=True)
    np.testing.assert_array_equal(timing.sequences[:, :5], prompts)
    assert timing.sequences[:, 5:].tolist() == [completion.tokens for completion in expected]
    assert timing.first > 0
    assert timing.steps > 0


@slow
def test_experts_read_are_those_that_the_router_chose(toy):
    sequences = np.asarray(workload.random_prompts(toy.config.vocab_size, 3, 24))
    distinct = 0
    for position in range(20, 23):
        chosen = [set() for _ in range(toy.config.num_layers)]
        for row in sequences:
            state = toy.engine.new_state(np.pad(row[None], ((0, 0), (0, 256 - 24))))
            _, _, captured = toy.engine.score(state, np.array([23]), 64, ("expert_indices",))
            for layer, indices in enumerate(np.asarray(captured["expert_indices"])):
                chosen[layer] |= set(indices[position].tolist())
        distinct += sum(map(len, chosen))
    assert workload.experts_read(toy, sequences, 20) == distinct / 3
    assert workload.experts_read(toy, sequences[:1], 5) == 2 * toy.config.num_layers


def test_decode_bytes_of_all_experts_are_the_whole_model_and_the_filled_cache(toy):
    all_experts = toy.config.num_layers * toy.config.num_experts
    parts = workload.decode_bytes(toy, 2, 10, 3, all_experts)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(toy.params))
    if toy.engine.screening_table is not None:  # read instead of the embedding
        table = sum(leaf.nbytes for leaf in jax.tree.leaves(toy.engine.screening_table))
        weights += table - toy.params.embedding.nbytes
    assert parts["layers"] + parts["experts"] + parts["head"] == weights
    row = 2 * toy.config.num_layers * toy.config.num_kv_heads * toy.config.key_size * 4
    assert parts["cache"] == 2 * row * (11 + 12 + 13) / 3
    chosen = workload.decode_bytes(toy, 2, 10, 3, all_experts / 4)
    assert chosen["experts"] == parts["experts"] / 4


def test_prefill_operations_are_those_of_the_products():
    config = grok1.TOY
    one = workload.prefill_operations(config, 1)
    # From the checkpoint: 2 for each weight that a token meets, and attention to itself.
    attention = 2 * 128 * 128 + 2 * 128 * 64
    experts = 2 * 3 * 128 * config.ffn_size + 128 * 8
    assert one == 2 * 6 * (attention + experts + 2 * 128)
    assert workload.prefill_operations(config, 3) == 3 * one + 2 * 6 * 2 * 128 * (0 + 1 + 2)
