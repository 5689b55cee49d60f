"""The model as a user holds it: logits, generate, stream."""

from collections.abc import Sequence
from typing import Any, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grok1 import description, keywords, reprs
from grok1.config import ModelConfig
from grok1.engine.engine import Engine
from grok1.generate.completion import Completion
from grok1.generate.options import GenerationArguments, GenerationOptions, check_ids
from grok1.generate.requests import Batch, Prompt, is_batch
from grok1.generate.text_stream import TextStream
from grok1.machine.agreement import agree
from grok1.machine.jax_settings import own_settings
from grok1.nn.manifest import TensorSpec
from grok1.nn.transformer import Params
from grok1.offload.runner import OffloadStats, stats_of
from grok1.ops.forms import kernels_in_words
from grok1.study import scoring
from grok1.study.intervention import Intervention, prepare
from grok1.study.scores import Choice, Score
from grok1.study.scoring import ScoreOptions
from grok1.study.tracing import Trace, trace, trace_generation
from grok1.tokenizer import Tokenizer


class Model:
    """A Grok-1 model on its devices; made by `load` or `random_model`.

    Attributes:
      config: The architecture.
      mesh: The device mesh, axes (data, model).
      dtype: Type of the products with weights, float32 or bfloat16.
      params: The weights, layers stacked, sharded over the mesh.
      tensors: The checkpoint's tensors in file order, with the scale grouping of its files.
      tokenizer: Text to ids and back; None when the checkpoint has none.
      engine: The compiled steps.
    """

    _acting: Sequence[tuple[Intervention, Any]] = ()
    """Each hook that acts, on the devices, behind the intervention that it is of."""

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        mesh: Mesh,
        dtype: Any,
        tensors: list[TensorSpec],
        tokenizer: Tokenizer | None = None,
        cache_dtype: Any = None,
        engine: Engine | None = None,
    ):
        if tokenizer is not None:
            tokenizer.check_vocabulary(config.vocab_size)
        self.params, self.config, self.mesh = params, config, mesh
        self.dtype = jnp.dtype(dtype)
        self.tokenizer = tokenizer
        self.tensors = tensors
        self.engine = engine or Engine(params, config, mesh, dtype, cache_dtype)

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.params)
        gigabytes = sum(leaf.nbytes for leaf in leaves) / 1e9
        sizes = "x".join(str(size) for size in self.mesh.devices.shape)
        parts = [
            f"{self.config.num_layers} layers",
            f"{self.config.num_experts} experts",
            f"{reprs.figures(gigabytes)} GB",
            f"{self.dtype}",
            f"mesh {sizes} {self.mesh.devices.flat[0].platform}",
            *kernels_in_words(self.mesh.devices.flat[0].platform),
            *description.particulars(self.engine),
        ]
        return f"Model({', '.join(parts)})"

    def __copy__(self) -> "Model":
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a model lies on its devices, and is neither pickled nor deeply copied; load it in the "
            "process that needs it, or take copy.copy(model), which shares its weights"
        )

    @property
    def offload_stats(self) -> OffloadStats | None:
        """What streaming experts from their files has cost so far; None for a resident model."""
        return stats_of(self.engine)

    def _repr_html_(self) -> str:
        return description.table(self.engine, self.tensors, self.tokenizer)

    @own_settings()
    def logits(self, tokens) -> np.ndarray:
        """Computes the next-token logits after every position.

        Args:
          tokens: Token ids `[T]` or `[B, T]`, T up to the context.

        Returns:
          float32 `[T, V]` or `[B, T, V]`, on the host.

        Raises:
          ValueError: If the ids are no such array, are out of range, or exceed the context.
        """
        agree(
            "logits",
            lambda: {"tokens": tokens, "interventions": self.engine.interventions},
            self.mesh,
        )
        try:
            array, remedy = np.asarray(tokens), ""
        except ValueError:
            array = np.asarray(tokens, object)
            remedy = "; give rows of different lengths one by one, or fill them up at their ends"
        if array.dtype.kind == "U":
            remedy = "; encode text first, with the model's tokenizer.encode"
        rows = array[None] if array.ndim == 1 else array
        if rows.ndim != 2 or not rows.size or not np.issubdtype(rows.dtype, np.integer):
            raise ValueError(
                f"tokens must be integer ids [T] or [B, T] with at least one token, found "
                f"{array.dtype}{list(array.shape)}{remedy}"
            )
        num_rows, length = rows.shape
        check_ids(rows, self.config.vocab_size, "tokens")
        if length > self.config.sequence_len:
            raise ValueError(
                f"{length} tokens are {length - self.config.sequence_len} more than the context "
                f"of {self.config.sequence_len}; give fewer"
            )
        self.engine.check_length(length)
        batch = self.engine.batch_for(num_rows)
        padded = np.zeros((batch, self.engine.capacity_for(length)), np.int32)
        padded[:num_rows, :length] = rows
        state = self.engine.new_state(padded)
        out = np.empty((num_rows, length, self.config.vocab_size), np.float32)
        for chunk in self.engine.chunks(batch, length, with_logits=True):
            num_valid = np.where(np.arange(batch) < num_rows, chunk.num_tokens, 0).astype(np.int32)
            state, found, _ = self.engine.score(state, num_valid, chunk.length)
            out[:, chunk.start : chunk.end] = np.asarray(found)[:num_rows, : chunk.num_tokens]
        return out[0] if array.ndim == 1 else out

    @overload
    def score(  # pyright: ignore[reportOverlappingOverload]
        self,
        text: Prompt,
        *,
        top_k: int = 5,
        window: int | None = None,
        stride: int | None = None,
        add_bos: bool = False,
        allow_control: bool = False,
    ) -> Score: ...
    @overload
    def score(
        self,
        text: Sequence[Prompt],
        *,
        top_k: int = 5,
        window: int | None = None,
        stride: int | None = None,
        add_bos: bool = False,
        allow_control: bool = False,
    ) -> list[Score]: ...

    @keywords.suggesting()
    def score(self, text, *, top_k=5, window=None, stride=None, add_bos=False, allow_control=False):
        """Computes how probable each token of a text is, given those before it.

        Logits never leave the devices, and exist for some rows at a time. A text of more than
        `window` tokens is run in overlapping windows, several side by side; each token is scored
        once, with at least `window - stride + 1` tokens before it. Roundings depend on the shapes
        that are run: between one window and several they are the same wherever as many tokens run
        at a time, and differ by some 1e-5 elsewhere.

        Args:
          text: Text or token ids of any length; or a list of these.
          top_k: The alternatives to report for each token.
          window: Most tokens run at a time; None for the context.
          stride: How far apart windows begin; None for half of the window.
          add_bos: Begin a text with [BOS]; without it nothing precedes the first token, which is
            not scored. Token ids are taken as they are, and with this an error.
          allow_control: Let control pieces such as `<|separator|>` in a text be themselves.

        Returns:
          A `Score`, or for a list of texts a list of them.

        Raises:
          ValueError: If a text has fewer than two tokens or ids out of range, an option is out of
            range, or an intervention is of another length, or of positions where the text is cut
            into windows.
          TypeError: If the text is of another type.
        """
        options = ScoreOptions(top_k, window, stride, add_bos, allow_control)
        return scoring.score(self.engine, self.tokenizer, text, options)

    @keywords.suggesting()
    def choose(
        self,
        context: Prompt,
        options: Sequence[Prompt],
        *,
        add_bos: bool = False,
        allow_control: bool = False,
    ) -> Choice:
        """Computes how probable each of several continuations of a context is.

        Context and option are encoded together and cut where that parts from the context alone;
        white space at the end of the context counts as the options' (lm-evaluation-harness's rule),
        and so does a token in which the two join, as "an" and "d" in " and". What then has nothing
        before it is scored after [BOS].

        Args:
          context: Text or token ids; an empty text stands for [BOS].
          options: The continuations, of the context's kind; begin a new word with its space.
          add_bos: Put [BOS] before a context, which must be text.
          allow_control: Let control pieces such as `<|separator|>` in texts be themselves.

        Returns:
          A `Choice`: log-likelihoods, raw, per token and per byte, and the best by each.

        Raises:
          ValueError: If an option or a context of ids is empty, ids are out of range, or context
            and option are too long.
          TypeError: If the options are no list, or an empty one, or of another kind than the
            context.
        """
        return scoring.choose(
            self.engine,
            self.tokenizer,
            context,
            options,
            add_bos=add_bos,
            allow_control=allow_control,
        )

    # A str is also a Sequence[str]; the first overload that fits wins.
    @overload
    def generate(  # pyright: ignore[reportOverlappingOverload]
        self, prompt: Prompt, **options: Unpack[GenerationArguments]
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompt: Sequence[Prompt],
        **options: Unpack[GenerationArguments],
    ) -> list[Completion]: ...

    @keywords.suggesting(GenerationOptions)
    @own_settings()
    def generate(self, prompt, **options: Unpack[GenerationArguments]):
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
        many = is_batch(prompt)
        prompts = list(prompt) if many else [prompt]
        batch = Batch(self.engine, self.tokenizer, prompts, GenerationOptions(**options))
        for _ in batch.run():
            pass
        completions = [builder.build() for builder in batch.builders]
        return completions if many else completions[0]

    @keywords.suggesting(GenerationOptions)
    def stream(self, prompt: Prompt, **options: Unpack[GenerationArguments]) -> TextStream:
        """Continues one prompt, yielding text as it becomes certain: whole characters, no stops.

        On a CPU the tokens of a tenth of a second come together, unless there are stop strings.

        Args:
          prompt: Text or token ids.
          **options: Those of `GenerationOptions`, such as max_new_tokens=64 and temperature=0.7.

        Returns:
          An iterator over pieces of the text, with the `completion` once it has ended.

        Raises:
          ValueError, TypeError: As `generate`; and ValueError if the model has no tokenizer.
        """
        if is_batch(prompt):
            raise TypeError("stream takes one prompt; give a batch to generate")
        if self.tokenizer is None:
            raise ValueError("stream needs a tokenizer, and this model has none; use generate")
        batch = Batch(self.engine, self.tokenizer, [prompt], GenerationOptions(**options))
        return TextStream(batch)

    @keywords.suggesting()
    def trace(
        self,
        text: Prompt,
        capture: Sequence[str] = ("router", "residual"),
        *,
        attention_layers: int | Sequence[int] | None = None,
        lens_top: int = 5,
        add_bos: bool = False,
        allow_control: bool = False,
    ) -> Trace:
        """Runs a text and keeps what happens inside; see `tracing.trace`.

        Args:
          text: Text or token ids, up to the context.
          capture: Any of "router", "residual", "branches", "attention", "logit_lens", "logits".
          attention_layers: With "attention", the layers to map; None for all.
          lens_top: With "logit_lens", how many tokens to name.
          add_bos: Begin a text with [BOS]; with token ids an error.
          allow_control: Let control pieces such as `<|separator|>` in a text be themselves.
        """
        return trace(
            self.engine,
            self.tokenizer,
            text,
            capture,
            attention_layers=attention_layers,
            lens_top=lens_top,
            add_bos=add_bos,
            allow_control=allow_control,
        )

    @keywords.suggesting(GenerationOptions)
    def trace_generation(
        self,
        prompt: Prompt,
        capture: Sequence[str] = ("router", "residual"),
        *,
        attention_layers: int | Sequence[int] | None = None,
        lens_top: int = 5,
        **options: Unpack[GenerationArguments],
    ) -> tuple[Completion, Trace]:
        """Continues a prompt as `generate` and keeps what happens inside; see `tracing`.

        Args:
          prompt: Text or token ids.
          capture: Any of "router", "residual", "branches", "attention" and "logit_lens".
          attention_layers: With "attention", the layers to map; None for all.
          lens_top: With "logit_lens", how many tokens to name.
          **options: Those of `GenerationOptions`, such as max_new_tokens=64 and temperature=0.7.
        """
        return trace_generation(
            self.engine,
            self.tokenizer,
            prompt,
            capture,
            attention_layers=attention_layers,
            lens_top=lens_top,
            **options,
        )

    @own_settings()
    def intervene(self, *interventions: Intervention) -> "IntervenedModel":
        """Gives a model with the same weights in which these act, in this order; it can be nested.

        `with model.intervene(AblateExperts(3, layers=5)) as m: m.generate(...)`, or
        `m = model.intervene(...)`. This model stays as it is.

        Args:
          *interventions: Those of `study.router_interventions` and `study.stream_interventions`.

        Raises:
          TypeError: If one is no intervention.
          ValueError: If one does not fit the model, or lets the router choose anew what one before
            it has forced. What does not fit a text, as a patch of another length or a position that
            it has not, says so when that is to be run.
        """
        # What acts already is not read again: a user's arrays may hold other numbers by now.
        acting = [*self._acting, *prepare(interventions, self.config, self._acting)]
        changed = IntervenedModel.__new__(IntervenedModel)
        changed.__dict__.update(self.__dict__)
        changed.engine = self.engine.intervened(
            (*self.engine.interventions, *interventions), tuple(hook for _, hook in acting)
        )
        on_devices = changed.engine.weights.interventions
        changed._acting = [(one, hook) for (one, _), hook in zip(acting, on_devices, strict=True)]
        return changed


class IntervenedModel(Model):
    """A model in which interventions act, made by `Model.intervene`; a `with` block may hold it."""

    def __enter__(self) -> "IntervenedModel":
        return self

    def __exit__(self, *exception: object) -> None:
        pass
