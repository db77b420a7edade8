"""What callbacks remember: Keras' own, hvdkit's, and yours.

A callback's memory is in its attributes. Those of plain values that have changed since training began are its state;
those that have not are its configuration, which a resumed run may give otherwise. So `EarlyStopping` keeps its best
value and its waiting, and a patience that was raised for the resumed run stays raised.

A callback that is not served so has two methods of its own: `checkpoint_state()` returns plain values, and
`restore_state(state)` takes them. One with the attribute `checkpointed = False` has nothing to remember.
"""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from hvdkit.checkpoint.plain import NotPlain, pack, unpack

_log = logging.getLogger(__name__)

_NOT_ITS_OWN = {"model", "_model", "params", "validation_data"}
_COMPARED_BYTES = 1 << 20


class CallbackStates:
    """The states of the callbacks of one `fit`. Make it when training begins, after the callbacks have begun.

    Args:
        callbacks: all of them.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        self._callbacks = [c for c in callbacks if getattr(c, "checkpointed", True) and not _is_progress_bar(c)]
        self._names = _names(self._callbacks)
        self._at_begin = [{name: _Seen(value) for name, value in _plain(c).items()} for c in self._callbacks]

    def pack(self, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """The states as JSON, by name; arrays in them are added to `arrays`."""
        states: dict[str, Any] = {}
        for name, callback, at_begin in zip(self._names, self._callbacks, self._at_begin, strict=True):
            state = self._state(callback, at_begin)
            if state:
                own: dict[str, np.ndarray] = {}
                states[name] = pack(state, own, f"callback/{name}")
                # Copies, for their owner may go on to change them while they are written. Best weights are replaced.
                stays = isinstance(callback, keras.callbacks.EarlyStopping)
                arrays |= own if stays else {n: a.copy() for n, a in own.items()}
        return states

    def restore(self, states: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Gives the callbacks their states back. Callbacks that were not there have none."""
        for name, callback in zip(self._names, self._callbacks, strict=True):
            if name not in states:
                continue
            try:
                state = unpack(states[name], arrays)
            except KeyError:  # arrays are rank 0's, which has no such callback
                _log.warning("The state of %s is not restored: it has arrays, and only this rank had it.", name)
                continue
            _give(callback, state)

    def _state(self, callback: Any, at_begin: dict[str, Any]) -> dict[str, Any]:
        if hasattr(callback, "checkpoint_state"):
            return callback.checkpoint_state()
        if isinstance(callback, keras.callbacks.CSVLogger):
            return _csv_state(callback)
        if isinstance(callback, keras.callbacks.TensorBoard):  # it measures times, too, which are this run's
            return {n: v for n, v in _plain(callback).items() if n.startswith("_global_")}
        changed = {n: v for n, v in _plain(callback).items() if n not in at_begin or at_begin[n].differs(v)}
        if callable(getattr(callback, "monitor_op", None)) and hasattr(callback, "_set_monitor_op"):
            changed["monitor_op"] = True
        return changed


def _give(callback: Any, state: dict[str, Any]) -> None:
    if hasattr(callback, "restore_state"):
        callback.restore_state(state)
        return
    if isinstance(callback, keras.callbacks.CSVLogger):
        _restore_csv(callback, state)
        return
    # Keras chooses it at the first epoch's end, and turns min_delta's sign then: it must not do so once more.
    if state.pop("monitor_op", False) and callback.monitor_op is None:
        callback._set_monitor_op()
    for name, value in state.items():
        setattr(callback, name, value)


def _plain(callback: Any) -> dict[str, Any]:
    """A callback's attributes that can be stored."""
    found = {}
    for name, value in vars(callback).items():
        try:
            if name not in _NOT_ITS_OWN:
                pack(value, {}, "")
                found[name] = value
        except NotPlain:
            continue
    return found


class _Seen:
    """A plain value as it was at one moment, to tell later whether it has changed."""

    def __init__(self, value: Any) -> None:
        arrays: dict[str, np.ndarray] = {}
        self._json = json.dumps(pack(value, arrays, ""))
        self._arrays = [(a, a.copy() if a.nbytes <= _COMPARED_BYTES else None) for a in arrays.values()]

    def differs(self, value: Any) -> bool:
        """Whether `value` is another. Large arrays are compared by which they are, not by what is in them."""
        arrays: dict[str, np.ndarray] = {}
        if json.dumps(pack(value, arrays, "")) != self._json:
            return True
        pairs = zip(self._arrays, arrays.values(), strict=True)
        return any(a is not old if copy is None else a.tobytes() != copy.tobytes() for (old, copy), a in pairs)


def _names(callbacks: Sequence[Any]) -> list[str]:
    """`EarlyStopping`, and `EarlyStopping.2` for the second of a class."""
    seen: Counter[str] = Counter()
    names = []
    for callback in callbacks:
        kind = type(callback).__name__
        seen[kind] += 1
        names.append(kind if seen[kind] == 1 else f"{kind}.{seen[kind]}")
    return names


def _is_progress_bar(callback: Any) -> bool:
    return isinstance(callback, keras.callbacks.ProgbarLogger)


def _csv_state(callback: Any) -> dict[str, Any]:
    """The file itself: what later epochs have added to it is then gone."""
    if callback.csv_file is None or callback.keys is None:
        return {}
    with open(callback.filename, encoding="utf-8", newline="") as file:  # noqa: PTH123 - as Keras opens it
        return {"text": file.read(), "keys": list(callback.keys)}


def _restore_csv(callback: Any, state: dict[str, Any]) -> None:
    with open(callback.filename, "w", encoding="utf-8", newline="") as file:  # noqa: PTH123
        file.write(state["text"])
    callback.csv_file.seek(0, 2)  # Keras has it open, and writes on
    callback.keys, callback.append_header = state["keys"], False
