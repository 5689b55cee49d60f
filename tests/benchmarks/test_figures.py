"""Ratios of what is measured in turns."""

from benchmarks.figures import interleave, ratio


def test_interleaved_ratios_are_medians_of_rounds():
    order = []
    rates = {"a": iter([10, 1, 6]), "b": iter([5, 1, 1])}

    def contestant(name):
        def measure():
            order.append(name)
            return next(rates[name])

        return measure

    said = []
    rounds = interleave({name: contestant(name) for name in rates}, 3, said.append)
    assert order == ["a", "b"] * 3
    assert said == ["round 1 of 3", "round 2 of 3", "round 3 of 3"]
    assert ratio(rounds, "a", "b") == 2


def test_a_bound_is_the_larger_of_what_stands_on_both_sides():
    rates = {"roofline": iter([5.0, 20.0, 10.0]), "grok1": iter([7.0, 9.0])}
    rounds = interleave({name: lambda it=it: next(it) for name, it in rates.items()}, 2, print)
    assert rounds == {"roofline": [20.0, 20.0], "grok1": [7.0, 9.0]}
