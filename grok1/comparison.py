"""Two models, or saved logits, over one text: how far apart they are, and from which layer on.

One source is run at a time. What it makes of the text goes to files in a temporary directory, and
the two are compared from there, some rows at a time: memory holds one model and a few rows.

Dimension key: T position, V vocabulary, D model dim, L layer, A chosen experts.
"""

import gc
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np

from grok1.checkpoint.directory import load_config
from grok1.engine.shapes import CHUNK_LENGTHS
from grok1.factory import load
from grok1.files import open_regular
from grok1.generate.options import check_ids
from grok1.generate.requests import Prompt, encode_prompt
from grok1.keywords import as_python, check_flags, is_whole, shown
from grok1.machine.agreement import agree
from grok1.machine.float_errors import as_numpy_comes
from grok1.machine.jax_settings import own_settings
from grok1.model import Model
from grok1.study.comparison_report import Comparison, ForcedComparison
from grok1.study.recorded_run import RecordedRun, compare_runs
from grok1.study.router_interventions import ForceExperts
from grok1.study.saved_logits import check_new_file, open_saved, save_logits_of

Source = Model | str | os.PathLike[str]
"""A model, its directory, or a file of saved logits."""

_Opened = Model | pathlib.Path

_CHUNK_BYTES = 1 << 28  # most memory that logits and residuals of one run chunk take on the host


@as_numpy_comes
@own_settings()
def compare(
    a: Source,
    b: Source,
    text: Prompt | None = None,
    *,
    top_k: int = 5,
    load_a: Mapping[str, Any] | None = None,
    load_b: Mapping[str, Any] | None = None,
    save_logits: str | os.PathLike[str] | None = None,
    force_experts: bool = False,
) -> Comparison:
    """Compares two models, or saved logits, over a text.

    A source is a `Model`, a directory that `load` reads, or a file of saved logits: `.npz` with
    `logits` `[T, V]` and `tokens` `[T]`, or `.npy` with the logits alone. Directories are loaded
    one after the other. A text longer than the context is run in pieces of the context's length,
    each from its own start. Disk space for `4 * T * (V + L * D)` bytes a source is taken in the
    temporary directory (`TMPDIR`).

    Args:
      a: The first source, which B is measured against.
      b: The second.
      text: Text or token ids; None for the tokens of the `.npz`.
      top_k: How many most probable tokens are compared as sets.
      load_a: Options of `load` for A, such as `mesh` and `dtype`.
      load_b: Options of `load` for B.
      save_logits: A new `.npz` for A's logits and tokens, to compare others with later.
      force_experts: Run B once more with every token sent to the experts that A's went to, which
        tells the rounding of weights from near ties of the router (`Comparison.forced`).

    Raises:
      TypeError: If the text or a switch is of another type.
      ValueError: If the two have different vocabularies, tokenizers or lengths, there is no text or
        no model to run, an option is out of range, or an intervention does not fit the text.
      FileNotFoundError, FileExistsError: If a source, or the directory of `save_logits`, is
        missing; if there is a file of this name.
      CheckpointError: As `load`, or if saved logits are no regular file.
    """
    check_flags(force_experts=force_experts)
    sources: dict[str, _Opened] = {
        side: source if isinstance(source, Model) else pathlib.Path(os.path.expanduser(source))
        for side, source in (("A", a), ("B", b))
    }
    options = {"A": dict(load_a or {}), "B": dict(load_b or {})}
    for side, source in sources.items():
        if force_experts and _is_saved(source):
            raise ValueError(
                f"{side} is a file of logits, and force_experts needs two models; leave it out"
            )
        _check_source(source, side, options[side])
    if text is not None and all(map(_is_saved, sources.values())):
        for side, source in sources.items():
            if _names_tokens(source):
                raise ValueError(f"{side} is a file that holds its tokens; leave out the text")
    if save_logits is not None:
        save_logits = pathlib.Path(os.path.expanduser(save_logits))
        check_new_file(save_logits)
    with tempfile.TemporaryDirectory(prefix="grok1-compare-") as directory:
        runs: dict[str, RecordedRun] = {}
        again: RecordedRun | None = None
        sizes: dict[str, int] = {}
        files = {side: pathlib.Path(directory, side) for side in sources}
        # Files first: they may hold the tokens that the models are to run.
        for side, source in sources.items():
            files[side].mkdir()
            if _is_saved(source):
                runs[side] = open_saved(source, files[side])
                sizes[side] = runs[side].logits.shape[1]
            else:
                config = source.config if isinstance(source, Model) else load_config(source)
                sizes[side] = config.vocab_size
        top_k = as_python(top_k)
        _check_vocabularies(sizes, top_k)
        if text is None:
            text = next((run.tokens for run in runs.values() if run.tokens is not None), None)
        for side, source in sources.items():
            if _is_saved(source):
                continue
            if text is None:
                raise ValueError(
                    "compare needs a text; give one, or logits saved with their tokens"
                )
            forced = runs["A"] if force_experts and side == "B" else None
            made = _run(source, options[side], text, files[side], forced)
            runs[side], again = made[0], made[-1]
        runs = _with_tokens(runs, text)
        _check_same_text(runs)
        if save_logits is not None:
            save_logits_of(runs["A"], save_logits)
        found = compare_runs(runs["A"], runs["B"], top_k)
        if not force_experts:
            return found
        assert again is not None  # B is a model
        same = compare_runs(runs["A"], again._replace(tokens=runs["A"].tokens), top_k)
        residuals = [layer.residual for layer in same.layers or []]
        forced = ForcedComparison(same.mean_divergence, same.top_1_agreement, residuals)
        return found._replace(forced=forced)


def _is_saved(source: _Opened) -> TypeGuard[pathlib.Path]:
    return isinstance(source, pathlib.Path) and source.suffix in (".npz", ".npy")


def _names_tokens(source: _Opened) -> bool:
    return _is_saved(source) and source.suffix == ".npz"


def _check_source(source: _Opened, side: str, options: dict[str, Any]) -> None:
    if options and (isinstance(source, Model) or _is_saved(source)):
        what = "a file of logits" if _is_saved(source) else "a model that is loaded already"
        raise ValueError(f"{side} is {what}, which takes no {', '.join(sorted(options))}")
    if isinstance(source, Model):
        return
    if not source.exists():
        raise FileNotFoundError(
            f"{source}: there is no such file; {side} is a model's directory, or saved logits in a "
            ".npz or .npy file"
        )
    if not source.is_dir() and not _is_saved(source):
        raise ValueError(
            f"{source} is no directory and no .npz or .npy file; {side} is a model's directory, or "
            "saved logits"
        )
    if _is_saved(source):
        os.close(open_regular(source))


def _check_vocabularies(sizes: dict[str, int], top_k: int) -> None:
    if sizes["A"] != sizes["B"]:
        raise ValueError(
            f"the vocabularies differ: A has {sizes['A']} tokens, B {sizes['B']}; only models of "
            "one vocabulary can be compared"
        )
    if not is_whole(top_k) or not 1 <= top_k <= sizes["A"]:
        raise ValueError(
            f"top_k must be from 1 to the vocabulary of {sizes['A']}, found {shown(top_k)}"
        )


def _run(
    source: _Opened,
    options: dict[str, Any],
    text: Prompt,
    files: pathlib.Path,
    forced: RecordedRun | None,
) -> list[RecordedRun]:
    """Runs a model; and again with the experts of another one's run, if there is one."""
    given = isinstance(source, Model)
    model = source if given else load(source, **options)
    name = repr(model) if given else f"{source}, {model!r}"
    runs = [_run_model(model, name, text, files)]
    if forced is not None:
        own, others = runs[0].experts, forced.experts
        assert own is not None  # a model's run has them
        assert others is not None
        sizes = own.shape[0], others.shape[0]
        if sizes[0] != sizes[1] or others.max() >= model.config.num_experts:
            raise ValueError(
                f"force_experts needs models of the same layers and experts, found {sizes[1]} "
                f"layers in A and {sizes[0]} of {model.config.num_experts} experts in B"
            )
        (files / "forced").mkdir()
        runs.append(_run_model(model, name, text, files / "forced", others))
    # The next model needs the memory, which an error that was caught may keep until then.
    del model
    gc.collect()
    return runs


def _run_model(
    model: Model,
    name: str,
    text: Prompt,
    files: pathlib.Path,
    forced: np.ndarray | None = None,
) -> RecordedRun:
    """Runs the text; `forced` are experts `[L, T, A]` for its tokens, -1 for none."""
    engine, config = model.engine, model.config
    agree("compare", lambda: {"the text": text, "interventions": engine.interventions}, model.mesh)
    tokens = encode_prompt(text, model.tokenizer, config.vocab_size)
    if not tokens:
        raise ValueError("the text is empty; give at least one token")
    num_tokens = len(tokens)
    engine.check_length(num_tokens, is_whole=num_tokens <= config.sequence_len)

    def array(name, dtype, *shape):
        return np.lib.format.open_memmap(files / f"{name}.npy", "w+", dtype, shape)

    logits = array("logits", np.float32, num_tokens, config.vocab_size)
    residual = array("residual", np.float32, config.num_layers, num_tokens, config.emb_size)
    experts = None
    token_bytes = 4 * (config.vocab_size + config.num_layers * config.emb_size)
    fitting = [n for n in CHUNK_LENGTHS if n * token_bytes <= _CHUNK_BYTES]
    longest = max(fitting, default=CHUNK_LENGTHS[0])
    batch = engine.batch_for(1)
    capacity = engine.capacity_for(min(num_tokens, config.sequence_len))
    for start in range(0, num_tokens, config.sequence_len):
        end = min(start + config.sequence_len, num_tokens)
        if forced is not None:
            engine = model.intervene(ForceExperts(forced[:, start:end])).engine
        padded = np.zeros((batch, capacity), np.int32)
        padded[0, : end - start] = tokens[start:end]
        state = engine.new_state(padded)
        for chunk in engine.chunks(batch, end, start, most_tokens=longest * batch):
            count = chunk.num_tokens
            num_valid = np.array([count] + [0] * (batch - 1), np.int32)
            state, found, captured = engine.score(
                state, num_valid, chunk.length, ("residual", "expert_indices")
            )
            here = slice(chunk.start, chunk.end)
            logits[here] = np.asarray(found)[0, :count]
            residual[:, here] = np.asarray(captured["residual"])[:, 0, :count]
            chosen = np.asarray(captured["expert_indices"])
            chosen = chosen.reshape(len(chosen), batch, chunk.length, -1)[:, 0, :count]
            if experts is None:
                # Interventions change how many there are.
                experts = array("experts", np.int32, len(chosen), num_tokens, chosen.shape[-1])
            experts[:, here] = np.where(chosen < config.num_experts, chosen, -1)
    pieces = None
    if model.tokenizer is not None:
        pieces = [model.tokenizer.piece(token) for token in tokens]
    return RecordedRun(name, tokens, pieces, logits, residual, experts)


def _with_tokens(runs: dict[str, RecordedRun], text: Prompt | None) -> dict[str, RecordedRun]:
    """Gives logits that were saved alone the other side's tokens."""
    known = next((run for run in runs.values() if run.tokens is not None), None)
    if known is None:
        if text is None or isinstance(text, str):
            raise ValueError(
                "neither file says what its tokens are; give token ids, or logits in a .npz file "
                "with their tokens"
            )
        ids = encode_prompt(text, None, runs["A"].logits.shape[1])
        return {side: run._replace(tokens=ids) for side, run in runs.items()}
    return {
        side: run if run.tokens is not None else run._replace(tokens=known.tokens)
        for side, run in runs.items()
    }


def _check_same_text(runs: dict[str, RecordedRun]) -> None:
    a, b = runs["A"], runs["B"]
    # `_with_tokens` gave them.
    assert a.tokens is not None
    assert b.tokens is not None
    for place, (token_a, token_b) in enumerate(zip(a.tokens, b.tokens, strict=False)):
        if token_a != token_b:
            raise ValueError(
                f"the tokens differ: token {place} of the text is {token_a} in A and {token_b} in "
                "B; compare models of one tokenizer, or logits of the same text"
            )
    sizes = len(a.tokens), len(a.logits), len(b.tokens), len(b.logits)
    if len(set(sizes)) > 1:
        raise ValueError(
            f"the lengths differ: A has {len(a.tokens)} tokens and logits of {len(a.logits)} "
            f"positions, B {len(b.tokens)} and {len(b.logits)}; use the same text for both"
        )
    vocab_size = a.logits.shape[1]
    check_ids(np.asarray(a.tokens), vocab_size, "the text")
