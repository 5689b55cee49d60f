"""The CUDA kernels of norms and the router against float64, on a CPU in place of a device."""

import numpy as np
import pytest

from grok1.ops.cuda import shapes_of_rows
from grok1.ops.cuda.shapes_of_rows import Router
from tests.ops import standin
from tests.ops.cuda_cases import LAYER, assert_close

pytestmark = pytest.mark.not_on_gpu("a CPU stands for a device there")

ROWS = [(3, 160), (1, 2048), (2, 40), (1, 37), (1, 9000)]
ROUTES = [
    (5, Router(96, 8, 2, None, False)),
    (2, Router(40, 4, 3, 30.0, True)),
    (1, Router(300, 32, 1, None, False)),
    (1, Router(2100, 6, 2, None, False)),  # of which a thread has several numbers
    (2, Router(6144, 8, 2, None, False)),  # and reads weights of before they are needed
    (1, Router(45, 1, 1, None, True)),
]
WIDE = ROUTES[4]


def norms(case):
    names = ("norm", "add_norm", "add_norm_and_norm")
    return [shapes_of_rows.norms(case[0], case[1], 1e-5, name) for name in names]


def add_and_route(tokens, router):
    return shapes_of_rows.add_and_route(tokens, router, 1e-5)


SUMS = [(tokens, router.width) for tokens, router in ROUTES]


@pytest.fixture(scope="module")
def library():
    return standin.build(
        [
            *(kernel for case in (*ROWS, *SUMS) for kernel in norms(case)),
            *(shapes_of_rows.route(*case) for case in ROUTES),
            *(add_and_route(*case) for case in ROUTES),
        ]
    )


@pytest.fixture
def rng():
    return np.random.default_rng(14)


def normed(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * scale


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_norms(library, rng, case):
    x, branch = (rng.standard_normal(case).astype(np.float32) for _ in "xb")
    scales = [rng.random((2, case[1])).astype(np.float32) for _ in range(2)]
    exact, of_branch = x.astype(float), branch.astype(float)
    norm, add, add_and_norm = norms(case)
    (alone,) = standin.run(library, norm, x, scales[0], LAYER)
    assert_close(alone, normed(exact, scales[0][1]), 1e-6)
    expected = exact + normed(of_branch, scales[0][1])
    (added,) = standin.run(library, add, x, branch, scales[0], LAYER)
    assert_close(added, expected, 1e-6)
    both = standin.run(library, add_and_norm, x, branch, *scales, LAYER)
    assert_close(both[0], expected, 1e-6)
    assert_close(both[1], normed(expected, scales[1][1]), 1e-6)


@pytest.mark.parametrize("case", ROUTES, ids=str)
def test_routing(library, rng, case):
    tokens, (width, num_experts, selected, cap, renormalize) = case
    x = rng.standard_normal((tokens, width)).astype(np.float32)
    routers = rng.standard_normal((2, width, num_experts)).astype(np.float32)
    routers[1, :, -1] = routers[1, :, 0]  # of equals the first comes first
    found = standin.run(library, shapes_of_rows.route(*case), x, routers, LAYER)
    logits = x.astype(float) @ routers[1]
    logits = logits if cap is None else cap * np.tanh(logits / cap)
    probs = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probs /= probs.sum(axis=-1, keepdims=True)
    assert_close(found[0], logits, 1e-6)
    assert_close(found[1], probs, 1e-5)
    order = np.argsort(-found[1], axis=-1, kind="stable")[:, :selected]
    np.testing.assert_array_equal(found[2], order)
    weights = np.take_along_axis(probs, order, axis=-1)
    weights = weights / weights.sum(axis=-1, keepdims=True) if renormalize else weights
    assert_close(found[3], weights, 1e-5)


def test_routing_of_no_numbers_chooses_experts_that_exist(library):
    x, routers = np.full((5, 96), np.nan, np.float32), np.ones((2, 96, 8), np.float32)
    _, _, indices, weights = standin.run(
        library, shapes_of_rows.route(*ROUTES[0]), x, routers, LAYER
    )
    np.testing.assert_array_equal(indices, [[0, 1]] * 5)
    assert np.isnan(weights).all()


@pytest.mark.parametrize("case", ROUTES, ids=str)
def test_a_sum_that_is_routed_is_the_sum_and_its_route(library, rng, case):
    tokens, router = case
    x, branch = (rng.standard_normal((tokens, router.width)).astype(np.float32) for _ in "xb")
    scales = [rng.random((2, router.width)).astype(np.float32) for _ in range(2)]
    routers = rng.standard_normal((2, router.width, router.num_experts)).astype(np.float32)
    *_, add_and_norm = norms((tokens, router.width))
    added = standin.run(library, add_and_norm, x, branch, *scales, LAYER)
    routed = standin.run(library, shapes_of_rows.route(*case), added[1], routers, LAYER)
    found = standin.run(library, add_and_route(*case), x, branch, *scales, routers, LAYER)
    for one, expected in zip(found, (*added, *routed), strict=True):
        np.testing.assert_array_equal(one, expected)


SUM = test_a_sum_that_is_routed_is_the_sum_and_its_route
BREAKS = [
    ("read(router, 0, early[0])", "read(router, 1, early[0])", SUM, WIDE),
    ("read(router, 1, early[1])", "read(router, 0, early[1])", SUM, WIDE),
    ("is_left && lane != best[a]", "is_left", test_routing, ROUTES[0]),
    ("is_upper ? sums[i] : sums[i + HALF]", "sums[i]", test_routing, ROUTES[0]),
]
"""A text of the sources, what stands there when it is broken, and the test and case that see it."""


@pytest.mark.parametrize(
    ("text", "broken", "test", "case"),
    BREAKS,
    ids=lambda of: getattr(of, "__name__", str(of))[:30],
)
def test_a_broken_router_is_noticed(rng, text, broken, test, case):
    tokens, router = case
    make = norms((tokens, router.width))[-1], shapes_of_rows.route(*case), add_and_route(*case)
    library = standin.build(make, [(text, broken)])
    with pytest.raises(AssertionError):
        test(library, rng, case)
