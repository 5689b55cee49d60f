"""How probable a text is under the model: each token, and whole continuations to choose from.

Statistics of each token are computed on the devices, so that of a text of any length only some
numbers a token reach the host. A text longer than the window is run in windows that overlap.

Dimension key: T token of a text, V vocabulary, k alternative, O option.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from grok1.engine.engine import Engine
from grok1.engine.sampling import WHY_NOT_FINITE
from grok1.engine.shapes import CHUNK_LENGTHS
from grok1.generate.requests import Prompt, encode_prompt, is_batch
from grok1.keywords import as_python, is_whole, shown
from grok1.machine.agreement import agree
from grok1.machine.jax_settings import own_settings
from grok1.nn.sharding import DATA_AXIS
from grok1.nn.unembedding import TokenStatistics
from grok1.study.scores import Choice, Score
from grok1.tokenizer import Tokenizer

_TOKENS_AT_ONCE = CHUNK_LENGTHS[-1]
"""Tokens that one group of devices runs at a time, over all rows."""


class ScoreOptions(NamedTuple):
    """How `score` reads a text, and what it reports; see `Model.score`.

    Attributes:
      top_k: The alternatives to report for each token.
      window: Most tokens run at a time; None for the context.
      stride: How far apart windows begin; None for half of the window.
      add_bos: Begin with [BOS].
      allow_control: Let control pieces in a text be themselves.
    """

    top_k: int
    window: int | None
    stride: int | None
    add_bos: bool
    allow_control: bool


class Window(NamedTuple):
    """A stretch of text to run.

    Attributes:
      tokens: What is run and what follows: token i + 1 is scored after tokens 0 to i.
      first: Index of the first token that is scored; those before it are context.
    """

    tokens: Sequence[int] | np.ndarray
    first: int


@own_settings()
def score(
    engine: Engine,
    tokenizer: Tokenizer | None,
    text: Prompt | Sequence[Prompt],
    options: ScoreOptions,
) -> Score | list[Score]:
    """Scores a text, or several, as `Model.score` says."""
    options = ScoreOptions(*map(as_python, options))
    agree(
        "score",
        lambda: {"texts": text, **options._asdict(), "interventions": engine.interventions},
        engine.mesh,
    )
    top_k, window, stride, add_bos, allow_control = options
    context, vocab_size = engine.config.sequence_len, engine.config.vocab_size
    window = context if window is None else window
    if not is_whole(window) or not 1 <= window <= context:
        raise ValueError(
            f"window must be from 1 to the context of {context}, found {shown(window)}"
        )
    stride = max(1, window // 2) if stride is None else stride
    if not is_whole(stride) or not 1 <= stride <= window:
        raise ValueError(f"stride must be from 1 to the window of {window}, found {shown(stride)}")
    if not is_whole(top_k) or not 0 <= top_k <= vocab_size:
        raise ValueError(
            f"top_k must be from 0 to the vocabulary of {vocab_size}, found {shown(top_k)}"
        )
    many = is_batch(text)
    texts: list[Any] = list(text) if many else [text]
    ids = []
    for number, one in enumerate(texts):
        tokens = encode_prompt(
            one, tokenizer, vocab_size, add_bos=add_bos, allow_control=allow_control
        )
        if len(tokens) < 2:
            which = f"text {number}" if many else "the text"
            found = "one token, with nothing before it" if tokens else "no token"
            raise ValueError(
                f"{which} has {found}; give at least two tokens, or text and add_bos=True"
            )
        ids.append(np.asarray(tokens, np.int32))

    windows, places = [], []
    for number, tokens in enumerate(ids):
        engine.check_length(len(tokens), is_whole=len(tokens) <= window + 1)
        for start, begin, end in window_bounds(len(tokens), window, stride):
            windows.append(Window(tokens[start:end], begin - start))
            places.append((number, begin, end))
    found = [_empty_statistics(len(tokens), top_k) for tokens in ids]
    for index, statistics in score_windows(engine, windows, top_k):
        number, begin, end = places[index]
        for whole, part in zip(found[number], statistics, strict=True):
            whole[begin:end] = part
    scores = [
        Score(
            tokens,
            None if tokenizer is None else tokenizer.token_texts(tokens),
            *statistics,
            _num_bytes(tokenizer, tokens),
        )
        for tokens, statistics in zip(ids, found, strict=True)
    ]
    return scores if many else scores[0]


@own_settings()
def choose(
    engine: Engine,
    tokenizer: Tokenizer | None,
    context: Prompt,
    options: Sequence[Prompt],
    *,
    add_bos: bool = False,
    allow_control: bool = False,
) -> Choice:
    """Scores continuations of one context, as `Model.choose` says."""
    agree(
        "choose",
        lambda: {
            "the context": context,
            "options": options,
            "add_bos": add_bos,
            "allow_control": allow_control,
            "interventions": engine.interventions,
        },
        engine.mesh,
    )
    if not _is_list(options):
        raise TypeError(
            "options must be a list of continuations, texts or sequences of token ids, found "
            f"{shown(options)}"
        )
    limit = engine.config.sequence_len + 1
    pairs = []
    for number, option in enumerate(options):
        if (len(option) if isinstance(option, (str, Sequence)) else np.size(option)) == 0:
            raise ValueError(f"option {number} is empty; give every option at least one token")
        pair = encode_pair(
            tokenizer,
            context,
            option,
            engine.config.vocab_size,
            add_bos=add_bos,
            allow_control=allow_control,
        )
        length = len(pair[0]) + len(pair[1])
        if length > limit:
            raise ValueError(
                f"context and option {number} have {length} tokens, {length - limit} more than "
                f"can be scored in the context of {limit - 1}; shorten them"
            )
        pairs.append(pair)
    logprobs, is_greedy = continuation_logprobs(engine, pairs)
    tokens = [continuation for _, continuation in pairs]
    sizes = [_option_bytes(tokenizer, option) for option in options]
    return Choice(
        list(options),
        tokens,
        logprobs,
        logprobs / [len(one) for one in tokens],
        # Options of control pieces alone have no bytes to divide by.
        None if None in sizes else logprobs / np.maximum(np.asarray(sizes, float), 1),
        is_greedy,
    )


def _is_list(options: Any) -> bool:
    if isinstance(options, (str, bytes)):
        return False
    try:
        return is_batch(options)
    except (TypeError, ValueError):  # neither a prompt nor several, or empty
        return False


def encode_pair(
    tokenizer: Tokenizer | None,
    context: Prompt,
    continuation: Prompt,
    vocab_size: int,
    *,
    add_bos: bool = False,
    allow_control: bool = False,
) -> tuple[list[int], list[int]]:
    """Returns the token ids of a context and of what continues it.

    Texts are encoded joined, as the model would meet them, and cut where that parts from the
    context alone; white space at the context's end goes to the continuation, since a piece begins
    with its space. This is lm-evaluation-harness's rule, but for a token in which the two join: it
    is the continuation's. At least the last token is. Where nothing is left before it, as behind an
    empty context, there is [BOS].

    Args:
      tokenizer: For texts.
      context: Text or token ids.
      continuation: As the context, and of the same kind.
      vocab_size: Ids are below it.
      add_bos: Put [BOS] before a context that is text.
      allow_control: As in `Tokenizer.encode`.

    Returns:
      Two lists, neither empty.

    Raises:
      TypeError: If one is text and the other is not.
      ValueError: If there is no text at all, a sequence of ids is empty, there is no [BOS], or as
        `requests.encode_prompt`.
    """
    if isinstance(context, str) != isinstance(continuation, str):
        raise TypeError("context and options must both be text, or both be token ids")

    def encode(prompt, with_bos=False):
        return encode_prompt(
            prompt, tokenizer, vocab_size, add_bos=with_bos, allow_control=allow_control
        )

    if not isinstance(context, str) or not isinstance(continuation, str):
        before, after = encode(context, add_bos), encode(continuation)
        if not before:
            raise ValueError("the context is empty; begin it with the id of [BOS]")
        if not after:
            raise ValueError("the continuation is empty; give at least one token")
        return before, after
    before, joined = encode(context.rstrip(), add_bos), encode(context + continuation, add_bos)
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, joined, strict=False))
    cut = min(sum(1 for _ in shared), len(joined) - 1)
    if cut < 1:
        if not context + continuation:
            raise ValueError("context and continuation are both empty; give some text to score")
        return encode("", with_bos=True), joined
    return joined[:cut], joined[cut:]


def continuation_logprobs(
    engine: Engine, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the log-probability of each continuation, and whether it is the greedy one.

    Args:
      engine: The model.
      pairs: Token ids (context, continuation), neither empty, together at most one token more than
        the context holds.

    Returns:
      float64 `[O]` and bool `[O]`.

    Raises:
      ValueError: If an intervention does not fit one of the texts.
    """
    for before, after in pairs:
        engine.check_length(len(before) + len(after))
    logprobs, is_greedy = np.zeros(len(pairs)), np.zeros(len(pairs), bool)
    windows = [Window([*before, *after], len(before)) for before, after in pairs]
    for index, found in score_windows(engine, windows, 0):
        logprobs[index] = found.logprobs.sum(dtype=np.float64)
        is_greedy[index] = not found.ranks.any()
    return logprobs, is_greedy


def window_bounds(num_tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yields the windows of a text as (start, begin, end): tokens `begin` to `end` are scored.

    Token t is predicted from the tokens before it, so a window that runs `window` tokens scores as
    many, from its second token to the one after its last. Every token but the text's first is
    scored once, and sees at least `window - stride + 1` tokens, or all that there are. The last
    window reaches back as far as the others do.

    Args:
      num_tokens: T, at least 2.
      window: Most tokens run at a time.
      stride: How far apart windows begin.
    """
    end = min(num_tokens, window + 1)
    yield 0, 1, end
    while end < num_tokens:
        begin, end = end, min(end + stride, num_tokens)
        yield end - 1 - window, begin, end


def score_windows(
    engine: Engine, windows: Sequence[Window], num_top: int
) -> Iterator[tuple[int, TokenStatistics]]:
    """Yields (index of the window, statistics of its tokens from `first` on), in any order.

    Windows of similar length run side by side.

    Args:
      engine: The model.
      windows: Of at least two tokens, and at most one more than the context holds.
      num_top: How many of the most probable tokens to report.

    Raises:
      ValueError: If a token has no finite log-probability.
    """
    order = sorted(range(len(windows)), key=lambda index: -len(windows[index].tokens))
    while order:
        longest = len(windows[order[0]].tokens) - 1
        rows = engine.mesh.shape[DATA_AXIS] * (_TOKENS_AT_ONCE // engine.chunk_for(1, longest))
        chosen, order = order[:rows], order[rows:]
        batch = [windows[index] for index in chosen]
        yield from zip(chosen, _score_batch(engine, batch, num_top), strict=True)


def _score_batch(
    engine: Engine, windows: Sequence[Window], num_top: int
) -> Iterator[TokenStatistics]:
    """The statistics of windows that run side by side, in their order."""
    batch = engine.batch_for(len(windows))
    lengths = np.zeros(batch, np.int32)
    lengths[: len(windows)] = [len(window.tokens) - 1 for window in windows]
    capacity = engine.capacity_for(int(lengths.max()))
    tokens = np.zeros((batch, capacity + CHUNK_LENGTHS[-1]), np.int32)
    for row, window in enumerate(windows):
        tokens[row, : len(window.tokens)] = window.tokens
    inputs = np.where(np.arange(capacity) < lengths[:, None], tokens[:, :capacity], 0)
    state = engine.new_state(inputs)
    parts = []
    for chunk in engine.chunks(batch, int(lengths.max())):
        following = tokens[:, chunk.start + 1 : chunk.start + 1 + chunk.length]
        num_valid = np.clip(lengths - chunk.start, 0, chunk.length).astype(np.int32)
        state, found = engine.score_tokens(state, num_valid, following, num_top)
        parts.append(found)
    on_host = jax.device_get(parts)
    for row, window in enumerate(windows):
        statistics = TokenStatistics(
            *(
                np.concatenate([part[row] for part in leaf])[window.first - 1 : lengths[row]]
                for leaf in zip(*on_host, strict=True)
            )
        )
        finite = np.isfinite(statistics.logprobs)
        if not finite.all():
            raise ValueError(
                f"token {window.first + int(finite.argmin())} of a text cannot be scored: "
                f"{WHY_NOT_FINITE}"
            )
        yield statistics


def _empty_statistics(num_tokens: int, top_k: int) -> TokenStatistics:
    def full(value, dtype, *more):
        return np.full((num_tokens, *more), value, dtype)

    return TokenStatistics(
        full(np.nan, np.float32),
        full(-1, np.int32),
        full(np.nan, np.float32),
        full(-1, np.int32, top_k),
        full(np.nan, np.float32, top_k),
    )


def _num_bytes(tokenizer: Tokenizer | None, tokens: np.ndarray) -> int | None:
    """UTF-8 bytes of all tokens but the first."""
    if tokenizer is None:
        return None
    ids, counts = np.unique(tokens[1:], return_counts=True)
    sizes = [len(tokenizer.token_bytes(token)) for token in ids]
    total = int(np.dot(sizes, counts))
    # Behind [BOS] stands the space that encoding puts before a text.
    if tokens[0] == tokenizer.bos_id and tokenizer.token_bytes(tokens[1]).startswith(b" "):
        total -= 1
    return total


def _option_bytes(tokenizer: Tokenizer | None, option: Prompt) -> int | None:
    if isinstance(option, str):
        return len(option.encode())
    if tokenizer is None:
        return None
    return sum(len(tokenizer.token_bytes(token)) for token in np.asarray(option).tolist())
