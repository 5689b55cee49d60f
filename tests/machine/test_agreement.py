"""What processes compare, and how they say where they differ; the others are played by a table."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grok1
from grok1 import factory
from grok1.machine import agreement
from grok1.machine.processes import OtherProcessError


class Service:
    """JAX's coordination service, as process 0 of three sees it; the others repeat its words.

    Attributes:
      changes: What processes 1 and 2 say otherwise.
      table: What has been written.
    """

    def __init__(self):
        self.changes: dict[int, dict[str, str]] = {}
        self.table: dict[str, str] = {}

    def key_value_set(self, key, value):
        name, _, own = key.rpartition("/")
        assert own == "0"
        for rank in range(3):
            words = json.loads(value) | self.changes.get(rank, {})
            self.table[f"{name}/{rank}"] = json.dumps(words)

    def key_value_dir_get(self, name):
        return [(key, value) for key, value in self.table.items() if key.startswith(name)]

    def key_value_delete(self, key):
        del self.table[key]


@pytest.fixture
def service(monkeypatch) -> Service:
    service = Service()
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    monkeypatch.setattr(agreement.jax_distributed.global_state, "client", service)
    monkeypatch.setattr(agreement, "_numbers", {})
    return service


def words_of(service, **items):
    """What process 0 writes of its items."""
    agreement.agree("call", lambda: items)
    words = json.loads([value for key, value in service.table.items() if key.endswith("/0")][-1])
    del words["call"]
    return words


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([1, 2, 3], np.array([1, 2, 3])),
        ([1, 2, 3], jnp.array([1, 2, 3])),
        ((1, 2), range(1, 3)),
        (0, 0.0),
        (np.float32(0.5), 0.5),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({5, 6, 7}, frozenset((7, 6, 5))),
        (grok1.AblateExperts(3, layers=range(2)), grok1.AblateExperts(3, layers=(0, 1))),
    ],
    ids=repr,
)
def test_what_means_the_same_is_the_same(service, one, other):
    assert words_of(service, it=one) == words_of(service, it=other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1", 1),
        (None, "None"),
        (True, 1.5),
        (["a", "b"], ["ab"]),
        (np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32)),
        (np.zeros(100), np.full(100, 1e-9)),
        ("x" * 200, "x" * 199 + "y"),
        (grok1.AblateExperts(3), grok1.AblateExperts(4)),
        (grok1.AblateExperts(3), grok1.ScaleHeads(3, 0.0)),
        (
            grok1.ScaleHeads(3, positions=slice(1, None)),
            grok1.ScaleHeads(3, positions=slice(2, None)),
        ),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_differs_differs(service, one, other):
    assert words_of(service, it=one) != words_of(service, it=other)


def test_every_difference_is_named_with_those_who_have_it(service):
    service.changes = {1: {"seed": "1"}, 2: {"seed": "1", "dtype": "'bfloat16'"}}
    message = (
        "processes disagree about load: seed is 0 in process 0, 1 in processes 1, 2; dtype is "
        "'float32' in processes 0, 1, 'bfloat16' in process 2. Give all of them the same"
    )
    with pytest.raises(OtherProcessError) as error:
        agreement.agree("load", lambda: {"seed": 0, "dtype": "float32", "layers": None})
    assert str(error.value) == message


def test_a_model_is_made_by_one_version_of_the_library(monkeypatch):
    said = []
    monkeypatch.setattr(factory, "agree", lambda what, items: said.append((what, items())))
    for sources in ("a" * 64, "b" * 64):
        monkeypatch.setattr(factory, "source_hash", lambda sources=sources: sources)
        grok1.random_model(grok1.TOY, mesh=(1, 1))
    (what, first), (_, second) = said
    assert (what, first["jax"]) == ("random_model", jax.__version__)
    assert first["grok1"] == f"{grok1.__version__} {'a' * 12}"
    assert {name for name in first if first[name] != second[name]} == {"grok1"}


def test_another_call_is_named(service):
    service.changes = {2: {"call": "score"}}
    with pytest.raises(OtherProcessError, match="different calls, logits in processes 0, 1, score"):
        agreement.agree("logits", lambda: {"tokens": [1]})


def test_what_was_said_before_is_taken_back(service):
    for _ in range(5):
        agreement.agree("logits", lambda: {"tokens": [1]})
    own = [key for key in service.table if key.endswith("/0")]
    assert len(own) == 1


def test_a_process_that_is_alone_writes_nothing_out():
    agreement.agree("logits", lambda: pytest.fail("it was asked what it does"))
