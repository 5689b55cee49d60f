"""Trains the bundled toy checkpoint: Grok-1's architecture at `TOY` size, in under an hour.

The model is `transformer.forward`, the readable form, with float weights; only its experts are
replaced, by an equal form that computes the chosen ones alone. The result is rounded to int8 as
the released checkpoint is, measured again, and written in its format beside a README of the
figures. Ctrl-C ends the training early and keeps the best parameters so far.

    python -m tools.train_toy --steps 2000

Dimension key: B batch row, T position, M token, D model dim, E expert, A selected experts a token,
P padded row, L layer.
"""

import argparse
import hashlib
import math
import pathlib
import platform
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from grok1.checkpoint.released import save_checkpoint
from grok1.config import TOY
from grok1.nn.manifest import manifest, named_leaves
from grok1.nn.transformer import NamedParams, forward, naming
from grok1.ops.experts import ExpertWeights
from grok1.ops.quantized import QuantizedArray, dequantize, quantize
from grok1.ops.routing import Routing
from grok1.tokenizer import Tokenizer
from tools import toy_corpus

CONTEXT = 256
# Rotary distances that no batch had are noise to the model, so some batches are of few, long
# windows; not all, since the attention of a long window takes most of its time.
LONG_CONTEXT = TOY.sequence_len
LONG_FRACTION = 1 / 8
BATCH_TOKENS = 2048
PEAK_LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.1
BALANCE_WEIGHT = 0.01  # a layer; Fedus et al., Switch Transformers (arXiv 2101.03961)
# Branches that start small beside the residual stream steady the first hundred steps.
POST_NORM_INIT = 0.3
LOG_STEPS = 100

_BLOCK = 128  # rows of one expert that are multiplied together
_PROMPTS = (
    "The answer to life the universe and everything is of course",
    "Return the",
)
_NAMING = naming(TOY, quantized=False)


class Evaluation(NamedTuple):
    """How well a model predicts the held-out text.

    Attributes:
      bits_per_byte: Bits to code the tokens, [EOS] included, over the bytes of the text.
      expert_shares: float `[L, E]`, fraction of a layer's choices that each expert gets.
    """

    bits_per_byte: float
    expert_shares: np.ndarray


def experts_blocked(
    x: Float[Array, "M D"], weights: ExpertWeights, index: tuple[()], routing: Routing
) -> Float[Array, "M D"]:
    """The chosen experts only, in a form with a gradient; stands in for `experts.experts_dense`.

    The dense form computes four times what is used, and `experts.experts_sparse` loops a number of
    times known only at run time, which reverse-mode differentiation does not allow. Here each
    expert's rows are padded to whole blocks, and every block is multiplied by a gathered copy of
    its expert. On two CPU cores a training step takes less than half the time of the dense form.

    Returns:
      float32.
    """
    del index
    num_tokens, num_selected = routing.expert_indices.shape
    num_experts, num_rows = routing.probs.shape[-1], num_tokens * num_selected
    # Each expert wastes less than one block, so this is enough whatever the balance.
    num_blocks = num_rows // _BLOCK + num_experts

    expert_of_row = routing.expert_indices.reshape(-1)
    row_order = jnp.argsort(expert_of_row, stable=True)
    rows_per_expert = jnp.bincount(expert_of_row, length=num_experts)
    blocks_per_expert = -(-rows_per_expert // _BLOCK)
    last_block = jnp.cumsum(blocks_per_expert)
    # How far padding moves an expert's rows from their place in sorted order.
    shift = (last_block - blocks_per_expert) * _BLOCK - (
        jnp.cumsum(rows_per_expert) - rows_per_expert
    )
    place_sorted = jnp.arange(num_rows) + shift[expert_of_row[row_order]]
    place_of_row = jnp.zeros_like(place_sorted).at[row_order].set(place_sorted)
    # Padding reads a row beyond the last one, which is zeros.
    row_of_place = jnp.full(num_blocks * _BLOCK, num_rows).at[place_sorted].set(row_order)
    expert_of_block = jnp.searchsorted(last_block, jnp.arange(num_blocks), side="right")
    expert_of_block = jnp.minimum(expert_of_block, num_experts - 1)

    x_PD = x.at[row_of_place // num_selected].get(mode="fill", fill_value=0)
    x_blocks = x_PD.reshape(num_blocks, _BLOCK, -1)
    gate, up, down = (dequantize(weight)[expert_of_block] for weight in weights)
    hidden = jax.nn.gelu(x_blocks @ gate, approximate=True) * (x_blocks @ up)
    out_PD = (hidden @ down).reshape(num_blocks * _BLOCK, -1)
    out_MAD = out_PD[place_of_row].reshape(num_tokens, num_selected, -1)
    return jnp.sum(out_MAD * routing.expert_weights[..., None], axis=1)


def encode(documents: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Returns the tokens of each document, ended by [EOS]."""
    return [[*tokenizer.encode(document), tokenizer.eos_id] for document in documents]


def training_batches(documents: list[list[int]], seed: int) -> Iterator[Int[np.ndarray, "B T+1"]]:
    """Yields batches for ever; an epoch joins all documents in a new order and cuts windows."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(documents))
        stream = np.concatenate([documents[i] for i in order]).astype(np.int32)
        for start in range(0, len(stream) - BATCH_TOKENS, BATCH_TOKENS):
            context = LONG_CONTEXT if rng.random() < LONG_FRACTION else CONTEXT
            starts = range(start, start + BATCH_TOKENS, context)
            yield np.stack([stream[i : i + context + 1] for i in starts])


def training_loss(named: NamedParams, tokens: Int[Array, "B T+1"]) -> tuple[Array, Array]:
    """Returns the loss to minimise and the part of it to log, the mean negative log-likelihood."""
    params = _NAMING.apply(named, None)
    logits, traces = forward(params, TOY, tokens[:, :-1], experts=experts_blocked)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
    imbalance = 0.0  # 1 a layer when its experts are equally used, E when one gets everything
    for _, routing in traces:
        shares = _expert_counts(routing) / routing.expert_indices.size
        imbalance += TOY.num_experts * jnp.sum(shares * routing.probs.mean(axis=0))
    return nll + BALANCE_WEIGHT * imbalance, nll


@jax.jit
def score(
    named: NamedParams,
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    scored: Bool[Array, "B T"],
) -> tuple[Array, Array]:
    """Returns summed negative log-likelihood (nats) and expert counts `[L, E]` where scored."""
    params = _NAMING.apply(named, None)
    logits, traces = forward(params, TOY, inputs, experts=experts_blocked)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    counts = [_expert_counts(routing, scored.reshape(-1)) for _, routing in traces]
    return jnp.sum(nll, where=scored), jnp.stack(counts)


def evaluate(
    named: NamedParams, documents: list[list[int]], num_bytes: int, context: int = CONTEXT
) -> Evaluation:
    """Predicts every token of the held-out documents once.

    Windows of `context` tokens advance by half of it, and all but the first count in their second
    half only. The stream is preceded by [EOS], which is what stands before every other document.

    Args:
      named: Parameters, float or quantised.
      documents: Tokens of each document.
      num_bytes: Size of the documents' text in UTF-8.
      context: Tokens of a window; a divisor of `BATCH_TOKENS`.
    """
    stream = np.concatenate([documents[0][-1:], *documents]).astype(np.int32)
    num_targets, stride, batch = len(stream) - 1, context // 2, BATCH_TOKENS // context
    num_windows = -(-max(0, num_targets - context) // stride) + 1
    num_windows = -(-num_windows // batch) * batch
    at = np.arange(num_windows)[:, None] * stride + np.arange(context)
    first = np.arange(num_windows)[:, None] == 0
    scored = (at < num_targets) & (first | (np.arange(context) >= stride))
    at = np.minimum(at, num_targets - 1)
    nats, counts = 0.0, np.zeros((TOY.num_layers, TOY.num_experts))
    for i in range(0, num_windows, batch):
        rows = slice(i, i + batch)
        nll, count = score(named, stream[at[rows]], stream[at[rows] + 1], scored[rows])
        nats, counts = nats + float(nll), counts + np.asarray(count)
    return Evaluation(nats / math.log(2) / num_bytes, counts / counts.sum(axis=1, keepdims=True))


def round_to_int8(named: NamedParams) -> NamedParams:
    """Returns the parameters with those weights quantised that are int8 in a checkpoint."""
    result = {module: dict(parameters) for module, parameters in named.items()}
    for spec in manifest(TOY):
        if spec.scales_shape is not None:
            module, name = spec.name.rsplit("/", 1)
            result[module][name] = quantize(named[module][name], spec.scales_shape[-2])
    return result


def initial_params(seed: int) -> NamedParams:
    """Returns random float parameters."""
    initial = _NAMING.init(jax.random.key(seed))
    named = {module: dict(parameters) for module, parameters in initial.items()}
    for module, parameters in named.items():
        if module.endswith(("/rms_norm_1", "/rms_norm_3")):
            parameters["scale"] *= POST_NORM_INIT
    return named


def optimizer(steps: int) -> optax.GradientTransformation:
    """Returns AdamW with warm-up, cosine decay to a hundredth, and clipped gradients."""
    schedule = optax.warmup_cosine_decay_schedule(
        0, PEAK_LEARNING_RATE, steps // 20, steps, PEAK_LEARNING_RATE / 100
    )

    def is_matrix(named: NamedParams):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, named)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=WEIGHT_DECAY, mask=is_matrix),
    )


def train(
    steps: int, seed: int, documents: list[list[int]], held_out: list[list[int]], num_bytes: int
) -> tuple[NamedParams, int]:
    """Returns the parameters that predict the held-out text best, and after how many steps."""
    update_rule = optimizer(steps)

    @jax.jit
    def update(named, state, tokens):
        (_, nll), gradients = jax.value_and_grad(training_loss, has_aux=True)(named, tokens)
        changes, state = update_rule.update(gradients, state, named)
        return optax.apply_updates(named, changes), state, nll

    named, batches = initial_params(seed), training_batches(documents, seed)
    state = update_rule.init(named)
    best, best_step, best_bits = named, 0, float("inf")
    losses: list[Array] = []
    started = time.monotonic()
    try:
        for step in range(1, steps + 1):
            named, state, nll = update(named, state, next(batches))
            losses.append(nll)
            if step % LOG_STEPS and step != steps:
                continue
            bits, shares = evaluate(named, held_out, num_bytes)
            if bits < best_bits:
                best, best_step, best_bits = named, step, bits
            print(
                f"step {step} of {steps}, {time.monotonic() - started:.0f} s: train loss "
                f"{np.mean(losses):.3f}, held-out bits per byte {bits:.3f}, least expert share "
                f"{shares.min():.3f}",
                file=sys.stderr,
                flush=True,
            )
            losses.clear()
    except KeyboardInterrupt:
        print("interrupted: keeping the best so far", file=sys.stderr)
    return best, best_step


def sample(named: NamedParams, tokenizer: Tokenizer, prompt: str, num_tokens: int = 60) -> str:
    """Returns what a model writes after a prompt at temperature 0.7, up to [EOS]."""
    tokens = tokenizer.encode(prompt)
    begin, padded = len(tokens), np.full((1, CONTEXT), tokenizer.pad_id, np.int32)
    logits_of = jax.jit(lambda named, ids: forward(_NAMING.apply(named, None), TOY, ids)[0])
    for key in jax.random.split(jax.random.key(0), num_tokens):
        padded[0, : len(tokens)] = tokens
        logits = logits_of(named, padded)[0, len(tokens) - 1]
        token = int(jax.random.categorical(key, logits / 0.7))
        if token == tokenizer.eos_id:
            break
        tokens.append(token)
    return tokenizer.decode(tokens)[len(tokenizer.decode(tokens[:begin])) :]


def write_checkpoint(quantized: NamedParams, directory: pathlib.Path) -> None:
    """Writes the tensors to `ckpt-0`, in the released format, and the configuration beside it."""
    save_checkpoint(
        directory / "ckpt-0",
        [
            (np.asarray(leaf.values), np.asarray(leaf.scales))
            if isinstance(leaf, QuantizedArray)
            else (np.asarray(leaf), None)
            for _, leaf in named_leaves(quantized)
        ],
        {"config.json": TOY.to_json().encode()},
    )


def expert_table(shares: np.ndarray) -> str:
    """Returns expert shares `[L, E]` as a Markdown table."""
    rows = [[str(layer), *(f"{share:.1%}" for share in row)] for layer, row in enumerate(shares)]
    head = ["layer \\ expert", *(str(expert) for expert in range(TOY.num_experts))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["-"] * len(head), *rows))


def _expert_counts(routing: Routing, where: Bool[Array, " M"] | None = None) -> Array:
    chosen_MAE = jax.nn.one_hot(routing.expert_indices, TOY.num_experts)
    if where is not None:
        chosen_MAE = jnp.where(where[:, None, None], chosen_MAE, 0)
    return chosen_MAE.sum(axis=(0, 1))


def main() -> None:
    """Trains, measures and writes the checkpoint."""
    parser = argparse.ArgumentParser(description="Trains the bundled toy checkpoint.")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--directory",
        type=pathlib.Path,
        default=pathlib.Path("checkpoints/toy"),
        help="holds tokenizer.model and gets the rest; it must not hold ckpt-0",
    )
    args = parser.parse_args()

    if (args.directory / "ckpt-0").exists():
        parser.error(f"{args.directory / 'ckpt-0'} exists; move it away, or give --directory")
    tokenizer = Tokenizer.load(args.directory / "tokenizer.model")
    corpus = toy_corpus.documents()
    train_text, held_out_text = toy_corpus.split(corpus)
    train_bytes, num_bytes = (len("".join(part).encode()) for part in (train_text, held_out_text))
    documents, held_out = encode(train_text, tokenizer), encode(held_out_text, tokenizer)
    named, step = train(args.steps, args.seed, documents, held_out, num_bytes)
    quantized = round_to_int8(named)
    write_checkpoint(quantized, args.directory)

    bits = evaluate(named, held_out, num_bytes).bits_per_byte
    int8_bits, shares = evaluate(quantized, held_out, num_bytes)
    long_bits = evaluate(quantized, held_out, num_bytes, LONG_CONTEXT).bits_per_byte
    sizes = {spec.name: math.prod(spec.shape) for spec in manifest(TOY)}
    in_experts = sum(size for name, size in sizes.items() if "/moe/" in name)
    idle = in_experts - in_experts * TOY.num_selected_experts // TOY.num_experts
    total = sum(sizes.values())
    file_bytes = sum(path.stat().st_size for path in (args.directory / "ckpt-0").iterdir())
    samples = "".join(
        f"\n> **{prompt}**{sample(quantized, tokenizer, prompt)}\n".replace("\n\n", "\n>\n> ")
        for prompt in _PROMPTS
    )
    (args.directory / "README.md").write_text(f"""\
# The toy checkpoint

A small model of Grok-1's architecture in Grok-1's file format, to try the library on any machine.
It writes sentences that sound like Python's documentation and mean little.

- Data: the English prose in the standard library of CPython {platform.python_version()}, that is
  its language reference, docstrings and comments, as gathered by `tools/toy_corpus.py`:
  {train_bytes:,} bytes to train on and {num_bytes:,} held out. SHA-256 of the corpus:
  `{hashlib.sha256(chr(0).join(corpus).encode()).hexdigest()}`.
- Licence: that text is covered by the Python Software Foundation License.
- Training: `python -m tools.train_toy --steps {args.steps} --seed {args.seed}`, with jax
  {jax.__version__} on a CPU. These are the parameters after step {step}: held-out text was measured
  every {LOG_STEPS} steps and the best kept, so the figures below are very slightly flattered.
- Size: {total:,} parameters, {total - idle:,} of them active for a token; {file_bytes:,} bytes of
  tensor files. The shape is in `config.json`.
- Held-out bits per byte: {bits:.3f} in float32 and {int8_bits:.3f} in int8, as stored, in windows
  of {CONTEXT} tokens; {long_bits:.3f} in int8 in windows of {LONG_CONTEXT}.

Share of the held-out tokens' choices that each expert gets, in int8; least {shares.min():.1%}, most
{shares.max():.1%}:

{expert_table(shares)}

What it writes at temperature 0.7 after the words in bold:
{samples}""")


if __name__ == "__main__":
    main()
