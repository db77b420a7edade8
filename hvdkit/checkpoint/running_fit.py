"""A running `Model.fit`, made to begin in the middle of an epoch.

Keras can begin at an epoch (`initial_epoch`), but not at a step: the first steps of an epoch are skipped here.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from hvdkit.compat import fit_loop, keras3


class RunningFit:
    """The `fit` of a model, from whose `on_train_begin` this is made.

    Args:
        model: the model that is trained.

    Raises:
        RuntimeError: no `fit` of this model is running.
        UsageError: it is that of a Keras that hvdkit does not know.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self._iterator, self.callbacks = fit_loop.of(model)

    @property
    def steps(self) -> int | None:
        """Steps an epoch; None as long as Keras does not know."""
        steps = self._iterator.num_batches
        return None if steps is None or not math.isfinite(steps) else int(steps)

    def build(self) -> None:
        """Builds what Keras would build in the first step: layers, optimizer, and the metrics' states."""
        spec = fit_loop.element_spec(self._iterator)
        if not all(isinstance(leaf, tf.TensorSpec) for leaf in keras.tree.flatten(spec)):
            return  # under tf.distribute, where Keras has done so; or of ragged tensors, with which it cannot
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
        """Makes the loop over epochs begin at `epoch`, and its first epoch at `step`.

        Args:
            epoch: from 0.
            step: steps of that epoch which were taken before.
            steps: an epoch's, as far as they were known.
            data_begins_there: the data set's first batch is that step's. Otherwise the batches before it are read
                once more, and passed over.
            then: called when the data is in place, before the first step.
            logs: of the last step taken; those of the epoch, if no step of it is left.
        """
        keras3.set_first_epoch(self._model, epoch)

        def from_step(original: Callable[[], Iterator[Any]]) -> Iterator[Any]:
            unknown = self.steps is None  # how long the data is: Keras learns it when it ends for the first time
            for _ in range(0 if data_begins_there else epoch):
                self._pass_over(original(), steps if unknown else None)
            yield from self._rest(original(), step, read=not data_begins_there, then=then)

        fit_loop.replace_next_epoch(self._iterator, from_step)
        if step:  # Keras has the last step's logs in a local variable, which stays empty if no step is left
            keras3.replace_next_epoch_logs(self._model, lambda given: given or logs)

    def leave_epochs_out(self, epochs: int) -> None:
        """Makes `fit` end at once: training was over."""
        keras3.set_first_epoch(self._model, epochs)

    def _pass_over(self, enumeration: Iterator[Any], learned_steps: int | None) -> None:
        """An epoch that was trained before, in which the data set must move on as it did then.

        A data set that goes on from epoch to epoch is read; one that begins anew with each is begun, which is when it
        draws the seed of that epoch's order.

        Args:
            enumeration: of the epoch's steps.
            learned_steps: what Keras learned when the data ended, where it did not know before.
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
