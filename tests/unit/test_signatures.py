"""Every public name of Horovod's Keras layer is here, and takes the same arguments, in the same order."""

import inspect

import pytest

import hvdkit as hvd

_MISSING = inspect.Parameter.empty
_KERAS = pytest.importorskip("horovod.tensorflow.keras", reason="Horovod is not installed")
_HOROVOD = pytest.importorskip("horovod.tensorflow")


def _public(module):
    return [n for n, v in vars(module).items() if not n.startswith("_") and callable(v)]


_NOT_OF_THE_API = {"is_version_greater_equal_than"}
_OTHERS = [
    "Compression",
    "DistributedGradientTape",
    "PartialDistributedGradientTape",
    "allgather_object",
    "alltoall",
    "broadcast_object",
    "broadcast_variables",
    "grouped_allgather",
    "grouped_allreduce",
    "grouped_reducescatter",
    "join",
    "is_homogeneous",
    "SyncBatchNormalization",
]
CASES = [
    *[(_KERAS, hvd, n) for n in _public(_KERAS) if n not in _NOT_OF_THE_API],
    *[(_HOROVOD, hvd, n) for n in _OTHERS],
    *[(_KERAS.callbacks, hvd.callbacks, n) for n in _public(_KERAS.callbacks) if n not in _NOT_OF_THE_API],
    *[(_KERAS.elastic, None, n) for n in _KERAS.elastic.__all__],
]


@pytest.mark.parametrize(("theirs", "ours", "name"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_the_arguments_of(theirs, ours, name):
    ours = ours or hvd.elastic
    expected = inspect.signature(getattr(theirs, name)).parameters
    # A wrapt proxy's class has a descriptor where inspect would look for a wrapped function.
    found = inspect.signature(getattr(ours, name), follow_wrapped=False).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in found.values())
    for (place, parameter), mine in zip(enumerate(expected.values()), [*found.values(), *[None] * 20], strict=False):
        if mine is None or mine.kind in (mine.VAR_POSITIONAL, mine.VAR_KEYWORD):
            assert open_ended, f"argument {place} of {name}, {parameter}, is not accepted"
            break
        if parameter.kind is not parameter.POSITIONAL_ONLY:
            assert mine.name == parameter.name, f"argument {place} of {name} is {mine}, Horovod's is {parameter}"
        if parameter.default is not _MISSING:
            assert _same_meaning(mine.default, parameter.default), f"{name}: {mine} has another default: {parameter}"
    for extra in list(found.values())[len(expected) :]:
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
