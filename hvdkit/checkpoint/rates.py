"""Learning rates of a run that goes on with another number of ranks.

Programs scale the rate by the number of ranks (`hvdkit.scaled`). A checkpoint has the present rate, which schedules,
warm-ups or plateaus have changed since: it is scaled like the rate with which the optimizer is made.
"""

import logging
from collections.abc import Sequence

import keras

from hvdkit import world
from hvdkit.compat.keras3 import learning_rate_source, momentum_slots
from hvdkit.optimizers.parts import optimizers_of, parts_of

_log = logging.getLogger(__name__)


def rates_of(model: keras.Model) -> list[float | str]:
    """Returns the rate of each optimizer of a model, and of those inside; of a schedule the name of its class."""
    return [_rate(part) for part in _parts(model)]


def rescale(model: keras.Model, before: Sequence[float | str], saved: Sequence[float | str]) -> None:
    """Multiplies the restored rates by the ratio of those with which the optimizers were made, here and there.

    The velocity of SGD and RMSprop is scaled with the rate, as in `LearningRateScheduleCallback`.

    Args:
        model: its optimizers are restored.
        before: its rates before they were restored, of this number of ranks.
        saved: the same of the run that saved the checkpoint.
    """
    if len(saved) != len(before):
        return
    for part, here, there in zip(_parts(model), before, saved, strict=True):
        if isinstance(here, str) or isinstance(there, str) or not there or here == there:
            continue
        part.learning_rate = float(_rate(part)) * here / there
        for velocity in momentum_slots(part):
            velocity.assign(velocity * (here / there))


def tell(model: keras.Model, before: Sequence[float | str], saved: Sequence[float | str], ranks: int) -> None:
    """Logs on rank 0 what another number of ranks means for the rates."""
    schedules = [rate for rate in before if isinstance(rate, str)]
    if world.rank() or ranks == world.size():
        return
    if schedules:
        _log.warning(
            "%s counts steps, and those that are done were of %d ranks: with %d ranks an epoch has another number of "
            "them. hvdkit.callbacks.LearningRateScheduleCallback counts epochs.",
            schedules[0],
            ranks,
            world.size(),
        )
    elif list(before) != list(saved):
        message = "The saved learning rate, of %d ranks, is scaled by %.4g, as that with which the optimizer is made."
        here, there = next((here, there) for here, there in zip(before, saved, strict=False) if here != there)
        if isinstance(here, float) and isinstance(there, float) and there:
            _log.warning(message, ranks, here / there)


def _parts(model: keras.Model) -> list[keras.optimizers.Optimizer]:
    leaves = [part for optimizer in optimizers_of(model) for part in parts_of(optimizer)]
    return [part for part in leaves if not hasattr(part, "inner_optimizer") and not hasattr(part, "optimizers")]


def _rate(part: keras.optimizers.Optimizer) -> float | str:
    source = learning_rate_source(part)
    if isinstance(source, keras.optimizers.schedules.LearningRateSchedule):
        return type(source).__name__
    return float(keras.ops.convert_to_numpy(part.learning_rate))
