"""ModelConfig: the released constants, derived sizes, JSON, and what each error names."""

import dataclasses
import json
import pathlib

import pytest

from grok1.config import GROK_1, TOY, ModelConfig

NANO = pathlib.Path(__file__).parent / "golden" / "nano" / "config.json"


def test_grok_1_has_the_released_constants():
    assert dataclasses.asdict(GROK_1) == {
        "vocab_size": 131072,
        "emb_size": 6144,
        "widening_factor": 8,
        "key_size": 128,
        "num_q_heads": 48,
        "num_kv_heads": 8,
        "num_layers": 64,
        "num_experts": 8,
        "num_selected_experts": 2,
        "sequence_len": 8192,
        # Written out as in the released run script, so that the last digit counts.
        "embedding_multiplier_scale": 78.38367176906169,
        "output_multiplier_scale": 0.5773502691896257,
        "attn_output_multiplier": 0.08838834764831845,
        "router_softcap": None,
        "renormalize_gates": False,
    }
    assert GROK_1.ffn_size == 32768
    assert GROK_1.queries_per_kv_head == 6


def test_nano_config_file_reads_field_by_field():
    config = ModelConfig.load(NANO)
    router = {"router_softcap": None, "renormalize_gates": False}
    assert dataclasses.asdict(config) == json.loads(NANO.read_text()) | router
    assert config.to_json() == NANO.read_text().rstrip() + "\n"
    assert config.ffn_size == 128
    assert config.queries_per_kv_head == 2


def test_multipliers_left_out_follow_from_the_sizes():
    fields = json.loads(NANO.read_text())
    for name in ("embedding_multiplier_scale", "output_multiplier_scale", "attn_output_multiplier"):
        del fields[name]
    config = json.loads(ModelConfig(**fields).to_json())
    assert config == pytest.approx(json.loads(NANO.read_text()), rel=1e-15)


@pytest.mark.parametrize(
    ("widening_factor", "emb_size", "ffn_size"),
    [
        (3, 64, 128),  # 192 * 2 / 3 = 128 exactly
        (2.25, 128, 192),
        (1, 100, 72),  # 66.7: down to 66, then up to a multiple of 8
        (1, 12, 8),  # a multiple of 8 stays
        (1.3, 10, 8),  # the product 13 is cut to an integer first: 13 * 2 // 3 = 8
    ],
)
def test_ffn_size(widening_factor, emb_size, ffn_size):
    config = dataclasses.replace(TOY, widening_factor=widening_factor, emb_size=emb_size)
    assert config.ffn_size == ffn_size


OTHER_ROUTER = dataclasses.replace(TOY, router_softcap=30.0, renormalize_gates=True)


@pytest.mark.parametrize("config", [GROK_1, TOY, OTHER_ROUTER], ids=["grok_1", "toy", "router"])
def test_json_round_trip(config, tmp_path):
    text = config.to_json()
    assert text.endswith("}\n")
    assert ModelConfig.from_json(text) == config
    path = tmp_path / "config.json"
    path.write_text(text)
    assert ModelConfig.load(str(path)) == config


def test_config_is_a_frozen_hashable_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(TOY, "emb_size", 1)  # noqa: B010
    assert hash(dataclasses.replace(TOY)) == hash(TOY)
    assert dataclasses.replace(TOY, num_layers=7) != TOY


INTEGERS = [field.name for field in dataclasses.fields(ModelConfig) if field.type is int]
MULTIPLIERS = [field.name for field in dataclasses.fields(ModelConfig) if "multi" in field.name]
NUMBERS = [*MULTIPLIERS, "widening_factor", "router_softcap"]


def test_every_field_is_validated():
    assert len(INTEGERS) + len(NUMBERS) + 1 == len(dataclasses.fields(ModelConfig)) == 15


@pytest.mark.parametrize("value", [0, "yes", None])
def test_renormalize_gates_is_a_truth_value(value):
    with pytest.raises(
        ValueError, match=f"^renormalize_gates must be true or false, found {value!r}"
    ):
        dataclasses.replace(TOY, renormalize_gates=value)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [0, -3])
def test_sizes_are_above_0(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be a whole number above 0, found {value}$"):
        dataclasses.replace(TOY, **{name: value})


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [2.0, "8", True, None])
def test_sizes_are_whole_numbers(name, value):
    with pytest.raises(
        ValueError, match=f"^{name} must be a whole number above 0, found {value!r}$"
    ):
        dataclasses.replace(TOY, **{name: value})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["8", True])
def test_multipliers_are_numbers(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be a number above 0, found {value!r}$"):
        dataclasses.replace(TOY, **{name: value})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-1.0, 0, float("inf"), float("nan"), 10**400])
def test_multipliers_are_finite_and_positive(name, value):
    with pytest.raises(
        ValueError, match=f"^{name} must be a (number above 0|finite number), found"
    ):
        dataclasses.replace(TOY, **{name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_size": 15}, r"key_size must be even \(rotary phases turn pairs\), found 15"),
        ({"num_q_heads": 6}, "num_q_heads must be a multiple of num_kv_heads 4, found 6"),
        ({"num_q_heads": 2}, "num_q_heads must be a multiple of num_kv_heads 4, found 2"),
        (
            {"num_selected_experts": 9},
            "num_selected_experts must be at most num_experts 8, found 9",
        ),
    ],
)
def test_impossible_combinations_name_the_field(change, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        dataclasses.replace(TOY, **change)


@pytest.mark.parametrize("name", [*INTEGERS, "widening_factor"])
def test_missing_field_is_named(name):
    fields = json.loads(TOY.to_json())
    del fields[name]
    with pytest.raises(ValueError, match=f"configuration field '{name}' is missing"):
        ModelConfig.from_json(json.dumps(fields))


def test_unknown_field_is_named_with_the_known_ones():
    fields = json.loads(TOY.to_json()) | {"hidden_size": 128}
    with pytest.raises(ValueError, match=r"unknown configuration field 'hidden_size'.*'emb_size'"):
        ModelConfig.from_json(json.dumps(fields))


def test_json_that_is_no_object():
    with pytest.raises(ValueError, match=r"must be a JSON object, found \[1, 2\]"):
        ModelConfig.from_json("[1, 2]")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "the configuration is not JSON"),
        (b'{"vocab_size": "many"}', "configuration field 'emb_size' is missing"),
        (
            TOY.to_json().replace("1280", '"many"').encode(),
            "vocab_size must be a whole number above 0",
        ),
        (b"\xff\xfe{}", "codec can't decode"),
    ],
)
def test_load_names_the_file(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        ModelConfig.load(path)


def test_a_widening_factor_that_leaves_no_hidden_width_is_refused():
    with pytest.raises(ValueError, match=r"^widening_factor 0.001 leaves the experts no hidden"):
        dataclasses.replace(TOY, widening_factor=0.001)
