"""The search for the best cuts of a step's products, with a CPU in place of a device."""

import dataclasses
import math

import numpy as np
import pytest

from grok1.config import GROK_1
from grok1.ops.cuda import calls
from grok1.ops.cuda.shapes import Cut
from tests.helpers import slow
from tests.ops import standin
from tools import gpu_cuts
from tools.gpu_cuts import NAMES, Choice, Product

pytestmark = pytest.mark.not_on_gpu("a CPU stands for a device there")

SMALL = dataclasses.replace(
    GROK_1, emb_size=256, widening_factor=6, key_size=32, num_q_heads=16, num_kv_heads=8
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 8, 32])
def test_it_begins_with_what_the_library_has(name, rows):
    product = Product(name, rows, 8)
    _, kernel = product.kernels()
    choice = gpu_cuts.chosen(product)
    assert gpu_cuts.kernel_of(product, choice) == kernel
    others = [gpu_cuts.kernel_of(product, of) for of in gpu_cuts.neighbours(choice)]
    assert len({*others} - {kernel, None}) >= 3
    assert product.kernels()[1] == kernel  # nothing stays behind


# But for 4-bit gate and up, which give digits of numbers that the cut puts together.
@pytest.mark.parametrize(
    "name", ["down", "output", *(pytest.param(NAMES[i], marks=slow) for i in (0, 2, 5))]
)
def test_a_product_is_the_same_however_it_is_cut(name, monkeypatch):
    monkeypatch.setattr(calls, "call", standin.call)
    monkeypatch.setattr(gpu_cuts, "_STACK_BYTES", 1)
    product = Product(name, 2, 1, SMALL)
    operands = gpu_cuts.Operands(product)
    _, kernel = product.kernels()
    kernels = (
        gpu_cuts.kernel_of(product, of) for of in gpu_cuts.neighbours(gpu_cuts.chosen(product))
    )
    other = next(of for of in kernels if of not in (kernel, None) and of.grid != kernel.grid)
    found, expected = (np.asarray(operands.launch(of)) for of in (other, kernel))
    if name == "projections":  # parts that are to be added up
        found, expected = found.sum(axis=1), expected.sum(axis=1)
    assert len(found) == operands.layers == 2
    assert np.abs(expected[0] - expected[1]).max() > 0  # each layer has weights of its own
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_it_walks_to_the_best_and_no_further():
    measured = []

    def seconds(choices):
        measured.extend(choices)
        times = {}
        for choice in choices:
            cut, resident = choice
            far = abs(math.log2(cut.parts / 32)) + abs(cut.stages - 5) + abs(resident - 3)
            times[choice] = math.inf if cut.across == 2 else 10 + far
        return times

    best, times = gpu_cuts.fastest(Choice(Cut(4, 1, 8, 4), 2), seconds)
    assert best == Choice(Cut(4, 1, 32, 5), 3)
    assert sorted(measured) == sorted(times)  # none twice


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "0"], "the kernels take 1 to 64, found 0"),
        (["--rows", "65"], "the kernels take 1 to 64, found 65"),
        (["--shards", "3"], "a matrix is cut into 1, 2, 4 or 8, found 3"),
        ([], "the kernels are CUDA's, and this is a cpu"),
    ],
)
def test_what_it_cannot_measure_it_says(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu_cuts.main(arguments)
    assert message in f"{ended.value}{capsys.readouterr().err}"
