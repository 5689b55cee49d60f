"""What a user of `grok1.load` relies on: batches, streams, stops, seeds, and clear refusals."""

import contextlib
import copy
import dataclasses
import gc
import pathlib
import pickle
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grok1
from tests.helpers import SLOW_TESTS, named_params, readable, relative_error, slow


def load_toy(**options) -> grok1.Model:
    path = pathlib.Path(__file__).parent.parent / "checkpoints" / "toy"
    return grok1.load(path, **{"mesh": (1, 1), "dtype": "float32", "progress": False, **options})


def divergence(model: grok1.Model, other: grok1.Model, tokens: list[int]) -> float:
    """Mean over positions of the divergence of the other model's next-token distribution."""
    expected = jax.nn.log_softmax(model.logits(tokens))
    found = jax.nn.log_softmax(other.logits(tokens))
    return float(jnp.sum(jnp.exp(expected) * (expected - found), axis=-1).mean())


def ragged_prompts(vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, vocab_size, size=length).tolist() for length in (1, 40, 3, 64)]


@pytest.mark.parametrize("temperature", [pytest.param(0, marks=slow), 0.9])
def test_a_batch_gives_what_each_prompt_gives_alone(nano, temperature):
    prompts = ragged_prompts(128)
    options = {"max_new_tokens": 16, "temperature": temperature, "ignore_eos": True}
    seeds = list(range(20, 24))
    together = nano.generate(prompts, seed=seeds, **options)
    alone = [nano.generate(p, seed=s, **options) for p, s in zip(prompts, seeds, strict=True)]
    assert [c.tokens for c in together] == [c.tokens for c in alone]
    assert all(len(c.tokens) == 16 for c in together)


def test_logits_of_a_batch_equal_those_of_each_row(nano, nano_reference):
    tokens = nano_reference["tokens"]
    single = nano.logits(tokens)
    assert single.shape == (48, 128)
    assert single.dtype == np.float32
    batch = nano.logits(np.stack([tokens, tokens[::-1]]))
    assert batch.shape == (2, 48, 128)
    assert relative_error(batch[0], single) <= 2e-5
    assert relative_error(batch[1], nano.logits(tokens[::-1])) <= 2e-5


def test_logits_in_several_chunks_up_to_the_context(nano, nano_reference):
    tokens = np.concatenate([nano_reference["tokens"]] * 2)
    assert len(tokens) == nano.config.sequence_len
    logits = nano.logits(tokens)
    assert relative_error(logits[:48], nano_reference["logits_f64"]) <= 2e-5


def test_arrays_are_prompts_too(nano):
    expected = nano.generate([5, 6, 7], max_new_tokens=3)
    assert nano.generate(jnp.array([5, 6, 7]), max_new_tokens=3) == expected
    assert nano.generate(np.array([[5, 6, 7]]), max_new_tokens=3, seed=[0])[0] == expected


def test_no_alternatives_still_report_the_chosen_one(nano):
    out = nano.generate([5, 6], max_new_tokens=2, logprobs=0)
    assert len(out.logprobs) == 2
    assert out.top_logprobs == [{}, {}]


def test_token_zero_is_an_ordinary_token(nano, nano_reference):
    tokens = nano_reference["tokens"].copy()
    tokens[10] = 0
    logits = nano.logits(tokens)
    assert relative_error(logits[:10], nano.logits(tokens[:10])) <= 2e-5
    # It is attended to: what stands at its place changes everything after.
    other = tokens.copy()
    other[10] = 1
    assert relative_error(nano.logits(other)[11:], logits[11:]) > 1e-3


def test_more_prompts_than_rows_run_in_several_batches(nano):
    prompts = [[i + 1] for i in range(37)]
    completions = nano.generate(prompts, max_new_tokens=2, temperature=0)
    assert len(completions) == 37
    assert (
        completions[35].tokens == nano.generate(prompts[35], max_new_tokens=2, temperature=0).tokens
    )


def test_logprobs_are_the_models_own(nano):
    prompt = [5, 6, 7]
    out = nano.generate(
        prompt, max_new_tokens=4, temperature=0.5, top_k=3, logprobs=5, seed=3, ignore_eos=True
    )
    logits = nano.logits(prompt + out.tokens).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    for i, token in enumerate(out.tokens):
        row = logprobs[len(prompt) - 1 + i]
        assert out.logprobs[i] == pytest.approx(row[token], abs=1e-4)
        assert list(out.top_logprobs[i]) == np.argsort(-row)[:5].tolist()
        assert list(out.top_logprobs[i].values()) == pytest.approx(np.sort(row)[:-6:-1], abs=1e-4)


def test_without_logprobs_there_are_none(nano):
    out = nano.generate([1], max_new_tokens=1)
    assert out.logprobs is None
    assert out.top_logprobs is None


def test_equal_prompts_in_a_batch_draw_differently_and_repeatably(nano):
    options = {"max_new_tokens": 24, "temperature": 1.0, "ignore_eos": True}
    first, second = nano.generate([[9], [9]], seed=5, **options)
    assert first.tokens != second.tokens
    again = nano.generate([[9], [9]], seed=5, **options)
    assert [first.tokens, second.tokens] == [c.tokens for c in again]
    assert nano.generate([9], seed=5, **options).tokens == first.tokens
    assert nano.generate([9], seed=6, **options).tokens != first.tokens


def test_stop_token_ends_and_is_kept(nano, nano_reference):
    expected = nano_reference["greedy_tokens"].tolist()
    stop = expected[5]
    out = nano.generate(
        nano_reference["greedy_prompt"], max_new_tokens=32, temperature=0, stop=stop
    )
    assert out.tokens == expected[: expected.index(stop) + 1]
    assert out.stop_reason == "stop"


def test_end_of_sequence_stops_unless_ignored(nano):
    def always_eos(logits, tokens, length):
        return logits.at[:, 2].set(1e9)

    out = nano.generate([1, 5], max_new_tokens=6, logits_processor=always_eos)
    assert (out.tokens, out.stop_reason) == ([2], "stop")
    out = nano.generate([1, 5], max_new_tokens=6, logits_processor=always_eos, ignore_eos=True)
    assert (out.tokens, out.stop_reason) == ([2] * 6, "length")


def test_a_processor_sees_the_tokens_so_far(nano):
    def one_more_than_the_last(logits, tokens, length):
        last = jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)[:, 0]
        rows = jnp.arange(len(last))
        return logits.at[rows, last + 1].set(1e9)

    out = nano.generate([[10], [3, 50]], max_new_tokens=4, logits_processor=one_more_than_the_last)
    assert [c.tokens for c in out] == [[11, 12, 13, 14], [51, 52, 53, 54]]


def test_only_allowed_tokens_are_drawn(nano):
    out = nano.generate([1], max_new_tokens=30, temperature=2.0, top_p=1, allowed_tokens=[7, 90])
    assert set(out.tokens) == {7, 90}


def test_generation_ends_at_the_context(nano):
    prompt = list(range(1, 91))
    out = nano.generate(prompt, max_new_tokens=50, temperature=0, ignore_eos=True)
    assert len(out.tokens) == 6
    assert out.stop_reason == "context"
    # The cache was never overwritten: the last token is what the whole sequence predicts.
    assert out.tokens[-1] == nano.logits(prompt + out.tokens[:-1])[-1].argmax()
    exactly = nano.generate(prompt, max_new_tokens=6, temperature=0, ignore_eos=True)
    assert exactly.stop_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], ValueError, r"no prompt in an empty sequence; give text, token ids, or a list of"),
        ((), ValueError, r"no prompt in an empty sequence; give text, token ids, or a list of"),
        (np.zeros((0, 3), int), ValueError, r"no prompt in an empty sequence"),
        (b"ab", TypeError, r"a prompt is text or token ids, found bytes; decode it to text"),
        (bytearray(b"ab"), TypeError, r"a prompt is text or token ids, found bytearray; decode"),
        (memoryview(b"ab"), TypeError, r"found memoryview; decode .* or give list\(prompt\)"),
        ([b"ab", [1]], TypeError, r"a prompt is text or token ids, found bytes"),
        (np.array(["a", "bc"]), TypeError, r"found one of <U2; give a list of texts: prompts.tol"),
        (np.array(["a", "bc"], object), TypeError, r"found one of object; give a list of texts"),
        (np.array([b"a", b"bc"]), TypeError, r"found one of \|S2; give a list of texts"),
        (np.array(5), TypeError, r"a prompt is text or a sequence of token ids, found ndarray"),
        ([[[1], [2, 3]]], ValueError, r"must be one sequence of whole numbers, found \[\[1\]"),
        ([1, "a"], TypeError, r"a prompt is text or a sequence of token ids, found int"),
        (
            list(range(96)),
            ValueError,
            r"the prompt has 96 tokens and the context holds 96.*shorten the prompt by 1$",
        ),
        ([1] * 100, ValueError, r"shorten the prompt by 5$"),
        ([1, 128], ValueError, r"the prompt must be token ids from 0 to 127, found 128"),
        ([-1], ValueError, r"the prompt must be token ids from 0 to 127, found -1"),
        ([1.5], ValueError, r"the prompt must be whole-number token ids, found float64"),
        ("text", ValueError, r"this model has no tokenizer; give token ids"),
        ([["a", "b"]], ValueError, r"found a sequence of texts \['a', 'b'\]; give each by itself"),
        ([[1], []], ValueError, r"the prompt is empty"),
        (3, TypeError, r"a prompt is text or a sequence of token ids, found int"),
    ],
    # A memoryview shows where it lies.
    ids=lambda value: type(value).__name__ if isinstance(value, memoryview) else repr(value),
)
def test_prompts_that_are_refused(nano, prompt, error, message):
    with pytest.raises(error, match=message):
        nano.generate(prompt)


@pytest.mark.parametrize(
    "prompts",
    [
        [jnp.array([1, 2, 3]), jnp.array([4])],
        [np.array([1, 2, 3]), jnp.array([4])],
        [(1, 2, 3), np.array([4])],
    ],
    ids=["jax", "numpy and jax", "tuple and numpy"],
)
def test_arrays_of_different_lengths_are_a_batch(nano, prompts):
    found = nano.generate(prompts, max_new_tokens=2, temperature=0)
    expected = nano.generate([[1, 2, 3], [4]], max_new_tokens=2, temperature=0)
    assert [out.tokens for out in found] == [out.tokens for out in expected]
    numbers = [jnp.int32(1), np.int32(2), np.array(3)]
    assert nano.generate(numbers, max_new_tokens=2, temperature=0).tokens == found[0].tokens


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stop": "x"}, ValueError, r"stop string 'x' needs a tokenizer"),
        ({"stop": [128]}, ValueError, r"stop must be token ids from 0 to 127, found 128"),
        ({"logprobs": 129}, ValueError, r"logprobs must be at most the vocabulary of 128"),
        ({"temperature": -1}, ValueError, r"temperature must be 0 .* or above, found -1"),
        ({"seed": -1}, ValueError, r"seed must be a whole number from 0 to 2\*\*32 - 1, found -1"),
        ({"seed": [1, 2]}, ValueError, r"2 seeds for 1 prompts; give one a prompt"),
        ({"max_tokens": 3}, TypeError, r"max_tokens"),
    ],
    ids=repr,
)
def test_options_that_are_refused(nano, options, error, message):
    with pytest.raises(error, match=message):
        nano.generate([1], **options)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((1, 2, 3), int), r"integer ids \[T\] or \[B, T\].*found int64\[1, 2, 3\]"),
        ([], r"with at least one token"),
        ([0.5], r"found float64\[1\]"),
        ([[1, 2], [3]], r"integer ids \[T\] or \[B, T\].*found object\[2\]; give rows of diff"),
        ("text", r"integer ids .* found <U4\[\]; encode text first, with the model's tokenizer"),
        ([1, 200], r"tokens must be token ids from 0 to 127, found 200"),
        (np.zeros(97, int), r"97 tokens are 1 more than the context of 96"),
    ],
    ids=["rank", "empty", "float", "ragged", "text", "range", "context"],
)
def test_logits_refuses_what_is_no_token_array(nano, tokens, message):
    with pytest.raises(ValueError, match=message):
        nano.logits(tokens)


def test_what_intervenes_is_not_saved_and_said(nano, tmp_path):
    with nano.intervene(grok1.AblateExperts(3)) as changed:
        message = r"what intervenes in this model is none: AblateExperts\(experts=3\); save the mo"
        with pytest.raises(ValueError, match=message):
            grok1.save(changed, tmp_path / "changed")
    assert not list(tmp_path.iterdir())


def test_a_model_is_copied_with_its_weights_and_not_without(nano):
    changed = nano.intervene(grok1.AblateExperts(1))
    for model in (nano, changed):
        for take in (pickle.dumps, copy.deepcopy, lambda one: copy.deepcopy([one])):
            with pytest.raises(
                TypeError, match=r"^a model lies on its devices, and is neither pick"
            ):
                take(model)
        made = copy.copy(model)
        assert type(made) is type(model)
        assert made.params is model.params
        np.testing.assert_array_equal(made.logits([5, 7]), model.logits([5, 7]))


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_a_deleted_model_is_gone_before_garbage_is_collected(offload):
    memory = None if offload == "none" else "3GB"
    model = load_toy(offload=offload, memory=memory)
    options = {"max_new_tokens": 2, "temperature": 0}
    stream = model.stream("The", **options)
    kept = [
        list(stream),
        model.generate("The", **options, logprobs=1),
        model.score("The file"),
        model.choose("The", [" file"]),
        model.trace("The file", ("router", "logits")),
        model.trace_generation("The", **options),
        model.logits([5, 6]),
    ]
    model.intervene(grok1.AblateExperts(1)).score("The file")
    weight = weakref.ref(model.params.embedding)
    gc.collect()
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()
    assert list(stream) == []
    assert stream.completion == kept[5][0]


def test_stream_needs_a_tokenizer_and_one_prompt(nano, toy):
    with pytest.raises(ValueError, match="stream needs a tokenizer"):
        nano.stream([1])
    with pytest.raises(TypeError, match="stream takes one prompt"):
        toy.stream(["a", "b"])


def test_a_warning_is_of_the_line_that_called(toy):
    for call in (
        lambda: toy.stream("a▁b"),
        lambda: toy.trace("a▁b", capture=("none",)),
        lambda: toy.choose("▁a", [" b", ""]),
        lambda: toy.tokenizer.encode("a▁b"),
    ):
        # Nothing is run.
        message = "text holds the character U"
        with pytest.warns(UserWarning, match=message) as told, contextlib.suppress(ValueError):
            call()
        assert {(one.filename, one.lineno) for one in told} == {
            (__file__, call.__code__.co_firstlineno)
        }


def test_dtype_and_tokenizer_that_are_refused(nano_path):
    with pytest.raises(ValueError, match='dtype must be "float32" or "bfloat16", found \'int8\''):
        grok1.load(nano_path, dtype="int8")
    toy_tokenizer = nano_path.parents[2] / "checkpoints" / "toy" / "tokenizer.model"
    with pytest.raises(ValueError, match=r"tokenizer has 1280 pieces, the model's vocabulary 128"):
        grok1.load(nano_path, tokenizer=toy_tokenizer, progress=False)
    message = r"toy: is a directory; give the file in it: .*toy.tokenizer\.model$"
    with pytest.raises(grok1.CheckpointError, match=message):
        grok1.load(nano_path, tokenizer=toy_tokenizer.parent)
    wrong: Any
    for wrong, found in ((False, "bool"), (3, "int"), (b"tokenizer.model", "bytes")):
        message = f"^tokenizer must be a Tokenizer, or the path of its file, found {found}$"
        with pytest.raises(TypeError, match=message):
            grok1.load(nano_path, tokenizer=wrong)


@pytest.mark.parametrize("make", [grok1.load, grok1.random_model], ids=["load", "random_model"])
def test_cache_types_that_are_refused(make, nano_path):
    source = nano_path if make is grok1.load else grok1.TOY
    for dtype, name in (("bfloat16", "bfloat16"), (np.int16, "int16"), ("fp8", "fp8")):
        message = (
            'cache_dtype must be "float32", "float16" or "int8", or None for the default of dtype, '
            f"found '{name}'"
        )
        with pytest.raises(ValueError, match=f"^{message}$"):
            make(source, cache_dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "cache"),
    [
        ("float32", None, "float32"),
        ("bfloat16", None, "float16"),
        ("float32", "float16", "float16"),
        ("bfloat16", "float32", "float32"),
        ("bfloat16", "int8", "int8"),
    ],
)
def test_the_type_of_the_cache(dtype, cache_dtype, cache):
    model = load_toy(dtype=dtype, cache_dtype=cache_dtype)
    state = model.engine.new_state(np.zeros((1, 256), np.int32))
    assert state.cache.k.dtype == state.cache.v.dtype == cache
    assert (state.cache.k_scales is not None) == (cache == "int8")


@pytest.mark.devices(8)
def test_random_models_are_the_same_on_every_mesh():
    config = dataclasses.replace(grok1.TOY, num_layers=2, vocab_size=64)
    one, other = (
        grok1.random_model(config, mesh=mesh, dtype="float32", seed=1) for mesh in ((1, 1), (2, 4))
    )
    found, expected = (jax.tree.leaves(named_params(model)) for model in (other, one))
    for leaf, leaf_of_one in zip(found, expected, strict=True):
        np.testing.assert_array_equal(leaf, leaf_of_one)
    assert 0.1 < one.logits([3, 1, 4, 1, 5]).std() < 3


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True])
def test_seeds_of_weights_that_are_refused(seed):
    with pytest.raises(
        ValueError, match=r"^seed must be a whole number from 0 to 2\*\*32 - 1, found"
    ):
        grok1.random_model(grok1.TOY, seed=seed)


class TestToy:
    """The trained toy and its tokenizer, through text."""

    prompt = "The answer to life the universe and everything is of course"
    text = (
        "The first argument is the name of the file to be read. If the file cannot be opened, an "
        "OSError is raised. The optional mode is a string; the default is to read text. When the "
        "end of the file has been reached, the method returns an empty string."
    )

    def test_stream_joins_to_the_completion(self, toy):
        stream = toy.stream(self.prompt, max_new_tokens=40, seed=1)
        assert stream.completion is None
        pieces = list(stream)
        completion = stream.completion
        assert len(pieces) > 5
        assert "".join(pieces) == completion.text
        assert completion == toy.generate(self.prompt, max_new_tokens=40, seed=1)

    def test_a_stop_string_is_cut_off(self, toy):
        free = toy.generate(self.prompt, max_new_tokens=60, temperature=0, ignore_eos=True)
        stop = free.text[20:26]  # begins and ends inside tokens, wherever those are
        out = toy.generate(
            self.prompt, max_new_tokens=60, temperature=0, ignore_eos=True, stop=["@@@", stop]
        )
        assert out.text == free.text[: free.text.index(stop)]
        assert out.stop_reason == "stop"
        assert out.tokens == free.tokens[: len(out.tokens)]

    def test_the_text_is_english(self, toy):
        text = toy.generate("The ", max_new_tokens=200, ignore_eos=True).text
        words = text.lower().split()
        common = {"the", "a", "of", "to", "is", "and", "in", "that", "for", "be", "with", "or"}
        assert sum(word in common for word in words) / len(words) > 0.2

    def test_text_and_its_tokens_give_the_same(self, toy):
        tokens = toy.tokenizer.encode(self.prompt)
        by_text = toy.generate(self.prompt, max_new_tokens=8, temperature=0)
        by_tokens = toy.generate(tokens, max_new_tokens=8, temperature=0)
        assert by_text == by_tokens
        with_bos = toy.generate(self.prompt, max_new_tokens=8, temperature=0, add_bos=True)
        assert with_bos == toy.generate([1, *tokens], max_new_tokens=8, temperature=0)

    def test_saving_keeps_the_tokenizer(self, toy, tmp_path):
        grok1.save(toy, tmp_path / "toy")
        copy = grok1.load(tmp_path / "toy", mesh=(1, 1), dtype="float32", progress=False)
        assert copy.generate("The ", max_new_tokens=8) == toy.generate("The ", max_new_tokens=8)

    def test_a_long_prompt_runs_in_chunks_and_key_blocks(self):
        # Of the readable form, every layer is compiled.
        model = load_toy(layers=None if SLOW_TESTS else 1)
        tokens = np.random.default_rng(3).integers(4, model.config.vocab_size, size=700)
        expected, _ = readable(named_params(model), model.config, tokens)
        assert relative_error(model.logits(tokens), expected) <= 2e-5
        out = model.generate(tokens, max_new_tokens=2, temperature=0, logprobs=0, ignore_eos=True)
        assert out.tokens[0] == expected[-1].argmax()
        logprob = jax.nn.log_softmax(expected[-1]).max()
        assert out.logprobs[0] == pytest.approx(float(logprob), abs=1e-4)

    @slow
    def test_a_float16_cache_changes_little(self, toy):
        tokens = toy.tokenizer.encode(self.text)
        assert divergence(toy, load_toy(cache_dtype="float16"), tokens) < 1e-4

    # Rows on two groups of devices, each of which has more devices than there are cached heads.
    @slow
    @pytest.mark.devices(16)
    def test_an_int8_cache_changes_little(self, toy):
        model = load_toy(mesh=(2, 8), cache_dtype="int8")
        # All of it in chunks of 64.
        tokens = toy.tokenizer.encode(self.text)[:64]
        assert 1e-6 < divergence(toy, model, tokens) < 4e-3
        options = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
        prompts = [tokens[:40], tokens[:33], tokens[5:50]]
        together = model.generate(prompts, **options)
        for prompt, completion in zip(prompts, together, strict=True):
            assert len(completion.tokens) == 12
            # Steps through the cache, in chunks and one by one, draw what one pass predicts.
            logits = model.logits(prompt + completion.tokens[:-1])[len(prompt) - 1 :]
            chosen = np.take_along_axis(logits, np.array(completion.tokens)[:, None], axis=1)
            assert np.all(chosen[:, 0] >= logits.max(axis=-1) - 0.05)
