"""Which weights form a fragment of streaming DiLoCo, and when it is synchronized."""

import numpy as np
import pytest

from hvdkit.optimizers.fragments import divide, timetable


@pytest.mark.parametrize("fragments", [1, 2, 3, 5, 7])
def test_each_variable_is_in_one_fragment_and_none_is_empty(fragments):
    sizes = np.random.default_rng(fragments).integers(0, 1000, size=23).tolist()
    found = divide(sizes, fragments)
    assert sorted(place for places in found for place in places) == list(range(23))
    assert len(found) == fragments
    assert all(found)
    totals = [sum(sizes[place] for place in places) for places in found]
    assert max(totals) <= sum(sizes) / fragments + max(sizes) / 3  # Graham's bound for the largest first, in this form


def test_equal_layers_are_dealt_out_over_depth():
    layers = [400, 40] * 6  # kernel and bias of six layers
    assert divide(layers, 3) == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]


def test_variables_without_elements_leave_no_fragment_empty():
    assert divide([0, 0, 0], 3) == [[0], [1], [2]]


@pytest.mark.parametrize(("steps", "fragments"), [(8, 1), (8, 4), (10, 3), (7, 7), (100, 6)])
def test_each_fragment_comes_once_in_its_steps_and_at_even_distances(steps, fragments):
    table = timetable(steps, fragments)
    at = [next(t for t in range(1, steps + 1) if table[t % steps] == p) for p in range(fragments)]
    assert len(table) == steps
    assert sum(p < fragments for p in table) == fragments
    assert at[-1] == steps, "a single fragment is synchronized after step H, as without fragments"
    apart = np.diff([0, *at])
    assert set(apart.tolist()) <= {steps // fragments, -(-steps // fragments)}
