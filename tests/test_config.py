"""ModelConfig: the released constants, derived sizes, JSON, and what each error names."""

import copy
import dataclasses
import json
import math
import pathlib
import re

import jax.numpy as jnp
import numpy as np
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


def test_numbers_of_numpy_are_numbers():
    found = dataclasses.replace(
        TOY, num_layers=np.int64(3), widening_factor=np.float32(2.25), router_softcap=np.float64(30)
    )
    expected = dataclasses.replace(TOY, num_layers=3, widening_factor=2.25, router_softcap=30.0)
    assert found == expected
    assert found.to_json() == expected.to_json()
    for given in (True, np.float64(3), np.bool_(1)):
        with pytest.raises(ValueError, match=r"^num_layers must be a whole number above 0, found"):
            dataclasses.replace(TOY, num_layers=given)
    with pytest.raises(ValueError, match=r"^layers must be from 1 to 6, found 2\.0$"):
        TOY.first_layers(2.0)
    assert TOY.first_layers(jnp.int32(2)) == TOY.first_layers(np.array(2)) == TOY.first_layers(2)


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
    # Files of models that are routed as Grok-1 is name what every version knows.
    for name in ("router_softcap", "renormalize_gates"):
        assert (name in text) == (config is OTHER_ROUTER)
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
    fields = json.loads(TOY.to_json()) | {"embedding_size": 128}
    with pytest.raises(
        ValueError, match=r"unknown configuration field 'embedding_size'.*'emb_size'"
    ):
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
        (b'{"emb_size": 1, "emb_size": 1}', "each name once, found 'emb_size' twice"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b" " * (1 << 20) + b"{}", "is longer than 1,048,576 bytes, which no such file is"),
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


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("digits", ["1" + "0" * 18, "9" * 5000, "1" + "0" * 4299])
def test_absurd_sizes_are_refused_by_field_and_bound(name, digits):
    text = re.sub(rf'"{name}": \d+', f'"{name}": {digits}', TOY.to_json())
    shown = digits if len(digits) < 40 else f"an integer of {len(digits):,} digits"
    with pytest.raises(ValueError, match=rf"^{name} must be at most [\d,]+, found {shown}$"):
        ModelConfig.from_json(text)


def test_absurd_sizes_of_python_are_refused_too():
    with pytest.raises(ValueError, match=r"^num_layers must be at most 1,024, found 1025$"):
        dataclasses.replace(TOY, num_layers=1025)
    with pytest.raises(
        ValueError,
        match=r"^num_layers must be at most 1,024, found an integer of some 5,000 digits$",
    ):
        dataclasses.replace(TOY, num_layers=10**5000)
    with pytest.raises(ValueError, match=r"^widening_factor must be at most 1,024, found 1e\+29$"):
        dataclasses.replace(TOY, widening_factor=1e29)


def test_multipliers_follow_the_sizes_unless_they_are_given():
    wide = dataclasses.replace(TOY, emb_size=512, key_size=64)
    assert wide.embedding_multiplier_scale == math.sqrt(512)
    assert wide.attn_output_multiplier == 0.125
    # Through a file and a second change as well, and where only the last digit differs.
    again = dataclasses.replace(ModelConfig.from_json(wide.to_json()), emb_size=256, num_layers=2)
    assert (again.embedding_multiplier_scale, again.attn_output_multiplier) == (16.0, 0.125)
    nano = ModelConfig.load(NANO)
    assert nano.attn_output_multiplier == 0.35355339059327373 != 8**-0.5
    assert dataclasses.replace(nano, num_layers=2).attn_output_multiplier == 0.35355339059327373
    assert dataclasses.replace(nano, key_size=16).attn_output_multiplier == 0.25
    given = dataclasses.replace(TOY, embedding_multiplier_scale=3.0, attn_output_multiplier=0.5)
    for config in (given, ModelConfig.from_json(given.to_json())):
        kept = dataclasses.replace(config, emb_size=512, key_size=64)
        assert (kept.embedding_multiplier_scale, kept.attn_output_multiplier) == (3.0, 0.5)
    assert dataclasses.replace(copy.deepcopy(TOY), key_size=64).attn_output_multiplier == 0.125


PORT = {  # As conversions on Hugging Face have it.
    "architectures": ["Grok1ModelForCausalLM"],
    "attn_output_multiplier": 0.08838834764831845,
    "auto_map": {"AutoConfig": "configuration_grok1.Grok1Config"},
    "bos_token_id": 1,
    "embedding_multiplier_scale": 78.38367176906169,
    "hidden_size": 6144,
    "intermediate_size": 32768,
    "max_attn_value": 30.0,
    "max_position_embeddings": 8192,
    "model_type": "grok-1",
    "num_attention_heads": 48,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "output_multiplier_scale": 0.5773502691896257,
    "output_router_logits": False,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 131072,
}


def test_the_configuration_of_a_port_is_read():
    config = ModelConfig.from_json(json.dumps(PORT))
    assert config == GROK_1
    assert config.to_json() == GROK_1.to_json()
    assert ModelConfig.from_json(json.dumps(PORT | {"head_dim": 64})).key_size == 64


@pytest.mark.parametrize("config", [GROK_1, TOY, OTHER_ROUTER], ids=["grok_1", "toy", "router"])
def test_what_is_written_for_ports_reads_the_same(config):
    fields = json.loads(config.to_json(hugging_face=True))
    assert fields["model_type"] == "grok-1"
    assert fields["architectures"] == ["Grok1ModelForCausalLM"]
    assert fields["intermediate_size"] == config.ffn_size
    assert ModelConfig.from_json(json.dumps(fields)) == config
    own = {field.name for field in dataclasses.fields(ModelConfig)} - {
        "vocab_size", "num_experts", "router_softcap", "renormalize_gates",
        "embedding_multiplier_scale", "output_multiplier_scale", "attn_output_multiplier",
    }  # fmt: skip
    port = {name: value for name, value in fields.items() if name not in own}
    assert dataclasses.replace(ModelConfig.from_json(json.dumps(port))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', expected a Grok-1 model's, 'grok-1'"),
        ({"max_attn_value": 1.0}, "max_attn_value is 1.0, expected 30.0 as in Grok-1"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False, expected True as in Gro"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling is {'type': 'yarn'}, expected null as"),
        ({"hidden_act": "silu"}, "hidden_act is 'silu', expected 'gelu' or 'gelu_new' or 'gelu_"),
        ({"emb_size": 64}, "hidden_size is 6144, and emb_size 64"),
        ({"intermediate_size": 32766}, "intermediate_size is 32766, expected 32768 by the other"),
        ({"intermediate_size": "wide"}, "intermediate_size must be a whole number above 0, found"),
        ({"num_hidden_layers": 10**18}, "num_hidden_layers must be at most 1,024, found 10{18}"),
        ({"hidden_size": [6144]}, r"hidden_size must be a whole number above 0, found \[6144\]"),
        ({"num_key_value_heads": None}, "configuration field 'num_kv_heads' is missing"),
        ({"hidden_size": None}, "configuration field 'emb_size' is missing"),
        ({"num_attention_heads": None}, "configuration field 'key_size' is missing"),
        ({"hidden_size": None, "emb_size": 0}, "emb_size must be a whole number above 0, found 0"),
        ({"vocab_size": 0}, "vocab_size must be a whole number above 0, found 0"),
    ],
)
def test_the_configuration_of_another_model_is_refused_by_field(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ModelConfig.from_json(json.dumps(PORT | change))
