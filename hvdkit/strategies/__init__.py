"""Parallelism strategies: one small protocol, one file per strategy, and `create` to choose one by name."""

from collections.abc import Callable

from hvdkit.errors import UsageError
from hvdkit.strategies.base import Strategy
from hvdkit.strategies.divided import NAMES, DividedStrategy, Division
from hvdkit.strategies.horovod import HorovodStrategy
from hvdkit.strategies.mirrored import MirroredStrategy
from hvdkit.strategies.multiworker import MultiWorkerStrategy
from hvdkit.strategies.single import SingleStrategy
from hvdkit.strategies.tpu import TPUStrategy

__all__ = [
    "DividedStrategy",
    "Division",
    "HorovodStrategy",
    "MirroredStrategy",
    "MultiWorkerStrategy",
    "SingleStrategy",
    "Strategy",
    "TPUStrategy",
    "create",
]

_BY_NAME: dict[str, Callable[[int | None], Strategy]] = {
    "single": SingleStrategy,
    "horovod": HorovodStrategy,
    "mirrored": MirroredStrategy,
    "multiworker": MultiWorkerStrategy,
    "tpu": TPUStrategy,
}


def create(name: str, replicas: int | None = None, division: Division | None = None) -> Strategy:
    """Creates a strategy and configures its devices. Call it before TensorFlow makes its first tensor.

    Args:
        name: `single`, `horovod`, `mirrored`, `multiworker` or `tpu` for data parallelism; `tensor`, `branches` or
            `pipeline` for model parallelism.
        replicas: for `mirrored`, the number of devices (default: all GPUs, or 2 logical CPUs). For `single`, the number
            of ranks whose data order to emulate. The others take it from the launcher.
        division: how to divide the model, for model parallelism.

    Raises:
        UsageError: the name is unknown, or does not fit how the process was launched.
    """
    if name in NAMES:
        return DividedStrategy(name, division or Division(), replicas)
    if name not in _BY_NAME:
        raise UsageError(f"There is no strategy {name!r}. Choose one of: {', '.join([*_BY_NAME, *NAMES])}.")
    return _BY_NAME[name](replicas)
