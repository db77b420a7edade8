"""Which assignments of a metric's `update_state` are sums with what its variable was."""

import pytest

from hvdkit.callbacks import own_metrics


class Metric:
    def adds(self, y):
        self.total.assign(self.total + y)

    def subtracts_on_the_right(self, y):
        self.total.assign(y - 1 + self.total)

    def adds_by_name(self, y):
        new = self.total + y
        self.total.assign(new)

    def adds_by_function(self, y):
        self.total.assign(keras.ops.cast(keras.ops.add(self.total, y), "float32"))  # noqa: F821 - only read
        self.count.assign_add(1)

    def takes_the_largest(self, y):
        self.total.assign(max(self.total, y))

    def forgets(self, y):
        self.total.assign(0.9 * self.total + 0.1 * y)

    def keeps_the_last(self, y):
        last = y[-1]
        self.total.assign(last)
        self.count.assign(self.count + 1)


@pytest.mark.parametrize(
    ("method", "assigned"),
    [
        ("adds", ()),
        ("subtracts_on_the_right", ()),
        ("adds_by_name", ()),
        ("adds_by_function", ()),
        ("takes_the_largest", ("total",)),
        ("forgets", ("total",)),
        ("keeps_the_last", ("total",)),
    ],
)
def test_what_is_no_sum_is_found(method, assigned):
    assert own_metrics.assigned(getattr(Metric, method)) == assigned


def test_a_method_without_source_is_passed_over():
    assert own_metrics.assigned(len) == ()
