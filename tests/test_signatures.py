"""What notebooks and checkers see of the public methods, and what a wrong argument is told."""

import dataclasses
import inspect
import typing

import numpy as np
import pytest

import grok1
from grok1.generate.options import GenerationArguments, GenerationOptions
from tests.conftest import TOY
from tests.generate.test_options import make_options

OPTIONS = {field.name: field for field in dataclasses.fields(GenerationOptions)}


LONG = [np.zeros((40, 40)), np.ma.array([1, 2], mask=[0, 1]), "x" * 9000, -(10**5000)]


@pytest.mark.parametrize("value", LONG, ids=["array", "masked array", "text", "integer"])
@pytest.mark.parametrize(
    "call",
    [
        *(lambda m, v, name=name: m.generate([5], **{name: v}) for name in
          ("max_new_tokens", "temperature", "top_p", "min_p", "seed", "ignore_eos", "logprobs",
           "logits_processor")),
        lambda m, v: m.generate([5], stop=[{"a": v}]),
        lambda m, v: m.score([5, 6], window=v),
        lambda m, v: m.score([5, 6], top_k=v),
        lambda m, v: m.trace([5, 6], [v]),
        lambda m, v: m.trace([5, 6], ["logit_lens"], lens_top=v),
        lambda m, v: m.intervene(grok1.SelectExperts(v)),
        lambda m, v: m.intervene(grok1.AddToResidual(np.zeros(128), point=v)),
        lambda m, v: m.intervene(grok1.Patch(v, np.zeros(128))),
        lambda m, v: m.intervene(grok1.ScaleHeads(np.array([[1, 2]] * 90))),
        lambda m, v: m.tokenizer.piece(v),
        lambda m, v: grok1.load(TOY, mesh=v, progress=False),
        lambda m, v: grok1.load(TOY, offload=v, progress=False),
        lambda m, v: grok1.load(TOY, memory=v, offload="disk", progress=False),
    ],
)  # fmt: skip
def test_a_long_value_is_shown_in_part_and_on_one_line(toy, call, value):
    with pytest.raises((ValueError, TypeError)) as caught:
        call(toy, value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_arguments_are_the_options():
    arguments = typing.get_type_hints(GenerationArguments)
    assert arguments == {name: typing.get_type_hints(GenerationOptions)[name] for name in OPTIONS}
    assert list(arguments) == list(OPTIONS)


@pytest.mark.parametrize("method", ["generate", "stream", "trace_generation"])
def test_options_are_shown_one_by_one_with_their_defaults(method):
    shown = inspect.signature(getattr(grok1.Model, method)).parameters
    for name, field in OPTIONS.items():
        assert shown[name].default == field.default
        assert shown[name].kind == inspect.Parameter.KEYWORD_ONLY
    assert not any(one.kind == inspect.Parameter.VAR_KEYWORD for one in shown.values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate([5], temprature=1), "generate has no argument 'temprature'; did you "
         "mean 'temperature'?"),
        (lambda m: m.stream([5], stops=1), "stream has no argument 'stops'; did you mean 'stop'?"),
        (lambda m: m.trace_generation([5], topk=1), "trace_generation has no argument 'topk'; did "
         "you mean 'top_k'?"),
        (lambda m: m.score([5, 6], topk=1), "score has no argument 'topk'; did you mean 'top_k'?"),
        (lambda m: m.choose([5], [[6]], zzz=1), "choose has no argument 'zzz'; it takes context, "
         "options, add_bos, allow_control"),
        (lambda m: m.trace([5], captures=1), "trace has no argument 'captures'; did you mean"),
        (lambda m: grok1.load("x", layer=1), "load has no argument 'layer'; did"),
        (lambda m: grok1.random_model(grok1.TOY, sed=1), "random_model has no argument 'sed'; did"),
        (lambda m: grok1.random_model({}), "config must be a ModelConfig, such as grok1.TOY,"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_told_the_right_one(call, message, nano):
    with pytest.raises(TypeError) as caught:
        call(nano)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("mesh", [8, 1.5, {1, 8}, (1, "8")])
def test_a_mesh_that_is_none_is_told_what_one_is(mesh):
    with pytest.raises(ValueError, match=r"^mesh must be two sizes above 0, \(data, model\)"):
        grok1.random_model(grok1.TOY, mesh=mesh)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("temperature", "0", "a number, found '0'"),
        ("temperature", None, "a number, found None"),
        ("temperature", True, "a number, found True"),
        ("top_p", "0.9", "a number, found '0.9'"),
        ("min_p", [0.1], "a number, found [0.1]"),
        ("ignore_eos", "no", "True or False, found 'no'"),
        ("add_bos", 1, "True or False, found 1"),
        ("allow_control", None, "True or False, found None"),
        ("logits_processor", "f", "a function of (logits, tokens, length), found 'f'"),
    ],
)
def test_values_of_another_type_are_named(option, value, expected):
    with pytest.raises(TypeError) as caught:
        make_options(**{option: value})
    assert str(caught.value) == f"{option} must be {expected}"


def test_numpys_numbers_are_numbers():
    options = make_options(temperature=np.float32(0.5), ignore_eos=np.bool_(True), min_p=np.int8(1))
    assert options.temperature == 0.5


def test_interventions_need_no_with_block(nano):
    changed = nano.intervene(grok1.AblateExperts(0))
    with changed as same:
        assert same is changed
    assert isinstance(changed, grok1.Model)
    assert changed.engine.interventions
    assert not nano.engine.interventions


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_a_stream_that_was_interrupted_says_what_to_do(failure, toy):
    stream = toy.stream("The first", temperature=0, max_new_tokens=4)

    def fail():
        yield "The"
        raise failure

    stream._pieces = fail()
    assert next(stream) == "The"
    with pytest.raises(type(failure)):
        next(stream)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"before its end; begin a new one$"):
            next(stream)
    assert stream.completion is None
