"""Makes a running `Model.fit` start in the middle of an epoch.

Keras can start at an epoch (`initial_epoch`), but not at a step. This module skips the first steps of an epoch.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from hvdkit.compat import fit_loop, keras3


class RunningFit:
    """The running `fit` of a model. Make it in a callback's `on_train_begin`.

    Args:
        model: the model that is trained.

    Raises:
        RuntimeError: no `fit` of this model is running.
        UsageError: hvdkit does not support the `fit` of this Keras version.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self._iterator, self.callbacks = fit_loop.of(model)

    @property
    def steps(self) -> int | None:
        """Steps per epoch; None until Keras knows the number."""
        steps = self._iterator.num_batches
        return None if steps is None or not math.isfinite(steps) else int(steps)

    def build(self) -> None:
        """Builds what Keras would build in the first step: layers, optimizer and metrics."""
        spec = fit_loop.element_spec(self._iterator)
        if not all(isinstance(leaf, tf.TensorSpec) for leaf in keras.tree.flatten(spec)):
            return  # tf.distribute, where Keras has built them; or ragged tensors, for which it cannot
        batch = keras.tree.map_structure(
            lambda s: keras.KerasTensor(s.shape, keras.backend.standardize_dtype(s.dtype)), spec
        )
        keras3.build_on(self._model, batch)

    def begin_at(
        self,
        epoch: int,
        step: int,
        *,
        steps: int | None,
        data_begins_there: bool,
        then: Callable[[], None],
        logs: dict[str, Any],
    ) -> None:
        """Makes the loop over epochs start at `epoch`, and its first epoch at `step`.

        Args:
            epoch: number of the epoch, from 0.
            step: how many steps of that epoch are already done.
            steps: steps per epoch, if they were known.
            data_begins_there: whether the data set's first batch is the one of that step. Otherwise the earlier
                batches are read again and skipped.
            then: called before the first step, when the data is at its position.
            logs: the logs of the last step; they become the epoch's logs if no step of it is left.
        """
        keras3.set_first_epoch(self._model, epoch)

        def from_step(original: Callable[[], Iterator[Any]]) -> Iterator[Any]:
            unknown = self.steps is None  # Keras learns the number of steps when the data ends for the first time
            for _ in range(0 if data_begins_there else epoch):
                self._pass_over(original(), steps if unknown else None)
            yield from self._rest(original(), step, read=not data_begins_there, then=then)

        fit_loop.replace_next_epoch(self._iterator, from_step)
        if step:  # Keras keeps the last step's logs in a local variable, which stays empty if no step is left
            keras3.replace_next_epoch_logs(self._model, lambda given: given or logs)

    def leave_epochs_out(self, epochs: int) -> None:
        """Makes `fit` end at once, because training was complete."""
        keras3.set_first_epoch(self._model, epochs)

    def _pass_over(self, enumeration: Iterator[Any], learned_steps: int | None) -> None:
        """Skips an epoch that is already trained, and leaves the data set in the state that it had then.

        A data set that continues from epoch to epoch is read. One that restarts with each epoch is only started: it
        then draws the seed for that epoch's order.

        Args:
            enumeration: the epoch's steps.
            learned_steps: the number of steps that Keras learned when the data ended, if it did not know it before.
        """
        begun = False
        for item in enumeration:
            if self._iterator.steps_per_epoch:
                self._read(fit_loop.data_of(item))
            elif not begun:
                begun = True
                next(fit_loop.data_of(item), None)
                if learned_steps is not None:
                    fit_loop.end_epoch_after(self._iterator, learned_steps)
                    break

    def _rest(self, enumeration: Iterator[Any], step: int, *, read: bool, then: Callable[[], None]) -> Iterator[Any]:
        placed = False
        for item in enumeration:
            if fit_loop.step_of(item) < step:
                if read:
                    self._read(fit_loop.data_of(item))
                continue
            if not placed:
                placed = True
                then()
            yield item
        if not placed:
            then()

    def _read(self, iterator: Any) -> None:
        for _ in range(self._iterator.steps_per_execution):
            next(iterator, None)
