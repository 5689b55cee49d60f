"""What stays in memory, and that more memory is never worse."""

import numpy as np
import pytest

from grok1.offload.expert_cache import ExpertCache


def run(accesses, capacity, per_step=1 << 30):
    """Returns the hits, and what is held after every access."""
    cache, hits, held = ExpertCache(capacity), [], []
    for i, key in enumerate(accesses):
        if i % per_step == 0:
            cache.step()
        found = cache.use(key)
        hits.append(found is not None)
        assert found in (None, key)
        if found is None:
            victim = cache.victim(key)
            if victim is not None and victim != key:
                assert cache.take(victim) == victim
            if victim != key:
                cache.put(key, key)
        held.append(set(cache._held))
    return np.array(hits), held


def tokens(num_tokens, num_layers, skew, seed=0):
    """Two experts of eight for each layer and token, in the order of a run."""
    generator = np.random.default_rng(seed)
    odds = np.exp(skew * generator.standard_normal((num_layers, 8)))
    return [
        (layer, int(expert))
        for _ in range(num_tokens)
        for layer in range(num_layers)
        for expert in generator.choice(8, 2, replace=False, p=odds[layer] / odds[layer].sum())
    ]


def test_going_through_the_layers_again_and_again_finds_what_is_held():
    # The last-used 10 of 128 would never hold the one that comes next.
    cycle = [(layer, expert) for layer in range(64) for expert in (0, 1)]
    hits, _ = run(cycle * 4, 10)
    assert hits[128:].sum() == 3 * 10


def test_experts_used_alike_do_not_drive_each_other_out():
    # Each token chooses others, in every layer.
    accesses = [(layer, 2 * t + i) for t in range(4) for layer in range(16) for i in range(2)]
    _, held = run(accesses, 10, per_step=32)
    assert held[-1] == held[31]


def test_a_larger_cache_holds_all_that_a_smaller_one_does():
    accesses = tokens(40, 12, skew=0.5)
    smaller, larger = run(accesses, 7, 24), run(accesses, 12, 24)
    assert all(some <= more for some, more in zip(smaller[1], larger[1], strict=True))
    assert larger[0].sum() > smaller[0].sum() > 0


def test_what_is_used_more_is_kept():
    accesses = tokens(200, 12, skew=1.5)
    hits, _ = run(accesses, 12, 24)
    # An eighth of the experts; kept at random they would have an eighth of the uses.
    assert hits[len(hits) // 2 :].mean() > 0.3


def test_a_new_subject_finds_its_experts():
    before, after = tokens(600, 4, skew=2.0, seed=1), tokens(900, 4, skew=2.0, seed=2)
    hits, _ = run(before + after, 4, 8)
    alone, _ = run(after, 4, 8)
    assert hits[-2000:].mean() == pytest.approx(alone[-2000:].mean(), rel=0.05)


@pytest.mark.parametrize(
    ("num_steps", "uses", "leaves"), [(255, 2, (0, 1)), (256, 2, (0, 0)), (256, 1, (0, 1))]
)
def test_uses_count_half_after_256_steps(num_steps, uses, leaves):
    cache = ExpertCache(1)
    for _ in range(2):
        cache.use((0, 0))
    cache.put((0, 0), "first")
    for _ in range(num_steps):
        cache.step()
    for _ in range(uses):
        cache.use((0, 1))
    assert cache.victim((0, 1)) == leaves


def test_what_is_in_use_does_not_leave():
    cache = ExpertCache(1)
    cache.use((0, 0))
    cache.put((0, 0), "first")
    for _ in range(3):
        cache.use((0, 1))
    assert cache.victim((0, 1)) == (0, 0)
    assert cache.victim((0, 1), kept=[(0, 0)]) == (0, 1)


def test_shrinking_lets_go_of_what_is_used_least():
    cache = ExpertCache(3)
    for key, uses in (((0, 0), 2), ((0, 1), 1), ((1, 0), 3)):
        for _ in range(uses):
            cache.use(key)
        cache.put(key, key)
    cache.shrink(4)
    assert len(cache) == 3
    cache.shrink(2)
    assert cache.use((0, 1)) is None
    assert cache.use((0, 0)) is not None
    assert cache.use((1, 0)) is not None
    cache.shrink(0)
    assert len(cache) == 0
