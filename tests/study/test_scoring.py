"""Scores of texts against a float64 softmax of the logits; windows; choices; refusals."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import grok1
from grok1.nn.sharding import make_mesh
from grok1.nn.unembedding import _LOGITS_BYTES
from grok1.planning.memory import abstract_engine, released_weights
from grok1.study.scoring import Window, encode_pair, score_windows, window_bounds
from tests import one_device
from tests.helpers import SLOW_TESTS, flags_with_devices, slow
from tests.one_device import within

ROOT = pathlib.Path(__file__).parent.parent.parent
ROUNDING = 1e-4 if one_device.PLATFORM == "cuda" else 2e-5
"""Of log-probabilities where another number of tokens runs at a time, on a GPU in other kernels."""

TEXT = (
    "The first argument is a string. If the file cannot be opened, an OSError is raised.\n\n"
    "def is_prime(n: int) -> bool:\n    return n > 1 and all(n % i for i in range(2, n))\n\n"
    "Les élèves ont reçu 42 € — 漢字 and a \U0001f600 face.\n"
)


def expected_statistics(logits, tokens, top_k):
    """The same numbers from all logits, in float64: of token t + 1 after position t."""
    logits = logits[:-1].astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    chosen = logprobs[np.arange(len(logprobs)), tokens[1:]]
    order = np.argsort(-logprobs, axis=-1, kind="stable")
    ranks = np.argmax(order == tokens[1:, None], axis=-1)
    entropies = -(np.exp(logprobs) * logprobs).sum(axis=-1)
    top = order[:, :top_k]
    return chosen, ranks, entropies, top, np.take_along_axis(logprobs, top, axis=-1)


def assert_scored(score, logits, top_k):
    expected = expected_statistics(logits, score.tokens, top_k)
    logprobs, ranks, entropies, top_tokens, top_logprobs = expected
    np.testing.assert_allclose(score.logprobs[1:], logprobs, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(score.ranks[1:], ranks)
    np.testing.assert_allclose(score.entropies[1:], entropies, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(score.top_tokens[1:], top_tokens)
    np.testing.assert_allclose(score.top_logprobs[1:], top_logprobs, rtol=0, atol=1e-5)


def test_scores_are_those_of_a_float64_softmax(toy):
    score = toy.score(TEXT, top_k=7)
    assert score.tokens.tolist() == toy.tokenizer.encode(TEXT)
    assert_scored(score, toy.logits(score.tokens), 7)
    assert [score.logprobs.dtype, score.ranks.dtype] == [np.float32, np.int32]
    assert score.pieces == toy.trace(score.tokens, ()).pieces
    # Nothing stands before the first token.
    assert np.isnan([score.logprobs[0], score.entropies[0], *score.top_logprobs[0]]).all()
    assert [score.ranks[0], *score.top_tokens[0]] == [-1] * 8


def test_scores_on_a_mesh_with_several_texts():
    options = {"dtype": "float32", "progress": False}
    model = grok1.load(ROOT / "checkpoints/toy", mesh=within((2, 4)), **options)
    # Of 5 alternatives a device with few rows of the vocabulary could hold any number.
    texts = [TEXT, TEXT[:40], "Return the number of bytes."]
    engine, steps = model.engine, []
    score_tokens = engine.score_tokens

    def recording(state, num_valid, following, num_top):
        steps.append((np.asarray(state.tokens), num_valid, following.shape[1]))
        return score_tokens(state, num_valid, following, num_top)

    engine.score_tokens = recording
    scores = model.score(texts)
    # In the shapes that were run: in others sums are rounded otherwise.
    tokens = steps[0][0]
    state, parts = engine.new_state(tokens), []
    for _, num_valid, chunk in steps:
        state, logits, _ = engine.score(state, num_valid, chunk)
        parts.append(np.asarray(logits)[:, : num_valid.max()])
    logits = np.concatenate(parts, axis=1)
    for text, score in zip(texts, scores, strict=True):
        assert score.tokens.tolist() == model.tokenizer.encode(text)
        length = len(score.tokens)
        whole = np.pad(score.tokens[:-1], (0, tokens.shape[1] - length + 1))
        [row] = np.flatnonzero((tokens == whole).all(axis=1))
        # The last token is scored and not run; nothing is asked of what follows it.
        of_text = np.pad(logits[row], ((0, 1), (0, 0)))[:length]
        assert_scored(score, of_text, 5)


@slow
@pytest.mark.devices(8)
def test_more_alternatives_than_a_device_has_tokens(nano_on_mesh):
    model = nano_on_mesh((2, 4))
    tokens = np.arange(20)
    assert model.config.vocab_size // 4 < 40
    assert_scored(model.score(tokens, top_k=40), model.logits(tokens), 40)


def test_equal_logits_rank_by_id(nano):
    params = nano.params._replace(embedding=nano.params.embedding * 0)
    flat = grok1.Model(params, nano.config, nano.mesh, "float32", nano.tensors)
    score = flat.score([9, 4, 100], top_k=3)
    assert score.ranks.tolist() == [-1, 4, 100]
    assert score.top_tokens[1:].tolist() == [[0, 1, 2]] * 2
    np.testing.assert_allclose(score.logprobs[1:], -np.log(128), rtol=1e-6)
    np.testing.assert_allclose(score.entropies[1:], np.log(128), rtol=1e-6)
    assert score.perplexity == pytest.approx(128, rel=1e-6)


def test_logits_of_all_tokens_never_exist():
    config = grok1.ModelConfig(
        vocab_size=131072, emb_size=64, widening_factor=2, key_size=16, num_q_heads=4,
        num_kv_heads=2, num_layers=1, num_experts=2, num_selected_experts=1, sequence_len=1024,
        embedding_multiplier_scale=8.0, output_multiplier_scale=1.0, attn_output_multiplier=0.25,
    )  # fmt: skip
    engine = abstract_engine(released_weights(config), config, make_mesh(config, (1, 1)), "float32")
    chunk = 1024
    program = engine.token_score_program(chunk, 5)
    state = engine.abstract_state(1, chunk)
    counts = engine.abstract_rows(1), jax.ShapeDtypeStruct((1, chunk), np.int32)
    memory = program.lower(engine.weights, state, *counts).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * _LOGITS_BYTES < chunk * config.vocab_size * 4


# What windows hold, those that lie side by side, and the bounds of those that begin at every token,
# are below.
@slow
@pytest.mark.parametrize(("window", "stride"), [(100, 30), (64, 64), (64, 1)])
def test_a_window_starts_as_the_whole_text_does(toy, window, stride):
    tokens = np.asarray(toy.tokenizer.encode(TEXT * 6))[:200]
    whole = toy.score(tokens)
    found = toy.score(tokens, window=window, stride=stride)
    # Tokens 1 to `window` have the same context in both. Roundings depend on how many tokens run
    # at a time; they may move a rank, or a place among alternatives, only where there is a tie.
    first = slice(1, window + 1)
    np.testing.assert_allclose(found.logprobs[first], whole.logprobs[first], rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(
        found.entropies[first], whole.entropies[first], rtol=0, atol=ROUNDING
    )
    np.testing.assert_array_equal(found.ranks[first], whole.ranks[first])
    # The rest has less context.
    assert (found.logprobs[window + 1 :] != whole.logprobs[window + 1 :]).any()


@slow
def test_windows_equal_the_whole_bit_for_bit_where_as_many_tokens_run_at_a_time(toy):
    tokens = np.resize(toy.tokenizer.encode(TEXT * 6), 1024)
    whole = toy.score(tokens)
    found = toy.score(tokens, window=256, stride=256)
    np.testing.assert_array_equal(found.logprobs[:257], whole.logprobs[:257])
    np.testing.assert_array_equal(found.top_logprobs[:257], whole.top_logprobs[:257])
    np.testing.assert_array_equal(found.entropies[:257], whole.entropies[:257])


def test_each_window_is_the_text_it_holds(toy):
    tokens = np.asarray(toy.tokenizer.encode(TEXT * 3))[:300]
    found = toy.score(tokens, window=64, stride=24)
    for start, begin, end in window_bounds(len(tokens), 64, 24):
        alone = toy.score(tokens[start:end])
        np.testing.assert_allclose(
            found.logprobs[begin:end], alone.logprobs[begin - start :], rtol=0, atol=ROUNDING
        )


@pytest.mark.parametrize("window", [1, 2, 7, 64])
def test_every_token_is_scored_once_with_enough_context(window):
    for stride in {1, max(1, window // 2), window}:
        for length in range(2, 200):
            scored = []
            for start, begin, end in window_bounds(length, window, stride):
                assert 0 <= start < begin < end <= length
                assert end - start <= window + 1
                assert start == 0 or begin - start >= window - stride + 1
                scored += range(begin, end)
            assert scored == list(range(1, length))


def test_windows_come_back_under_their_own_index(toy):
    rng = np.random.default_rng(3)
    lengths = [2, 300, 17, 290, 5, 12, 1025, 13, 2]
    if not SLOW_TESTS:
        lengths = [2, 90, 17, 80, 5, 12, 70, 13, 2]
    windows = [Window(rng.integers(4, 1280, size=n), 1 + n // 3) for n in lengths]
    windows[0] = windows[-1] = Window([7, 8], 1)
    found = dict(score_windows(toy.engine, windows, 0))
    assert sorted(found) == list(range(len(lengths)))
    for index, window in enumerate(windows):
        assert len(found[index].logprobs) == len(window.tokens) - window.first
        (_, alone) = next(iter(score_windows(toy.engine, [window], 0)))
        np.testing.assert_allclose(
            found[index].logprobs, alone.logprobs, rtol=0, atol=1.5 * ROUNDING
        )


def test_perplexity_and_bits_per_byte(toy):
    text = "The file is opened."
    score = toy.score(text)
    first = toy.tokenizer.piece(score.tokens[0]).replace("▁", " ")
    assert score.num_scored == len(score.tokens) - 1
    assert score.total_logprob == pytest.approx(score.logprobs[1:].sum(), rel=1e-6)
    assert score.perplexity == pytest.approx(np.exp(-score.logprobs[1:].mean()), rel=1e-5)
    # The first token is not scored, nor are its bytes, less the space that stands for the start.
    assert score.num_bytes == len(text) - (len(first) - 1)
    assert score.bits_per_byte == pytest.approx(
        -score.total_logprob / np.log(2) / score.num_bytes, rel=1e-12
    )
    assert toy.score(score.tokens).bits_per_byte == pytest.approx(score.bits_per_byte)
    assert repr(score).startswith(f"Score({score.num_scored} tokens scored, logprob ")
    # As of a model whose logits are thousands apart.
    unlikely = dataclasses.replace(score, logprobs=1000 * score.logprobs)
    assert unlikely.perplexity == np.inf
    assert "perplexity inf" in repr(unlikely)
    assert "perplexity inf" in unlikely._repr_html_()


@pytest.mark.parametrize("text", [TEXT, "x", " leading", "\ttab\n", "é", "漢字 \U0001f600"])
def test_behind_bos_every_byte_of_a_text_is_counted(toy, text):
    score = toy.score(text, add_bos=True)
    assert score.tokens.tolist() == [1, *toy.tokenizer.encode(text)]
    assert score.num_bytes == len(text.encode())
    np.testing.assert_allclose(
        score.logprobs[1:], toy.score(score.tokens).logprobs[1:], rtol=0, atol=1e-6
    )


def test_a_model_without_tokenizer_scores_ids(nano):
    score = nano.score([5, 6, 7], top_k=0)
    assert score.pieces is None
    assert score.top_tokens.shape == (3, 0)
    assert score.perplexity > 1
    with pytest.raises(ValueError, match="bits_per_byte needs a tokenizer, and the model has none"):
        _ = score.bits_per_byte
    with pytest.raises(ValueError, match="this model has no tokenizer; give token ids"):
        nano.score("text")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "the text has no token; give at least two tokens, or text and add_bos=True"),
        ("", {"add_bos": True}, "the text has one token, with nothing before it"),
        ([5], {}, "the text has one token, with nothing before it"),
        ([[5, 6], [7]], {}, "text 1 has one token, with nothing before it"),
        ([5, 1280], {}, "the prompt must be token ids from 0 to 1279, found 1280"),
        ([5, 6], {"window": 1025}, "window must be from 1 to the context of 1024, found 1025"),
        ([5, 6], {"window": 0}, "window must be from 1 to the context of 1024, found 0"),
        ([5, 6], {"window": 8, "stride": 9}, "stride must be from 1 to the window of 8, found 9"),
        ([5, 6], {"stride": 0}, "stride must be from 1 to the window of 1024, found 0"),
        ([5, 6], {"top_k": -1}, "top_k must be from 0 to the vocabulary of 1280, found -1"),
        ([5, 6], {"top_k": 2.0}, "top_k must be from 0 to the vocabulary of 1280, found 2.0"),
        ([5, 6], {"top_k": "2"}, "top_k must be from 0 to the vocabulary of 1280, found '2'"),
        ([5, 6], {"window": 2.5}, "window must be from 1 to the context of 1024, found 2.5"),
        ([5, 6], {"window": True}, "window must be from 1 to the context of 1024, found True"),
        ([5, 6], {"stride": 1.5}, "stride must be from 1 to the window of 1024, found 1.5"),
        (
            [5, 6],
            {"add_bos": True},
            r"add_bos puts \[BOS\] before text, and token ids are taken as",
        ),
    ],
)
def test_scores_refuse(toy, text, options, message):
    with pytest.raises(ValueError, match=message):
        toy.score(text, **options)


def test_windows_are_numbers_of_any_library(toy):
    tokens = np.arange(5, 300)
    expected = toy.score(tokens, top_k=0, window=255, stride=200)
    # 255 and 1 are 0 in eight bits.
    found = toy.score(tokens, top_k=np.uint8(0), window=np.uint8(255), stride=np.array(200))
    np.testing.assert_array_equal(found.logprobs, expected.logprobs)


@pytest.mark.parametrize("name", ["add_bos", "allow_control"])
@pytest.mark.parametrize("value", ["no", 0, None])
def test_switches_are_true_or_false_wherever_a_text_is_read(toy, name, value):
    given = {name: value}
    for read in (
        lambda: toy.generate(TEXT, **given),
        lambda: toy.score(TEXT, **given),
        lambda: toy.choose(TEXT, [" a"], **given),
        lambda: toy.trace(TEXT, **given),
    ):
        with pytest.raises(TypeError, match=f"^{name} must be True or False, found {value!r}$"):
            read()


def test_choices_are_sums_of_scores(toy):
    context, options = "The first argument is a ", ["string", "list of strings.", "n €"]
    choice = toy.choose(context, options)
    cut = len(toy.tokenizer.encode(context.rstrip()))
    for i, option in enumerate(options):
        score = toy.score(context + option)
        assert choice.tokens[i] == score.tokens[cut:].tolist()
        assert choice.logprobs[i] == pytest.approx(score.logprobs[cut:].sum(), abs=1e-4)
        assert choice.is_greedy[i] == (score.ranks[cut:] == 0).all()
    np.testing.assert_allclose(
        choice.per_token, choice.logprobs / [len(tokens) for tokens in choice.tokens]
    )
    np.testing.assert_allclose(
        choice.per_byte, choice.logprobs / [len(option.encode()) for option in options]
    )
    assert choice.best == int(np.argmax(choice.logprobs))
    assert choice.best_per_token == int(np.argmax(choice.per_token))
    assert choice.best_per_byte == int(np.argmax(choice.per_byte))


def test_lengths_change_what_is_best():
    choice = grok1.Choice(
        ["a", "bcde"], [[1], [2, 3]], np.array([-2.0, -3.0]), np.array([-2.0, -1.5]),
        np.array([-2.0, -0.75]), np.array([False, False]),
    )  # fmt: skip
    assert (choice.best, choice.best_per_token, choice.best_per_byte) == (0, 1, 1)


def test_the_greedy_continuation_is_greedy(toy):
    out = toy.generate("The first argument is", max_new_tokens=6, temperature=0)
    prompt = toy.tokenizer.encode("The first argument is")
    other = [*out.tokens[:-1], out.tokens[-1] ^ 1]
    choice = toy.choose(prompt, [out.tokens, other])
    assert choice.is_greedy.tolist() == [True, False]
    assert choice.best == 0


def test_the_same_choice_as_ids_and_behind_an_empty_context(toy, nano):
    choice = toy.choose("", ["The file", "zzz"])
    assert choice.tokens[0] == toy.tokenizer.encode("The file")
    score = toy.score("The file", add_bos=True)
    assert choice.logprobs[0] == pytest.approx(score.total_logprob, abs=1e-4)
    ids = toy.choose([toy.tokenizer.bos_id], choice.tokens)
    np.testing.assert_allclose(ids.logprobs, choice.logprobs, rtol=0, atol=1e-5)
    assert nano.choose([5], [[6], [7, 8]]).best_per_byte is None


REAL = grok1.Tokenizer.load(ROOT / "checkpoints" / "tokenizer.model")


@pytest.mark.parametrize(
    ("context", "option", "before", "after"),
    [
        ("un", "fair", ["[BOS]"], ["▁unfair"]),
        ("Ans", "wer", ["[BOS]"], ["▁Answer"]),
        ("A", "I", ["[BOS]"], ["▁AI"]),
        ("retur", "n the", ["[BOS]"], ["▁return", "▁the"]),
        ("the an", "d", ["▁the"], ["▁and"]),
        ("an", " elephant", ["▁an"], ["▁elephant"]),
        ("an ", "elephant", ["▁an"], ["▁elephant"]),
        ("", "a", ["[BOS]"], ["▁a"]),
        ("  ", "a", ["[BOS]"], ["▁▁", "▁a"]),
        ("the an", "", ["▁the"], ["▁an"]),
        ("an", "", ["[BOS]"], ["▁an"]),
    ],
)
def test_a_continuation_begins_where_the_whole_parts_from_the_context(
    context, option, before, after
):
    found = encode_pair(REAL, context, option, REAL.vocab_size)
    assert [[REAL.piece(token) for token in tokens] for tokens in found] == [before, after]
    behind_bos = encode_pair(REAL, context, option, REAL.vocab_size, add_bos=True)
    assert behind_bos[0] == [REAL.bos_id, *(found[0] if before != ["[BOS]"] else [])]
    assert behind_bos[1] == found[1]


def test_options_that_join_the_context_are_scored(toy):
    choice = toy.choose("an", ["d", " elephant"])
    whole = toy.tokenizer.encode("and")
    assert choice.tokens[0] == whole
    assert choice.logprobs[0] == pytest.approx(
        toy.score("and", add_bos=True).logprobs[1:].sum(), abs=1e-4
    )
    assert choice.logprobs[0] < 0
    assert toy.choose("retur", ["n"]).logprobs[0] < 0
    assert toy.choose("an", ["d"], add_bos=True).logprobs[0] == pytest.approx(
        choice.logprobs[0], abs=1e-4
    )


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_has_no_finite_probability_is_an_error(nano, poison):
    norm = nano.params.final_norm.at[3].set(poison)
    damaged = grok1.Model(
        nano.params._replace(final_norm=norm), nano.config, nano.mesh, "float32", nano.tensors
    )
    message = "token 1 of a text cannot be scored: the model's logits must be finite, found NaN"
    with pytest.raises(ValueError, match=message):
        damaged.score([5, 6, 7])
    with pytest.raises(ValueError, match=message):
        damaged.choose([5], [[6], [7]])


@pytest.mark.parametrize(
    ("context", "options", "error", "message"),
    [
        ("a", ["b", ""], ValueError, "option 1 is empty; give every option at least one token"),
        ("a", "b", TypeError, "options must be a list of continuations"),
        ("a", [], TypeError, "options must be a list of continuations"),
        ("a", None, TypeError, "options must be a list of continuations, .* found None"),
        ("a", 3, TypeError, "options must be a list of continuations, .* found 3"),
        ("a", iter(["b"]), TypeError, "options must be a list of continuations"),
        ("a", np.array(3), TypeError, "options must be a list of continuations"),
        ("a", ["b", 3], TypeError, "context and options must both be text, or both be token ids"),
        ([5], [[6], 3], TypeError, "a prompt is text or a sequence of token ids, found int"),
        ("a", [[5]], TypeError, "context and options must both be text, or both be token ids"),
        ([], [[5]], ValueError, "the context is empty; begin it with the id of .BOS."),
        ([5], [[6], []], ValueError, "option 1 is empty; give every option at least one token"),
        ([5] * 1000, [[6] * 26], ValueError, "option 0 have 1026 tokens, 1 more than can be"),
    ],
)
def test_choices_refuse(toy, context, options, error, message):
    with pytest.raises(error, match=message):
        toy.choose(context, options)


def test_ids_of_a_pair_are_never_empty():
    with pytest.raises(ValueError, match=r"^the continuation is empty; give at least one token$"):
        encode_pair(None, [5], [], 128)


def test_a_choice_may_fill_the_context_to_its_last_token(toy):
    assert np.isfinite(toy.choose([5] * 1000, [[6] * 25]).logprobs).all()


@slow
def test_a_long_text_takes_little_memory():
    program = (
        "import resource, sys, grok1, numpy as np\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "model = grok1.load('checkpoints/toy', mesh=(1, 1), dtype='float32', progress=False)\n"
        "before = peak()\n"
        "text = open('docs/architecture.md', encoding='utf-8').read()\n"
        "tokens = np.resize(model.tokenizer.encode(text), int(sys.argv[1]))\n"
        "score = model.score(tokens)\n"
        "assert score.num_scored == len(tokens) - 1\n"
        "print(peak() - before)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "12000"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags_with_devices(1)},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) <= 300
