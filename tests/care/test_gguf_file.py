"""GGUF: the int8 weights unchanged, what llama.cpp cannot run refused, and its logits ours."""

import dataclasses
import itertools
import pathlib
import random
import re

import ml_dtypes
import numpy as np
import pytest

import grok1
from grok1.care.conversion import convert
from grok1.care.gguf_file import (
    GgufTensor,
    check_file,
    check_model,
    header,
    llama_cpp_vocabulary,
    pack_iq4_xs,
    pack_q8_0,
)
from grok1.checkpoint.directory import open_tensors
from grok1.checkpoint.storage import dequantize_matrix, read_matrix
from grok1.config import GROK_1
from grok1.config import TOY as TOY_CONFIG
from grok1.files import CheckpointError
from grok1.nn.manifest import manifest
from grok1.nn.sharding import make_mesh
from grok1.ops.int4 import dequantize_int4
from grok1.ops.int4_rounding import round_weight
from grok1.tokenizer import Tokenizer
from tests.conftest import TOY
from tests.helpers import random_named, slow, stack
from tools.compare_llama_cpp import compare

gguf = pytest.importorskip("gguf")
ONE_WAY = "this library does not read GGUF, and there is no way back from it: keep the source"
RELEASED_TOKENIZER = TOY.parent / "tokenizer.model"
# The prompts of the README, and what user-defined pieces are of: line ends, tabs, spaces, digits.
TEXTS = [
    "The answer to life the universe and everything is of course",
    'def is_prime(n: int) -> bool:\n    """Whether n is a prime number."""\n',
    "A short story in three paragraphs.\n\nThe lighthouse keeper had not seen a ship for forty "
    "days when",
    'Q: What is the capital of France?\nA: Paris\nQ: Who wrote "Middlemarch"?\nA: George Eliot\n'
    "Q: What is the boiling point of water at sea level, in Celsius?\nA:",
    *("\n\nfoo", "42", "def f(x):\n    return x", "1 2  345", "\n" * 23, "\t" * 11, " " * 19),
    *("\t\tx\t", "\n \n  \n\n", "a\r\nb", " the", "  the", "a   the", "▁▁a▁", "3.14159\n2.71828"),
    *("日本語 текст é", "😀 a😀", "\x00a\x1b", "٣１"),
    *("<|separator|>", "a<|mask|>b", "[BOS]x[EOS]", "<0x0A>", "[UNUSED5]", "[UNK]"),
]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def test_4_bit_blocks_are_what_the_gguf_package_reads():
    rng = np.random.default_rng(0)
    weight = round_weight(rng.normal(size=(512, 6)).astype(np.float32), 2)
    blocks = pack_iq4_xs(weight)
    assert (blocks.shape, blocks.dtype) == ((6, 2, 136), np.uint8)
    found = gguf.quants.dequantize(blocks.reshape(6, -1), gguf.GGMLQuantizationType.IQ4_XS)
    np.testing.assert_array_equal(found, dequantize_int4(weight).T)


@pytest.fixture(scope="module")
def toy_gguf(tmp_path_factory) -> pathlib.Path:
    target = tmp_path_factory.mktemp("gguf") / "toy.gguf"
    notes = convert(TOY, target, to="gguf", progress=False)
    assert notes == [
        "30 tensors hold the int8 weights unchanged in Q8_0 blocks; 0 of 19,968 scales are not "
        "exactly a float16",
        "12 tensors are float32, exactly, because their scale groups are no multiples of the 32 "
        "rows of a Q8_0 block",
        ONE_WAY,
    ]
    return target


def test_every_weight_is_the_source_exactly(toy_gguf):
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(toy_gguf).tensors}
    assert len(found) == 2 + 12 * 6
    tensors, specs = open_tensors(TOY, TOY_CONFIG)
    source = {spec.name: tensor for spec, tensor in zip(specs, tensors, strict=True)}
    names = {
        "multi_head_attention/query/w": "attn_q",
        "multi_head_attention/linear/w": "attn_output",
        "moe/linear/w": "ffn_gate_exps",
        "moe/linear_v/w": "ffn_up_exps",
        "moe/linear_1/w": "ffn_down_exps",
        "router/w": "ffn_gate_inp",
    }
    for name, theirs in names.items():
        tensor = source[f"transformer/decoder_layer_3/{name}"]
        stored = found[f"blk.3.{theirs}.weight"]
        decoded = gguf.quants.dequantize(stored.data, stored.tensor_type)
        decoded = decoded.reshape(tensor.values.num_matrices, *decoded.shape[-2:])
        for number, matrix in enumerate(decoded):
            values = read_matrix(tensor.values, number)
            if tensor.scales is not None:
                values = dequantize_matrix(values, read_matrix(tensor.scales, number), "float32")
            np.testing.assert_array_equal(matrix.T, values)
    norm = source["transformer/decoder_layer_3/rms_norm_3/scale"]
    np.testing.assert_array_equal(
        found["blk.3.layer_output_norm.weight"].data, read_matrix(norm.values)
    )
    embedding = source["language_model/in_out_embed/embeddings"]
    np.testing.assert_array_equal(found["token_embd.weight"].data, read_matrix(embedding.values))


def test_a_file_that_is_read_otherwise_is_refused(toy_gguf):
    message = r"toy.gguf: the gguf package reads 74 tensors, expected 1, first difference .*'other'"
    with pytest.raises(CheckpointError, match=message):
        check_file(toy_gguf, [GgufTensor("other", 0, "f32", (1,), 4)])


def test_blocks_hold_the_values_and_the_scale_of_their_group():
    values = np.random.default_rng(0).integers(-128, 128, (128, 5)).astype(np.int8)
    scales = np.array([[1, 2, 4, 0.5, 3], [5, 6, 7, 8, 9]], BFLOAT16)
    packed = pack_q8_0(values, scales)
    assert packed.shape == (5, 4, 34)
    np.testing.assert_array_equal(packed[..., 2:].view(np.int8).reshape(5, 128).T, values)
    halves = np.ascontiguousarray(packed[..., :2]).view(np.float16)[..., 0]
    np.testing.assert_array_equal(halves, scales.astype(np.float32).T.repeat(2, axis=1))


def test_the_tokenizer_is_in_the_file(toy_gguf):
    fields = gguf.GGUFReader(toy_gguf).fields
    tokenizer = Tokenizer.load(TOY / "tokenizer.model")
    pieces = fields["tokenizer.ggml.tokens"].contents()
    assert pieces == [tokenizer.piece(token) for token in range(tokenizer.vocab_size)]
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert [kinds[i] for i in (0, 1, 2, 3, 4, 260)] == [3, 3, 3, 2, 1, 6]
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert fields["grok.embedding_scale"].contents() == pytest.approx(128**0.5)


def llama_cpp_ids(vocabulary: list[tuple[bytes, float, int]], texts: list[str]) -> list[list[int]]:
    """What llama.cpp makes of texts: pieces it cuts out first, then pairs joined by score."""
    ids = {piece.decode(errors="replace"): i for i, (piece, _, _) in enumerate(vocabulary)}
    cut_out = sorted((p.decode() for p, _, kind in vocabulary if kind == 4), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, cut_out)) or "$^")
    return [_llama_cpp_ids(vocabulary, ids, pattern, text) for text in texts]


def _llama_cpp_ids(vocabulary, ids, pattern, text) -> list[int]:
    found = []
    for part, cut in itertools.zip_longest(pattern.split(text), pattern.findall(text)):
        symbols = list(f" {part}".replace(" ", "▁")) if part else []
        while pairs := [
            (-vocabulary[ids[a + b]][1], place)
            for place, (a, b) in enumerate(itertools.pairwise(symbols))
            if a + b in ids
        ]:
            _, place = min(pairs)
            symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
        for symbol in symbols:
            in_bytes = [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
            found += [ids[symbol]] if symbol in ids else in_bytes
        found += [ids[cut]] if cut else []
    return found


@pytest.mark.filterwarnings("ignore:text holds the character U.2581")
@pytest.mark.parametrize(
    "model",
    [TOY / "tokenizer.model", pytest.param(RELEASED_TOKENIZER, marks=slow)],
    ids=["toy", "real"],
)
def test_llama_cpp_is_given_a_vocabulary_that_makes_our_ids(model):
    tokenizer = Tokenizer.load(model)
    vocabulary, of_model = llama_cpp_vocabulary(tokenizer), tokenizer.vocabulary
    expected = [tokenizer.encode(text) for text in TEXTS]
    assert llama_cpp_ids(vocabulary, TEXTS) == expected
    # Were the types those of the model, pieces would be cut out, and spaces put between.
    as_it_is = llama_cpp_ids(of_model, TEXTS[4:6])
    assert as_it_is != expected[4:6]
    highest = max(score for _, score, kind in of_model if kind == 1)
    for (piece, score, kind), (_, new_score, new_kind) in zip(of_model, vocabulary, strict=True):
        if kind != 4:
            assert (new_score, new_kind) == (score, kind)
        elif piece.startswith(b"<|"):
            assert new_kind == 3
        else:
            assert (new_score, new_kind) == (len(piece), 1)
            assert new_score > highest


@pytest.mark.filterwarnings("ignore:text holds the character U.2581")
@pytest.mark.parametrize(
    "model", [TOY / "tokenizer.model", RELEASED_TOKENIZER], ids=["toy", "real"]
)
def test_llama_cpp_makes_our_ids(model, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = Tokenizer.load(model)
    config = TOY_CONFIG if model.parent == TOY else GROK_1
    data, _ = header("vocabulary", config, [], tokenizer)
    (tmp_path / "vocabulary.gguf").write_bytes(data)
    theirs = llama_cpp.Llama(str(tmp_path / "vocabulary.gguf"), vocab_only=True, verbose=False)
    generator = random.Random(0)
    letters = [*" \n\t0123456789abcXYZ.,()<|>▁é日_", "  ", "\n\n", "the", " of"]
    texts = TEXTS + ["".join(generator.choices(letters, k=k % 40 + 1)) for k in range(1000)]
    text = pathlib.Path(__file__).read_text()
    texts += [text[start : start + 100] for start in range(0, len(text), 50)]
    found = [theirs.tokenize(text.encode(), add_bos=False, special=False) for text in texts]
    assert found == [tokenizer.encode(text) for text in texts]


def test_scales_that_float16_rounds_are_reported(tmp_path):
    config = dataclasses.replace(TOY_CONFIG, num_layers=1, widening_factor=3)
    named, mesh = random_named(config), make_mesh(config, (1, 1))
    scales = named["transformer/decoder_layer_0/multi_head_attention/query"]["w"].scales

    def save(path):
        params = stack(named, config, mesh)
        grok1.save(grok1.Model(params, config, mesh, "float32", manifest(config)), path)

    scales[0, :3] = 1e-7
    save(tmp_path / "model")
    notes = convert(tmp_path / "model", tmp_path / "a.gguf", to="gguf", progress=False)
    assert "; 3 of " in notes[0]
    assert "scales are not exactly a float16, the worst is off by " in notes[0]
    assert "tokenizer.model is not there" in notes[-1]
    scales[0, 5] = 1e6
    save(tmp_path / "huge")
    with pytest.raises(CheckpointError, match=r"a scale of 999424\.0 does not fit the float16"):
        convert(tmp_path / "huge", tmp_path / "b.gguf", to="gguf", progress=False)


def test_a_shape_that_llama_cpp_cannot_run_is_refused():
    check_model(TOY_CONFIG)
    wide = dataclasses.replace(TOY_CONFIG, num_q_heads=16)
    with pytest.raises(CheckpointError, match="found 16 x 16 = 256 and 128; convert with --to saf"):
        check_model(wide)
    narrow = dataclasses.replace(TOY_CONFIG, widening_factor=2.5)
    with pytest.raises(CheckpointError, match="32 divides, found emb_size 128 and an expert width"):
        check_model(narrow)
    capped = dataclasses.replace(TOY_CONFIG, router_softcap=30.0)
    with pytest.raises(CheckpointError, match=r"GGUF has no field for router_softcap.*30\.0 and"):
        check_model(capped)


@pytest.mark.parametrize("embedding", ["f16", "bf16", "q8_0"])
def test_the_embedding_can_be_smaller(embedding, tmp_path):
    notes = convert(TOY, tmp_path / "toy", to="gguf", embedding=embedding, progress=False)
    assert notes[0].startswith("30 tensors hold the int8 weights unchanged in Q8_0 blocks")
    assert notes[1] == f"the embedding is rounded to {embedding}"
    assert notes[-1] == ONE_WAY
    stored = gguf.GGUFReader(tmp_path / "toy").tensors[0]
    assert stored.tensor_type.name.lower() == embedding
    decoded = gguf.quants.dequantize(stored.data, stored.tensor_type)
    tensors, _ = open_tensors(TOY, TOY_CONFIG)
    np.testing.assert_allclose(decoded, read_matrix(tensors[0].values), atol=0.02)


def test_llama_cpp_computes_the_same_logits(toy_gguf, toy):
    pytest.importorskip("llama_cpp")
    tokens = toy.tokenizer.encode("The first argument is a string, and the second argument is")[:16]
    result = compare(toy, toy_gguf, tokens)
    near_ties = np.flatnonzero(result.router_gap < 0.01)
    clear = slice(0, near_ties[0] if len(near_ties) else None)
    assert len(result.relative_error[clear]) >= 4
    assert result.relative_error[clear].max() < 0.02
    assert result.same_argmax[clear].all()
