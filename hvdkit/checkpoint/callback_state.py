"""The state of callbacks: Keras' own, hvdkit's, and yours.

Attributes with plain values that have changed since training began are a callback's state. Those that have not changed
are its configuration, which a resumed run may set differently. For example, `EarlyStopping` keeps its best value and
its wait counter, but a patience that was raised for the resumed run stays raised.

If this does not fit your callback, give it two methods: `checkpoint_state()` returns plain values, and
`restore_state(state)` takes them. If it has no state, give it the attribute `checkpointed = False`.
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
    """The states of the callbacks of one `fit`. Make it after `on_train_begin` of all callbacks.

    Args:
        callbacks: all callbacks of the `fit`.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        self._callbacks = [c for c in callbacks if getattr(c, "checkpointed", True) and not _is_progress_bar(c)]
        self._names = _names(self._callbacks)
        self._at_begin = [{name: _Seen(value) for name, value in _plain(c).items()} for c in self._callbacks]

    def pack(self, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """Returns the states as JSON, by name, and adds their arrays to `arrays`."""
        states: dict[str, Any] = {}
        for name, callback, at_begin in zip(self._names, self._callbacks, self._at_begin, strict=True):
            state = self._state(callback, at_begin)
            if state:
                own: dict[str, np.ndarray] = {}
                states[name] = pack(state, own, f"callback/{name}")
                # Copied, because the callback may change them while they are written. EarlyStopping replaces its
                # best weights and never changes them in place.
                stays = isinstance(callback, keras.callbacks.EarlyStopping)
                arrays |= own if stays else {n: a.copy() for n, a in own.items()}
        return states

    def restore(self, states: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Restores the callbacks' states. A callback without a saved state is left as it is."""
        for name, callback in zip(self._names, self._callbacks, strict=True):
            if name not in states:
                continue
            try:
                state = unpack(states[name], arrays)
            except KeyError:  # only rank 0's arrays are saved, and rank 0 has no such callback
                _log.warning("The state of %s is not restored: it has arrays, and only this rank had it.", name)
                continue
            _give(callback, state)

    def _state(self, callback: Any, at_begin: dict[str, Any]) -> dict[str, Any]:
        if hasattr(callback, "checkpoint_state"):
            return callback.checkpoint_state()
        if isinstance(callback, keras.callbacks.CSVLogger):
            return keras3.csv_state(callback)
        if isinstance(callback, keras.callbacks.TensorBoard):  # its time measurements belong to one process
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
    """A plain value at one moment, to detect later whether it has changed."""

    def __init__(self, value: Any) -> None:
        arrays: dict[str, np.ndarray] = {}
        self._json = json.dumps(pack(value, arrays, ""))
        self._arrays = [(a, a.copy() if a.nbytes <= _COMPARED_BYTES else None) for a in arrays.values()]

    def differs(self, value: Any) -> bool:
        """Whether `value` differs. Large arrays are compared by identity, not by content."""
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
