"""EleutherAI's lm-evaluation-harness on this library: the model type "grok1".

The harness finds model types of other packages only when they are imported, so its command is run
through this module, which registers the type first and changes nothing else:

    python -m grok1.lm_eval run --model grok1 --model_args path=checkpoints/toy --tasks ...

In Python, `import grok1.lm_eval` does the same for `lm_eval.simple_evaluate(model="grok1", ...)`.
It needs the package lm-eval: `pip install 'grok1[lm-eval]'`.
"""

import collections
import inspect
import json
import pathlib
import sys
import traceback
from typing import Any

from tqdm import tqdm

from grok1.checkpoint.tensor_file import CheckpointError
from grok1.factory import load
from grok1.keywords import check_flags, is_whole, shown
from grok1.machine.agreement import agree
from grok1.machine.processes import OtherProcessError
from grok1.model import Model
from grok1.study.scoring import continuation_logprobs, encode_pair

try:
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
except ImportError as error:
    # The cause too: what the harness itself needs may be what is not there.
    words = f"grok1.lm_eval needs the package lm-eval ({error}): pip install 'grok1[lm-eval]'"
    if __name__ == "__main__":
        sys.exit(words)
    raise ImportError(words) from error

_REQUESTS_AT_ONCE = 64  # between two movements of the progress bar
_MAX_NEW_TOKENS = 256  # the harness's own default
_LOAD_OPTIONS = tuple(name for name in inspect.signature(load).parameters if name != "path")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
_IDLE: dict[str, tuple[Any, ...]] = {  # and the values with which it changes nothing
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1.0,),
    "length_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "diversity_penalty": (0.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "no_repeat_ngram_size": (0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "early_stopping": (False,),
    "use_cache": (True, False),
}


@register_model("grok1")
class Grok1LM(LM):
    """A model of this library, as the harness asks it.

    Contexts that are too long lose their beginning, as is the harness's way. [BOS] stands before a
    text that has no context; `add_bos=True` puts it before every context.

    Args:
      path: The model's directory; or a loaded `Model`, in Python.
      max_length: Most tokens that the model sees at a time; None for its context.
      add_bos: Begin contexts with [BOS]; the released model does not.
      seed: Seed of what is sampled.
      batch_size: What the harness passes; rows are chosen by the engine, whatever it says.
      max_batch_size: As `batch_size`.
      device: What the harness passes; JAX has chosen the devices. `mesh` says how many are used.
      **options: Those of `load`, as mesh="1x8", dtype, cache_dtype, layers, offload, memory,
        tokenizer, embedding_dtype, router_softcap and renormalize_gates; none with a loaded model.

    Raises:
      TypeError: If an option is unknown or of another type, or given with a loaded model.
      ValueError: If the model has no tokenizer, or max_length is out of range; or as `load`.
    """

    def __init__(
        self,
        path: str | pathlib.Path | Model,
        max_length: int | None = None,
        add_bos: bool = False,
        seed: int = 0,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
        **options: Any,
    ):
        super().__init__()
        unknown = sorted(set(options) - set(_LOAD_OPTIONS))
        if unknown:
            raise TypeError(
                f"model_args {', '.join(unknown)} are unknown; known are path, max_length, "
                f"add_bos, seed, {', '.join(_LOAD_OPTIONS)}"
            )
        # Before a model is loaded, and not when its first text has come.
        check_flags(add_bos=add_bos)
        for name, number in (("max_length", max_length), ("seed", seed)):
            if not is_whole(number) and (name, number) != ("max_length", None):
                raise TypeError(f"{name} must be a whole number, found {shown(number)}")
        if not isinstance(path, Model):
            if options.get("offload", "auto") is None:
                options["offload"] = "none"  # the harness takes the word for Python's
            self.model = load(path, **options)
        elif options:
            raise TypeError(
                f"{', '.join(options)} cannot be chosen for a model that is loaded; give them to "
                "load"
            )
        else:
            self.model = path
        if self.model.tokenizer is None:
            raise ValueError(f"{path}: the harness needs a tokenizer, and this model has none")
        self._tokenizer = self.model.tokenizer
        context = self.model.config.sequence_len
        self.max_length = context if max_length is None else max_length
        if not 2 <= self.max_length <= context:
            raise ValueError(f"max_length must be from 2 to {context}, found {max_length}")
        self._add_bos, self._seed = add_bos, seed

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells tokenizers apart by in its caches."""
        return "grok1"

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns (log-likelihood, whether it is the greedy continuation) for each request."""
        agree(
            "loglikelihood", lambda: {"requests": [one.args for one in requests]}, self.model.mesh
        )
        pairs = []
        for context, continuation in (request.args for request in requests):
            before, after = encode_pair(
                self._tokenizer,
                context,
                continuation,
                self.model.config.vocab_size,
                add_bos=self._add_bos,
            )
            if len(after) > self.max_length:
                raise ValueError(
                    f"a continuation of {len(after)} tokens does not fit the context of "
                    f"{self.max_length}: {continuation!r:.80}"
                )
            kept = before[-(self.max_length + 1 - len(after)) :]
            if len(kept) < len(before):
                self.model.engine.check_length(len(before) + len(after), is_whole=False)
            pairs.append((kept, after))
        found: list[Any] = [None] * len(pairs)
        # Similar lengths side by side, the longest first, so that the time left is overestimated.
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        with tqdm(total=len(pairs), desc="loglikelihood", disable=disable_tqdm) as progress:
            for start in range(0, len(order), _REQUESTS_AT_ONCE):
                chosen = order[start : start + _REQUESTS_AT_ONCE]
                scores = continuation_logprobs(self.model.engine, [pairs[i] for i in chosen])
                for i, logprob, is_greedy in zip(chosen, *scores, strict=True):
                    found[i] = (float(logprob), bool(is_greedy))
                    self.cache_hook.add_partial("loglikelihood", requests[i].args, found[i])
                progress.update(len(chosen))
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each text behind [BOS].

        Long texts are cut as the harness does: windows follow one another, and the last one reaches
        back as far as the context allows.
        """
        found = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm):
            (text,) = request.args
            total = 0.0
            if text:
                total = self.model.score(
                    text, top_k=0, window=self.max_length, stride=self.max_length, add_bos=True
                ).total_logprob
            found.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return found

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Returns the continuation of each context up to the first of its stop strings."""
        groups = collections.defaultdict(list)
        for i, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(i)
        found: list[Any] = [None] * len(requests)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as progress:
            for indices in groups.values():
                options = _generation_options(requests[indices[0]].args[1])
                room = self.max_length - options["max_new_tokens"]
                if room < 1:
                    raise ValueError(
                        f"max_gen_toks {options['max_new_tokens']} leaves no room for a context in "
                        f"{self.max_length} tokens; lower it"
                    )
                for start in range(0, len(indices), _REQUESTS_AT_ONCE):
                    chosen = indices[start : start + _REQUESTS_AT_ONCE]
                    prompts = [self._prompt(requests[i].args[0], room) for i in chosen]
                    # A request's draws are its own, wherever it stands among the others.
                    seeds = [(self._seed + i) % 2**32 for i in chosen]
                    for i, out in zip(
                        chosen, self.model.generate(prompts, seed=seeds, **options), strict=True
                    ):
                        found[i] = out.text
                        self.cache_hook.add_partial("generate_until", requests[i].args, out.text)
                    progress.update(len(chosen))
        return found

    def _prompt(self, context: str, room: int) -> list[int]:
        tokens = self._tokenizer.encode(context, add_bos=self._add_bos or not context)
        if len(tokens) > room:
            self.model.engine.check_length(len(tokens), is_whole=False)
        return tokens[-room:]


def _generation_options(given: dict[str, Any]) -> dict[str, Any]:
    """The harness's words for a generation in ours; it samples only where a task says so."""
    # null is the harness's word for what is left as it is.
    given = {name: value for name, value in given.items() if value is not None}
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    limits = [given.pop(name) for name in names if name in given]
    stop = given.pop("until", None) or []
    options: dict[str, Any] = {
        "max_new_tokens": int(limits[0]) if limits else _MAX_NEW_TOKENS,
        "stop": [one for one in ([stop] if isinstance(stop, str) else stop) if one],
        "temperature": 0,
    }
    sampled = {name: given.pop(name) for name in _SAMPLING if name in given}
    if sampled.get("top_k") in (0, -1):  # off, as others spell it
        del sampled["top_k"]
    do_sample = given.pop("do_sample", None)
    if do_sample is None:
        temperature = sampled.get("temperature", 0)
        do_sample = not isinstance(temperature, (int, float)) or temperature > 0
    if do_sample:
        # What is not mentioned is off in the harness.
        options |= {"temperature": 1.0, "top_p": 1.0, **sampled}
    changing = [
        f"{name}: {value!r}"
        for name, value in sorted(given.items())
        if name not in _IDLE or value not in _IDLE[name]
    ]
    if changing:
        idle = ", ".join(f"{name} ({values[0]!r})" for name, values in _IDLE.items())
        raise ValueError(
            f"generation options {', '.join(changing)} cannot be had here; known are until, "
            f"max_gen_toks, do_sample, {', '.join(_SAMPLING)}, and, with the value that changes "
            f"nothing, {idle}"
        )
    return options


def main() -> None:
    """Runs the harness's own command line with the model type registered.

    What this package refuses is one line; an error of the harness's is left as it is.
    """
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    try:
        cli_evaluate()
    except (CheckpointError, OSError, OtherProcessError, TypeError, ValueError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        module = frame.f_globals.get("__name__", "")
        if module != __name__ and not module.startswith("grok1."):
            raise
        sys.exit(f"grok1.lm_eval: {error}")


if __name__ == "__main__":
    main()
