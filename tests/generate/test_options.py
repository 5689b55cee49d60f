"""GenerationOptions: defaults, what is refused and in which words, and the values derived."""

import dataclasses
import inspect
import re

import jax.numpy as jnp
import numpy as np
import pytest

from grok1.engine.sampling import SamplingParams
from grok1.generate.options import GenerationOptions, check_ids


def exactly(message):
    return f"^{re.escape(message)}$"


def make_options(**fields):
    """Constructs options without the type checker that a test run may put around them."""
    options = object.__new__(GenerationOptions)
    inspect.unwrap(GenerationOptions.__init__)(options, **fields)
    return options


def test_defaults():
    options = GenerationOptions()
    assert dataclasses.asdict(options) == {
        "max_new_tokens": 64,
        "temperature": 0.7,
        "top_p": 0.95,
        "top_k": None,
        "min_p": None,
        "seed": 0,
        "stop": None,
        "ignore_eos": False,
        "logprobs": None,
        "add_bos": False,
        "allow_control": False,
        "allowed_tokens": None,
        "logits_processor": None,
    }
    assert options.sampling() == SamplingParams()


@pytest.mark.parametrize("array", [np.int8, np.uint64, np.array, jnp.int32])
def test_numbers_are_those_of_any_library(array):
    whole = ("max_new_tokens", "top_k", "logprobs", "seed", "stop")
    options = make_options(**{name: array(100) for name in whole})
    assert options == make_options(**dict.fromkeys(whole, 100))
    # Small integers of NumPy's wrap around where they are added to others.
    assert {type(getattr(options, name)) for name in whole} == {int}
    several = make_options(seed=array([3, 4]), stop=[array(7), "a"])
    assert several == make_options(seed=[3, 4], stop=[7, "a"])


@pytest.mark.parametrize("array", [np.float16, np.array, jnp.float32, jnp.bfloat16])
def test_fractions_are_those_of_any_library(array):
    names = ("temperature", "top_p", "min_p")
    options = make_options(**{name: array(0.5) for name in names})
    assert options == make_options(**dict.fromkeys(names, 0.5))
    with pytest.raises(TypeError, match="temperature must be a number, found True"):
        make_options(temperature=np.array(True))


def test_sampling_is_the_part_that_shapes_a_draw():
    options = make_options(temperature=0.5, top_p=0.25, top_k=7, min_p=0.125, seed=3)
    expected = SamplingParams(temperature=0.5, top_p=0.25, top_k=7, min_p=0.125)
    assert options.sampling() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number above 0, found 0"),
        ({"max_new_tokens": -3}, "max_new_tokens must be a whole number above 0, found -3"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number above 0, found 1.5"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number above 0, found True"),
        ({"max_new_tokens": "8"}, "max_new_tokens must be a whole number above 0, found '8'"),
        ({"logprobs": -1}, "logprobs must be a number of alternatives from 0, or None, found -1"),
        (
            {"logprobs": True},
            "logprobs must be a number of alternatives from 0, or None, found True",
        ),
        ({"stop": ""}, "stop must not hold an empty string: it would end at once"),
        ({"stop": ["a", ""]}, "stop must not hold an empty string: it would end at once"),
        (
            {"temperature": -1.0},
            "temperature must be 0 (the most probable token) or above, found -1.0",
        ),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, found 0.0"),
        ({"top_k": 0}, "top_k must be a whole number above 0, or None, found 0"),
        ({"min_p": 2.0}, "min_p must be from 0 to 1, or None, found 2.0"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=exactly(message)):
        make_options(**options)


# --- stop -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "strings", "tokens"),
    [
        (None, [], []),
        ("end", ["end"], []),
        (7, [], [7]),
        (0, [], [0]),
        (["end", 7, "\n", 0], ["end", "\n"], [7, 0]),
        (("end", "\n"), ["end", "\n"], []),
        ([], [], []),
        ([np.int32(5), "x"], ["x"], [5]),
        (np.int64(5), [], [5]),
    ],
)
def test_stop_takes_strings_and_tokens_one_or_several(stop, strings, tokens):
    options = make_options(stop=stop)
    assert options.stop_strings() == strings
    assert options.stop_tokens() == tokens


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ([True], "stop takes strings and token ids, found True of type bool"),
        (["a", 2.5], "stop takes strings and token ids, found 2.5 of type float"),
        ([None], "stop takes strings and token ids, found None of type NoneType"),
        (2.5, "stop takes strings and token ids, one or a list, found 2.5 of type float"),
        (b"x", "stop takes strings and token ids, one or a list, found b'x' of type bytes"),
        ([["a"]], "stop takes strings and token ids, found ['a'] of type list"),
        (
            np.array(2.5),
            "stop takes strings and token ids, one or a list, found 2.5 of type float",
        ),
    ],
)
def test_stop_of_another_type_is_refused(stop, message):
    with pytest.raises(TypeError, match=exactly(message)):
        make_options(stop=stop)


# --- seeds ------------------------------------------------------------------------------------


def test_one_seed_makes_a_stream_for_each_prompt():
    assert make_options(seed=5).seeds(3) == [(5, 0), (5, 1), (5, 2)]


def test_a_sequence_of_seeds_gives_each_prompt_the_draws_it_would_have_alone():
    seeds = make_options(seed=[5, 6, 5]).seeds(3)
    assert seeds == [(5, 0), (6, 0), (5, 0)]
    assert seeds[1:2] == make_options(seed=6).seeds(1)


def test_seeds_are_python_integers():
    for options in (make_options(seed=np.int64(5)), make_options(seed=np.array([5, 5]))):
        for seed, stream in options.seeds(2):
            assert type(seed) is type(stream) is int


@pytest.mark.parametrize("seeds", [[5, 6], [5, 6, 7, 8], []])
def test_seeds_must_be_one_a_prompt(seeds):
    message = f"{len(seeds)} seeds for 3 prompts; give one a prompt"
    with pytest.raises(ValueError, match=exactly(message)):
        make_options(seed=seeds).seeds(3)


# --- allowed tokens ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [
        ([1, 3], [1, 3]),
        ((0,), [0]),
        (np.array([4, 4, 2], np.uint8), [2, 4]),
        ([False, True, False, False, True], [1, 4]),
        (np.arange(5) > 2, [3, 4]),
    ],
)
def test_allowed_mask(allowed, expected):
    mask = make_options(allowed_tokens=allowed).allowed_mask(5)
    assert mask.dtype == bool
    assert mask.shape == (5,)
    assert np.flatnonzero(mask).tolist() == expected


def test_one_new_token_and_no_alternatives_are_enough():
    options = make_options(max_new_tokens=1, logprobs=0)
    assert (options.max_new_tokens, options.logprobs) == (1, 0)


def test_an_allowed_mask_that_is_changed_afterwards_changes_nothing():
    given = np.arange(5) == 3
    mask = make_options(allowed_tokens=given).allowed_mask(5)
    given[:] = np.arange(5) == 1
    assert mask is not None
    assert np.flatnonzero(mask).tolist() == [3]


def test_without_allowed_tokens_there_is_no_mask():
    assert make_options(allowed_tokens=None).allowed_mask(5) is None


NOT_ONE = "allowed_tokens must be one sequence of token ids, or one mask, for all prompts, found"


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        ([5], "allowed_tokens must be token ids from 0 to 4, found 5"),
        ([2, -1], "allowed_tokens must be token ids from 0 to 4, found -1"),
        ([1.5], "allowed_tokens must be whole-number token ids, found float64"),
        (["a"], "allowed_tokens must be whole-number token ids, found text"),
        ([True] * 4, "allowed_tokens as a mask must be bool[5], found bool[4]"),
        (np.ones((1, 5), bool), "allowed_tokens as a mask must be bool[5], found bool[1, 5]"),
        ([[1, 2], [3, 4]], f"{NOT_ONE} [[1, 2], [3, 4]]"),
        ([[1, 2], [3]], f"{NOT_ONE} [[1, 2], [3]]"),
        ({1: 2}, f"{NOT_ONE} {{1: 2}}"),
        ([10**30], f"{NOT_ONE} [1{'0' * 30}]"),
        ([False] * 5, "allowed_tokens allows no token; allow at least one"),
        ([], "allowed_tokens allows no token; allow at least one"),
    ],
)
def test_allowed_tokens_that_are_none_are_refused(allowed, message):
    with pytest.raises(ValueError, match=exactly(message)):
        make_options(allowed_tokens=allowed).allowed_mask(5)


# --- check_ids --------------------------------------------------------------------------------


def test_check_ids_takes_integers_of_any_width_and_no_ids_at_all():
    check_ids(np.array([0, 6], np.uint16), 7, "the prompt")
    check_ids(np.array([]), 7, "the prompt")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([0, 7]), "the prompt must be token ids from 0 to 6, found 7"),
        (np.array([[0], [-2]]), "the prompt must be token ids from 0 to 6, found -2"),
        (np.array([1.0]), "the prompt must be whole-number token ids, found float64"),
        (np.array([True]), "the prompt must be whole-number token ids, found bool"),
    ],
)
def test_check_ids_names_what_it_checks(ids, message):
    with pytest.raises(ValueError, match=exactly(message)):
        check_ids(ids, 7, "the prompt")


def test_options_that_hold_arrays_are_compared_by_value():
    def made(seed, allowed):
        return GenerationOptions(seed=np.array([seed, 2]), allowed_tokens=np.array(allowed))

    assert made(1, [3, 4]) == made(1, [3, 4])
    assert made(1, [3, 4]) != made(5, [3, 4])
    assert made(1, [3, 4]) != made(1, [3])
    assert made(1, [3]) != GenerationOptions()
    assert GenerationOptions(stop="a") == GenerationOptions(stop="a")
    assert GenerationOptions() != "text"
