"""Arguments of Horovod's functions, in the order of either of its modules.

`horovod.tensorflow.allreduce(x, False)` returns a sum, and `horovod.tensorflow.keras.allreduce(x, "loss")` has a name.
A script changes its import line alone, so hvdkit's functions accept both. Their own order is that of
`horovod.tensorflow.keras`; arguments in the other order are recognized by their types.
"""

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from hvdkit.errors import UsageError

_Function = TypeVar("_Function", bound=Callable[..., Any])
_DEVICE = re.compile(r"(/.*|(cpu|gpu)(:(\d+|\*))?)?", re.IGNORECASE)


class ArgumentsError(UsageError, TypeError):
    """The positional arguments fit neither of Horovod's orders."""


def of_both_modules(names: str) -> Callable[[_Function], _Function]:
    """Makes a function accept its arguments in the order of `horovod.tensorflow`, too.

    Args:
        names: the parameters of `horovod.tensorflow`'s function, in its order, separated by spaces. The first one may
            have another name in hvdkit.

    Raises:
        ArgumentsError: when called, if the positional arguments fit neither order.
    """

    def decorate(function: _Function) -> _Function:
        signature = inspect.signature(function)
        ours = [name for name in signature.parameters if name != "self"]
        owners = len(signature.parameters) - len(ours)  # 1 for a method
        alias, *others = names.split()
        theirs = [ours[0], *others]
        differs = any(a != b for a, b in zip(ours, theirs, strict=False))

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if alias in kwargs and alias not in ours:
                kwargs[ours[0]] = kwargs.pop(alias)
            owner, given = args[:owners], args[owners:]
            if not differs or len(given) < 2:
                return function(*args, **kwargs)
            if _fit(given, theirs):
                return function(*owner, **dict(zip(theirs, given, strict=False)), **kwargs)
            if _fit(given, ours):
                return function(*args, **kwargs)
            raise ArgumentsError(
                f"{function.__qualname__.removesuffix('.__init__')} was given {given[1:]!r:.200}, which are neither "
                f"{', '.join(theirs[1 : len(given)])} (the order of horovod.tensorflow) nor "
                f"{', '.join(ours[1 : len(given)])} (the order of horovod.tensorflow.keras). Name these arguments."
            )

        call.__signature__ = signature  # type: ignore[attr-defined]
        call.horovod_order = [alias, *others]  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate


def _fit(given: Sequence[Any], names: Sequence[str]) -> bool:
    """Returns whether values have the types of the parameters at their places."""
    if len(given) > len(names):
        return False
    return all(_FITS.get(name, _anything)(value) for name, value in zip(names, given, strict=False))


def _anything(value: Any) -> bool:
    return True


def _boolean(value: Any) -> bool:
    return type(value).__name__ in ("bool", "bool_")  # NumPy's is called bool_ before NumPy 2


def _number(value: Any) -> bool:
    return hasattr(value, "__float__") and not _boolean(value)


def _whole(value: Any) -> bool:
    return hasattr(value, "__index__") and not _boolean(value)


def _device(value: Any) -> bool:
    return value is None or (isinstance(value, str) and bool(_DEVICE.fullmatch(value)))


def _compressor(value: Any) -> bool:
    return not (value is None or isinstance(value, str) or _number(value) or _boolean(value))


# What the parameters take that have different places in the two orders.
_FITS: dict[str, Callable[[Any], bool]] = {
    "average": lambda value: value is None or _boolean(value),
    "average_aggregated_gradients": _boolean,
    "backward_passes_per_step": _whole,
    "compression": _compressor,
    "device_dense": _device,
    "device_sparse": _device,
    "gradient_predivide_factor": _number,
    "name": lambda value: value is None or isinstance(value, str),
    "op": lambda value: value is None or _whole(value),
    "postscale_factor": _number,
    "prescale_factor": _number,
    "sparse_as_dense": _boolean,
    "use_locking": _boolean,
}
