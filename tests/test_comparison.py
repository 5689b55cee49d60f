"""Two models over a text: by hand, with themselves, between types and meshes, and refusals."""

import errno
import json
import os
import pathlib
import zipfile
from unittest import mock

import jax
import numpy as np
import pytest

import grok1
from grok1.__main__ import main
from grok1.comparison import compare
from grok1.files import CheckpointError
from tests.conftest import TOY
from tests.helpers import slow

TEXT = "The first argument is a string, and the second is the number of bytes to read."


@pytest.fixture(scope="module")
def other(toy) -> grok1.Model:
    """The toy with another final norm and another router in its last layer but one."""
    layers = toy.params.layers
    router = layers.router.at[4].set(-layers.router[4])
    params = toy.params._replace(
        layers=layers._replace(router=router), final_norm=toy.params.final_norm * 1.5
    )
    return grok1.Model(params, toy.config, toy.mesh, "float32", toy.tensors, toy.tokenizer)


def test_a_model_is_no_distance_from_itself(toy):
    found = compare(toy, toy, TEXT)
    assert found.tokens == toy.tokenizer.encode(TEXT)
    assert found.largest_divergence == 0
    assert (found.top_1_agreement, found.top_k_agreement, found.expert_agreement) == (1, 1, 1)
    assert found.logits_difference == 0
    assert [layer.residual for layer in found.layers] == [0] * 6
    assert found.perplexity_a == pytest.approx(toy.score(TEXT).perplexity, rel=1e-5)
    assert found.perplexity_a == found.perplexity_b


def test_figures_are_those_of_the_logits(toy, other):
    found = compare(toy, other, TEXT, top_k=3)
    tokens = toy.tokenizer.encode(TEXT)
    a, b = (np.asarray(m.logits(tokens), np.float64) for m in (toy, other))
    log_a, log_b = (np.asarray(jax.nn.log_softmax(x.astype(np.float32))) for x in (a, b))
    divergences = (np.exp(log_a) * (log_a - log_b)).sum(axis=-1)
    np.testing.assert_allclose(found.divergences, divergences, rtol=1e-3, atol=1e-5)
    assert found.mean_divergence == pytest.approx(divergences.mean(), rel=1e-3)
    worst = found.worst[0]
    assert worst.position == int(divergences.argmax())
    assert worst.piece == toy.tokenizer.piece(tokens[worst.position])
    assert (worst.top_a, worst.top_b) == (a[worst.position].argmax(), b[worst.position].argmax())
    assert found.top_1_agreement == (a.argmax(-1) == b.argmax(-1)).mean()
    sets = [[set(row) for row in np.argsort(-x, axis=-1)[:, :3]] for x in (a, b)]
    shared = [len(one & two) / 3 for one, two in zip(*sets, strict=True)]
    assert found.top_k_agreement == pytest.approx(np.mean(shared))
    assert found.logits_difference == pytest.approx(
        np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-4
    )
    assert found.perplexity_b == pytest.approx(other.score(TEXT).perplexity, rel=1e-4)


def test_layers_show_where_the_difference_begins(toy, other):
    layers = compare(toy, other, TEXT).layers
    assert [layer.residual == 0 for layer in layers] == [True] * 4 + [False] * 2
    assert [layer.same_experts == 1 for layer in layers[:4]] == [True] * 4
    # The least probable experts of the toy are never its most probable.
    assert layers[4].same_experts < 0.2


def test_a_text_longer_than_the_context_is_run_in_pieces(nano):
    tokens = np.random.default_rng(0).integers(1, 128, size=200)
    found = compare(nano, nano, tokens)
    assert len(found.divergences) == 200 > nano.config.sequence_len
    pieces = [nano.logits(tokens[start : start + 96]) for start in (0, 96, 192)]
    logprobs = np.asarray(jax.nn.log_softmax(np.concatenate(pieces)[:-1]))
    expected = np.exp(-logprobs[np.arange(199), tokens[1:]].mean(dtype=np.float64))
    assert found.perplexity_a == pytest.approx(expected, rel=1e-4)


def test_a_text_that_fills_the_context_is_whole(nano, monkeypatch):
    told = []
    monkeypatch.setattr(
        type(nano.engine), "check_length", lambda *_, is_whole: told.append(is_whole)
    )
    for num_tokens in (96, 97):
        compare(nano, nano, [5] * num_tokens)
    assert told == [True, True, False, False]


@pytest.mark.parametrize("num_tokens", [1, 4, 5, 6, 9])
def test_a_text_of_any_length_modulo_the_block_of_rows(num_tokens, tmp_path, monkeypatch):
    rng = np.random.default_rng(num_tokens)
    tokens = rng.integers(0, 16, num_tokens)
    runs = [rng.standard_normal((num_tokens, 16)) for _ in range(2)]
    files = [tmp_path / "a.npz", tmp_path / "b.npz"]
    for file, logits in zip(files, runs, strict=True):
        np.savez(file, logits=logits, tokens=tokens)
    whole = compare(*files, top_k=2)
    monkeypatch.setattr("grok1.study.recorded_run._ROWS_BYTES", 4 * 8 * 16)  # four rows at a time
    found = compare(*files, top_k=2)
    np.testing.assert_allclose(found.divergences, whole.divergences)
    logprobs = [np.log(np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)) for x in runs]
    np.testing.assert_allclose(
        found.divergences, (np.exp(logprobs[0]) * (logprobs[0] - logprobs[1])).sum(axis=-1)
    )
    if num_tokens == 1:
        assert found.perplexity_a is None
    else:
        chosen = logprobs[1][np.arange(num_tokens - 1), tokens[1:]]
        assert found.perplexity_b == pytest.approx(np.exp(-chosen.mean()))
        np.savez(files[1], logits=1e5 * runs[1], tokens=tokens)
        assert compare(*files, top_k=2).perplexity_b == np.inf


@pytest.mark.devices(4)
def test_meshes_and_types_on_the_command_line(capsys):
    arguments = ["compare", str(TOY), str(TOY), "--prompt", TEXT, "--json"]
    sides = ["--mesh-a", "1x1", "--mesh-b", "2x2", "--dtype-a", "float32", "--dtype-b", "bfloat16"]
    assert main([*arguments, *sides]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "float32, mesh 1x1" in found["a"]
    assert "bfloat16, mesh 2x2" in found["b"]
    assert 0 < found["mean_divergence"] < 0.05
    assert len(found["divergences"]) == len(found["tokens"])
    assert 0.8 < found["expert_agreement"] <= 1
    assert len(found["layers"]) == 6


def test_tables_for_people(capsys, tmp_path, toy):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    assert (
        main(
            [
                "compare",
                str(TOY),
                str(TOY),
                "--text",
                str(file),
                "--mesh-a",
                "1x1",
                "--mesh-b",
                "1x1",
            ]
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"A: {TOY}, Model(6 layers, 8 experts")
    assert f"{len(toy.tokenizer.encode(TEXT))} tokens" in lines
    assert any(line.startswith("KL(A || B), nats         mean ") for line in lines)
    assert "same most probable token  100.00%" in lines
    assert sum(line.endswith("100.00%") for line in lines) >= 6


def test_models_with_other_routers_and_interventions(toy):
    more, none = grok1.SelectExperts(3), grok1.AblateExperts(range(8), layers=1)
    with toy.intervene(more) as three, toy.intervene(more, none) as less:
        found = compare(toy, three, TEXT)
        ablated, itself = compare(three, less, TEXT), compare(less, less, TEXT)
    assert found.expert_agreement == 1
    assert found.mean_divergence > 0
    assert found.a == repr(toy)
    assert found.b == f"{found.a[:-1]}, with SelectExperts(count=3))"
    # Of no experts that run, none are the same; all are, where there is none to be so.
    assert [layer.same_experts for layer in ablated.layers][:2] == [1, 0]
    assert itself.expert_agreement == 1


def test_with_the_experts_of_the_other_the_router_parts_them_no_more(toy):
    with toy.intervene(grok1.SelectExperts(1)) as one:
        found = compare(toy, one, TEXT, force_experts=True)
    assert found.mean_divergence > 1e-3
    assert found.forced is not None
    assert found.forced.mean_divergence < 1e-9
    assert found.forced.top_1_agreement == 1
    assert max(found.forced.residuals) < 1e-5
    assert any(line.startswith("with A's experts         KL mean ") for line in found.lines())
    assert found.to_dict()["forced"]["mean_divergence"] == found.forced.mean_divergence
    with pytest.raises(ValueError, match="A is a file of logits, and force_experts needs two"):
        compare(__file__.replace(".py", ".npz"), toy, TEXT, force_experts=True)


@slow
@pytest.mark.not_on_gpu("it reads what a model on a CPU is called")
def test_other_ports_routers_on_the_command_line(capsys):
    arguments = ["compare", str(TOY), str(TOY), "--prompt", TEXT, "--json"]
    sides = ["--mesh-a", "1x1", "--mesh-b", "1x1", "--router-softcap-a", "30"]
    assert main([*arguments, *sides, "--renormalize-gates-b"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["a"].endswith("mesh 1x1 cpu, router soft cap 30)")
    assert found["b"].endswith("mesh 1x1 cpu, gates renormalised)")
    assert 0 < found["mean_divergence"] < 0.1


def test_a_comparison_in_a_notebook(toy, other):
    found = compare(toy, other, TEXT)
    assert repr(found).startswith(f"Comparison({len(found.tokens)} tokens, KL mean ")
    assert "\n" not in repr(found)
    shown = found._repr_html_()
    for text in (
        "A&#x27;s norm at most, after layer ",
        f"{found.expert_agreement:.2%}",
        "nats, at",
    ):
        assert text in shown


def test_comparisons_are_compared_by_value(toy, other):
    found = grok1.compare(toy, other, "Of one text")
    again = found._replace(divergences=found.divergences.copy(), tokens=[*found.tokens])
    assert found == again
    assert (found != again) is False
    assert found != found._replace(divergences=found.divergences + 1)
    assert found != found._replace(a="another")


def test_positions_and_values_must_fit_the_text(nano):
    tokens = np.arange(100) % 128
    patch = grok1.Patch("residual", np.zeros((12, 5, 64)))
    for intervention, text, message in (
        (grok1.ScaleHeads(1, positions=3), tokens, "of 100 tokens is cut into pieces that begin"),
        (patch, tokens[:6], "values are of 5 tokens and the text has 6"),
    ):
        with nano.intervene(intervention) as changed, pytest.raises(ValueError, match=message):
            compare(changed, nano, text)


def test_saved_logits_stand_for_a_model(toy, other, tmp_path):
    file = tmp_path / "toy.npz"
    whole = compare(toy, other, TEXT, save_logits=file)
    again = compare(file, other)
    np.testing.assert_array_equal(again.divergences, whole.divergences)
    assert again.layers is None
    assert again.notes == ["layers are not compared: saved logits have none"]
    assert "note: layers are not compared: saved logits have none" in again.lines()
    assert again.worst == whole.worst
    alone = tmp_path / "alone.npy"
    np.save(alone, np.load(file)["logits"])
    np.testing.assert_array_equal(compare(alone, other, TEXT).divergences, whole.divergences)
    assert compare(file, alone).largest_divergence == 0
    assert compare(alone, alone, whole.tokens).perplexity_a == whole.perplexity_a
    with pytest.raises(ValueError, match="the tokens differ: token 0 of the text is"):
        compare(file, other, "Another text.")
    with pytest.raises(ValueError, match=r"the lengths differ: A has .* tokens and logits of"):
        compare(alone, other, TEXT[:40])
    with pytest.raises(ValueError, match="neither file says what its tokens are"):
        compare(alone, alone)
    for a, b, side in ((file, file, "A"), (file, alone, "A"), (alone, file, "B")):
        message = f"^{side} is a file that holds its tokens; leave out the text$"
        with pytest.raises(ValueError, match=message):
            compare(a, b, TEXT)
    for ids, message in (
        ([whole.tokens], "must be one sequence of whole numbers"),
        (whole.tokens[0], "is text or a sequence of token ids, found int"),
        ([1280, *whole.tokens[1:]], "must be token ids from 0 to 1279, found 1280"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            compare(alone, alone, ids)
    with pytest.raises(ValueError, match="A is a file of logits, which takes no dtype"):
        compare(file, other, load_a={"dtype": "float32"})


def test_models_of_other_sizes_have_no_layers_to_compare(toy):
    shorter = grok1.load(TOY, mesh=(1, 1), dtype="float32", progress=False, layers=3)
    found = compare(toy, shorter, TEXT)
    assert found.mean_divergence > 0
    assert found.notes == ["layers are not compared: A has 6 of width 128, B 3 of width 128"]
    message = "^force_experts needs .* found 6 layers in A and 3 of 8 experts in B$"
    with pytest.raises(ValueError, match=message):
        compare(toy, shorter, TEXT, force_experts=True)


def test_it_refuses_what_it_cannot_compare(toy, nano, tmp_path):
    with pytest.raises(ValueError, match="vocabularies differ: A has 1280 tokens, B 128; only"):
        compare(toy, nano, [5, 6])
    with pytest.raises(TypeError, match="force_experts must be True or False, found 'no'"):
        compare(toy, toy, "text", force_experts="no")
    with pytest.raises(ValueError, match="compare needs a text; give one, or logits saved with"):
        compare(toy, toy)
    with pytest.raises(ValueError, match="the text is empty; give at least one token"):
        compare(toy, toy, "")
    with pytest.raises(ValueError, match="top_k must be from 1 to the vocabulary of 1280, found 0"):
        compare(toy, toy, "text", top_k=0)
    with pytest.raises(
        ValueError, match=r"top_k must be from 1 to the vocabulary of 1280, found 2\.5"
    ):
        compare(toy, toy, "text", top_k=2.5)
    with pytest.raises(ValueError, match="A is a model that is loaded already, which takes no me"):
        compare(toy, toy, "text", load_a={"mesh": (1, 1)})
    with pytest.raises(ValueError, match="top_k must be from 1 to the vocabulary of 1280, found 9"):
        compare(TOY, TOY, "text", top_k=9999, load_a={"mesh": "none"})
    with pytest.raises(ValueError, match="vocabularies differ: A has 1280 tokens, B 128; only"):
        compare(TOY, nano, [5, 6], load_a={"mesh": "none"})
    missing = tmp_path / "missing" / "a.npz"
    with pytest.raises(FileNotFoundError, match=r"a.npz: there is no directory .*; make it first"):
        compare(TOY, TOY, "text", save_logits=missing, load_a={"mesh": "none"})
    kept = tmp_path / "kept.npz"
    kept.write_bytes(b"results")
    with pytest.raises(FileExistsError, match=r"kept.npz is there already; remove it, or name a"):
        compare(TOY, TOY, "text", save_logits=kept, load_a={"mesh": "none"})
    assert kept.read_bytes() == b"results"
    with pytest.raises(ValueError, match=r"saved logits are a .npz file, found 'a.bin'"):
        compare(toy, toy, "text", save_logits="a.bin")
    with pytest.raises(FileNotFoundError, match="there is no such file; B is a model's directory"):
        compare(toy, tmp_path / "absent", "text")
    foreign = tmp_path / "foreign.bin"
    foreign.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"is no directory and no .npz or .npy file; A is a model"):
        compare(foreign, toy, "text")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"tokens": np.arange(3)}, r"expected the arrays logits \[T, V\] and tokens"),
        (
            {"tokens": np.arange(3), "logits": np.zeros((2, 1280), np.float32)},
            "3 tokens, but logits of 2 positions",
        ),
        (
            {"tokens": np.zeros(2), "logits": np.zeros((2, 1280), np.float32)},
            r"tokens must be whole numbers \[T\], found float64\[2\]",
        ),
        (
            {"tokens": np.arange(2), "logits": np.zeros(2, np.float32)},
            r"logits must be floats \[T, V\], found float32\[2\]",
        ),
        (
            {"tokens": np.arange(2), "logits": np.array([[0.0, 1.0], [0.0, np.nan]])},
            "the logits at position 1 are not finite",
        ),
    ],
)
def test_damaged_files_of_logits_are_named(tmp_path, arrays, message):
    file = tmp_path / "logits.npz"
    np.savez(file, **arrays)
    with pytest.raises(ValueError, match=message) as error:
        compare(file, file, top_k=1)
    assert str(file) in str(error.value)


def test_errors_of_the_command_are_one_line(capsys, tmp_path):
    file = tmp_path / "logits.npz"
    file.write_bytes(b"no archive")
    assert main(["compare", str(file), str(TOY), "--prompt", "x"]) == 1
    assert capsys.readouterr().err == (
        f"grok1: {file}: not a .npz file, or a damaged one: File is not a zip file; save the "
        "logits again\n"
    )


def saved(file: pathlib.Path) -> pathlib.Path:
    np.savez(file, logits=np.zeros((3, 7), np.float32), tokens=np.arange(3))
    return file


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:100],
        lambda data: data[:-30],
        lambda data: data.replace(b"NUMPY", b"NUMPI"),
        lambda data: data[:70] + bytes(60) + data[130:],
        lambda data: b"",
        lambda data: b"PK\x05\x06" + bytes(18),
        # The directory is said to begin later: so does the first file, before the beginning.
        lambda data: data[:-6] + (int.from_bytes(data[-6:], "little") + 8).to_bytes(6, "little"),
    ],
)
def test_damaged_files_of_logits_are_one_line(damage, tmp_path, capsys):
    a, b = saved(tmp_path / "a.npz"), saved(tmp_path / "b.npz")
    a.write_bytes(damage(a.read_bytes()))
    assert main(["compare", str(a), str(b)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"grok1: {a}: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    ("make", "found"),
    [
        (os.mkfifo, "a pipe"),
        (os.mkdir, "a directory"),
        (lambda path: os.symlink("/dev/zero", path), "a device"),
    ],
)
def test_logits_that_are_no_file_are_refused_before_anything_runs(make, found, side, tmp_path):
    make(tmp_path / "logits.npz")
    a, b = (tmp_path / "logits.npz" if side == place else TOY for place in (0, 1))
    with (
        mock.patch("grok1.comparison.load", side_effect=AssertionError("loaded")),
        pytest.raises(CheckpointError, match=rf"logits\.npz: not a regular file but {found}; move"),
    ):
        compare(a, b, "text")


@pytest.mark.parametrize("length", [-8, 20, 0])
def test_damaged_logits_alone_are_one_line(length, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 7), np.float32))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:length])
    with pytest.raises(ValueError, match=r"a\.npy: not a \.npy file, or a damaged one: [^\n]*$"):
        compare(tmp_path / "a.npy", saved(tmp_path / "b.npz"))


@pytest.mark.parametrize("at", [b"{", b"<f4", b"(3, 7)"])
def test_logits_with_a_header_that_is_no_text_of_python_are_one_line(at, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 7), np.float32))
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data.replace(at, b"\x7f" + at[1:]))
    with pytest.raises(ValueError, match=r"a\.npy: not a \.npy file, or a damaged one: [^\n]*$"):
        compare(tmp_path / "a.npy", saved(tmp_path / "b.npz"))


def test_tokens_that_are_said_to_be_huge_take_no_memory(tmp_path):
    with zipfile.ZipFile(saved(tmp_path / "a.npz"), "a") as archive:
        tokens = archive.read("tokens.npy").replace(b"(3,), }" + b" " * 14, b"(%d,), }" % 10**14)
    np.savez(tmp_path / "a.npz", logits=np.zeros((3, 7), np.float32))
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("tokens.npy", tokens)
    with pytest.raises(ValueError, match=r"a\.npz: not a \.npz file, or a damaged one: [^\n]*$"):
        compare(tmp_path / "a.npz", saved(tmp_path / "b.npz"))


def test_logits_are_saved_over_nothing_and_through_no_link(tmp_path, monkeypatch):
    a, link = saved(tmp_path / "a.npz"), tmp_path / "link.npz"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match=r"link\.npz is there already"):
        compare(a, a, save_logits=link)
    assert not (tmp_path / "elsewhere").exists()
    whole = np.savez

    def race(file, **arrays):
        whole(file, **arrays)
        (tmp_path / "new.npz").write_text("precious")

    monkeypatch.setattr(np, "savez", race)
    with pytest.raises(FileExistsError, match=r"new\.npz is there already"):
        compare(a, a, save_logits=tmp_path / "new.npz")
    assert (tmp_path / "new.npz").read_text() == "precious"

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match=r"full\.npz: the logits cannot be written: No space left"):
        compare(a, a, save_logits=tmp_path / "full.npz")
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "link.npz", "new.npz"]
