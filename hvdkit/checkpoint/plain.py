"""Values as JSON and arrays: stored without pickle, and restored with the same types.

Supported are None, booleans, numbers, strings, lists, tuples, dicts, deques and NumPy arrays, also nested. Arrays are
stored separately; the JSON contains their names.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np


class NotPlain(TypeError):  # noqa: N818 - says what it is
    """The value contains something that cannot be stored."""


def pack(value: Any, arrays: dict[str, np.ndarray], name: str) -> Any:
    """Returns `value` as JSON, and adds its arrays, not copied, to `arrays`, under names that begin with `name`.

    Raises:
        NotPlain: it contains another type than those above.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value)
        if array.dtype.hasobject:
            raise NotPlain(f"an array of {array.dtype}")
        key = f"{name}/{len(arrays)}"
        arrays[key] = array
        return {"array": key, "scalar": isinstance(value, np.generic)}
    if type(value) is dict:
        return {"dict": [[pack(k, arrays, name), pack(v, arrays, name)] for k, v in value.items()]}
    if type(value) is deque:
        return {"deque": [pack(v, arrays, name) for v in value], "maxlen": value.maxlen}
    if type(value) in (list, tuple):
        packed = [pack(v, arrays, name) for v in value]
        return packed if type(value) is list else {"tuple": packed}
    raise NotPlain(type(value).__name__)


def unpack(packed: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """The inverse of `pack`."""
    if isinstance(packed, list):
        return [unpack(v, arrays) for v in packed]
    if not isinstance(packed, dict):
        return packed
    if "array" in packed:
        array = arrays[packed["array"]]
        return array[()] if packed["scalar"] else array.copy()
    if "dict" in packed:
        return {unpack(k, arrays): unpack(v, arrays) for k, v in packed["dict"]}
    if "deque" in packed:
        return deque((unpack(v, arrays) for v in packed["deque"]), packed["maxlen"])
    return tuple(unpack(v, arrays) for v in packed["tuple"])
