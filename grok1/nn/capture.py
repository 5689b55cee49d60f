"""What a forward pass can keep on its way: the names, their axes, and which to keep.

Dimension key: L layer, E expert, A selected experts a token, D model dim, N query heads,
V vocabulary, T token.
"""

import dataclasses
from collections.abc import Collection

from grok1.config import ModelConfig

GROUPS = {
    "router": ("router_probs", "expert_indices", "expert_weights"),
    "residual": ("residual_in", "residual_mid", "residual"),
    "branches": ("attention_out", "moe_out"),
    "attention": ("attention_probs",),
    "logit_lens": ("lens_tokens", "lens_logprobs"),
}
"""The arrays behind each name that a user gives."""

AXES = {
    "router_probs": ("layer", "token", "expert"),
    "expert_indices": ("layer", "token", "choice"),
    "expert_weights": ("layer", "token", "choice"),
    "residual_in": ("layer", "token", "model_dim"),
    "residual_mid": ("layer", "token", "model_dim"),
    "residual": ("layer", "token", "model_dim"),
    "attention_out": ("layer", "token", "model_dim"),
    "moe_out": ("layer", "token", "model_dim"),
    "attention_probs": ("layer", "head", "query", "key"),
    "lens_tokens": ("layer", "token", "rank"),
    "lens_logprobs": ("layer", "token", "rank"),
}
"""Every array that `decoder.forward` can keep, and the axes it has on the host."""


@dataclasses.dataclass(frozen=True)
class Capture:
    """The arrays that a program keeps; a part of what it is compiled for.

    Attributes:
      names: Keys of `AXES`.
      attention_layers: Layers of which "attention_probs" are kept, in this order.
      lens_top: How many tokens "lens_tokens" and "lens_logprobs" hold.
    """

    names: tuple[str, ...] = ()
    attention_layers: tuple[int, ...] = ()
    lens_top: int = 0

    def __bool__(self) -> bool:
        return bool(self.names)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def bytes_per_token(self, config: ModelConfig, capacity: int) -> int:
        """Device memory that a token's values take, what they are computed from included.

        Args:
          config: The model.
          capacity: Positions of the cache.
        """
        experts = 2 * config.num_selected_experts + config.num_experts
        streams = sum(AXES[name][-1] == "model_dim" for name in self.names)
        total = config.num_layers * (streams * config.emb_size + experts + 2 * self.lens_top)
        if "lens_tokens" in self or "lens_logprobs" in self:
            total += config.vocab_size
        if "attention_probs" in self:
            total += (len(self.attention_layers) + 2) * config.num_q_heads * capacity
        return 4 * total

    def bytes_on_host(self, config: ModelConfig, num_tokens: int) -> int:
        """Memory that the values of a text take on the host.

        Args:
          config: The model.
          num_tokens: T.
        """
        per_token = {
            "expert": config.num_experts,
            "choice": config.num_selected_experts,
            "model_dim": config.emb_size,
            "rank": self.lens_top,
        }
        total = 0
        for name in self.names:
            if name == "attention_probs":
                total += len(self.attention_layers) * config.num_q_heads * num_tokens**2
            else:
                total += config.num_layers * num_tokens * per_token[AXES[name][-1]]
        return 4 * total


NOTHING = Capture()
"""What a program captures that is not traced."""


def as_capture(capture: Capture | Collection[str]) -> Capture:
    """Returns a `Capture` of these names of arrays that need no other choice, or as it is."""
    return capture if isinstance(capture, Capture) else Capture(tuple(sorted(capture)))
