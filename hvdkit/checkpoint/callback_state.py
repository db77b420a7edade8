"""The state of callbacks (Keras' own, hvdkit's, and yours), and of your own layers and metrics outside of variables.

Attributes with plain values that have changed since training began are such an object's state. Those that have not
changed are its configuration, which a resumed run may set differently. For example, `EarlyStopping` keeps its best
value and its wait counter, but a patience that was raised for the resumed run stays raised.

If this does not fit your callback, give it two methods: `checkpoint_state()` returns plain values, and
`restore_state(state)` takes them. If it has no state, give it the attribute `checkpointed = False`.
"""

import io
import json
import logging
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdkit import world
from hvdkit.checkpoint.plain import NotPlain, pack, unpack
from hvdkit.compat import keras3

_log = logging.getLogger(__name__)

_COMPARED_BYTES = 64 << 20  # which takes some 50 ms
_COMPARED_BYTES_OF_KERAS = 1 << 20  # Keras' own callbacks replace arrays, and do not change them in place


class CallbackStates:
    """The states of the callbacks of one `fit`, and of its model. Make it after `on_train_begin` of all callbacks.

    Args:
        callbacks: all callbacks of the `fit`.
        model: the model that is trained, if the states of its layers and metrics are wanted.
    """

    def __init__(self, callbacks: Sequence[Any], model: keras.Model | None = None) -> None:
        self._owners = [c for c in callbacks if getattr(c, "checkpointed", True) and not _is_progress_bar(c)]
        if model is not None:
            parts = [*keras3.layers_of(model), *model.metrics]
            self._owners += [part for part in parts if keras3.attributes_of_own_class(part)]
        self._names = _names(self._owners)
        self._at_begin = [{name: _Seen(value, _limit(o)) for name, value in _plain(o).items()} for o in self._owners]
        self._unsaved = dict(_unsaved(self._names, self._owners))

    def pack(self, common: dict[str, np.ndarray], own: dict[str, np.ndarray]) -> dict[str, Any]:
        """Returns the states as JSON, by name.

        Args:
            common: takes the arrays that are the same on all ranks, such as weights.
            own: takes the other arrays.
        """
        states: dict[str, Any] = {}
        for name, owner, at_begin in zip(self._names, self._owners, self._at_begin, strict=True):
            state = self._state(owner, at_begin)
            if state:
                arrays: dict[str, np.ndarray] = {}
                states[name] = pack(state, arrays, f"callback/{name}")
                # Copied, because the callback may change them while they are written. EarlyStopping replaces its
                # best weights, of the model that all ranks have, and never changes them in place.
                if isinstance(owner, keras.callbacks.EarlyStopping):
                    common |= arrays
                else:
                    own |= {key: array.copy() for key, array in arrays.items()}
        return states

    def restore(self, states: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Restores the states. An object without a saved state is left as it is."""
        for name, owner in zip(self._names, self._owners, strict=True):
            if name not in states:
                continue
            try:
                state = unpack(states[name], arrays)
            except KeyError:  # of an older hvdkit, which saved only rank 0's arrays
                _log.warning("The state of %s is not restored: it has arrays, and only this rank had it.", name)
                continue
            _give(owner, state)

    def unsaved(self) -> list[str]:
        """Describes what checkpoints leave out: iterators, tensors that have changed, and very large arrays."""
        now = dict(_unsaved(self._names, self._owners))
        lasting = [f"{what} ({kind})" for what, (kind, _) in now.items() if kind != "a tensor"]
        changed = [
            f"{what} (a tensor)"
            for what, (kind, value) in now.items()
            if kind == "a tensor" and self._unsaved.get(what, (kind, None))[1] is not value
        ]
        return lasting + changed

    def _state(self, owner: Any, at_begin: dict[str, Any]) -> dict[str, Any]:
        if hasattr(owner, "checkpoint_state"):
            return owner.checkpoint_state()
        if isinstance(owner, keras.callbacks.CSVLogger):
            return keras3.csv_state(owner)
        if isinstance(owner, keras.callbacks.TensorBoard):  # its time measurements belong to one process
            return keras3.tensorboard_counters(owner)
        changed = {n: v for n, v in _plain(owner).items() if n not in at_begin or at_begin[n].differs(v)}
        if keras3.chooses_direction_late(owner) and callable(owner.monitor_op):
            changed["monitor_op"] = True
        return changed


def checksums(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns what tells arrays apart, by name."""
    return {name: _checksum(array) for name, array in arrays.items()}


def unlike(arrays: Mapping[str, np.ndarray], of_root: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the arrays that rank 0 does not have, or has otherwise, under the names in which they are stored.

    Args:
        arrays: this rank's own arrays, by name.
        of_root: rank 0's `checksums`.
    """
    if world.rank() == 0:
        return {}
    differing = {name: array for name, array in arrays.items() if _checksum(array) != of_root.get(name)}
    return {f"rank/{world.rank()}/{name}": array for name, array in differing.items()}


def arrays_of(rank: int, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns a rank's arrays by name: its own where it has some, and otherwise rank 0's."""
    prefix = f"rank/{rank}/"
    return {**arrays, **{n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}}


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


def _attributes(owner: Any) -> dict[str, Any]:
    if isinstance(owner, keras.callbacks.Callback):
        return keras3.attributes_of_callback(owner)
    return keras3.attributes_of_own_class(owner)


def _plain(owner: Any) -> dict[str, Any]:
    """An object's attributes that can be stored."""
    found = {}
    for name, value in _attributes(owner).items():
        try:
            pack(value, {}, "")
            found[name] = value
        except NotPlain:
            continue
    return found


def _unsaved(names: Sequence[str], owners: Sequence[Any]) -> Iterator[tuple[str, tuple[str, Any]]]:
    """Yields attributes of the user's objects that are not stored though they may have a state, by name and owner."""
    for name, owner in zip(names, owners, strict=True):
        if hasattr(owner, "checkpoint_state") or type(owner).__module__.startswith(("keras.", "hvdkit.")):
            continue
        for attribute, value in _attributes(owner).items():
            if isinstance(value, Iterator) and not isinstance(value, io.IOBase):
                yield f"{attribute} of {name}", ("an iterator", value)
            elif isinstance(value, tf.Tensor) and hasattr(value, "numpy"):
                yield f"{attribute} of {name}", ("a tensor", value)
            elif isinstance(value, np.ndarray) and value.nbytes > _COMPARED_BYTES:
                yield f"{attribute} of {name}", ("an array too large to look for changes in place", value)


def _limit(owner: Any) -> int:
    return _COMPARED_BYTES_OF_KERAS if type(owner).__module__.startswith("keras.") else _COMPARED_BYTES


class _Seen:
    """A plain value at one moment, to detect later whether it has changed.

    Args:
        value: the value.
        limit: arrays of more bytes are compared by identity, not by content.
    """

    def __init__(self, value: Any, limit: int) -> None:
        arrays: dict[str, np.ndarray] = {}
        self._json = json.dumps(pack(value, arrays, ""))
        self._arrays = [(a, _checksum(a) if a.nbytes <= limit else None) for a in arrays.values()]

    def differs(self, value: Any) -> bool:
        """Whether `value` differs."""
        arrays: dict[str, np.ndarray] = {}
        if json.dumps(pack(value, arrays, "")) != self._json:
            return True
        pairs = zip(self._arrays, arrays.values(), strict=True)
        return any(a is not old if sum_ is None else _checksum(a) != sum_ for (old, sum_), a in pairs)


def _checksum(array: np.ndarray) -> tuple[Any, ...]:
    return array.shape, str(array.dtype), zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _names(owners: Sequence[Any]) -> list[str]:
    """`EarlyStopping`, and `EarlyStopping.2` for the second of a class."""
    seen: Counter[str] = Counter()
    names = []
    for owner in owners:
        kind = type(owner).__name__
        seen[kind] += 1
        names.append(kind if seen[kind] == 1 else f"{kind}.{seen[kind]}")
    return names


def _is_progress_bar(callback: Any) -> bool:
    return isinstance(callback, keras.callbacks.ProgbarLogger)
