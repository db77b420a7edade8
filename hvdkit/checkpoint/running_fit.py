"""A running `Model.fit`, made to begin in the middle of an epoch.

Keras can begin at an epoch (`initial_epoch`), but not at a step. What it needs for that is in two local variables of
`fit`: the list of callbacks, and the iterator over an epoch's steps, whose first steps are passed over here. There is
no public way to either.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from hvdkit.compat import call_stack


class RunningFit:
    """The `fit` of a model, from whose `on_train_begin` this is made.

    Args:
        model: the model that is trained.

    Raises:
        RuntimeError: no `fit` of this model is running, or it is that of an unknown Keras.
    """

    def __init__(self, model: keras.Model) -> None:
        found = call_stack.locals_of("fit", model, ("epoch_iterator", "callbacks"))
        if found is None:
            raise RuntimeError(
                f"CheckpointCallback works in Model.fit only, of Keras 3.5 to 3.15; this is Keras {keras.__version__}, "
                f"and no fit of the model {model.name!r} was found around it."
            )
        self._model = model
        self._iterator = found["epoch_iterator"]
        self.callbacks: list[Any] = found["callbacks"].callbacks

    @property
    def steps(self) -> int | None:
        """Steps an epoch; None as long as Keras does not know."""
        steps = self._iterator.num_batches
        return None if steps is None or not math.isfinite(steps) else int(steps)

    def build(self) -> None:
        """Builds what Keras would build in the first step: layers, optimizer, and the metrics' states."""
        spec = self._iterator._distributed_dataset.element_spec
        if not all(isinstance(leaf, tf.TensorSpec) for leaf in keras.tree.flatten(spec)):
            return  # under tf.distribute, where Keras has done so; or of ragged tensors, with which it cannot
        batch = keras.tree.map_structure(
            lambda s: keras.KerasTensor(s.shape, keras.backend.standardize_dtype(s.dtype)), spec
        )
        self._model._symbolic_build(data_batch=batch)

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
        self._model._initial_epoch = epoch
        iterator = self._iterator
        name = "_enumerate_iterator" if hasattr(iterator, "_enumerate_iterator") else "enumerate_epoch"
        original = getattr(iterator, name)

        def from_step() -> Iterator[Any]:
            delattr(iterator, name)  # the following epochs are ordinary ones
            unknown = self.steps is None  # how long the data is: Keras learns it when it ends for the first time
            for _ in range(0 if data_begins_there else epoch):
                self._pass_over(original(), steps if unknown else None)
            yield from self._rest(original(), step, read=not data_begins_there, then=then)

        setattr(iterator, name, from_step)
        if step:
            self._keep_logs(logs)

    def leave_epochs_out(self, epochs: int) -> None:
        """Makes `fit` end at once: training was over."""
        self._model._initial_epoch = epochs

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
                self._read(item[-1])
            elif not begun:
                begun = True
                next(item[-1], None)
                if learned_steps is not None:  # then Keras leaves the epoch when the data ends, not when it has counted
                    self._iterator._num_batches = learned_steps
                    self._iterator._current_iterator = None
                    break

    def _rest(self, enumeration: Iterator[Any], step: int, *, read: bool, then: Callable[[], None]) -> Iterator[Any]:
        placed = False
        for item in enumeration:
            if item[0] < step:
                if read:
                    self._read(item[-1])
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

    def _keep_logs(self, logs: dict[str, Any]) -> None:
        """`fit` has the last step's logs in a local variable, which stays empty if no step of the epoch is left."""
        model = self._model
        original = model._get_metrics_result_or_logs

        def result(given: dict[str, Any]) -> dict[str, Any]:
            del model.__dict__["_get_metrics_result_or_logs"]
            return original(given or logs)

        model.__dict__["_get_metrics_result_or_logs"] = result
