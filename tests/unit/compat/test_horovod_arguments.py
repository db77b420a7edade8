import numpy as np
import pytest

from hvdkit import UsageError
from hvdkit.compat.horovod_arguments import of_both_modules
from hvdkit.compression import Compression


def _changed(arguments):
    """The arguments that are not the default."""
    defaults = (None, 1.0, "", Compression.none)
    return {key: given for key, given in arguments.items() if isinstance(given, bool) or given not in defaults}


@of_both_modules("tensor average device_dense device_sparse compression op prescale_factor postscale_factor name")
def reduce(value, name=None, average=None, prescale_factor=1.0, op=None, compression=Compression.none, device_dense=""):
    return _changed(locals())


@of_both_modules("tensor device_dense compression op name")
def scatter(value, name=None, op=None, device_dense="", compression=Compression.none):
    return _changed(locals())


@of_both_modules("tensor root_rank name")
def send(value, root_rank, name=None):
    return value, root_rank, name


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (lambda: reduce(7), {}),
        (lambda: reduce(tensor=7), {}),
        (lambda: reduce(7, None), {}),
        (lambda: reduce(7, False), {"average": False}),
        (lambda: reduce(7, np.bool_(False), op=2), {"average": False, "op": 2}),
        (lambda: reduce(7, None, "/cpu:0"), {"device_dense": "/cpu:0"}),
        (lambda: reduce(7, "loss"), {"name": "loss"}),
        (lambda: reduce(7, "loss", True), {"name": "loss", "average": True}),
        (lambda: reduce(7, None, None, 0.5, 2), {"prescale_factor": 0.5, "op": 2}),
        (lambda: scatter(7, "loss"), {"name": "loss"}),
        (lambda: scatter(7, "", Compression.fp16, 2), {"compression": Compression.fp16, "op": 2}),
        (lambda: scatter(7, "gpu:0"), {"device_dense": "gpu:0"}),
        (lambda: scatter(7, None, 2), {"op": 2}),
        (lambda: scatter(tensor=7, op=2), {"op": 2}),
    ],
)
def test_the_order_is_recognized_by_types(found, expected):
    assert found() == {"value": 7, **expected}


def test_alike_orders_are_not_judged():
    assert send(7, root_rank := object()) == send(tensor=7, root_rank=root_rank) == (7, root_rank, None)


def test_what_fits_neither_order_is_one_sentence():
    with pytest.raises(UsageError, match=r"reduce was given \('loss', ''\), which are neither average, device_dense"):
        reduce(7, "loss", "")
    with pytest.raises(TypeError, match="multiple values"):
        reduce(7, False, average=True)


class Wrapper:
    @of_both_modules("optimizer name use_locking device_dense")
    def __init__(self, optimizer, name=None, device_dense="", use_locking=False):
        self.given = optimizer, name, device_dense, use_locking


def test_methods_have_both_orders_too():
    assert Wrapper(7, "sgd", True, "cpu").given == (7, "sgd", "cpu", True)
    assert Wrapper(7, "sgd", "cpu").given == Wrapper(optimizer=7, name="sgd", device_dense="cpu").given
