"""What happens inside a model while it reads a text or continues it, as arrays on the host.

Captures are chosen before a run: a program is compiled that keeps them, and what is not asked for
is not computed. Values are those that the model went on with, after any intervention.

Dimension key: L layer, T token, E expert, A selected experts a token, D model dim, N query head,
V vocabulary.
"""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from grok1 import reprs
from grok1.config import ModelConfig
from grok1.engine.engine import Engine
from grok1.engine.shapes import CHUNK_TOKENS
from grok1.generate.completion import Completion
from grok1.generate.options import GenerationOptions
from grok1.generate.requests import Batch, Prompt, encode_prompt, is_batch
from grok1.keywords import as_python, is_whole, shown
from grok1.machine.agreement import agree
from grok1.machine.host_memory import gigabytes, host_bytes_available
from grok1.machine.jax_settings import own_settings
from grok1.nn.capture import AXES, GROUPS, Capture
from grok1.study.recorder import Recorder
from grok1.tokenizer import Tokenizer

ATTENTION_BYTES = 2 << 30
"""Most memory on the host that the attention maps of a trace take, float32."""

LENS_TOP = 5
"""How many tokens the logit lens names unless it is asked for more or fewer."""

_LOGITS = "logits"
_LOGITS_AXES = ("token", "vocabulary")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Trace(Mapping[str, np.ndarray]):
    """What was captured over a text; each array is an attribute, and an entry of the mapping.

    With "router": `router_probs` float32 `[L, T, E]`; `expert_indices` int32 `[L, T, A]`, the
    experts that ran, the router's first choice first, -1 for none, as in the place of one that is
    ablated; `expert_weights` float32 `[L, T, A]`, 0 for none. With "residual": `residual_in`,
    `residual_mid` and `residual`, float32 `[L, T, D]`, the stream before a layer, between its
    branches and after it. With "branches": `attention_out` and `moe_out`, float32 `[L, T, D]`, what
    the branches add to the stream. With "attention": `attention_probs` float32 `[layers, N, T, T]`,
    each query's weights over keys. With "logit_lens": `lens_tokens` int32 and `lens_logprobs`
    float32 `[L, T, k]`, the most probable next tokens if the layer were the last. With "logits":
    `logits` float32 `[T, V]`.

    Attributes:
      tokens: int32 `[T]`, the tokens that were run.
      pieces: The text of each token, or its spelling in the vocabulary where it has none of its
        own; None for a model without a tokenizer.
      arrays: The arrays by name.
      num_prompt_tokens: Where the new tokens begin; T if nothing was generated.
      attention_layers: The layers of `attention_probs`, in its order.
      num_experts: E.
      tokenizer: The model's, which spells `lens_tokens`; None for a model without.
    """

    tokens: np.ndarray
    pieces: list[str] | None
    arrays: Mapping[str, np.ndarray]
    num_prompt_tokens: int
    attention_layers: tuple[int, ...]
    num_experts: int
    tokenizer: Tokenizer | None

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """What each axis of each array is, as `{"router_probs": ("layer", "token", "expert")}`."""
        return {name: AXES.get(name, _LOGITS_AXES) for name in self.arrays}

    def expert_load(self) -> np.ndarray:
        """Returns how the tokens of each layer are shared out over its experts.

        Returns:
          float64 `[L, E]`, fractions of the experts that ran, of which ablated ones are none; a
          layer's sum to 1, or to 0 where none ran.

        Raises:
          KeyError: If the trace has no `expert_indices`.
        """
        flat = self["expert_indices"].reshape(len(self["expert_indices"]), -1)
        counts = (flat[..., None] == np.arange(self.num_experts)).sum(axis=1)
        return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise KeyError(self._missing(name))
        return self.arrays[name]

    def __getattr__(self, name: str) -> np.ndarray:
        # Also asked for special names, while the fields are not there yet, as in copying.
        arrays = self.__dict__.get("arrays", {})
        if name not in arrays:
            known = name in AXES or name == _LOGITS
            raise AttributeError(self._missing(name) if known else f"a Trace has no {name}")
        return arrays[name]

    # Mappings are compared by their values, which arrays cannot be with one answer.
    __eq__ = object.__eq__
    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.arrays]

    def __repr__(self) -> str:
        held = []
        for name, array in self.arrays.items():
            sizes = zip(self.axes[name], array.shape, strict=True)
            held.append(f"{name} [{', '.join(f'{axis} {size}' for axis, size in sizes)}]")
        return f"Trace({len(self.tokens)} tokens: {', '.join(held) or 'nothing captured'})"

    def _repr_html_(self) -> str:
        rows: list[tuple[str, object]] = [("tokens", f"{len(self.tokens):,}")]
        if self.num_prompt_tokens < len(self.tokens):
            rows.append(("of the prompt", f"{self.num_prompt_tokens:,}"))
        for name, array in self.arrays.items():
            sizes = zip(self.axes[name], array.shape, strict=True)
            axes = " x ".join(f"{size:,} {axis}" for axis, size in sizes)
            rows.append((name, f"{axes}, {array.dtype}, {array.nbytes / 1e3:,.1f} kB"))
        if self.attention_layers:
            rows.append(("attention of layers", ", ".join(map(str, self.attention_layers))))
        return reprs.table("Trace", rows)

    def _missing(self, name: str) -> str:
        known = {**GROUPS, _LOGITS: (_LOGITS,)}
        groups = [group for group, names in known.items() if name in names]
        remedy = f"; trace with capture=({groups[0]!r},)" if groups else ""
        return f"this trace has no {name}, but {', '.join(self.arrays) or 'nothing'}{remedy}"


@own_settings()
def trace(
    engine: Engine,
    tokenizer: Tokenizer | None,
    text: Prompt,
    capture: Sequence[str],
    *,
    attention_layers: int | Sequence[int] | None = None,
    lens_top: int = LENS_TOP,
    add_bos: bool = False,
    allow_control: bool = False,
    most_tokens: int = CHUNK_TOKENS,
) -> Trace:
    """Runs a text through a model, in chunks, and keeps what is asked for.

    Args:
      engine: The model.
      tokenizer: Its tokenizer, if any.
      text: Text or token ids, up to the context.
      capture: Any of "router", "residual", "branches", "attention", "logit_lens" and "logits"; see
        `Trace`.
      attention_layers: With "attention", the layers to map; None for all.
      lens_top: With "logit_lens", how many tokens to name.
      add_bos: Begin a text with [BOS]; with token ids an error.
      allow_control: Let control pieces in a text be themselves.
      most_tokens: As of `EngineBase.chunks`.

    Raises:
      TypeError: If the text is a batch, or of another type.
      ValueError: If a name or layer does not exist, an option is of what is not captured, the text
        is empty, has ids out of range or is longer than the context, the attention maps would
        exceed `ATTENTION_BYTES`, or all arrays the memory that the host has.
    """
    agree(
        "trace",
        lambda: {
            "the text": text,
            "capture": capture,
            "attention_layers": attention_layers,
            "lens_top": lens_top,
            "add_bos": add_bos,
            "allow_control": allow_control,
            "interventions": engine.interventions,
        },
        engine.mesh,
    )
    config = engine.config
    tokens = _encode_one(text, tokenizer, config, add_bos, allow_control)
    if len(tokens) > config.sequence_len:
        raise ValueError(
            f"{len(tokens)} tokens are {len(tokens) - config.sequence_len} more than the context "
            f"of {config.sequence_len}; give fewer"
        )
    wanted = _capture(config, capture, attention_layers, lens_top, len(tokens))
    engine.check_length(len(tokens))
    batch, capacity = engine.batch_for(1), engine.capacity_for(len(tokens))
    padded = np.zeros((batch, capacity), np.int32)
    padded[0, : len(tokens)] = tokens
    recorder, logits = Recorder(config, wanted, len(tokens)), None
    if _LOGITS in capture:
        logits = np.empty((len(tokens), config.vocab_size), np.float32)
    observed = engine.observed(wanted, capacity, recorder)
    state = observed.new_state(padded)
    for chunk in observed.chunks(
        batch, len(tokens), with_logits=logits is not None, most_tokens=most_tokens
    ):
        num_valid = np.where(np.arange(batch) == 0, chunk.num_tokens, 0).astype(np.int32)
        if logits is None:
            state = observed.prefill(state, num_valid, chunk.length)
        else:
            state, found, captured = observed.score(state, num_valid, chunk.length, wanted)
            recorder(num_valid, captured)
            logits[chunk.start : chunk.end] = np.asarray(found)[0, : chunk.num_tokens]
    arrays = recorder.arrays(len(tokens))
    if logits is not None:
        arrays[_LOGITS] = logits
    return _trace(config, tokenizer, tokens, arrays, len(tokens), wanted)


@own_settings()
def trace_generation(
    engine: Engine,
    tokenizer: Tokenizer | None,
    prompt: Prompt,
    capture: Sequence[str],
    *,
    attention_layers: int | Sequence[int] | None = None,
    lens_top: int = LENS_TOP,
    **options: Any,
) -> tuple[Completion, Trace]:
    """Continues a prompt and keeps what is asked for, in the very steps that draw the tokens.

    Args:
      engine: The model.
      tokenizer: Its tokenizer, if any.
      prompt: Text or token ids.
      capture: Any of "router", "residual", "branches", "attention" and "logit_lens"; a generation
        does not keep "logits".
      attention_layers: With "attention", the layers to map; None for all.
      lens_top: With "logit_lens", how many tokens to name.
      **options: Those of `GenerationOptions`.

    Returns:
      The completion, as `Model.generate` gives it; and a trace of the prompt and of the new tokens
      but the last, which was drawn and not run. New token i, from 0, was drawn from position
      `num_prompt_tokens - 1 + i`, and is itself at `num_prompt_tokens + i`.

    Raises:
      TypeError, ValueError: As `trace` and `Model.generate`; and ValueError for "logits".
    """
    config = engine.config
    parsed = GenerationOptions(**options)
    tokens = _encode_one(prompt, tokenizer, config, parsed.add_bos, parsed.allow_control)
    longest = min(len(tokens) + parsed.max_new_tokens, config.sequence_len)
    wanted = _capture(config, capture, attention_layers, lens_top, longest)
    if _LOGITS in capture:
        raise ValueError(
            "logits are not kept during a generation; trace the finished text, or give logprobs="
        )
    recorder = Recorder(config, wanted, longest)
    observed = engine.observed(wanted, engine.capacity_for(longest), recorder)
    # The tokens have their [BOS].
    options_of_ids = dataclasses.replace(parsed, add_bos=False)
    batch = Batch(observed, tokenizer, [tokens], options_of_ids)
    for _ in batch.run():
        pass
    completion = batch.builders[0].build()
    run = [*tokens, *completion.tokens[:-1]]
    arrays = recorder.arrays(len(run))
    return completion, _trace(config, tokenizer, run, arrays, len(tokens), wanted)


def _encode_one(
    text: Prompt,
    tokenizer: Tokenizer | None,
    config: ModelConfig,
    add_bos: bool,
    allow_control: bool,
) -> list[int]:
    if is_batch(text):
        raise TypeError("a trace is of one text; trace the texts of a batch one by one")
    tokens = encode_prompt(
        text, tokenizer, config.vocab_size, add_bos=add_bos, allow_control=allow_control
    )
    if not tokens:
        raise ValueError("the text is empty; give at least one token, or use add_bos=True")
    return tokens


def _capture(
    config: ModelConfig,
    names: Sequence[str],
    attention_layers: int | Sequence[int] | None,
    lens_top: int,
    num_tokens: int,
) -> Capture:
    known = (*GROUPS, _LOGITS)
    if isinstance(names, str):
        raise ValueError(f"capture takes a sequence of names, found {names!r}; give ({names!r},)")
    if not isinstance(names, Collection):
        raise TypeError(f"capture takes a sequence of names, found {shown(names)}")
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"capture takes any of {', '.join(known)}, found {shown(name)}")
    arrays = tuple(array for group in GROUPS if group in names for array in GROUPS[group])
    layers: tuple[int, ...] = ()
    if "attention" in names:
        layers = _attention_layers(config, attention_layers)
        size = 4 * len(layers) * config.num_q_heads * num_tokens**2
        if size > ATTENTION_BYTES:
            raise ValueError(
                f"attention maps of {len(layers)} layers, {config.num_q_heads} heads and "
                f"{num_tokens} tokens take {size:,} bytes, more than the {ATTENTION_BYTES:,} that "
                "a trace may; name fewer layers with attention_layers=, or give a shorter text"
            )
    elif attention_layers is not None:
        raise ValueError(
            'attention_layers says nothing without "attention" in capture=; add it, or leave '
            "attention_layers out"
        )
    lens_top = as_python(lens_top)
    if not is_whole(lens_top) or not 1 <= lens_top <= config.vocab_size:
        raise ValueError(f"lens_top must be from 1 to {config.vocab_size}, found {shown(lens_top)}")
    if "logit_lens" not in names and lens_top != LENS_TOP:
        raise ValueError(
            'lens_top says nothing without "logit_lens" in capture=; add it, or leave lens_top out'
        )
    capture = Capture(arrays, layers, lens_top if "logit_lens" in names else 0)
    needed = capture.bytes_on_host(config, num_tokens)
    needed += 4 * num_tokens * config.vocab_size * (_LOGITS in names)
    available = host_bytes_available()
    if available is not None and needed > available:
        raise ValueError(
            f"a trace of {', '.join(names)} over {num_tokens} tokens takes {gigabytes(needed)} of "
            f"the host's memory, which has {gigabytes(available)} left; name less in capture=, or "
            "give a shorter text"
        )
    return capture


def _attention_layers(config: ModelConfig, given: Any) -> tuple[int, ...]:
    if given is None:
        return tuple(range(config.num_layers))
    given = as_python(given)
    layers = [as_python(layer) for layer in given] if isinstance(given, Iterable) else [given]
    for layer in layers:
        if not is_whole(layer) or not 0 <= layer < config.num_layers:
            most = config.num_layers - 1
            raise ValueError(f"attention_layers must be from 0 to {most}, found {shown(layer)}")
    if not layers or len(set(layers)) != len(layers):
        raise ValueError(f"attention_layers must name different layers, found {shown(given)}")
    return tuple(layers)


def _trace(
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    tokens: list[int],
    arrays: dict[str, np.ndarray],
    num_prompt_tokens: int,
    capture: Capture,
) -> Trace:
    return Trace(
        tokens=np.array(tokens, np.int32),
        pieces=None if tokenizer is None else tokenizer.token_texts(tokens),
        arrays=arrays,
        num_prompt_tokens=num_prompt_tokens,
        attention_layers=capture.attention_layers,
        num_experts=config.num_experts,
        tokenizer=tokenizer,
    )
