"""The model as a user holds it: load, logits, generate, stream, save."""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grok1.checkpoint import open_checkpoint, save_checkpoint
from grok1.completion import Completion, CompletionBuilder
from grok1.config import GROK_1, ModelConfig
from grok1.engine import Engine
from grok1.generation import Request, generate
from grok1.loading import load_params
from grok1.manifest import TensorSpec, manifest
from grok1.options import GenerationOptions, check_ids
from grok1.sharding import make_mesh
from grok1.stacking import random_params, unstack
from grok1.tokenizer import Tokenizer
from grok1.transformer import Params

Prompt = str | Sequence[int] | np.ndarray
"""Text, or token ids."""

EOS_ID = 2
"""End of sequence, in the released vocabulary; what ends a request of a model without tokenizer."""

MeshLike = Mesh | Sequence[int] | None
"""A mesh with axes (data, model), its two sizes, or None for every device."""


class Model:
    """A Grok-1 model on its devices; made by `load` or `random_model`.

    Attributes:
      config: The architecture.
      mesh: The device mesh, axes (data, model).
      dtype: Type of the products with weights, float32 or bfloat16.
      params: The weights, layers stacked, sharded over the mesh.
      tokenizer: Text to ids and back; None when the checkpoint has none.
      engine: The compiled steps.
    """

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        mesh: Mesh,
        dtype: Any,
        tensors: list[TensorSpec],
        tokenizer: Tokenizer | None = None,
    ):
        if tokenizer is not None and tokenizer.vocab_size != config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} pieces, the model's vocabulary "
                f"{config.vocab_size}; give the tokenizer.model that belongs to the checkpoint"
            )
        self.params, self.config, self.mesh = params, config, mesh
        self.dtype = jnp.dtype(dtype)
        self.tokenizer = tokenizer
        self.tensors = tensors
        self.engine = Engine(params, config, mesh, dtype)

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.params)
        gigabytes = sum(leaf.nbytes for leaf in leaves) / 1e9
        sizes = "x".join(str(size) for size in self.mesh.devices.shape)
        return (
            f"Model({self.config.num_layers} layers, {self.config.num_experts} experts, "
            f"{gigabytes:.3g} GB, {self.dtype}, mesh {sizes} {self.mesh.devices.flat[0].platform})"
        )

    def logits(self, tokens) -> np.ndarray:
        """Computes the next-token logits after every position.

        Args:
          tokens: Token ids `[T]` or `[B, T]`, T up to the context.

        Returns:
          float32 `[T, V]` or `[B, T, V]`, on the host.

        Raises:
          ValueError: If the ids are no such array, are out of range, or exceed the context.
        """
        array = np.asarray(tokens)
        rows = array[None] if array.ndim == 1 else array
        if rows.ndim != 2 or not rows.size or not np.issubdtype(rows.dtype, np.integer):
            raise ValueError(
                f"tokens must be integer ids [T] or [B, T] with at least one token, found "
                f"{array.dtype}{list(array.shape)}"
            )
        num_rows, length = rows.shape
        check_ids(rows, self.config.vocab_size, "tokens")
        if length > self.config.sequence_len:
            raise ValueError(
                f"{length} tokens are {length - self.config.sequence_len} more than the context "
                f"of {self.config.sequence_len}; give fewer"
            )
        batch = self.engine.batch_for(num_rows)
        padded = np.zeros((batch, self.engine.capacity_for(length)), np.int32)
        padded[:num_rows, :length] = rows
        state = self.engine.new_state(padded)
        out = np.empty((num_rows, length, self.config.vocab_size), np.float32)
        done = 0
        while done < length:
            chunk = self.engine.scoring_chunk_for(batch, length - done)
            count = min(chunk, length - done)
            num_valid = np.where(np.arange(batch) < num_rows, count, 0).astype(np.int32)
            state, chunk_logits, _ = self.engine.score(state, num_valid, chunk)
            out[:, done : done + count] = np.asarray(chunk_logits)[:num_rows, :count]
            done += count
        return out[0] if array.ndim == 1 else out

    # A str is also a Sequence[str]; the first overload that fits wins.
    @overload
    def generate(  # pyright: ignore[reportOverlappingOverload]
        self, prompt: str | Sequence[int] | np.ndarray, **options: Any
    ) -> Completion: ...
    @overload
    def generate(
        self, prompt: Sequence[str] | Sequence[Sequence[int]], **options: Any
    ) -> list[Completion]: ...

    def generate(self, prompt, **options):
        """Continues a prompt, or a batch of prompts.

        Args:
          prompt: Text or token ids; or a list of these, a batch, of any lengths.
          **options: Those of `GenerationOptions`: max_new_tokens=64, temperature=0.7, top_p=0.95,
            top_k, min_p, seed=0, stop, ignore_eos, logprobs, add_bos, allow_control,
            allowed_tokens, logits_processor.

        Returns:
          A `Completion`, or for a batch a list of them in the prompts' order.

        Raises:
          ValueError: If a prompt is empty, has ids out of range or leaves no room in the context,
            or an option is out of range.
          TypeError: If an option is unknown, or a prompt or stop is of another type.
        """
        is_batch = _is_batch(prompt)
        batch = _Batch(self, list(prompt) if is_batch else [prompt], GenerationOptions(**options))
        for _ in batch.run():
            pass
        completions = [builder.build() for builder in batch.builders]
        return completions if is_batch else completions[0]

    def stream(self, prompt: Prompt, **options: Any) -> "TextStream":
        """Continues one prompt, yielding text as it becomes certain: whole characters, no stops.

        Args:
          prompt: Text or token ids.
          **options: As for `generate`.

        Returns:
          An iterator over pieces of the text, with the `completion` once it has ended.

        Raises:
          ValueError, TypeError: As `generate`; and ValueError if the model has no tokenizer.
        """
        if _is_batch(prompt):
            raise TypeError("stream takes one prompt; give a batch to generate")
        if self.tokenizer is None:
            raise ValueError("stream needs a tokenizer, and this model has none; use generate")
        return TextStream(_Batch(self, [prompt], GenerationOptions(**options)))


class TextStream(Iterator[str]):
    """The text of one prompt's continuation, piece by piece.

    Attributes:
      completion: The whole `Completion`; None until the stream has ended.
    """

    def __init__(self, batch: "_Batch"):
        self.completion: Completion | None = None
        self._batch = batch
        self._pieces = (piece for _, piece in batch.run() if piece)

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration:
            self.completion = self._batch.builders[0].build()
            raise


class _Batch:
    """The requests of one call, each with the builder of its completion."""

    def __init__(self, model: Model, prompts: list[Prompt], options: GenerationOptions):
        tokenizer, config = model.tokenizer, model.config
        if tokenizer is None and options.stop_strings():
            raise ValueError(
                f"stop string {options.stop_strings()[0]!r} needs a tokenizer, and this model has "
                "none; stop at token ids instead"
            )
        if options.logprobs is not None and options.logprobs > config.vocab_size:
            raise ValueError(
                f"logprobs must be at most the vocabulary of {config.vocab_size}, found "
                f"{options.logprobs}"
            )
        check_ids(np.asarray(options.stop_tokens()), config.vocab_size, "stop")
        stop_tokens = set(options.stop_tokens())
        if not options.ignore_eos:
            stop_tokens.add(EOS_ID if tokenizer is None else tokenizer.eos_id)
        self._model, self._options = model, options
        self._allowed = options.allowed_mask(config.vocab_size)
        self._requests: list[Request] = []
        self.builders: list[CompletionBuilder] = []
        for prompt, (seed, stream) in zip(prompts, options.seeds(len(prompts)), strict=True):
            tokens = _encode(prompt, model, options)
            room = config.sequence_len - len(tokens)
            if room < 1:
                raise ValueError(
                    f"the prompt has {len(tokens)} tokens and the context holds "
                    f"{config.sequence_len}, of which one must stay free for a new token; shorten "
                    f"the prompt by {1 - room}"
                )
            max_tokens = min(options.max_new_tokens, room)
            self._requests.append(Request(tokens, max_tokens, seed, stream))
            self.builders.append(
                CompletionBuilder(
                    tokenizer,
                    max_tokens=max_tokens,
                    limit_reason="context" if room < options.max_new_tokens else "length",
                    stop_tokens=stop_tokens,
                    stop_strings=options.stop_strings(),
                    with_logprobs=options.logprobs is not None,
                )
            )

    def run(self) -> Iterator[tuple[int, str]]:
        """Yields (prompt, text that became certain) for every token; ends when all are over."""
        options = self._options
        for i, sampled in generate(
            self._model.engine,
            self._requests,
            options.sampling(),
            self._allowed,
            options.logprobs,
            options.logits_processor,
        ):
            piece = self.builders[i].push(sampled)
            self._requests[i].finished = self.builders[i].stop_reason is not None
            yield i, piece


def load(
    path: str | pathlib.Path,
    *,
    mesh: MeshLike = None,
    dtype: Any = None,
    progress: bool = True,
    tokenizer: str | pathlib.Path | Tokenizer | None = None,
) -> Model:
    """Loads a checkpoint in Grok-1's on-disk format, sharded over devices.

    Args:
      path: A directory with `ckpt-0/` and, where they differ from Grok-1's, `config.json` and
        `tokenizer.model`.
      mesh: Sizes (data, model), a `jax.sharding.Mesh` with these axes, or None for every device.
      dtype: "float32" or "bfloat16", the type of products with weights; None for float32 on a CPU
        and bfloat16 elsewhere.
      progress: Show bytes, rate and time left on stderr, if that is a terminal.
      tokenizer: A tokenizer or its file, instead of `tokenizer.model` in `path`.

    Raises:
      CheckpointError: If a file is missing, damaged, foreign or of the wrong shape; nothing in a
        file is ever executed.
      ValueError: If the configuration is impossible, the model does not divide over the mesh, or
        the tokenizer is another model's.
    """
    path = pathlib.Path(path)
    config_path = path / "config.json"
    config = ModelConfig.load(config_path) if config_path.exists() else GROK_1
    device_mesh = make_mesh(config, mesh)
    dtype = _dtype(dtype, device_mesh)
    if not isinstance(tokenizer, Tokenizer):
        tokenizer_path = pathlib.Path(tokenizer or path / "tokenizer.model")
        found = tokenizer is not None or tokenizer_path.exists()
        tokenizer = Tokenizer.load(tokenizer_path) if found else None
    expected = manifest(config)
    headers = open_checkpoint(path / "ckpt-0", expected)
    tensors = [
        spec._replace(dtype=header.values.dtype, scales_shape=header.scales and header.scales.shape)
        for spec, header in zip(expected, headers, strict=True)
    ]
    params = load_params(headers, tensors, config, device_mesh, progress)
    return Model(params, config, device_mesh, dtype, tensors, tokenizer)


def random_model(
    config: ModelConfig, *, mesh: MeshLike = None, dtype: Any = None, seed: int = 0
) -> Model:
    """Makes a model with random int8 weights, without files or tokenizer.

    Args:
      config: The architecture.
      mesh: As for `load`.
      dtype: As for `load`.
      seed: Seed of the weights; they are the same on every mesh.
    """
    device_mesh = make_mesh(config, mesh)
    dtype = _dtype(dtype, device_mesh)
    params = random_params(config, device_mesh, seed)
    return Model(params, config, device_mesh, dtype, manifest(config))


def save(model: Model, path: str | pathlib.Path) -> None:
    """Writes a model in Grok-1's on-disk format, byte for byte as the released files are framed.

    Args:
      model: What to write.
      path: The directory; gets `ckpt-0/`, `config.json` and, if the model has one,
        `tokenizer.model`.

    Raises:
      CheckpointError: If the directory already holds a checkpoint, or cannot be written.
    """
    path = pathlib.Path(path)
    save_checkpoint(path / "ckpt-0", unstack(model.params, model.config, model.tensors))
    (path / "config.json").write_text(model.config.to_json(), encoding="utf-8")
    if model.tokenizer is not None:
        (path / "tokenizer.model").write_bytes(model.tokenizer.model_proto)


def _encode(prompt: Prompt, model: Model, options: GenerationOptions) -> list[int]:
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise ValueError(
                "this model has no tokenizer; give token ids, or load it with tokenizer="
            )
        tokens = model.tokenizer.encode(
            prompt, add_bos=options.add_bos, allow_control=options.allow_control
        )
    else:
        array = np.asarray(prompt)
        check_ids(array, model.config.vocab_size, "the prompt")
        tokens = array.tolist()
    if not tokens:
        raise ValueError("the prompt is empty; give at least one token, or use add_bos=True")
    return tokens


def _is_batch(prompt) -> bool:
    """Whether this is a list of prompts, not one."""
    if isinstance(prompt, str):
        return False
    if isinstance(prompt, np.ndarray):
        return prompt.ndim > 1
    if not isinstance(prompt, Sequence):
        raise TypeError(
            f"a prompt is text or a sequence of token ids, found {type(prompt).__name__}"
        )
    return any(isinstance(item, (str, Sequence, np.ndarray)) for item in prompt)


def _dtype(dtype: Any, mesh: Mesh) -> jnp.dtype:
    if dtype is None:
        dtype = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in ("float32", "bfloat16"):
        raise ValueError(f'dtype must be "float32" or "bfloat16", found {name!r}')
    return jnp.dtype(name)
