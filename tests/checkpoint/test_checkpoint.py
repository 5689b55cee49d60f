"""Checkpoint directories: what is accepted, what is refused with which message, and saving."""

import errno
import os
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest

from grok1.checkpoint import released
from grok1.checkpoint.elements import check_finite, check_scales
from grok1.checkpoint.released import open_checkpoint, save_checkpoint
from grok1.checkpoint.tensor_file import CheckpointError, read_header, read_span, write_tensor
from grok1.nn.manifest import TensorSpec, file_name

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
D, F, V, E = 6, 8, 10, 2
NUM_LAYERS = 11  # Enough that decoder_layer_10 comes second.


def layer(i: int) -> list[TensorSpec]:
    prefix = f"transformer/decoder_layer_{i}"
    return [
        TensorSpec(f"{prefix}/moe/linear/w", (E, D, F), "int8", (E, 1, F)),
        TensorSpec(f"{prefix}/moe/linear_1/w", (E, F, D), "int8", (E, 4, D)),
        TensorSpec(f"{prefix}/rms_norm/scale", (D,), "float32", None),
    ]


def manifest_of(num_layers: int) -> list[TensorSpec]:
    return [
        TensorSpec("language_model/in_out_embed/embeddings", (V, D), "float32", None),
        TensorSpec("language_model/rms_norm/scale", (D,), "float32", None),
        *(spec for i in sorted(range(num_layers), key=str) for spec in layer(i)),
    ]


MANIFEST = manifest_of(NUM_LAYERS)
BESIDE = {"config.json": b"{}" * 10, "tokenizer.model": b"a tokenizer"}
DOWN = [i for i, spec in enumerate(MANIFEST) if spec.name.endswith("linear_1/w")]


def tensors_of(manifest: list[TensorSpec]):
    for i, spec in enumerate(manifest):
        values = np.full(spec.shape, i, spec.dtype)
        shape = spec.scales_shape
        yield values, None if shape is None else np.full(shape, i, BFLOAT16)


@pytest.fixture
def directory(tmp_path) -> pathlib.Path:
    save_checkpoint(tmp_path / "ckpt-0", tensors_of(MANIFEST))
    return tmp_path / "ckpt-0"


def refusal(directory, manifest=MANIFEST) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(directory, manifest)
    message = str(caught.value)
    assert message.startswith(str(directory))
    assert "\n" not in message
    return message.removeprefix(str(directory))


def rewrite(directory, index, shape, scales_shape=None):
    """Replaces one file; int8 if it has scales."""
    scales = None if scales_shape is None else np.ones(scales_shape, BFLOAT16)
    values = np.ones(shape, np.float32 if scales is None else np.int8)
    write_tensor(directory / file_name(index), values, scales)


# ---------------------------------------------------------------------------------------- opening


def test_opens_in_manifest_order(directory):
    (directory / "README").write_text("not a tensor")
    headers = open_checkpoint(str(directory), MANIFEST)
    assert [header.path.name for header in headers] == [file_name(i) for i in range(len(MANIFEST))]
    for i, (header, spec) in enumerate(zip(headers, MANIFEST, strict=True)):
        assert header.values[1:] == (spec.shape, spec.dtype)
        assert (header.scales and header.scales.shape) == spec.scales_shape
        assert (read_span(header, header.values) == i).all()


def test_a_missing_directory_says_where_the_weights_are(tmp_path):
    message = refusal(tmp_path / "checkpoints" / "ckpt-0")
    assert message.startswith(": there is no such directory; Grok-1's weights (318 GB) come from")
    assert "magnet link in the README of github.com/xai-org/grok-1" in message
    assert f"hf download xai-org/grok-1 --include 'ckpt-0/*' --local-dir {tmp_path}" in message
    assert message.endswith('load the bundled "toy"')


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "ckpt-0").write_text("")
    assert refusal(tmp_path / "ckpt-0").startswith(": there is no such directory")


def test_missing_files_are_named(directory):
    (directory / file_name(7)).unlink()
    assert refusal(directory) == (
        ": found 34 tensor files, expected 35: missing tensor00007_000; "
        "the download is incomplete: resume it"
    )
    for i in (3, 4, 20, 21):
        (directory / file_name(i)).unlink()
    assert ": found 30 tensor files, expected 35: missing tensor00003_000, tensor00004_000, " in (
        message := refusal(directory)
    )
    assert "tensor00007_000 and 2 more; the download" in message


def test_extra_files_are_named(directory):
    (directory / "tensor00035_000").write_bytes(b"")
    (directory / "tensor00003_000.part").write_bytes(b"")
    assert refusal(directory) == (
        ": found 37 tensor files, expected 35: extra tensor00003_000.part, tensor00035_000; "
        "move the extra files away"
    )


def test_missing_and_extra_files_are_both_named(directory):
    (directory / file_name(7)).rename(directory / "tensor00007_001")
    assert refusal(directory) == (
        ": found 35 tensor files, expected 35: missing tensor00007_000, extra tensor00007_001; "
        "the download is incomplete: resume it"
    )


@pytest.mark.parametrize("configured", [10, 12])
def test_the_files_of_another_number_of_layers_are_recognised(directory, configured):
    assert refusal(directory, manifest_of(configured)).endswith(
        f"; these are the files for 11 layers, the configuration has {configured}: "
        "is its config.json missing?"
    )


def test_an_empty_directory_is_no_checkpoint_of_any_size(tmp_path):
    assert refusal(tmp_path) == (
        ": found 0 tensor files, expected 35: missing tensor00000_000, tensor00001_000, "
        "tensor00002_000 and 32 more; the download is incomplete: resume it"
    )


def test_a_transposed_weight_is_refused_in_the_form_of_the_message(directory):
    rewrite(directory, 3, (E, D, F), (E, 1, F))
    assert refusal(directory) == (
        "/tensor00003_000: transformer/decoder_layer_0/moe/linear_1/w is int8[2,6,8], expected "
        "int8[2,8,6]; is this a Grok-1 checkpoint?"
    )


def test_another_type_is_refused(directory):
    rewrite(directory, 4, (1, D), (1, D))
    assert (
        "/tensor00004_000: transformer/decoder_layer_0/rms_norm/scale is int8[1,6], expected "
        in (refusal(directory))
    )
    rewrite(directory, 4, (D,), (D,))
    assert "scale is int8[6], expected float32[6]; is this a Grok-1" in refusal(directory)


def test_files_in_the_numbers_order_are_refused_where_shapes_tell(directory):
    """Numbered as decoder_layer_0, 1, 2, ..., the files of layers fall on those of others."""
    shuffled = [MANIFEST[i] for i in (0, 1, 3, 2)] + MANIFEST[4:]
    assert "/tensor00002_000: transformer/decoder_layer_0/moe/linear_1/w is int8[2,6,8]" in refusal(
        directory, shuffled
    )


def test_a_damaged_file_is_refused_by_name_before_any_shape(directory):
    rewrite(directory, 2, (E, D, F + 1), (E, 1, F + 1))
    path = directory / file_name(30)
    path.write_bytes(path.read_bytes()[:-1])
    assert refusal(directory).startswith("/tensor00030_000: byte ")


def test_a_directory_in_the_place_of_a_file_is_refused(directory):
    (directory / file_name(1)).unlink()
    (directory / file_name(1)).mkdir()
    assert refusal(directory).startswith("/tensor00001_000: not a regular file")


def test_links_are_followed(directory, tmp_path):
    blobs = tmp_path / "blobs"
    shutil.move(directory, blobs)
    directory.mkdir()
    for path in blobs.iterdir():
        (directory / path.name).symlink_to(path)
    assert len(open_checkpoint(directory, MANIFEST)) == len(MANIFEST)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_the_grouping_is_the_files(directory, groups):
    for i in DOWN:
        rewrite(directory, i, (E, F, D), (E, groups, D))
    scales = open_checkpoint(directory, MANIFEST)[DOWN[0]].scales
    assert scales is not None
    assert scales.shape == (E, groups, D)


@pytest.mark.parametrize(
    "scales_shape",
    [(E, 3, D), (E, 16, D), (E, 4, D + 1), (E + 1, 4, D), (4, D), (D,), (1, E, 4, D)],
    ids=str,
)
def test_scales_that_fit_no_grouping_are_refused(directory, scales_shape):
    rewrite(directory, 3, (E, F, D), scales_shape)
    assert refusal(directory) == (
        "/tensor00003_000: transformer/decoder_layer_0/moe/linear_1/w has scales "
        f"bfloat16[{','.join(map(str, scales_shape))}], expected bfloat16[2,G,6] with a G that "
        "divides 8; is this a Grok-1 checkpoint?"
    )


def test_layers_of_one_kind_have_one_grouping(directory):
    rewrite(directory, DOWN[1], (E, F, D), (E, 2, D))
    assert refusal(directory) == (
        "/tensor00006_000: transformer/decoder_layer_1/moe/linear_1/w is stored as int8[2,8,6] "
        "with scales bfloat16[2,2,6], expected int8[2,8,6] with scales bfloat16[2,4,6] as in "
        "tensor00003_000 for another layer; these files are of different checkpoints"
    )


def test_float32_weights_are_accepted_of_a_whole_kind(directory):
    for i in DOWN[:-1]:
        rewrite(directory, i, (E, F, D))
    assert refusal(directory).startswith(
        f"/{file_name(DOWN[-1])}: transformer/decoder_layer_9/moe/linear_1/w is stored as "
        "int8[2,8,6] with scales bfloat16[2,4,6], expected float32[2,8,6] as in tensor00003_000"
    )
    rewrite(directory, DOWN[-1], (E, F, D))
    headers = open_checkpoint(directory, MANIFEST)
    assert {headers[i].values.dtype for i in DOWN} == {"float32"}
    assert headers[DOWN[0]].scales is None


def test_scales_must_be_finite(directory):
    header = read_header(directory / file_name(3))
    scales = np.ones((E, 4, D), BFLOAT16)
    check_scales(header, scales)
    check_scales(header, np.full(3, -(2.0**20), BFLOAT16))
    scales[0, 2, 5], scales[1, 0, 0], scales[1, 3, 1] = np.inf, np.nan, -np.inf
    with pytest.raises(CheckpointError) as caught:
        check_scales(header, scales)
    assert str(caught.value) == (
        f"{directory}/tensor00003_000: 3 of 48 scales are not finite, or above 1,048,576, the "
        "first is inf at [0, 2, 5]; the file is damaged: download it again"
    )
    with pytest.raises(CheckpointError, match=r"2 of 24 .* the first is nan at \[0, 0\]"):
        check_scales(header, scales[1])


@pytest.mark.parametrize("scale", [1e29, -1e29, 1.1e6])
def test_scales_are_bounded(directory, scale):
    header = read_header(directory / file_name(3))
    scales = np.ones((E, 4, D), BFLOAT16)
    scales[1, 2, 3] = scale
    with pytest.raises(CheckpointError) as caught:
        check_scales(header, scales)
    assert str(caught.value) == (
        f"{directory}/tensor00003_000: 1 of 48 scales are not finite, or above 1,048,576, the "
        f"first is {BFLOAT16.type(scale)} at [1, 2, 3]; the file is damaged: download it again"
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_values_that_are_not_finite_are_found_wherever_they_are(directory, value, dtype):
    header = read_header(directory / file_name(0))
    values = np.full((3, 50_000), -np.finfo(np.float32).max / 2, dtype)
    check_finite(header, "x", values)
    for place in ((0, 0), (1, 31_072), (2, 49_999)):
        wrong = values.copy()
        wrong[place] = value
        with pytest.raises(CheckpointError) as caught:
            check_finite(header, "x", wrong, (10, 20))
        assert str(caught.value) == (
            f"{header.path}: x: 1 of 150000 values are not finite, the first is {value} at "
            f"[{place[0] + 10}, {place[1] + 20}]; the file is damaged: download it again"
        )


# ----------------------------------------------------------------------------------------- saving


def test_saves_the_nano_checkpoint_byte_for_byte(nano_path, tmp_path):
    paths = sorted((nano_path / "ckpt-0").iterdir())
    headers = [read_header(path) for path in paths]
    target = tmp_path / "new" / "directories" / "ckpt-0"
    save_checkpoint(
        target,
        (
            (read_span(h, h.values), None if h.scales is None else read_span(h, h.scales))
            for h in headers
        ),
    )
    assert sorted(os.listdir(target)) == [path.name for path in paths]
    assert all((target / path.name).read_bytes() == path.read_bytes() for path in paths)
    assert os.listdir(tmp_path / "new" / "directories") == ["ckpt-0"]


def test_the_directory_is_as_open_as_any_other(tmp_path, directory):
    (tmp_path / "other").mkdir()
    assert directory.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_saves_into_an_empty_directory(tmp_path):
    (tmp_path / "ckpt-0").mkdir()
    save_checkpoint(tmp_path / "ckpt-0", tensors_of(MANIFEST))
    open_checkpoint(tmp_path / "ckpt-0", MANIFEST)


def test_saves_into_a_relative_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint("ckpt-0", tensors_of(MANIFEST))
    open_checkpoint("ckpt-0", MANIFEST)


def test_never_overwrites(directory):
    before = (directory / file_name(0)).stat()
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(directory, tensors_of(MANIFEST))
    assert str(caught.value) == (
        f"{directory}: already holds tensor00000_000, tensor00001_000, tensor00002_000 and 32 "
        "more; choose a new directory, nothing was written"
    )
    assert (directory / file_name(0)).stat() == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_save_leaves_nothing(tmp_path, error):
    def interrupted():
        for i, tensor in enumerate(tensors_of(MANIFEST)):
            if i == 5:
                assert any(tmp_path.rglob(file_name(4)))
                raise error
            yield tensor

    with pytest.raises(error):
        save_checkpoint(tmp_path / "new" / "ckpt-0", interrupted())
    assert not os.listdir(tmp_path)


def test_a_full_disk_is_one_clear_message(directory, tmp_path, monkeypatch):
    def full(path, values, scales):
        write_tensor(path, values, scales)
        if path.name == file_name(2):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(released, "write_tensor", full)
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(tmp_path / "other" / "ckpt-0", tensors_of(MANIFEST))
    sizes = [(directory / file_name(i)).stat().st_size for i in range(3)]
    assert str(caught.value) == (
        f"{tmp_path}/other/ckpt-0: not saved: No space left on device on writing tensor00002_000 "
        f"({sizes[2]} bytes, {sizes[0] + sizes[1]} before it); nothing was left behind, choose a "
        "directory that can be written and has the space"
    )
    assert os.listdir(tmp_path) == ["ckpt-0"]


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.model",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors",
    ],
)
@pytest.mark.parametrize("is_link", [False, True])
def test_a_file_of_another_checkpoint_is_not_replaced(name, is_link, tmp_path):
    place = tmp_path / "model"
    place.mkdir()
    if is_link:  # one that leads nowhere, where the file would come to be
        (place / name).symlink_to(tmp_path / "elsewhere")
    else:
        (place / name).write_text("precious")
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(place / "ckpt-0", tensors_of(MANIFEST), BESIDE)
    assert str(caught.value) == (
        f"{place}: already holds {name}; choose a new directory, nothing was written"
    )
    assert os.listdir(place) == [name]
    assert os.listdir(tmp_path) == ["model"]
    assert is_link or (place / name).read_text() == "precious"


@pytest.mark.parametrize("when", ["config.json", "tokenizer.model", "ckpt-0"])
@pytest.mark.parametrize("before", ["nothing", "a directory"])
def test_a_disk_that_is_full_after_the_tensors_leaves_nothing(when, before, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    place = tmp_path / "model"
    if before == "a directory":
        place.mkdir()
        (place / "notes.txt").write_text("mine")
    moved, written = released.move_new, pathlib.Path.write_bytes

    def move(source, target):
        if target.name == when:
            raise full
        moved(source, target)

    def write(path, data):
        if path.name == when:
            written(path, data[:5])
            raise full
        return written(path, data)

    monkeypatch.setattr(released, "move_new", move)
    if when == "tokenizer.model":
        monkeypatch.setattr(pathlib.Path, "write_bytes", write)
    with pytest.raises(CheckpointError, match="not saved: No space left on device on"):
        save_checkpoint(place / "ckpt-0", tensors_of(MANIFEST), BESIDE)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == (
        ["notes.txt"] if before == "a directory" else []
    )
    save_checkpoint(place / "ckpt-0", tensors_of(MANIFEST), BESIDE)
    open_checkpoint(place / "ckpt-0", MANIFEST)
    assert {name: (place / name).read_bytes() for name in BESIDE} == BESIDE


def test_a_place_that_cannot_hold_a_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "lost").symlink_to("nowhere")
    for place in ("file", "file/ckpt-0", "file/below/ckpt-0", "lost/ckpt-0"):
        tensors = iter(tensors_of(MANIFEST))
        with pytest.raises(CheckpointError, match=r"not saved: (Not a directory|File exists) on "):
            save_checkpoint(tmp_path / place, tensors)
        assert len(list(tensors)) == len(MANIFEST), "some were written"
    assert sorted(os.listdir(tmp_path)) == ["file", "lost"]


def test_a_tensor_of_no_known_type_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="tensor00001_000: values are float64 with scales None"):
        save_checkpoint(tmp_path / "ckpt-0", [(np.ones(2, np.float32), None), (np.ones(2), None)])
    assert not os.listdir(tmp_path)
