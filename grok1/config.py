"""The architecture of a Grok-1 model as one frozen value, and the two presets.

Field names are those of the released code's configuration, so that a `config.json` beside a
checkpoint reads the same; those of Grok-1's ports for transformers are read too. The standard
one-letter dimensions are properties of the same object.
"""

import dataclasses
import json
import math
import numbers
import os
import re
from typing import Any

from grok1 import reprs
from grok1.files import CheckpointError, LongInteger, json_object, read_bounded
from grok1.keywords import as_python, is_whole, shown

_DERIVED = float("nan")  # stands for a multiplier that was not given
_MOST_FILE_BYTES = 1 << 20

# Far above what any such model has, and low enough that no arithmetic on sizes takes long.
_MOST = {
    "vocab_size": 1 << 24,
    "emb_size": 1 << 17,
    "widening_factor": 1 << 10,
    "key_size": 1 << 13,
    "num_q_heads": 1 << 12,
    "num_kv_heads": 1 << 12,
    "num_layers": 1 << 10,
    "num_experts": 1 << 10,
    "num_selected_experts": 1 << 10,
    "sequence_len": 1 << 24,
}

# What transformers' configuration of Grok-1 calls these fields.
_HUGGING_FACE_NAMES = {
    "hidden_size": "emb_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_q_heads",
    "num_key_value_heads": "num_kv_heads",
    "num_experts_per_tok": "num_selected_experts",
    "max_position_embeddings": "sequence_len",
    "head_dim": "key_size",
}
# What is fixed in Grok-1, and has a field there; None is also the same as absent.
_HUGGING_FACE_FIXED: dict[str, tuple[Any, ...]] = {
    "max_attn_value": (30.0,),
    "attn_logit_softcapping": (30.0,),
    "rms_norm_eps": (1e-5,),
    "rope_theta": (10000.0,),
    "tie_word_embeddings": (True,),
    "hidden_act": ("gelu", "gelu_new", "gelu_pytorch_tanh"),
    "final_logit_softcapping": (0.0,),
    "rope_scaling": (),
    "quantization_config": (),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "residual_moe": (False,),
}
_ARCHITECTURE = {"architectures": ["Grok1ModelForCausalLM"], "model_type": "grok-1"}

_LETTERS = {
    "vocab_size": "V",
    "emb_size": "D",
    "ffn_size": "F",
    "key_size": "H",
    "num_q_heads": "N",
    "num_kv_heads": "K",
    "num_layers": "L",
    "num_experts": "E",
    "num_selected_experts": "A",
    "sequence_len": "S",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and multipliers of a Grok-1 transformer.

    Attributes:
      vocab_size: V, rows of the embedding, which is also the output head.
      emb_size: D, width of the residual stream.
      widening_factor: Sets the expert hidden width F, see `ffn_size`.
      key_size: H, width of one attention head; even, because rotary phases turn pairs.
      num_q_heads: N, query heads a layer.
      num_kv_heads: K, key/value heads a layer; each serves N / K query heads.
      num_layers: L, decoder layers.
      num_experts: E, feed-forward experts a layer.
      num_selected_experts: A, experts that the router picks for a token.
      sequence_len: S, the context: prompt and generated tokens together.
      embedding_multiplier_scale: Factor on the embedding; sqrt(D) when not given, and then it
        follows the size in `dataclasses.replace`. A number that is sqrt(D) counts as not given.
      output_multiplier_scale: Factor on the logits; 1/sqrt(3) as trained.
      attn_output_multiplier: Factor on query-key products; 1/sqrt(H) when not given.
      router_softcap: c, which bounds the router's logits to (-c, c) as c * tanh(logits / c); None,
        as trained, for no bound.
      renormalize_gates: Divide the chosen experts' probabilities by their sum; as trained they are
        weights as they are.

    Raises:
      ValueError: If a value or a combination is impossible, or a size is beyond what any such model
        has; the message names the field.
    """

    vocab_size: int
    emb_size: int
    widening_factor: int | float
    key_size: int
    num_q_heads: int
    num_kv_heads: int
    num_layers: int
    num_experts: int
    num_selected_experts: int
    sequence_len: int
    embedding_multiplier_scale: int | float = _DERIVED
    output_multiplier_scale: int | float = 3**-0.5
    attn_output_multiplier: int | float = _DERIVED
    router_softcap: int | float | None = None
    renormalize_gates: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # NumPy's numbers, which JSON has not; a number that follows another stays as it is.
            if isinstance(value, numbers.Real) and not isinstance(value, (int, float, bool)):
                value = int(value) if isinstance(value, numbers.Integral) else float(value)
                object.__setattr__(self, field.name, value)
            _check_field(field, value)
        for name, derived in (
            ("embedding_multiplier_scale", math.sqrt(self.emb_size)),
            ("attn_output_multiplier", self.key_size**-0.5),
        ):
            given = getattr(self, name)
            # A file's own last digit stays, as long as the size does.
            if math.isclose(given, derived, rel_tol=1e-12):
                object.__setattr__(self, name, _Follows(given))
            elif isinstance(given, _Follows) or given is _DERIVED:
                object.__setattr__(self, name, _Follows(derived))
        if not self.ffn_size:
            raise ValueError(
                f"widening_factor {self.widening_factor} leaves the experts no hidden width"
            )
        if self.key_size % 2:
            raise ValueError(
                f"key_size must be even (rotary phases turn pairs), found {self.key_size}"
            )
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"num_q_heads must be a multiple of num_kv_heads {self.num_kv_heads}, "
                f"found {self.num_q_heads}"
            )
        if self.num_selected_experts > self.num_experts:
            raise ValueError(
                f"num_selected_experts must be at most num_experts {self.num_experts}, "
                f"found {self.num_selected_experts}"
            )

    def _repr_html_(self) -> str:
        values = {**dataclasses.asdict(self), "ffn_size": self.ffn_size}
        rows = [
            (f"{name} ({_LETTERS[name]})" if name in _LETTERS else name, _for_people(value))
            for name, value in values.items()
        ]
        return reprs.table("ModelConfig", rows)

    @property
    def ffn_size(self) -> int:
        """F, hidden width of one expert: two thirds of the widened D, up to a multiple of 8.

        Two thirds because a gated unit has three matrices where a plain one has two; the rounding
        is the released code's.
        """
        width = int(self.widening_factor * self.emb_size) * 2 // 3
        return width + (8 - width) % 8

    @property
    def queries_per_kv_head(self) -> int:
        """G, query heads that share one key/value head."""
        return self.num_q_heads // self.num_kv_heads

    def first_layers(self, layers: int | None) -> "ModelConfig":
        """Returns the configuration of the first layers alone; of all for None.

        Raises:
          ValueError: If there are fewer.
        """
        if layers is None:
            return self
        given: Any = as_python(layers)
        if not is_whole(given) or not 1 <= given <= self.num_layers:
            raise ValueError(f"layers must be from 1 to {self.num_layers}, found {shown(given)}")
        return dataclasses.replace(self, num_layers=int(given))

    def to_json(self, *, hugging_face: bool = False) -> str:
        """Returns the configuration as JSON text that `from_json` reads back unchanged.

        A departure from the router as trained is written, the router as trained is not: the file
        is then the released code's, field by field.

        Args:
          hugging_face: Write what transformers and vLLM call the fields as well, with
            `architectures` and `model_type`.
        """
        fields = dataclasses.asdict(self)
        if hugging_face:
            fields |= {name: fields[own] for name, own in _HUGGING_FACE_NAMES.items()}
            fields |= {"intermediate_size": self.ffn_size, **_ARCHITECTURE}
            for name in ("max_attn_value", "rms_norm_eps", "rope_theta", "tie_word_embeddings"):
                fields[name] = _HUGGING_FACE_FIXED[name][0]
        for name in ("router_softcap", "renormalize_gates"):
            if not fields[name]:
                del fields[name]
        return json.dumps(fields, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "ModelConfig":
        """Reads a configuration from JSON text.

        Args:
          text: An object of this class's fields, or of those that transformers' configuration of
            Grok-1 has; of the latter, what is fixed in Grok-1 must be as it is there.

        Raises:
          ValueError: If the text is no JSON object, or a field is missing, unknown, given twice or
            impossible.
        """
        return cls._from_text(text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ModelConfig":
        """Reads a configuration file; errors name the file.

        Raises:
          CheckpointError: If there is no such file, or it is none; otherwise as `from_json`.
        """
        text = read_bounded(os.path.expanduser(path), _MOST_FILE_BYTES)
        try:
            return cls._from_text(text)
        except ValueError as error:
            raise CheckpointError(path, str(error), kind="foreign") from None

    @classmethod
    def _from_text(cls, text: str | bytes) -> "ModelConfig":
        try:
            fields = json_object(text)
        except ValueError as error:
            raise ValueError(f"the configuration {error}") from None
        if fields.keys() & {*_HUGGING_FACE_NAMES, *_ARCHITECTURE}:
            return cls._from_hugging_face(fields)
        return cls._from_fields(fields)

    @classmethod
    def _from_hugging_face(cls, fields: dict[str, Any]) -> "ModelConfig":
        """Reads the fields of a port, and passes over those that are none of the model's."""
        kind = fields.get("model_type", "grok-1")
        if re.sub(r"[^a-z0-9]", "", str(kind).lower()) != "grok1":
            raise ValueError(f"model_type is {kind!r:.80}, expected a Grok-1 model's, 'grok-1'")
        for name, values in _HUGGING_FACE_FIXED.items():
            found = fields.get(name)
            if found is not None and found not in values:
                expected = " or ".join(map(repr, values)) or "null"
                raise ValueError(f"{name} is {found!r:.80}, expected {expected} as in Grok-1")
        known = {field.name for field in dataclasses.fields(cls)}
        own = {name: value for name, value in fields.items() if name in known}
        for name, own_name in _HUGGING_FACE_NAMES.items():
            value = fields.get(name)
            if value is None:
                continue
            _check_size(name, value, _MOST[own_name])
            if own.setdefault(own_name, value) != value:
                raise ValueError(f"{name} is {value!r:.80}, and {own_name} {own[own_name]!r:.80}")
        hidden, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
        if "key_size" not in own and hidden is not None and heads is not None:
            own["key_size"] = hidden // heads
        width = fields.get("intermediate_size")
        if width is not None and "emb_size" in own:
            _check_size("intermediate_size", width, _MOST["emb_size"] * _MOST["widening_factor"])
            _check_size("emb_size", own["emb_size"], _MOST["emb_size"])
            factor = 1.5 * width / own["emb_size"]
            own.setdefault("widening_factor", int(factor) if factor == int(factor) else factor)
        config = cls._from_fields(own)
        if width not in (None, config.ffn_size):
            raise ValueError(
                f"intermediate_size is {width}, expected {config.ffn_size} by the other fields, or "
                "a multiple of 8"
            )
        return config

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> "ModelConfig":
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise ValueError(f"unknown configuration field {unknown[0]!r}; known: {sorted(known)}")
        missing = [
            name
            for name, field in known.items()
            if field.default is dataclasses.MISSING and name not in fields
        ]
        if missing:
            raise ValueError(f"configuration field {missing[0]!r} is missing")
        return cls(**fields)


class _Follows(float):
    """A multiplier that follows from a size, and changes with it."""


def _check_field(field: dataclasses.Field[Any], value: Any) -> None:
    name = field.name
    if field.type is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, found {shown(value)}")
    elif value is _DERIVED or (value is None and field.default is None):
        return
    elif field.type is int:
        _check_size(name, value, _MOST[name])
    elif isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise ValueError(f"{name} must be a number above 0, found {shown(value)}")
    elif not value < 1e30:
        raise ValueError(f"{name} must be a finite number, found {shown(value)}")
    elif value > _MOST.get(name, math.inf):
        raise ValueError(f"{name} must be at most {_MOST[name]:,}, found {shown(value)}")


def _check_size(name: str, value: Any, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, LongInteger)):
        raise ValueError(f"{name} must be a whole number above 0, found {shown(value)}")
    if isinstance(value, LongInteger) or value > most:
        raise ValueError(f"{name} must be at most {most:,}, found {shown(value)}")
    if value < 1:
        raise ValueError(f"{name} must be a whole number above 0, found {shown(value)}")


def _for_people(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.10g}"


GROK_1 = ModelConfig(
    vocab_size=131072,
    emb_size=6144,
    widening_factor=8,
    key_size=128,
    num_q_heads=48,
    num_kv_heads=8,
    num_layers=64,
    num_experts=8,
    num_selected_experts=2,
    sequence_len=8192,
)
"""The released model; its multipliers are sqrt(6144), 1/sqrt(3) and 1/sqrt(128)."""

TOY = ModelConfig(
    vocab_size=1280,
    emb_size=128,
    widening_factor=2.25,
    key_size=16,
    num_q_heads=8,
    num_kv_heads=4,
    num_layers=6,
    num_experts=8,
    num_selected_experts=2,
    sequence_len=1024,
)
"""The bundled checkpoint `checkpoints/toy`: the same architecture in under 5 MB."""
