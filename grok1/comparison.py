"""Two models, or saved logits, over one text: how far apart they are, and from which layer on.

One source is run at a time. What it makes of the text goes to files in a temporary directory, and
the two are compared from there, some rows at a time: memory holds one model and a few rows.

Dimension key: T position, V vocabulary, D model dim, L layer, A chosen experts.
"""

import gc
import os
import pathlib
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from grok1 import reprs
from grok1.checkpoint.directory import load_config
from grok1.engine.shapes import CHUNK_LENGTHS
from grok1.factory import load
from grok1.files import printable
from grok1.generate.options import check_ids
from grok1.generate.requests import Prompt, encode_prompt
from grok1.machine.agreement import agree
from grok1.machine.float_errors import as_numpy_comes
from grok1.machine.jax_settings import own_settings
from grok1.machine.safe_files import creating
from grok1.model import Model

Source = Model | str | os.PathLike[str]
"""A model, its directory, or a file of saved logits."""

_Opened = Model | pathlib.Path

_CHUNK_BYTES = 1 << 28  # most memory that logits and residuals of one run chunk take on the host
_ROWS_BYTES = 1 << 25  # most memory that one float64 array of the comparison takes
_RESIDUAL_ROWS = 256  # positions of one layer that are compared at a time
_WORST = 5  # positions that are listed


class Position(NamedTuple):
    """One position where the two differ much.

    Attributes:
      position: Its place in the text; the distributions are those after this token.
      token: The token there.
      piece: Its spelling; None without a tokenizer.
      divergence: KL(A || B) in nats.
      top_a: A's most probable next token.
      top_b: B's.
    """

    position: int
    token: int
    piece: str | None
    divergence: float
    top_a: int
    top_b: int


class LayerDifference(NamedTuple):
    """One layer, over all positions.

    Attributes:
      residual: Norm of the difference of the residual streams after the layer, over A's norm.
      same_experts: Fraction of A's experts that B ran too; 1 where A ran none.
    """

    residual: float
    same_experts: float


class Comparison(NamedTuple):
    """How far B is from A on a text; divergences are in nats.

    Attributes:
      a: What A is.
      b: What B is.
      tokens: The text, `[T]`.
      divergences: KL(A || B) of the next token's distribution at every position, `[T]`.
      top_1_agreement: Fraction of positions with the same most probable token.
      top_k: How many tokens the next one counts.
      top_k_agreement: Fraction of A's `top_k` most probable tokens that are among B's.
      logits_difference: Norm of the difference of the logits over the norm of A's.
      perplexity_a: Perplexity of the text under A; None for a single token.
      perplexity_b: The same under B.
      worst: The positions of the largest divergences, largest first.
      layers: One entry a layer; None where there are no layers to compare.
      notes: What was not compared, and why.
    """

    a: str
    b: str
    tokens: list[int]
    divergences: np.ndarray
    top_1_agreement: float
    top_k: int
    top_k_agreement: float
    logits_difference: float
    perplexity_a: float | None
    perplexity_b: float | None
    worst: list[Position]
    layers: list[LayerDifference] | None
    notes: list[str]

    @property
    def mean_divergence(self) -> float:
        """Mean of KL(A || B) over the positions."""
        return float(self.divergences.mean())

    @property
    def largest_divergence(self) -> float:
        """The largest KL(A || B)."""
        return float(self.divergences.max())

    @property
    def expert_agreement(self) -> float | None:
        """Fraction of A's experts that B ran too, over all layers."""
        if self.layers is None:
            return None
        return float(np.mean([layer.same_experts for layer in self.layers]))

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            **self._asdict(),
            "divergences": self.divergences.tolist(),
            "mean_divergence": self.mean_divergence,
            "largest_divergence": self.largest_divergence,
            "expert_agreement": self.expert_agreement,
            "worst": [one._asdict() for one in self.worst],
            "layers": self.layers and [layer._asdict() for layer in self.layers],
        }

    def __repr__(self) -> str:
        agreement = self.expert_agreement
        experts = "" if agreement is None else f", same experts {agreement:.2%}"
        return (
            f"Comparison({len(self.tokens)} tokens, KL mean {self.mean_divergence:.3e}, largest "
            f"{self.largest_divergence:.3e}, same most probable token {self.top_1_agreement:.2%}"
            f"{experts})"
        )

    def _repr_html_(self) -> str:
        rows: list[tuple[str, object]] = [
            ("A", self.a),
            ("B", self.b),
            ("tokens", f"{len(self.tokens):,}"),
            ("KL(A || B), mean", f"{self.mean_divergence:.3e} nats"),
            (
                "KL(A || B), largest",
                f"{self.largest_divergence:.3e} nats, at position {self.worst[0].position}",
            ),
            ("same most probable token", f"{self.top_1_agreement:.2%}"),
            (f"same {self.top_k} most probable", f"{self.top_k_agreement:.2%}"),
            ("logits differ by", f"{self.logits_difference:.3e} of A's norm"),
        ]
        if self.perplexity_a is not None:
            rows.append(("perplexity", f"A {self.perplexity_a:.4f}, B {self.perplexity_b:.4f}"))
        if self.layers is not None:
            residuals = [layer.residual for layer in self.layers]
            largest = int(np.argmax(residuals))
            rows += [
                ("same experts", f"{self.expert_agreement:.2%}"),
                (
                    "residual streams differ by",
                    f"{residuals[largest]:.3e} of A's norm at most, after layer {largest}",
                ),
            ]
        rows += [("note", note) for note in self.notes]
        return reprs.table("Comparison", rows)

    def lines(self) -> list[str]:
        """The same as tables."""
        first = self.worst[0]
        lines = [
            f"A: {self.a}",
            f"B: {self.b}",
            f"{len(self.tokens)} tokens",
            "",
            f"KL(A || B), nats         mean {self.mean_divergence:.3e}, largest "
            f"{self.largest_divergence:.3e} at position {first.position}",
            f"same most probable token {self.top_1_agreement:8.2%}",
            f"same {self.top_k:3} most probable   {self.top_k_agreement:8.2%}",
            f"logits                   differ by {self.logits_difference:.3e} of A's norm",
        ]
        if self.perplexity_a is not None and self.perplexity_b is not None:
            lines.append(
                f"perplexity               {self.perplexity_a:.6g} (A), {self.perplexity_b:.6g} (B)"
            )
        if self.expert_agreement is not None:
            lines.append(f"same experts             {self.expert_agreement:8.2%}")
        lines += [
            "",
            "largest divergences",
            "  position     nats  after token, then A's and B's next",
        ]
        for one in self.worst:
            piece = "" if one.piece is None else f" {one.piece!r}"
            lines.append(
                f"  {one.position:8} {one.divergence:8.2e}  {one.token}{piece}: "
                f"{one.top_a}, {one.top_b}"
            )
        if self.layers is not None:
            lines += ["", "  layer  residual differs by  same experts"]
            lines += [
                f"  {number:5}  {layer.residual:19.3e}  {layer.same_experts:12.2%}"
                for number, layer in enumerate(self.layers)
            ]
        return lines + [f"note: {note}" for note in self.notes]


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

    Raises:
      ValueError: If the two have different vocabularies, tokenizers or lengths, there is no text or
        no model to run, an option is out of range, or an intervention does not fit the text.
      FileNotFoundError, FileExistsError: If a source, or the directory of `save_logits`, is
        missing; if there is a file of this name.
      CheckpointError: As `load`.
    """
    sources: dict[str, _Opened] = {
        side: source if isinstance(source, Model) else pathlib.Path(os.path.expanduser(source))
        for side, source in (("A", a), ("B", b))
    }
    options = {"A": dict(load_a or {}), "B": dict(load_b or {})}
    for side, source in sources.items():
        _check_source(source, side, options[side])
    if text is not None and all(_names_tokens(source) for source in sources.values()):
        raise ValueError("both files hold their tokens; leave out the text")
    if save_logits is not None:
        save_logits = pathlib.Path(os.path.expanduser(save_logits))
        _check_new_file(save_logits)
    with tempfile.TemporaryDirectory(prefix="grok1-compare-") as directory:
        runs: dict[str, _Run] = {}
        sizes: dict[str, int] = {}
        files = {side: pathlib.Path(directory, side) for side in sources}
        # Files first: they may hold the tokens that the models are to run.
        for side, source in sources.items():
            files[side].mkdir()
            if _is_saved(source):
                runs[side] = _open_saved(source, files[side])
                sizes[side] = runs[side].logits.shape[1]
            else:
                config = source.config if isinstance(source, Model) else load_config(source)
                sizes[side] = config.vocab_size
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
            runs[side] = _run(source, options[side], text, files[side])
        runs = _with_tokens(runs, text)
        _check_same_text(runs)
        if save_logits is not None:
            _save(pathlib.Path(save_logits), runs["A"])
        return _compare_runs(runs["A"], runs["B"], top_k)


class _Run(NamedTuple):
    """What a source makes of the text, as arrays in files.

    Attributes:
      name: What the source is.
      tokens: `[T]`; None for logits that were saved alone.
      pieces: Spelling of each token; None without a tokenizer.
      logits: float `[T, V]`.
      residual: float32 `[L, T, D]`; None for saved logits.
      experts: int32 `[L, T, A]`, those that ran, -1 for none; None for saved logits.
    """

    name: str
    tokens: list[int] | None
    pieces: list[str] | None
    logits: np.ndarray
    residual: np.ndarray | None = None
    experts: np.ndarray | None = None


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


def _check_new_file(path: pathlib.Path) -> None:
    if path.suffix != ".npz":
        raise ValueError(f"saved logits are a .npz file, found {os.fspath(path)!r}")
    if os.path.lexists(path):
        raise _is_there(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no directory {path.parent}; make it first")


def _is_there(path: pathlib.Path) -> FileExistsError:
    return FileExistsError(f"{path} is there already; remove it, or name a new file")


def _save(path: pathlib.Path, run: "_Run") -> None:
    try:
        with creating(path) as file:
            np.savez(file, logits=run.logits, tokens=np.asarray(run.tokens, np.int32))
    except FileExistsError:
        raise _is_there(path) from None
    except OSError as error:
        raise OSError(
            f"{path}: the logits cannot be written: {error.strerror}; nothing was left behind, "
            "name a file on another disk"
        ) from error


def _check_vocabularies(sizes: dict[str, int], top_k: int) -> None:
    if sizes["A"] != sizes["B"]:
        raise ValueError(
            f"the vocabularies differ: A has {sizes['A']} tokens, B {sizes['B']}; only models of "
            "one vocabulary can be compared"
        )
    if not 1 <= top_k <= sizes["A"]:
        raise ValueError(f"top_k must be from 1 to the vocabulary of {sizes['A']}, found {top_k}")


def _open_saved(path: pathlib.Path, files: pathlib.Path) -> _Run:
    logits, found = _arrays(path, files)
    tokens = None
    if found is not None:
        if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
            raise ValueError(
                f"{path}: tokens must be whole numbers [T], found {found.dtype}{list(found.shape)}"
            )
        tokens = found.tolist()
    if logits.ndim != 2 or not np.issubdtype(logits.dtype, np.floating) or not logits.size:
        raise ValueError(
            f"{path}: logits must be floats [T, V], found {logits.dtype}{list(logits.shape)}"
        )
    if tokens is not None and len(tokens) != len(logits):
        raise ValueError(f"{path}: {len(tokens)} tokens, but logits of {len(logits)} positions")
    return _Run(str(path), tokens, None, logits)


def _arrays(path: pathlib.Path, files: pathlib.Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The logits, left on the disk, and the tokens, if the file has any."""
    tokens, logits_path, names = None, path, {"logits.npy", "tokens.npy"}
    try:
        if path.suffix == ".npz":
            # An array inside the archive cannot be mapped; beside it, it can.
            with zipfile.ZipFile(path) as archive:
                names = set(archive.namelist())
                if names >= {"logits.npy", "tokens.npy"}:
                    logits_path = pathlib.Path(archive.extract("logits.npy", files))
                    tokens = np.load(archive.extract("tokens.npy", files))
        if "logits.npy" in names and "tokens.npy" in names:
            return np.load(logits_path, mmap_mode="r"), tokens
    # All that zipfile and NumPy make of bytes that are none of theirs.
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        ValueError,
        SyntaxError,
        RuntimeError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else "it ends too early"
        raise ValueError(
            f"{path}: not a {path.suffix} file, or a damaged one: {printable(reason):.200}; save "
            "the logits again"
        ) from None
    listed = ", ".join(sorted(name.removesuffix(".npy") for name in names))
    raise ValueError(
        f"{path}: expected the arrays logits [T, V] and tokens [T], found {printable(listed):.200}"
    )


def _run(source: _Opened, options: dict[str, Any], text: Prompt, files: pathlib.Path) -> _Run:
    if isinstance(source, Model):
        return _run_model(source, repr(source), text, files)
    model = load(source, **options)
    run = _run_model(model, f"{source}, {model!r}", text, files)
    # The next model needs the memory: programs and engine refer to each other.
    del model
    gc.collect()
    return run


def _run_model(model: Model, name: str, text: Prompt, files: pathlib.Path) -> _Run:
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
    return _Run(name, tokens, pieces, logits, residual, experts)


def _with_tokens(runs: dict[str, _Run], text: Prompt | None) -> dict[str, _Run]:
    """Gives logits that were saved alone the other side's tokens."""
    known = next((run for run in runs.values() if run.tokens is not None), None)
    if known is None:
        ids = None if text is None or isinstance(text, str) else np.asarray(text).tolist()
        if ids is None:
            raise ValueError(
                "neither file says what its tokens are; give token ids, or logits in a .npz file "
                "with their tokens"
            )
        return {side: run._replace(tokens=ids) for side, run in runs.items()}
    return {
        side: run if run.tokens is not None else run._replace(tokens=known.tokens)
        for side, run in runs.items()
    }


def _check_same_text(runs: dict[str, _Run]) -> None:
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


def _compare_runs(a: _Run, b: _Run, top_k: int) -> Comparison:
    assert a.tokens is not None  # `_check_same_text` has seen them
    num_tokens, vocab_size = a.logits.shape
    divergences = np.empty(num_tokens)
    best = np.empty((2, num_tokens), np.int64)
    logprobs = np.zeros(2)
    same_top_k, difference, norm = 0, 0.0, 0.0
    rows = max(1, _ROWS_BYTES // (8 * vocab_size))
    for start in range(0, num_tokens, rows):
        here = slice(start, start + rows)
        logits = [_finite(run, here) for run in (a, b)]
        logprobs_a, logprobs_b = (_log_softmax(part) for part in logits)
        divergences[here] = np.sum(np.exp(logprobs_a) * (logprobs_a - logprobs_b), axis=-1)
        best[:, here] = [part.argmax(axis=-1) for part in logits]
        tops = [_most_probable(part, top_k) for part in logits]
        same_top_k += int((tops[0][:, :, None] == tops[1][:, None, :]).sum())
        difference += float(np.sum((logits[0] - logits[1]) ** 2))
        norm += float(np.sum(logits[0] ** 2))
        # None where the block ends with the text after one row.
        following = np.asarray(a.tokens[start + 1 : start + rows + 1], np.int64)
        places = np.arange(len(following)), following
        logprobs += logprobs_a[places].sum(), logprobs_b[places].sum()
    # A divergence of float64 rounding may come out just below zero.
    divergences = np.maximum(divergences, 0)
    pieces = a.pieces or b.pieces
    worst = [
        Position(
            index,
            a.tokens[index],
            None if pieces is None else pieces[index],
            float(divergences[index]),
            *best[:, index].tolist(),
        )
        for index in np.argsort(-divergences, kind="stable")[:_WORST].tolist()
    ]
    perplexity_a, perplexity_b = None, None
    if num_tokens > 1:
        perplexity_a, perplexity_b = np.exp(-logprobs / (num_tokens - 1)).tolist()
    layers, notes = _compare_layers(a, b)
    return Comparison(
        a.name,
        b.name,
        a.tokens,
        divergences,
        float((best[0] == best[1]).mean()),
        top_k,
        same_top_k / (num_tokens * top_k),
        (difference / norm) ** 0.5 if norm else 0.0,
        perplexity_a,
        perplexity_b,
        worst,
        layers,
        notes,
    )


def _compare_layers(a: _Run, b: _Run) -> tuple[list[LayerDifference] | None, list[str]]:
    """One layer after the other, so that two residual streams are in memory."""
    if a.residual is None or b.residual is None or a.experts is None or b.experts is None:
        return None, ["layers are not compared: saved logits have none"]
    if a.residual.shape != b.residual.shape:
        shapes = a.residual.shape, b.residual.shape
        sizes = [f"{num_layers} of width {width}" for num_layers, _, width in shapes]
        return None, [f"layers are not compared: A has {sizes[0]}, B {sizes[1]}"]
    layers = []
    for layer in range(len(a.residual)):
        difference = norm = 0.0
        for start in range(0, a.residual.shape[1], _RESIDUAL_ROWS):
            here = slice(start, start + _RESIDUAL_ROWS)
            of_a = a.residual[layer, here].astype(np.float64)
            difference += float(np.sum((of_a - b.residual[layer, here]) ** 2))
            norm += float(np.sum(of_a**2))
        chosen_a, chosen_b = a.experts[layer], b.experts[layer]
        ran = chosen_a >= 0
        same = ran & (chosen_a[:, :, None] == chosen_b[:, None, :]).any(axis=-1)
        share = float(same.sum() / ran.sum()) if ran.any() else 1.0
        layers.append(LayerDifference((difference / norm) ** 0.5 if norm else 0.0, share))
    return layers, []


def _finite(run: _Run, rows: slice) -> np.ndarray:
    logits = run.logits[rows].astype(np.float64)
    good = np.isfinite(logits).all(axis=-1)
    if not good.all():
        raise ValueError(
            f"{run.name}: the logits at position {rows.start + int(np.argmin(good))} are not finite"
        )
    return logits


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _most_probable(logits: np.ndarray, top_k: int) -> np.ndarray:
    return np.argpartition(-logits, top_k - 1, axis=-1)[:, :top_k]
