"""How gradients meet: one small protocol, one file a strategy, and `create` that chooses by name."""

from collections.abc import Callable

from hvdkit.errors import UsageError
from hvdkit.strategies.base import Strategy
from hvdkit.strategies.divided import NAMES, DividedStrategy, Division
from hvdkit.strategies.horovod import HorovodStrategy
from hvdkit.strategies.mirrored import MirroredStrategy
from hvdkit.strategies.multiworker import MultiWorkerStrategy
from hvdkit.strategies.single import SingleStrategy

__all__ = [
    "DividedStrategy",
    "Division",
    "HorovodStrategy",
    "MirroredStrategy",
    "MultiWorkerStrategy",
    "SingleStrategy",
    "Strategy",
    "create",
]

_BY_NAME: dict[str, Callable[[int | None], Strategy]] = {
    "single": SingleStrategy,
    "horovod": HorovodStrategy,
    "mirrored": MirroredStrategy,
    "multiworker": MultiWorkerStrategy,
}


def create(name: str, replicas: int | None = None, division: Division | None = None) -> Strategy:
    """Makes a strategy and takes its devices; call it before TensorFlow makes its first tensor.

    Args:
        name: `single`, `horovod`, `mirrored` or `multiworker`; or of those that divide the model `tensor`, `branches`
            or `pipeline`.
        replicas: for `mirrored`, how many devices (default: all GPUs, or 2 logical CPUs); for `single`, how many ranks
            to imitate in the order of the data; the others take it from the launcher.
        division: how the model is divided, for those that do.

    Raises:
        UsageError: the name is unknown, or does not fit how the process was launched.
    """
    if name in NAMES:
        return DividedStrategy(name, division or Division(), replicas)
    if name not in _BY_NAME:
        raise UsageError(f"There is no strategy {name!r}. Choose one of: {', '.join([*_BY_NAME, *NAMES])}.")
    return _BY_NAME[name](replicas)
