"""`FitGuard`: the callback that keeps the ranks of a `fit` together, and checks that they allreduce gradients."""

import logging
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from hvdkit import collectives, world
from hvdkit.callbacks.average_state import average_state
from hvdkit.collectives.agreement import check_equal_steps
from hvdkit.collectives.mesh import copies_of, share
from hvdkit.compat.keras3 import first_epoch, set_first_epoch
from hvdkit.optimizers import heartbeat
from hvdkit.optimizers.distributed import DistributedOptimizer, all_ranks_train, keeps_local
from hvdkit.optimizers.exchanging import ExchangingOptimizer
from hvdkit.optimizers.local_sgd import local_optimizers
from hvdkit.optimizers.state import make_seeds_differ, seeds_of

_log = logging.getLogger(__name__)


class FitGuard(keras.callbacks.Callback):
    """The last callback of each `fit` in a job of several ranks.

    Args:
        optimizers: the distributed optimizers of the model, from `exchanging_optimizers_of`.
    """

    checkpointed = False
    sees_executions = True

    def __init__(self, optimizers: Sequence[ExchangingOptimizer]) -> None:
        super().__init__()
        self._optimizers = optimizers
        self._exchanges = [o._self_gradients for o in optimizers if isinstance(o, DistributedOptimizer)]
        self._one_model = all_ranks_train(optimizers)

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Synchronizes the initial state: weights, slots, and the epoch that a backup was restored to."""
        # Where tf.distribute reduces the gradients there is nothing to count.
        self._proven = self._one_model and not self._exchanges
        self._exchanged = False
        self._wishes = self._told = False  # stop requests: of this rank, of another rank
        self._steps = 0
        self._before = heartbeat.current().read()[0]
        self._weights = len(self.model.weights)
        if not self._one_model:
            return
        check_equal_steps(self.params.get("steps"))
        optimizer = self.model.optimizer
        if optimizer is not None and not optimizer.built and self._weights:
            optimizer.build(self.model.trainable_variables)
        make_common(self.model, self._optimizers, "when training begins")
        for local in local_optimizers(self.model):
            local.start()
        make_common_seeds_differ(self.model)
        set_first_epoch(self.model, collectives.broadcast_object(first_epoch(self.model), name="initial_epoch"))

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Checks the allreduce once; then passes on stop requests, and stops when all ranks stop."""
        beat = heartbeat.current()
        proven, votes = beat.read()
        self._steps += 1
        if not self._proven:
            self._prove(proven)
        if self._one_model and len(self.model.weights) != self._weights:  # built in the first step, by each rank
            self._weights = len(self.model.weights)
            make_common(self.model, self._optimizers, "after the step that built the model")
        if beat.all_stop:
            self.model.stop_training = True
        elif self._together():
            if self.model.stop_training and not votes:
                self._wishes = True
                beat.wish_to_stop()  # the next allreduce tells the others, and all stop after it
            self.model.stop_training = self._told = votes > 0

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Asks all ranks for stop requests: callbacks that run at the end of an epoch decide here."""
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
        """Synchronizes the result: averages statistics; takes the root's weights where a best epoch was restored."""
        if self._one_model:
            average_state(self.model)
            make_common(self.model, self._optimizers, "when training ends")

    def _together(self) -> bool:
        """Returns whether this rank must not exit alone: others reduce with it, if only in the model's train_step."""
        alone = bool(self._exchanges) and all(e.is_alone() for e in self._exchanges)
        return not alone and (bool(self._optimizers) or self._exchanged)

    def _prove(self, proven: float) -> None:
        """Compares the number of allreduces with the number that these steps must have made."""
        if proven < 0:
            raise RuntimeError(
                "The exchange of gradients does not sum up over the ranks: a vector known in closed form came back "
                "wrong in the first steps of fit. Horovod, or something that stands in its place, does not work here."
            )
        if proven > self._before:
            self._proven = self._exchanged = True
        elif not self._optimizers:
            self._proven = True
            warn_of_no_exchange(self.model)
        elif self.model.trainable_weights and not any(e.used or e.is_alone() for e in self._exchanges):
            raise RuntimeError(
                f"The first {self._steps} step(s) of fit exchanged no gradients, although the optimizer of model "
                f"{self.model.name!r} is distributed: its train_step goes around optimizer.apply. Call "
                f"self.optimizer.apply(gradients, variables) in it, or use hvdkit.DistributedGradientTape."
            )


def make_common(model: keras.Model, optimizers: Sequence[ExchangingOptimizer], when: str) -> None:
    """Compares weights and optimizer slots over the ranks, and broadcasts the root's if they differ.

    Args:
        model: the model, on all ranks.
        optimizers: its distributed optimizers.
        when: the moment, for the message.
    """
    state = {id(v): v for owner in (model, *optimizers) for v in _variables(owner)}
    variables = [v for v in state.values() if not any(keeps_local(o, v) for o in optimizers)]
    share(model.weights)
    everyone = collectives.allgather_object([collectives.digest([v]) for v in variables], name="common")
    if all(digests == everyone[0] for digests in everyone):
        return
    differing = [v.path for i, v in enumerate(variables) if len({d[i] for d in everyone if i < len(d)}) > 1]
    _log.warning(
        "%d variable(s), %s the first, differ between the ranks %s; all take those of rank 0. A callback that one "
        "rank alone has does this, and so does a script without hvdkit.callbacks.standard().",
        len(differing),
        differing[0] if differing else "of another model",
        when,
    )
    collectives.broadcast_variables(variables)


def make_common_seeds_differ(model: keras.Model) -> None:
    """Makes equal seeds differ between ranks, as after `keras.utils.set_random_seed(0)` on all of them."""
    digests = [collectives.digest([v]) for v in seeds_of(model)]
    everyone = collectives.allgather_object(digests, name="seeds", process_set=copies_of(model))
    if any(len(set(digests)) < len(digests) for digests in zip(*everyone, strict=False)):
        make_seeds_differ(model)


def warn_of_no_exchange(model: keras.Model) -> None:
    """Warns of a model whose optimizer is not distributed."""
    _log.warning(
        "The optimizer of model %r is not distributed: each of the %d ranks trains a model of its own. Write "
        "model.compile(hvdkit.DistributedOptimizer(optimizer), ...) to train one.",
        model.name,
        world.size(),
    )


def _variables(owner: Any) -> list[Any]:
    """Returns a model's weights or an optimizer's slots, which ranks synchronize. Seeds are not among them."""
    return owner.weights if isinstance(owner, keras.Model) else owner.variables
