"""The architecture of a Grok-1 model as one frozen value, and the two presets.

Field names are those of the released code's configuration, so that a `config.json` beside a
checkpoint reads the same; the standard one-letter dimensions are properties of the same object.
"""

import dataclasses
import json
import math
import pathlib
from typing import Any

from grok1 import reprs

_DERIVED = math.nan  # stands for a multiplier that was not given

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
      embedding_multiplier_scale: Factor on the embedding; sqrt(D) when not given.
      output_multiplier_scale: Factor on the logits; 1/sqrt(3) as trained.
      attn_output_multiplier: Factor on query-key products; 1/sqrt(H) when not given.
      router_softcap: c, which bounds the router's logits to (-c, c) as c * tanh(logits / c); None,
        as trained, for no bound.
      renormalize_gates: Divide the chosen experts' probabilities by their sum; as trained they are
        weights as they are.

    Raises:
      ValueError: If a value or a combination is impossible; the message names the field.
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
        for name, default in (
            ("embedding_multiplier_scale", lambda: math.sqrt(self.emb_size)),
            ("attn_output_multiplier", lambda: self.key_size**-0.5),
        ):
            if getattr(self, name) is _DERIVED:
                object.__setattr__(self, name, default())
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is bool:
                if not isinstance(value, bool):
                    raise ValueError(f"{field.name} must be true or false, found {value!r}")
            elif value is None and field.default is None:
                continue
            elif field.type is int:
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise ValueError(
                        f"{field.name} must be a whole number above 0, found {value!r}"
                    )
            elif isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                raise ValueError(f"{field.name} must be a number above 0, found {value!r}")
            elif not value < 1e30:
                raise ValueError(f"{field.name} must be a finite number, found {value!r:.40}")
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
        if not 1 <= layers <= self.num_layers:
            raise ValueError(f"layers must be from 1 to {self.num_layers}, found {layers}")
        return dataclasses.replace(self, num_layers=layers)

    def to_json(self) -> str:
        """Returns the configuration as JSON text that `from_json` reads back unchanged.

        A departure from the router as trained is written, the router as trained is not: the file
        is then the released code's, field by field.
        """
        fields = dataclasses.asdict(self)
        for name in ("router_softcap", "renormalize_gates"):
            if not fields[name]:
                del fields[name]
        return json.dumps(fields, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "ModelConfig":
        """Reads a configuration from JSON text.

        Raises:
          ValueError: If the text is no JSON object, or a field is missing, unknown or impossible.
        """
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the configuration is not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"the configuration must be a JSON object, found {fields!r:.80}")
        return cls._from_fields(fields)

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "ModelConfig":
        """Reads a configuration file; errors name the file.

        Raises:
          ValueError: As `from_json`.
        """
        try:
            return cls.from_json(pathlib.Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

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
