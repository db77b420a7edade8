"""Which gradients are sent together."""

import numpy as np
import pytest
import tensorflow as tf

from hvdkit.errors import UsageError
from hvdkit.optimizers import groups


@pytest.mark.parametrize(
    ("lengths", "smallest", "expected"),
    [
        ([1, 1, 1, 1], 8, [[2, 3], [0, 1]]),  # the last layers first, each bucket in layer order
        ([5, 1, 1, 2], 8, [[3], [1, 2], [0]]),
        ([1, 2, 2], 8, [[2], [0, 1]]),
        ([1, 2, 2, 2], 12, [[2, 3], [0, 1]]),
        ([1, 5, 5], 8, [[2], [0, 1]]),  # the rest is too small for a bucket of its own
        ([9], 8, [[0]]),
        ([1, 1], 100, [[0, 1]]),
        ([], 8, [[]]),
    ],
)
def test_a_bucket_has_at_least_so_many_bytes(lengths, smallest, expected):
    gradients = [tf.zeros([length]) for length in lengths]
    assert groups.buckets(list(range(len(lengths))), gradients, smallest) == expected


def test_only_the_given_places_are_in_buckets_and_bytes_count_by_dtype():
    gradients = [tf.zeros([4], tf.float16), None, tf.zeros([4], tf.float16), tf.zeros([4])]
    assert groups.buckets([0, 2, 3], gradients, 16) == [[3], [0, 2]]


@pytest.mark.parametrize(("number", "expected"), [(1, [[4, 6, 8]]), (2, [[6, 8], [4]]), (99, [[8], [6], [4]])])
def test_a_number_of_groups_begins_with_the_last_layers(number, expected):
    assert groups.divide([4, 6, 8], number) == expected


def test_variables_in_no_list_are_alone():
    variables = [tf.Variable(np.zeros(1)) for _ in range(4)]
    found = groups.by_variable([0, 1, 2, 3], variables, [[variables[3], variables[0]]])
    assert found == [[0, 3], [1], [2]]


@pytest.mark.parametrize("given", [0, -1, True, 1.5, "two"])
def test_what_is_no_division_is_refused(given):
    with pytest.raises(UsageError, match=r"groups must be .*" + repr(given)):
        groups.check(given)
