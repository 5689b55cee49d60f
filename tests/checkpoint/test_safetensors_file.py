"""Checkpoints in safetensors against their index: each tensor once, from where it says."""

import json
import os
import pathlib

import ml_dtypes
import numpy as np
import pytest

from grok1.checkpoint.safetensors_file import (
    examine_safetensors,
    open_safetensors,
    read_shard_header,
)
from grok1.checkpoint.safetensors_layout import (
    INDEX_NAME,
    TYPES,
    index_json,
    shard_header,
    shard_name,
    shards,
)
from grok1.checkpoint.storage import read_matrix
from grok1.checkpoint.tensor_file import DTYPES
from grok1.config import ModelConfig
from grok1.files import CheckpointError
from grok1.nn.manifest import EMBEDDING, manifest
from grok1.ops.formats import INT4

CONFIG = ModelConfig(
    vocab_size=32, emb_size=16, widening_factor=3, key_size=8, num_q_heads=2, num_kv_heads=1,
    num_layers=2, num_experts=2, num_selected_experts=1, sequence_len=16,
)  # fmt: skip
SPECS = manifest(CONFIG)
FIRST, SECOND, THIRD = (shard_name(number, 3) for number in range(3))
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
KEY = "model.layers.0.attn.k_proj.weight"
GATE = "model.layers.0.moe_block.experts.0.linear.weight"

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%b\nsize 9\n" % (b"0" * 64)

Tensors = dict[str, np.ndarray]


@pytest.fixture
def model(tmp_path) -> dict[str, Tensors]:
    """The tensors of each shard, for `write`."""
    random = np.random.default_rng(0)
    found = {}
    for number, shard in enumerate(shards(SPECS)):
        found[shard_name(number, 3)] = {
            tensor.name: random.integers(-9, 9, tensor.shape).astype(DTYPES[tensor.dtype])
            for tensor in shard
        }
    return found


def write(directory: pathlib.Path, found: dict[str, Tensors], weight_map=None) -> pathlib.Path:
    """Writes shards, and the index that belongs to them or another one."""
    codes = {dtype: code for code, dtype in TYPES.items()}
    for name, tensors in found.items():
        header, end = {}, 0
        for tensor, values in tensors.items():
            end += values.nbytes
            code = codes[values.dtype.name]
            offsets = [end - values.nbytes, end]
            header[tensor] = {"dtype": code, "shape": values.shape, "data_offsets": offsets}
        text = json.dumps(header).encode()
        data = b"".join(values.tobytes() for values in tensors.values())
        (directory / name).write_bytes(len(text).to_bytes(8, "little") + text + data)
    names = {tensor: name for name, tensors in found.items() for tensor in tensors}
    index = {"weight_map": names if weight_map is None else weight_map}
    (directory / INDEX_NAME).write_text(json.dumps(index))
    return directory


def refusal(directory: pathlib.Path) -> str:
    faults = examine_safetensors(directory, SPECS).faults
    with pytest.raises(CheckpointError) as caught:
        open_safetensors(directory, SPECS)
    assert str(caught.value) == str(faults[0])
    (only,) = faults
    return str(only).removeprefix(f"{directory}/")


def embedding(directory: pathlib.Path, specs=SPECS) -> np.ndarray:
    number = next(i for i, spec in enumerate(specs) if spec.name == EMBEDDING)
    return read_matrix(open_safetensors(directory, specs)[number].values)


def test_what_is_written_here_is_what_the_library_writes(model, tmp_path):
    write(tmp_path, model)
    assert (
        json.loads((tmp_path / INDEX_NAME).read_text())["weight_map"]
        == (json.loads(index_json(shards(SPECS)))["weight_map"])
    )
    header = shard_header(shards(SPECS)[1])
    assert json.loads(header[8:]).keys() - {"__metadata__"} == model[SECOND].keys()
    np.testing.assert_array_equal(embedding(tmp_path), model[FIRST][EMBED])


@pytest.mark.parametrize("tensor", [EMBED, KEY, f"{KEY}_scale"])
def test_a_tensor_in_two_shards_is_a_fault_and_read_from_where_the_index_says(
    tensor, model, tmp_path
):
    home = FIRST if tensor == EMBED else SECOND
    names = {name: shard for shard, tensors in model.items() for name in tensors}
    model[THIRD][tensor] = model[home][tensor] + model[home][tensor].dtype.type(1)
    write(tmp_path, model, names)
    spans = {
        shard: {span: name for name, span in read_shard_header(tmp_path / shard).spans.items()}
        for shard in model
    }
    assert refusal(tmp_path) == (
        f"{THIRD}: holds {tensor}, which {INDEX_NAME} says is in {home}; these files are of "
        "different checkpoints"
    )
    files = {
        file.path.name
        for stored in examine_safetensors(tmp_path, SPECS).tensors
        for array in stored or ()
        for file, span in (array.parts if array else ())
        if span in spans[file.path.name] and spans[file.path.name][span] == tensor
    }
    assert files == {home}


def test_what_the_index_does_not_name_is_a_fault(model, tmp_path):
    names = {name: shard for shard, tensors in model.items() for name in tensors}
    model[THIRD] |= {"extra.one": np.ones(3, np.float32), "extra.two": np.ones(3, np.float32)}
    write(tmp_path, model, names)
    assert refusal(tmp_path) == (
        f"{THIRD}: holds extra.one and 1 more, which {INDEX_NAME} does not name; these files are "
        "of different checkpoints"
    )


def test_what_is_in_another_shard_than_the_index_says_is_one_fault(model, tmp_path):
    names = {name: shard for shard, tensors in model.items() for name in tensors} | {KEY: THIRD}
    write(tmp_path, model, names)
    assert refusal(tmp_path).startswith(f"{THIRD}: lacks {KEY}, which {INDEX_NAME} says is there")


# Of 16 rows: blocks of two that leave some over, and blocks of a single one.
@pytest.mark.parametrize("blocks", [6, 16])
def test_a_number_of_blocks_that_4_bit_weights_cannot_have_is_refused(blocks, model, tmp_path):
    shapes = INT4.part_shapes((16, 32), blocks)
    for part, shape in zip(INT4.parts, shapes, strict=True):
        model[SECOND][f"{GATE}{part.suffix}"] = np.zeros(shape, part.dtype)
    write(tmp_path, model)
    assert refusal(tmp_path) == (
        f"{SECOND}: {GATE}_scale is float16[{blocks},32], expected float16[B,32] for 4-bit weights "
        "of 16 rows in B blocks of at most 256; is it a conversion by grok1?"
    )


# ------------------------------------------------------------------------------- the head


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("alone", [False, True])
def test_a_tied_head_is_read_as_the_embedding(alone, dtype, model, tmp_path):
    values = model[FIRST][EMBED].astype(dtype)
    model[FIRST][EMBED] = values
    model[THIRD][HEAD] = values
    if alone:
        del model[FIRST][EMBED]
    write(tmp_path, model)
    np.testing.assert_array_equal(embedding(tmp_path), values)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda head: head[:-1], f"{HEAD} is float32[31,16], and {EMBED} float32[32,16]"),
        (lambda head: head.T, f"{HEAD} is float32[16,32], and {EMBED} float32[32,16]"),
        (lambda head: head + 1, f"{HEAD} has other elements than {EMBED}"),
        (lambda head: head.astype(ml_dtypes.bfloat16), f"{HEAD} is bfloat16[32,16], and {EMBED} "
                                                       "float32[32,16]"),
    ],
)  # fmt: skip
def test_a_head_of_its_own_is_refused(change, problem, model, tmp_path):
    model[THIRD][HEAD] = np.ascontiguousarray(change(model[FIRST][EMBED]))
    write(tmp_path, model)
    assert refusal(tmp_path) == (
        f"{THIRD}: {problem}, expected the same: Grok-1's head is its embedding; these files are "
        "of different checkpoints"
    )


def test_floats_may_be_bfloat16(model, tmp_path):
    for tensors in model.values():
        for name, values in tensors.items():
            if values.dtype == np.float32:
                tensors[name] = values.astype(ml_dtypes.bfloat16)
    write(tmp_path, model)
    found = open_safetensors(tmp_path, SPECS)
    assert {stored.values.dtype for stored in found if stored.scales is None} == {"bfloat16"}


# --------------------------------------------------------------------------- no files


@pytest.mark.parametrize("name", [INDEX_NAME, SECOND])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (os.mkfifo, "not a regular file but a pipe; move it away"),
        (os.mkdir, "not a regular file but a directory; move it away"),
        (lambda path: os.symlink("/dev/zero", path), "not a regular file but a device; move it"),
        (lambda path: os.symlink("nowhere", path), "is a link to nowhere, which is not there; put"),
        (lambda path: path.write_bytes(POINTER), "is a Git LFS pointer, a few lines of text that"),
    ],
)
def test_what_is_no_file_is_named(make, message, name, model, tmp_path):
    write(tmp_path, model)
    (tmp_path / name).unlink()
    make(tmp_path / name)
    with pytest.raises(CheckpointError) as caught:
        open_safetensors(tmp_path, SPECS)
    assert str(caught.value).startswith(f"{tmp_path / name}: {message}")


def an_embedding_of_integers(model):
    model[FIRST][EMBED] = model[FIRST][EMBED].astype(np.int8)


def two_too_many(model):
    model[THIRD]["model.extra"] = model[THIRD]["model.other"] = np.zeros(3, np.float32)


def without_scales(model):
    del model[SECOND][f"{KEY}_scale"]


def floats_with_scales(model):
    model[SECOND][KEY] = model[SECOND][KEY].astype(np.float32)


def scales_of_another_type(model):
    model[SECOND][f"{KEY}_scale"] = model[SECOND][f"{KEY}_scale"].astype(np.float32)


def scales_of_a_vector(model):
    model[SECOND][f"{KEY}_scale"] = model[SECOND][f"{KEY}_scale"][:, 0]


def scales_of_other_columns(model):
    scales = model[SECOND][f"{KEY}_scale"]
    model[SECOND][f"{KEY}_scale"] = np.concatenate([scales, scales])


def no_scales_in_the_array(model):
    model[SECOND][f"{KEY}_scale"] = model[SECOND][f"{KEY}_scale"][:, :0]


def groups_that_do_not_divide_the_rows(model):
    scales = model[SECOND][f"{KEY}_scale"]
    model[SECOND][f"{KEY}_scale"] = np.repeat(scales[:, :1], 3, axis=1)


def one_layer_of_floats(model):
    del model[SECOND][f"{KEY}_scale"]
    model[SECOND][KEY] = model[SECOND][KEY].astype(np.float32)


def one_layer_of_other_groups(model):
    scales = model[SECOND][f"{KEY}_scale"]
    model[SECOND][f"{KEY}_scale"] = np.repeat(scales[:, :1], 4, axis=1)


def one_too_many(model):
    model[THIRD]["model.extra"] = np.zeros(3, np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_scales, f"{SECOND}: {KEY} is int8 and has no {KEY}_scale; copy it again"),
        (
            floats_with_scales,
            f"{SECOND}: {KEY} is float32 and has scales, expected int8 for a weight with scales; ",
        ),
        *(
            (
                change,
                f"{SECOND}: {KEY}_scale is {found}, expected bfloat16[8,G] with a G that divides "
                "16; ",
            )
            for change, found in (
                (scales_of_another_type, "float32[8,1]"),
                (scales_of_a_vector, "bfloat16[8]"),
                (scales_of_other_columns, "bfloat16[16,1]"),
                (groups_that_do_not_divide_the_rows, "bfloat16[8,3]"),
            )
        ),
        (
            no_scales_in_the_array,
            f"{SECOND}: its header is damaged: {KEY}_scale has the shape [8, 0]",
        ),
        (
            one_layer_of_floats,
            "layer_1/multi_head_attention/key/w is stored as int8 with 1 scales a column, "
            "elsewhere as float32; ",
        ),
        (
            one_layer_of_other_groups,
            "layer_1/multi_head_attention/key/w is stored as int8 with 1 scales a column, "
            "elsewhere as int8 with 4 scales a column; ",
        ),
        (an_embedding_of_integers, f"{EMBED} is int8[32,16], expected float32[32,16]; "),
        (two_too_many, f"{THIRD}: has the unexpected model.extra and 1 more; "),
        (one_too_many, f"{THIRD}: has the unexpected model.extra; is its config.json the one it "),
    ],
    ids=lambda of: getattr(of, "__name__", ""),
)
def test_a_weight_that_is_not_what_the_model_has_is_named(change, message, model, tmp_path):
    change(model)
    assert message in refusal(write(tmp_path, model))
