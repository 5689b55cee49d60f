"""The training of the toy, in miniature, and the checkpoint of the real size."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grok1
from grok1.care import verification
from grok1.checkpoint.directory import load_config, open_tensors
from grok1.config import TOY as TOY_CONFIG
from grok1.ops.experts import ExpertWeights, experts_dense
from grok1.ops.quantized import QuantizedArray
from grok1.ops.routing import route
from tests.helpers import named_params, relative_error, slow
from tools import check_offloaded, make_full_size, toy_corpus, train_toy


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[str]:
    """Of the topics and every other module at the top; all take twenty seconds to read."""
    library, part = toy_corpus._library(), tmp_path_factory.mktemp("library")
    (part / "pydoc_data").symlink_to(library / "pydoc_data")
    for path in sorted(library.glob("*.py"))[::2]:
        (part / path.name).symlink_to(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_corpus, "_library", lambda: part)
        return toy_corpus.documents()


def test_each_tool_says_how_it_is_run():
    # As a file it would not find the others.
    for path in sorted(pathlib.Path(toy_corpus.__file__).parent.glob("*.py")):
        text = path.read_text()
        assert "python tools/" not in text, path
        if '__name__ == "__main__"' in text:
            assert f"python -m tools.{path.stem}" in text, path


@pytest.mark.parametrize("name", ["gpu_programs", "tpu_programs"])
def test_a_tool_that_begins_anew_is_run_as_it_was(name):
    root = pathlib.Path(toy_corpus.__file__).parent.parent
    environment = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
    environment.pop("PYTHONPATH", None)  # by which it would find all
    command = [sys.executable, "-m", f"tools.{name}", "--help"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--cache-dtype" in done.stdout


@slow
def test_the_split_holds_out_the_end_and_loses_nothing(corpus):
    train, held_out = toy_corpus.split(corpus)
    assert train + held_out == corpus
    share = len("".join(held_out)) / len("".join(corpus))
    assert 0.05 <= share < 0.06


@slow
def test_the_tokenizer_round_trips_the_corpus(corpus, toy):
    for document in corpus[::20]:
        assert toy.tokenizer.decode(toy.tokenizer.encode(document)) == document


@slow
@pytest.mark.parametrize("num_tokens", [3, 200])
def test_blocked_experts_equal_dense_ones_with_their_gradients(num_tokens):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [(8, 12, 20), (8, 12, 20), (8, 20, 12)]
    weights = ExpertWeights(
        *(jax.random.normal(k, s) / 4 for k, s in zip(keys[:3], shapes, strict=True))
    )
    x = jax.random.normal(keys[3], (num_tokens, 12))
    routing = route(x, jax.random.normal(keys[4], (12, 8)), 2)

    def run(experts):
        def loss(weights, x):
            return jnp.sum(jnp.sin(experts(x, weights, (), routing)))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(weights, x)

    found = jax.tree.leaves(run(train_toy.experts_blocked))
    for leaf, expected in zip(found, jax.tree.leaves(run(experts_dense)), strict=True):
        assert relative_error(leaf, expected) <= 1e-5


@slow
def test_evaluation_counts_every_token_once(toy):
    named = named_params(toy)
    documents = train_toy.encode(["The first argument is a string. " * 40], toy.tokenizer)
    found = train_toy.evaluate(named, documents, num_bytes=100)
    tokens = np.array(documents[0])
    logprobs = jax.nn.log_softmax(toy.logits(np.concatenate([tokens[-1:], tokens[:-1]])))
    # Windows see at most 256 tokens back, the model here all of them.
    expected = -float(logprobs[np.arange(len(tokens)), tokens].sum()) / np.log(2) / 100
    assert found.bits_per_byte == pytest.approx(expected, rel=0.05)
    assert found.expert_shares.sum(axis=1) == pytest.approx(np.ones(TOY_CONFIG.num_layers))


@slow
def test_rounding_leaves_the_layout_of_the_checkpoint(toy):
    floats = {
        module: {name: jnp.ones(leaf.shape) for name, leaf in parameters.items()}
        for module, parameters in named_params(toy).items()
    }
    rounded = train_toy.round_to_int8(floats)
    down = rounded["transformer/decoder_layer_0/moe/linear_1"]["w"]
    assert isinstance(down, QuantizedArray)
    assert down.scales.shape == (8, 8, 128)
    assert not isinstance(rounded["transformer/decoder_layer_0/router"]["w"], QuantizedArray)


def test_one_layer_linked_is_a_whole_checkpoint(tmp_path):
    config = dataclasses.replace(TOY_CONFIG, num_layers=12)
    make_full_size.make_full_size(tmp_path / "one", dataclasses.replace(config, num_layers=1))
    make_full_size.make_full_size(tmp_path / "full", config, source=tmp_path / "one")
    make_full_size.make_full_size(tmp_path / "made", config)
    for name in ("full", "made"):
        assert verification.verify(tmp_path / name).is_good
        files = list((tmp_path / name / "ckpt-0").iterdir())
        assert len(files) == 2 + 12 * config.num_layers
        assert len({path.stat().st_ino for path in files}) == 14
    model = grok1.load(tmp_path / "full", mesh=(1, 1), progress=False)
    # Layer 10 comes before layer 2 in the files, and is the same.
    scales = np.asarray(model.params.layers.experts.down.scales, np.float32)
    np.testing.assert_array_equal(scales, np.broadcast_to(scales[:1], scales.shape))
    logits = model.logits([1, 2, 3])
    assert 0.1 < np.std(logits) < 10


def test_the_evaluation_in_float64_is_that_of_the_golden_numbers(nano_path, nano_reference):
    config = load_config(nano_path)
    stored, specs = open_tensors(nano_path, config)
    tensors = {spec.name: tensor for spec, tensor in zip(specs, stored, strict=True)}
    tokens = nano_reference["tokens"].tolist()
    found = check_offloaded.logits_float64(tensors, config, tokens)
    assert relative_error(found, nano_reference["logits_f64"]) <= 1e-12
