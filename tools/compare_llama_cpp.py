"""Compares the logits of a GGUF conversion in llama.cpp with this library's on the source.

    python -m grok1 convert checkpoints/toy toy.gguf --to gguf
    python -m tools.compare_llama_cpp checkpoints/toy toy.gguf

Needs `pip install llama-cpp-python`. llama.cpp rounds activations to 8 bits before products with
Q8_0 weights, so its logits differ by a hundredth or two. Where a token's second and third expert
are nearly tied it may choose the other one, and that token and those after it differ by more.
"""

import argparse
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import grok1
from grok1.nn.transformer import forward


class Comparison(NamedTuple):
    """How far two runs are apart, one entry a position.

    Attributes:
      relative_error: Norm of the difference of the logits over the norm of this library's.
      same_argmax: Whether both have the same most likely token.
      router_gap: The smallest gap of a layer between the router logits of the second and the third
        expert: how near the token is to a choice of other experts.
    """

    relative_error: np.ndarray
    same_argmax: np.ndarray
    router_gap: np.ndarray


def compare(model: grok1.Model, gguf: pathlib.Path, tokens: list[int]) -> Comparison:
    """Runs the same tokens through both."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    theirs = llama_cpp.Llama(
        str(gguf), n_ctx=len(tokens) + 16, n_batch=len(tokens), logits_all=True, verbose=False
    )
    theirs.eval(tokens)
    found = np.array(theirs.scores[: len(tokens)], np.float64)
    expected = np.asarray(model.logits(tokens), np.float64)
    num_layers = model.config.num_layers
    layers = [
        jax.tree.map(lambda leaf, i=i: leaf[i], model.params.layers) for i in range(num_layers)
    ]
    _, traces = forward(model.params._replace(layers=layers), model.config, jnp.array([tokens]))
    probs_LTE = np.sort([np.asarray(trace.routing.probs, np.float64) for trace in traces])
    chosen = model.config.num_selected_experts
    gaps_LT = np.log(probs_LTE[..., -chosen] / probs_LTE[..., -chosen - 1])
    return Comparison(
        np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1),
        found.argmax(axis=1) == expected.argmax(axis=1),
        gaps_LT.min(axis=0),
    )


def main() -> None:
    """Prints the comparison for random tokens, a line a position."""
    parser = argparse.ArgumentParser(description="Compare llama.cpp with grok1.")
    parser.add_argument("checkpoint", type=pathlib.Path, help="directory that holds ckpt-0/")
    parser.add_argument("gguf", type=pathlib.Path, help="its conversion")
    parser.add_argument("--num-tokens", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = grok1.load(arguments.checkpoint, mesh=(1, 1), dtype="float32")
    generator = np.random.default_rng(arguments.seed)
    tokens = generator.integers(4, model.config.vocab_size, arguments.num_tokens).tolist()
    result = compare(model, arguments.gguf, tokens)
    print("token  relative error  same argmax  router gap")
    for token, error, same, gap in zip(tokens, *result, strict=True):
        print(f"{token:6}  {error:14.4f}  {same!s:>11}  {gap:10.4f}")
    print(
        f"root mean square error {np.sqrt(np.mean(result.relative_error**2)):.4f}, "
        f"same argmax at {result.same_argmax.sum()} of {len(tokens)}"
    )


if __name__ == "__main__":
    main()
