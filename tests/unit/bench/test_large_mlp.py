"""The models of the bench have the sizes that their results are told with."""

import pytest

from hvdkit.bench import large_mlp


@pytest.mark.parametrize(("build", "weights"), [(large_mlp.build, 5_824_522), (large_mlp.build_larger, 49_600_522)])
def test_the_number_of_weights(build, weights):
    assert build((28, 28, 1), 10).count_params() == weights
