"""Every public name of Horovod's two modules is here, and takes the same arguments, in the order of either."""

import inspect

import pytest

import hvdkit as hvd
from hvdkit.data import compute_service

_MISSING = inspect.Parameter.empty
_KERAS = pytest.importorskip("horovod.tensorflow.keras", reason="Horovod is not installed")
_HOROVOD = pytest.importorskip("horovod.tensorflow")
_SERVICE = pytest.importorskip("horovod.tensorflow.data.compute_service")


def _public(module):
    return [n for n, v in vars(module).items() if not n.startswith("_") and callable(v)]


# What Horovod's modules need themselves; its documentation names none of these.
_INTERNAL = {
    "LocalGradientAggregationHelper",
    "check_extension",
    "check_num_rank_power_of_2",
    "handle_average_backwards_compatibility",
    "is_version_greater_equal_than",
    "refs_to_vars",
    "split_list",
    "vars_to_refs",
}
_HIDDEN = {"gpu_available"}  # Horovod caches its result by a decorator that shows *args and **kwargs
CASES = [
    *[(_KERAS, hvd, n) for n in _public(_KERAS)],
    *[(_HOROVOD, hvd, n) for n in _public(_HOROVOD)],
    *[(_KERAS.callbacks, hvd.callbacks, n) for n in _public(_KERAS.callbacks)],
    *[(_KERAS.elastic, hvd.elastic, n) for n in _KERAS.elastic.__all__],
    *[(_HOROVOD.elastic, hvd.elastic, n) for n in _HOROVOD.elastic.__all__],
    *[(_SERVICE, compute_service, n) for n in compute_service.__all__],
]


@pytest.mark.parametrize(
    ("theirs", "ours", "name"),
    [case for case in CASES if case[2] not in _INTERNAL],
    ids=lambda v: v if isinstance(v, str) else v.__name__,
)
def test_the_arguments_of(theirs, ours, name):
    ours, theirs = getattr(ours, name), getattr(theirs, name)
    expected, found = list(_parameters(theirs).values()), _parameters(ours)
    if name in _HIDDEN:
        expected = []
    other_order = getattr(getattr(ours, "__init__", None) if inspect.isclass(ours) else ours, "horovod_order", [])
    if (
        other_order and [p.name for p in expected] == other_order
    ):  # recognized by types: see `hvdkit.compat.horovod_arguments`
        first = next(iter(found.values()))
        _compare([first, *(found[p.name] for p in expected[1:])], expected, name, ignore_names=1)
    else:
        _compare(list(found.values()), expected, name)


def _parameters(function):
    # A wrapt proxy's class has a descriptor where inspect would look for a wrapped function.
    return dict(inspect.signature(function, follow_wrapped=False).parameters)


def _compare(found, expected, name, ignore_names=0):
    open_ended = any(p.kind is p.VAR_KEYWORD for p in found)
    for (place, parameter), mine in zip(enumerate(expected), [*found, *[None] * 20], strict=False):
        if mine is None or mine.kind in (mine.VAR_POSITIONAL, mine.VAR_KEYWORD):
            assert open_ended, f"argument {place} of {name}, {parameter}, is not accepted"
            break
        if parameter.kind is not parameter.POSITIONAL_ONLY and place >= ignore_names:
            assert mine.name == parameter.name, f"argument {place} of {name} is {mine}, Horovod's is {parameter}"
        if parameter.default is not _MISSING:
            assert _same_meaning(mine.default, parameter.default), f"{name}: {mine} has another default: {parameter}"
    for extra in found[len(expected) :]:
        assert extra.default is not _MISSING or extra.kind in (extra.VAR_POSITIONAL, extra.VAR_KEYWORD)


def _same_meaning(mine, theirs):
    if isinstance(theirs, _HOROVOD.ProcessSet):  # the global one
        return mine is None or mine is theirs
    if inspect.isclass(theirs):  # Compression.none
        return mine.__name__ == theirs.__name__
    if theirs == _HOROVOD.Average and isinstance(theirs, int) and not isinstance(theirs, bool):
        return mine in (None, theirs)
    return mine == theirs


def test_horovods_constants_are_here():
    for name in ("Average", "Sum", "Adasum", "Min", "Max", "Product", "global_process_set", "ProcessSet"):
        assert getattr(hvd, name) is getattr(_HOROVOD, name) or getattr(hvd, name) == getattr(_HOROVOD, name)
