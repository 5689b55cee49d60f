"""The race of the tokens: weights, noise and random numbers against float64 and known answers."""

import jax
import jax.numpy as jnp
import numpy as np

from grok1.ops import race


def test_weights_are_powers_of_two_to_float32():
    log_weight = -np.arange(0, 3 << 24, 97, dtype=np.int32)
    found = np.asarray(jax.jit(race.relative_weights)(log_weight), np.float64)
    np.testing.assert_allclose(found, 2.0 ** (log_weight / race.OCTAVE), rtol=1e-7)
    assert np.all(np.diff(found) <= 0)


def test_noise_is_gumbels():
    keys = np.array([[3, 4]], np.uint32)
    bits, noise = jax.jit(lambda k: (race.token_bits(k, 99_999), race.noise(k, 99_999)))(keys)
    uniform = (np.asarray(bits)[0].astype(np.float64) + 0.5) / 2**32
    expected = -np.log2(-np.log1p(-uniform))
    np.testing.assert_allclose(np.asarray(noise)[0] / race.OCTAVE, expected, atol=2e-6)
    assert abs(uniform.mean() - 0.5) < 4 / np.sqrt(12 * 99_999)


def test_keys_and_random_numbers_are_those_of_threefry():
    # The known answers of the authors' Random123, and JAX's own folding.
    block = race.threefry(*map(jnp.uint32, (0x13198A2E, 0x03707344, 0x243F6A88, 0x85A308D3)))
    assert [int(word) for word in block] == [0xC4923A9C, 0x483DF7A0]
    key = jax.random.key(9, impl="threefry2x32")
    folded = race.position_keys(jax.random.key_data(key)[None], np.array([77]))
    np.testing.assert_array_equal(folded[0], jax.random.key_data(jax.random.fold_in(key, 77)))


def test_many_equals_are_summed_up():
    one = race.weights(jnp.zeros(1, jnp.int32))
    for times in (1, 2**17, race.MOST_TOKENS):
        limbs = one.plus(one, jnp.array([times - 1])).carried()
        found = sum(int(limb[0]) << bits for limb, bits in zip(limbs, (30, 15, 0), strict=True))
        assert found == times << 44
