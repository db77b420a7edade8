"""What keeps `Model.fit` right on many ranks even where the user's script forgets something.

While a job of several ranks runs, `keras.Model.fit` is wrapped (`install`, called by `hvdkit.init`; the way of tracing
tools such as MLflow's autologging). Each `fit` gets one more callback, the last in line, which

- proves at the first step that gradients are exchanged, and says so if they are not;
- makes the ranks' state common when training begins and ends, and random seeds different;
- lets all ranks leave after the same step, whichever of them wanted to;
- gives callbacks that decide by metrics those of all ranks, and lets no file be written twice.

A model under a `tf.distribute` strategy is left alone: there TensorFlow does the exchange.
"""

import inspect
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import wrapt

from hvdkit import collectives, watchdog, world
from hvdkit.callbacks import AverageStateCallback, CheckpointCallback, MetricAverageCallback
from hvdkit.callbacks.average_state import average_state
from hvdkit.collectives.agreement import check_equal_steps
from hvdkit.collectives.mesh import copies_of, share
from hvdkit.errors import UsageError
from hvdkit.model.xla import make_train_function
from hvdkit.optimizers import heartbeat
from hvdkit.optimizers.distributed import DistributedOptimizer, keeps_local
from hvdkit.optimizers.exchanging import ExchangingOptimizer
from hvdkit.optimizers.local_sgd import local_optimizers
from hvdkit.optimizers.parts import optimizers_of
from hvdkit.optimizers.state import tell_seeds_apart

_log = logging.getLogger(__name__)

_BY_METRICS = (keras.callbacks.EarlyStopping, keras.callbacks.ReduceLROnPlateau, keras.callbacks.ModelCheckpoint)
# Callbacks that write files, and the attribute that says where.
_WRITERS = {
    keras.callbacks.ModelCheckpoint: "filepath",
    keras.callbacks.CSVLogger: "filename",
    keras.callbacks.TensorBoard: "log_dir",
    keras.callbacks.BackupAndRestore: "backup_dir",
}

_originals: dict[str, tuple[type, Any]] = {}


def install() -> None:
    """Wraps `keras.Model.fit` and the making of its training step; a second call does nothing."""
    for name, wrapper in (("fit", _guarded_fit), ("make_train_function", make_train_function)):
        if name not in _originals:
            owner = next(c for c in keras.Model.__mro__ if name in vars(c))
            _originals[name] = (owner, vars(owner)[name])
            setattr(owner, name, wrapt.FunctionWrapper(vars(owner)[name], wrapper))


def uninstall() -> None:
    """Gives Keras its own functions back."""
    for name, (owner, original) in _originals.items():
        setattr(owner, name, original)
    _originals.clear()


class Marks(keras.callbacks.Callback):
    """The first callback of each `fit`: tells the watchdog where this rank is."""

    checkpointed = False
    _epoch = 0
    _begun: int | None = None
    _done: int | None = None

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """From here on a step must follow."""
        self._epoch = epoch
        self._begun = self._done = None
        watchdog.in_phase("training")

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """A step begins."""
        self._begun = batch
        watchdog.at_step(self._epoch, batch)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """A step is done."""
        self._done = self._begun

    def on_test_begin(self, logs: dict | None = None) -> None:
        """Validation begins."""
        self._take_back()
        watchdog.in_phase("evaluating")

    def on_test_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Validation moves on."""
        watchdog.at_step(self._epoch, batch)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """What callbacks do now may take its time."""
        self._take_back()
        watchdog.in_phase("between")

    def on_train_end(self, logs: dict | None = None) -> None:
        """As at an epoch's end."""
        watchdog.in_phase("between")

    def _take_back(self) -> None:
        """Keras begins a step before it sees that a generator has no more: this rank has not come that far."""
        if self._done is not None and self._done != self._begun:
            self._begun = self._done
            watchdog.at_step(self._epoch, self._done)


class FitGuard(keras.callbacks.Callback):
    """The last callback of each `fit` in a job of several ranks.

    Args:
        optimizers: the distributed optimizers of the model, as `_distributed` finds them.
    """

    checkpointed = False

    def __init__(self, optimizers: Sequence[ExchangingOptimizer]) -> None:
        super().__init__()
        self._optimizers = optimizers
        self._exchanges = [o._self_gradients for o in optimizers if isinstance(o, DistributedOptimizer)]
        self._one_model = _all_ranks_train(optimizers)

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Makes the starting point common: weights, slots, and the epoch that a backup was restored to."""
        # Where tf.distribute exchanges there is nothing to count.
        self._proven = self._one_model and not self._exchanges
        self._exchanged = False
        self._wishes = self._told = False  # to stop; by this rank, by another
        self._steps = 0
        self._before = heartbeat.current().read()[0]
        self._weights = len(self.model.weights)
        if not self._one_model:
            return
        check_equal_steps(self.params.get("steps"))
        optimizer = self.model.optimizer
        if optimizer is not None and not optimizer.built and self._weights:
            optimizer.build(self.model.trainable_variables)
        self._make_common("when training begins")
        for local in local_optimizers(self.model):
            local.start()
        self._tell_seeds_apart()
        if hasattr(self.model, "_initial_epoch"):
            self.model._initial_epoch = collectives.broadcast_object(self.model._initial_epoch, name="initial_epoch")

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Proves the exchange once; then carries wishes to stop, and stops where all ranks do."""
        beat = heartbeat.current()
        proven, votes = beat.read()
        self._steps += 1
        if not self._proven:
            self._prove(proven)
        if self._one_model and len(self.model.weights) != self._weights:  # built in the first step, by each rank
            self._weights = len(self.model.weights)
            self._make_common("after the step that built the model")
        if beat.all_stop:
            self.model.stop_training = True
        elif self._together():
            if self.model.stop_training and not votes:
                self._wishes = True
                beat.wish_to_stop()  # the next exchange tells the others, and all stop after it
            self.model.stop_training = self._told = votes > 0

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Asks all ranks whether one wants to stop: callbacks of an epoch's end decide here."""
        heartbeat.current().all_stop = False
        if not self._together():
            return
        wishes = np.zeros(world.size())
        wishes[world.rank()] = self._wishes or (bool(self.model.stop_training) and not self._told)
        process_set = self._exchanges[0].process_set if self._exchanges else None
        wishes = collectives.allreduce_sum(wishes, name="stop", process_set=process_set)
        self.model.stop_training = self._told or bool(wishes.any())
        if wishes.any() and world.rank() == 0 and not wishes.all():
            ranks = ", ".join(str(r) for r in np.flatnonzero(wishes))
            _log.warning("Training stops in epoch %d on all ranks, because rank(s) %s asked for it.", epoch + 1, ranks)

    def on_train_end(self, logs: dict | None = None) -> None:
        """Makes the result common: statistics are averaged, and a best epoch that was restored is the root's."""
        if self._one_model:
            average_state(self.model)
            self._make_common("when training ends")

    def _together(self) -> bool:
        """Whether this rank must not leave alone: others exchange with it, if only in the model's own train_step."""
        alone = bool(self._exchanges) and all(e.is_alone() for e in self._exchanges)
        return not alone and (bool(self._optimizers) or self._exchanged)

    def _prove(self, proven: float) -> None:
        """Compares the number of exchanges with what these steps must have made."""
        if proven < 0:
            raise RuntimeError(
                "The exchange of gradients does not sum up over the ranks: a vector known in closed form came back "
                "wrong in the first steps of fit. Horovod, or something that stands in its place, does not work here."
            )
        if proven > self._before:
            self._proven = self._exchanged = True
        elif not self._optimizers:
            self._proven = True
            _log.warning(
                "The optimizer of model %r is not distributed: each of the %d ranks trains a model of its own. Write "
                "model.compile(hvdkit.DistributedOptimizer(optimizer), ...) to train one.",
                self.model.name, world.size(),
            )  # fmt: skip
        elif self.model.trainable_weights and not any(e.used or e.is_alone() for e in self._exchanges):
            raise RuntimeError(
                f"The first {self._steps} step(s) of fit exchanged no gradients, although the optimizer of model "
                f"{self.model.name!r} is distributed: its train_step goes around optimizer.apply. Call "
                f"self.optimizer.apply(gradients, variables) in it, or use hvdkit.DistributedGradientTape."
            )

    def _tell_seeds_apart(self) -> None:
        """Lets no two ranks drop the same units, as after `keras.utils.set_random_seed(0)` on all of them."""
        seeds = [v for v in self.model.variables if v.path.endswith("seed_generator_state")]
        digests = [collectives.digest([v]) for v in seeds]
        everyone = collectives.allgather_object(digests, name="seeds", process_set=copies_of(self.model))
        if any(len(set(digests)) < len(digests) for digests in zip(*everyone, strict=False)):
            tell_seeds_apart(self.model)

    def _make_common(self, when: str) -> None:
        """Compares weights and optimizer slots over the ranks, and takes the root's where they differ."""
        state = {id(v): v for owner in (self.model, *self._optimizers) for v in _variables(owner)}
        variables = [v for v in state.values() if not any(keeps_local(o, v) for o in self._optimizers)]
        share(self.model.weights)
        everyone = collectives.allgather_object([collectives.digest([v]) for v in variables], name="common")
        if all(digests == everyone[0] for digests in everyone):
            return
        differing = [v.path for i, v in enumerate(variables) if len({d[i] for d in everyone if i < len(d)}) > 1]
        _log.warning(
            "%d variable(s), %s the first, differ between the ranks %s; all take those of rank 0. A callback that one "
            "rank alone has does this, and so does a script without hvdkit.callbacks.standard().",
            len(differing), differing[0] if differing else "of another model", when,
        )  # fmt: skip
        collectives.broadcast_variables(variables)


def _variables(owner: Any) -> list[Any]:
    """The weights of a model, or the slots of an optimizer: what ranks have in common, so no seeds."""
    return owner.weights if isinstance(owner, keras.Model) else owner.variables


_depth = 0  # of a fit within a callback of another


def _guarded_fit(fit: Callable, model: keras.Model, args: tuple, kwargs: dict[str, Any]) -> Any:
    global _depth
    optimizers = _distributed(model)
    unguarded = world.size() == 1 or getattr(model, "_distribute_strategy", None) is not None
    if unguarded or (_depth and not optimizers):
        return fit(*args, **kwargs)
    call = inspect.signature(fit).bind_partial(*args, **kwargs)
    given = call.arguments.get("callbacks")
    callbacks = keras.tree.flatten(given.callbacks if isinstance(given, keras.callbacks.CallbackList) else given or [])
    callbacks = [c for c in callbacks if not isinstance(c, (Marks, FitGuard))]
    if _all_ranks_train(optimizers):
        _build(model, call.arguments.get("x"))
        callbacks = _for_all_ranks(callbacks)
    callbacks = [Marks(), *callbacks, FitGuard(optimizers)]
    if isinstance(given, keras.callbacks.CallbackList):
        given.callbacks = callbacks
        given.set_model(model)
        given.set_params(given.params)
    else:
        call.arguments["callbacks"] = callbacks
    if not _depth:
        heartbeat.current().begin()
    _depth += 1
    phase = "interrupted"  # which may last, and still tells in which step it happened
    try:
        result = fit(*call.args, **call.kwargs)
        phase = "between"
        return result
    finally:
        _depth -= 1
        watchdog.in_phase("training" if _depth else phase)


def _for_all_ranks(callbacks: list[Any]) -> list[Any]:
    """The user's callbacks, with exact metrics and averaged statistics before them, and each file written once."""
    paths = [p for c in callbacks for p in _paths(c)]
    needs = any(isinstance(c, (*_BY_METRICS, MetricAverageCallback)) for c in callbacks)
    saves = any(isinstance(c, CheckpointCallback) for c in callbacks)
    everyone = collectives.allgather_object((paths, needs, saves), name="callbacks")
    if len({saves for *_, saves in everyone}) > 1:
        without = ", ".join(str(rank) for rank, (*_, saves) in enumerate(everyone) if not saves)
        raise UsageError(
            f"CheckpointCallback is not among the callbacks of rank(s) {without}, and would wait for them for ever. "
            f"Give it to all ranks: it writes on rank 0 alone."
        )
    if any(needs for _, needs, _ in everyone):  # one rank may have a callback that others have not
        callbacks = [MetricAverageCallback(), *(c for c in callbacks if not isinstance(c, MetricAverageCallback))]
    if not any(isinstance(c, AverageStateCallback) for c in callbacks):
        callbacks = [AverageStateCallback(), *callbacks]
    written = {path for lower, *_ in everyone[: world.rank()] for path in lower}
    return [c for c in callbacks if not written.intersection(_paths(c))]


def _paths(callback: Any) -> Iterable[str]:
    """Where a callback of Keras' own writes; a subclass may do more than write."""
    path = getattr(callback, _WRITERS.get(type(callback), ""), None)
    if path is not None:
        yield f"{type(callback).__name__}:{os.path.abspath(os.fspath(path))}"  # noqa: PTH100 - gs:// and the like, too


def _build(model: keras.Model, x: Any) -> None:
    """Builds a model that has waited for its first batch, so that all ranks begin with the same weights."""
    if all(layer.built for layer in model._flatten_layers(include_self=False)) and model.weights:
        return
    try:
        spec = keras.tree.map_structure(_symbol, _inputs_of(x))
        model(spec)
    except Exception as error:  # of whatever kind: the model's own code may want a real batch, or x be a generator
        _log.debug("The model is built in its first step: %s", error)


def _inputs_of(x: Any) -> Any:
    if isinstance(x, tf.data.Dataset):
        spec = x.element_spec
        return spec[0] if isinstance(spec, tuple) else spec
    return keras.tree.map_structure(lambda a: tf.TensorSpec([None, *np.shape(a)[1:]], a.dtype), x)


def _symbol(spec: Any) -> keras.KerasTensor:
    dtype = spec.dtype.name
    return keras.KerasTensor(spec.shape, keras.config.floatx() if dtype == "float64" else dtype)


def _distributed(model: keras.Model) -> list[ExchangingOptimizer]:
    """The model's optimizers that exchange, at whatever depth; those of its own attributes (GANs have two), too."""
    found = {id(o): o for optimizer in optimizers_of(model) for o in _exchanging(optimizer)}
    return list(found.values())


def _exchanging(optimizer: Any) -> Iterable[ExchangingOptimizer]:
    if isinstance(optimizer, ExchangingOptimizer):
        yield optimizer
    elif getattr(optimizer, "inner_optimizer", None) is not None:
        yield from _exchanging(optimizer.inner_optimizer)


def _all_ranks_train(optimizers: Sequence[ExchangingOptimizer]) -> bool:
    """Whether all ranks of the job train this model; otherwise some may not even call `fit`."""
    sets = [o._self_gradients.process_set for o in optimizers if isinstance(o, DistributedOptimizer)]
    return bool(optimizers) and all(s.process_set_id == 0 for s in sets)
