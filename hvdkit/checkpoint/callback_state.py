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
from hvdkit.compat import keras3

_log = logging.getLogger(__name__)

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
            return keras3.csv_state(callback)
        if isinstance(callback, keras.callbacks.TensorBoard):  # it measures times, too, which are this run's
            return keras3.tensorboard_counters(callback)
        changed = {n: v for n, v in _plain(callback).items() if n not in at_begin or at_begin[n].differs(v)}
        if keras3.chooses_direction_late(callback) and callable(callback.monitor_op):
            changed["monitor_op"] = True
        return changed


def _give(callback: Any, state: dict[str, Any]) -> None:
    if hasattr(callback, "restore_state"):
        callback.restore_state(state)
        return
    if isinstance(callback, keras.callbacks.CSVLogger):
        keras3.restore_csv(callback, state)
        return
    if state.pop("monitor_op", False):
        keras3.choose_direction(callback)
    for name, value in state.items():
        setattr(callback, name, value)


def _plain(callback: Any) -> dict[str, Any]:
    """A callback's attributes that can be stored."""
    found = {}
    for name, value in keras3.attributes_of_callback(callback).items():
        try:
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
