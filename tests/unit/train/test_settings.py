"""What flags leave open, and what a recipe or a compiled model decides."""

import dataclasses

import pytest
from hvdkit_models.recipe import Recipe

from hvdkit.errors import UsageError
from hvdkit.train import flag_checks
from hvdkit.train import flags as train_flags
from hvdkit.train import settings as train_settings


def parse(*flags):
    return train_flags.parse(["train", *flags])


def _with(**changes):
    return dataclasses.replace(parse(), **changes)


def test_the_recipe_fills_in_what_the_flags_leave_open():
    recipe = Recipe("mnist", global_batch=100, learning_rate=0.1, epochs=20)
    config = train_settings.resolve(parse(), recipe, 2)
    assert (config.dataset, config.global_batch, config.local_batch, config.learning_rate) == ("mnist", 100, 50, 0.1)
    assert config.warmup_epochs == 0
    config = train_settings.resolve(_with(local_batch=100), recipe, 4)
    assert (config.global_batch, config.learning_rate, config.warmup_epochs) == (400, pytest.approx(0.4), 2.0)


def test_a_batch_that_cannot_be_divided():
    with pytest.raises(
        UsageError, match="global batch of 127 cannot be divided evenly over 2 replicas. Use --global-batch=126 or 128"
    ):
        train_settings.resolve(_with(global_batch=127), Recipe(), 2)


@pytest.mark.parametrize("wrong", ["width", "width=", "width=256;depth=6", "256", "width=2*x", "a=1,a=2", "**x"])
def test_arguments_of_the_model_that_cannot_be_read(wrong):
    with pytest.raises(UsageError, match=r"^--model-args=.* cannot be read \(.*\)\. The form is name=value,name=value"):
        flag_checks.check(_with(model_args=wrong))


def test_a_compiled_models_optimizer_is_its_own():
    settings = train_settings.resolve(_with(), Recipe(lr_schedule="cosine", warmup_epochs=1), 2)
    left = train_settings.leave_optimizer_to_model(_with(), settings, "mine", 0.25)
    assert (left.optimizer, left.learning_rate, left.lr_schedule, left.warmup_epochs) == (
        "the model's",
        0.25,
        "constant",
        0,
    )
    with pytest.raises(UsageError, match="--learning-rate was given, but the model mine is compiled by its function"):
        train_settings.leave_optimizer_to_model(_with(learning_rate=0.1), settings, "mine", 0.25)


@pytest.mark.parametrize(
    ("given", "validates", "share"),
    [
        ([], False, None),
        (["--eval-every=2"], True, None),
        (["--keep-best=1"], True, None),
        (["--validation=yes"], True, None),
        (["--validation=0.25"], True, 0.25),
        (["--validation=no", "--eval-every=1"], False, None),
        (["--fold=0/5", "--eval-every=1"], False, None),
    ],
)
def test_what_is_chosen_is_chosen_on_a_validation_split(given, validates, share):
    config = train_flags.parse(["hvdkit.train", *given])
    assert (config.validates, config.validation_share) == (validates, share)
