"""Data that cannot be balanced or augmented."""

import dataclasses

import pytest
from hvdkit_models.recipe import Recipe

from hvdkit.data.sources import open_source
from hvdkit.errors import UsageError
from hvdkit.train import flags as train_flags
from hvdkit.train import settings as train_settings
from hvdkit.train.data import prepared, schema_of


def parse(*flags):
    return train_flags.parse(["train", *flags])


def _with(**changes):
    return dataclasses.replace(parse(), **changes)


def test_values_have_no_classes_to_balance(tmp_path):
    (tmp_path / "x.csv").write_text("n,label\n" + "".join(f"{i},{i}.5\n" for i in range(10)))
    source = open_source(str(tmp_path / "x.csv"), schema=schema_of(_with(task="regression", feature_columns="n")))
    settings = train_settings.resolve(parse(), Recipe(), 1)
    assert prepared(source, settings) is source
    with pytest.raises(UsageError, match=r"--sampling=over balances classes, and x\.csv, for regression, have none"):
        prepared(source, dataclasses.replace(settings, sampling="over"))


def test_what_cannot_be_augmented_or_weighed_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("n,label\n" + "".join(f"{i},{i}.5\n" for i in range(10)))
    values = open_source(str(tmp_path / "x.csv"), schema=schema_of(_with(task="regression", feature_columns="n")))
    digits = open_source("digits")
    for source, changed, message in (
        (values, {"augment": "flip"}, r"--augment=flip changes images, and x\.csv has none"),
        (values, {"focal": 2.0}, "--focal=2.0 balances classes, and x.csv, for regression, have none"),
        (values, {"effective_number": 0.9}, "--effective-number=0.9 balances classes"),
        (values, {"long_tail": 9.0}, "--long-tail=9.0 makes classes rare, and x.csv, for regression, have none"),
        (digits, {"augment": "rand"}, r"--augment=rand changes colors, and the images of digits have 1 channel\(s\)"),
    ):
        settings = dataclasses.replace(train_settings.resolve(parse(), Recipe(), 1), **changed)
        with pytest.raises(UsageError, match=message):
            prepared(source, settings)
    with pytest.raises(UsageError, match="--effective-number and --class-weights exclude each other"):
        parse("--effective-number=0.9", "--class-weights")
    with pytest.raises(UsageError, match="'flop' is unknown. Name some of flip, crop, rand, mixup, cutmix"):
        parse("--augment=flip,flop")
    assert parse("--augment=flip,cutmix").one_hot_labels
    assert not parse("--augment=flip,crop").one_hot_labels
