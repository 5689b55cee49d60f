"""What interventions take, and what they refuse in which words."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from grok1.study.router_interventions import AblateExperts, ForceExperts, SelectExperts
from grok1.study.stream_interventions import AddToResidual, CapLayers, Patch, ScaleHeads


def test_iterators_serve_more_than_once(nano, tokens):
    def made(kind):
        return (
            AblateExperts(kind((1, 2)), layers=kind((0, 5))),
            ForceExperts(kind((3, 4)), layers=kind((1,))),
            ScaleHeads(kind((0, 7)), positions=kind((2, 3))),
        )

    with nano.intervene(*made(tuple)) as outer, outer.intervene(AblateExperts(0)) as inner:
        expected = inner.logits(tokens)
    for kind in (iter, lambda numbers: dict.fromkeys(numbers).keys()):
        with nano.intervene(*made(kind)) as outer, outer.intervene(AblateExperts(0)) as inner:
            np.testing.assert_array_equal(inner.logits(tokens), expected)
    assert repr(ScaleHeads(iter((0, 7)))) == "ScaleHeads(heads=(0, 7), factor=0.0)"


def of_any_type(value: Any) -> Any:
    """A value that a type checker would refuse, too."""
    return value


@pytest.mark.parametrize(
    ("intervention", "message"),
    [
        (AblateExperts(8), "^AblateExperts: experts must be from 0 to 7, found 8$"),
        (AblateExperts(-1), "^AblateExperts: experts must be from 0 to 7, found -1$"),
        (
            AblateExperts(of_any_type(1.5)),
            "^AblateExperts: experts must be whole numbers, found 1.5$",
        ),
        (
            AblateExperts(of_any_type("12")),
            "^AblateExperts: experts must be whole numbers, found '12'$",
        ),
        (AblateExperts(range(8), reroute=True), "^AblateExperts: reroute leaves no expert"),
        (
            AblateExperts(1, reroute=of_any_type("no")),
            "^AblateExperts: reroute must be True or False, found 'no'$",
        ),
        (AblateExperts(1, layers=12), "^AblateExperts: layers must be from 0 to 11, found 12$"),
        (
            AblateExperts(1, layers=(0, -1)),
            "^AblateExperts: layers must be from 0 to 11, found -1$",
        ),
        (
            AblateExperts(1, positions=96),
            "^AblateExperts: positions must be from 0 to 95, found 96",
        ),
        (
            AblateExperts(1, positions=(3, -1)),
            "^AblateExperts: positions must be from 0 to 95, found -1$",
        ),
        (
            AblateExperts(1, positions=slice(-3, None)),
            "^AblateExperts: positions must be from 0 to 95, found -3$",
        ),
        (
            AblateExperts(1, positions=slice(96, None)),
            "^AblateExperts: positions must be from 0 to 95, found 96$",
        ),
        (
            AblateExperts(1, positions=slice(3, 9)),
            r"^AblateExperts: positions as a slice go on to the end, .* found slice\(3, 9, None\)$",
        ),
        (
            ScaleHeads(1, positions=()),
            "^ScaleHeads: positions names none; name at least one, or leave positions= out for all",
        ),
        (
            AblateExperts(1, layers=np.zeros(0, int)),
            "^AblateExperts: layers names none; name at least one, or leave layers= out for all$",
        ),
        (
            AddToResidual(np.zeros((2, 64)), layers=(3, 3)),
            r"^AddToResidual: layers must differ where each has vectors of its own, found \(3, 3\)",
        ),
        *(
            (
                kind(np.zeros((12, *shape), int), layers=range(11, -1, -1)),
                f"^[A-Za-z]+: {what} of all 12 layers may be in their order or in that of",
            )
            for kind, shape, what in (
                (AddToResidual, (64,), "vectors"),
                (ForceExperts, (5, 1), "experts"),
                (functools.partial(Patch, "residual"), (5, 64), "values"),
            )
        ),
        (
            ForceExperts(np.zeros((2, 5, 1), int), layers=(3, 3)),
            r"^ForceExperts: layers must differ where each has experts of its own, found \(3, 3\)",
        ),
        (
            Patch("residual", np.zeros((12, 3, 64)), positions=slice(3, None)),
            "^Patch: positions must be from 0 to 2, found 3$",
        ),
        (
            ForceExperts(np.full((12, 5, 1), 4), positions=5),
            "^ForceExperts: positions must be from 0 to 4, found 5$",
        ),
        (ForceExperts((1, 1)), "^ForceExperts: the experts of a token must differ"),
        (ForceExperts((1, 8)), "^ForceExperts: experts must be from 0 to 7, found 8$"),
        (ForceExperts((1, -1)), "^ForceExperts: experts must be from 0 to 7, found -1$"),
        (ForceExperts(0.5), "^ForceExperts: experts must be whole numbers, found float64$"),
        (ForceExperts([[1, 2]]), r"^ForceExperts: .*array \[layers, tokens, experts\].*\[1, 2\]$"),
        (
            ForceExperts((1, 2), (0.5,)),
            r"^ForceExperts: weights must have the shape of experts, \[2\], found \[1\]$",
        ),
        (
            ForceExperts(np.zeros((3, 5, 1), int), layers=(1, 2)),
            "^ForceExperts: experts are of 3 layers; give those of the 2 that layers= names, or of "
            "all 12$",
        ),
        (SelectExperts(0), "^SelectExperts: count must be from 1 to 8, found 0$"),
        (SelectExperts(9), "^SelectExperts: count must be from 1 to 8, found 9$"),
        (CapLayers(13), "^CapLayers: num_layers must be from 0 to 12, found 13$"),
        (CapLayers([2, 3]), r"^CapLayers: num_layers must be from 0 to 12, found \[2, 3\]$"),
        (CapLayers(3, layers=2), "^CapLayers: layers= has no meaning here"),
        (
            AddToResidual(np.zeros(63)),
            r"^AddToResidual: vector must have shape \[64\] or \[layers, 64\], found \[63\]$",
        ),
        (AddToResidual(np.full(64, np.nan)), "^AddToResidual: vector must be finite numbers$"),
        (AddToResidual(["a"]), "^AddToResidual: vector must be numbers, found"),
        (AddToResidual(["1"] * 64), "^AddToResidual: vector must be numbers, found"),
        (AddToResidual(np.ones(64, complex)), "^AddToResidual: vector must be numbers, found"),
        (Patch("residual", of_any_type(None)), "^Patch: values must be numbers, found None$"),
        (ScaleHeads(1, of_any_type(None)), "^ScaleHeads: factor must be numbers, found None$"),
        (
            AddToResidual(np.zeros(64), "moe_out"),
            "^AddToResidual: point must be one of residual_in, residual_mid, residual, found",
        ),
        (AddToResidual(np.zeros((3, 64))), "^AddToResidual: vectors are of 3 layers"),
        (Patch("heads", np.zeros((12, 3, 64))), "^Patch: point must be one of .*, router, found"),
        *(
            (
                Patch(
                    "router", {"expert_indices": experts, "expert_weights": experts / 2}, **where
                ),
                f"^Patch: {message}",
            )
            for experts, where, message in (
                (np.full((3, 5, 1), 4), {}, "experts are of 3 layers; give those of the 12 that"),
                (np.full((12, 5, 1), 8), {}, "experts must be from 0 to 7, found 8$"),
                (np.full((12, 5, 1), 4), {"positions": 5}, "positions must be from 0 to 4, fou"),
                (np.full((12, 5, 1), 4), {"layers": 12}, "layers must be from 0 to 11, found 12$"),
            )
        ),
        (
            Patch("router", dict.fromkeys(("expert_indices", "expert_weights"), np.ones(2, int))),
            r"^Patch: expert_indices must have shape \[layers, tokens, experts\], found \[2\]$",
        ),
        (Patch("router", np.zeros((12, 3, 2))), '^Patch: at the point "router" values must be a'),
        (Patch("residual", {}), "^Patch: the trace has no residual; it has nothing$"),
        (
            Patch("residual", np.zeros((12, 3, 63))),
            r"^Patch: values must have shape \[layers, tokens, 64\], found \[12, 3, 63\]$",
        ),
        (
            Patch("residual", np.zeros((12, 97, 64)), positions=96),
            "^Patch: positions must be from 0 to 95, found 96$",
        ),
        (Patch("residual", np.zeros((12, 97, 64))), "^Patch: values are of 97 tokens, and the con"),
        (
            Patch("residual", np.zeros((12, 3, 64)), positions=3),
            "^Patch: positions must be from 0 to 2, found 3$",
        ),
        (ScaleHeads(16), "^ScaleHeads: heads must be from 0 to 15, found 16$"),
        (AddToResidual(np.full(64, 1e300)), "^AddToResidual: vector must be finite numbers$"),
        (ScaleHeads(1, float("inf")), "^ScaleHeads: factor must be finite numbers$"),
        (
            ScaleHeads(1, of_any_type((1.0, 2.0))),
            r"^ScaleHeads: factor must be one number, found shape \[2\]$",
        ),
    ],
)
def test_bad_input(nano, intervention, message):
    with pytest.raises(ValueError, match=message), nano.intervene(intervention):
        pass


def test_arrays_without_axes_are_numbers(nano, tokens):
    for three in (np.int64(3), np.array(3), jnp.int32(3)):
        given = AblateExperts(of_any_type(three), layers=of_any_type(three))
        expected = nano.intervene(AblateExperts(3, layers=3)).logits(tokens)
        np.testing.assert_array_equal(nano.intervene(given).logits(tokens), expected)


def test_numbers_too_small_for_float32_are_zero_whatever_numpy_is_told(nano):
    with np.errstate(all="raise"):
        nano.intervene(AddToResidual(np.full(64, 1e-50)), ScaleHeads(1, 1e-42))
        with pytest.raises(ValueError, match=r"^ScaleHeads: factor must be finite numbers$"):
            nano.intervene(ScaleHeads(1, 1e42))


def test_only_interventions_intervene(nano):
    message = r"^intervene takes interventions .* found int$"
    with pytest.raises(TypeError, match=message), nano.intervene(of_any_type(3)):
        pass
