"""Steps an execution, and schedules of the learning rate."""

import dataclasses
import types

import pytest
from hvdkit_models.recipe import Recipe

from hvdkit.errors import UsageError
from hvdkit.train import callbacks
from hvdkit.train import flags as train_flags
from hvdkit.train import settings as train_settings


def parse(*flags):
    return train_flags.parse(["train", *flags])


def _with(**changes):
    return dataclasses.replace(parse(), **changes)


@pytest.mark.parametrize(
    ("steps", "steps_per_epoch", "expected"), [(220, 44, 11), (1872, 468, 13), (200, 781, 10), (7, 5, 1)]
)
def test_steps_per_execution_divides_every_epoch(steps, steps_per_epoch, expected):
    chosen = callbacks.steps_per_execution(None, steps, steps_per_epoch, None)
    assert chosen == expected
    assert min(steps, steps_per_epoch) % chosen == 0 == (steps % steps_per_epoch) % chosen


def test_steps_per_execution_that_would_run_over_an_epochs_end_are_refused():
    assert callbacks.steps_per_execution(4, 220, 44, None) == 4
    with pytest.raises(
        UsageError, match="--steps-per-execution=16 does not divide an epoch of 44 .* 1, 2, 4, 11, 22, 44"
    ):
        callbacks.steps_per_execution(16, 220, 44, None)


def test_the_cosine_begins_where_the_warmup_ends():
    multiplier = callbacks._cosine(0.5, 2.0)
    assert [multiplier(e) for e in (0.0, 0.5, 1.25, 2.0)] == pytest.approx([1.0, 1.0, 0.5, 0.0])
    assert train_settings.resolve(_with(warmup_epochs=3.0), Recipe(), 1).warmup_epochs == 0


def test_the_step_at_which_a_run_goes_on_is_reached():
    found = types.SimpleNamespace(state={"step_in_epoch": 6})
    assert callbacks.steps_per_execution(None, 220, 44, found) == 2


@pytest.mark.parametrize(("flags", "share"), [((), 0.05), (("--checkpoint-every=9",), None)])
def test_checkpoints_of_epochs_are_limited_and_those_of_steps_are_not(tmp_path, flags, share):
    settings = train_settings.resolve(parse(*flags), Recipe(), 1)
    made = callbacks.checkpoint_callback(settings, types.SimpleNamespace(size=1), tmp_path, {}, None, None)
    assert made.max_overhead == share
