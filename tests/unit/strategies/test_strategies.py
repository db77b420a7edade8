"""How strategies are chosen, and batches divided over devices."""

import keras
import pytest

from hvdkit.errors import UsageError
from hvdkit.strategies import MirroredStrategy, SingleStrategy, create


def test_strategies_are_chosen_by_name(monkeypatch):
    assert isinstance(create("single", 3), SingleStrategy)
    assert list(create("single", 3).shares) == [0, 1, 2]
    with pytest.raises(
        UsageError, match="There is no strategy 'magic'. Choose one of: single, horovod, mirrored, multiworker"
    ):
        create("magic")
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    for name in ("single", "mirrored"):
        with pytest.raises(UsageError, match=f"--strategy={name} trains in one process, but 2 were started"):
            create(name)


@pytest.mark.parametrize(("examples", "size", "expected"), [(360, 2, 32), (10_000, 2, 32), (33, 2, 30), (7, 4, 8)])
def test_every_device_gets_an_example_of_every_evaluation_batch(examples, size, expected):
    strategy = object.__new__(MirroredStrategy)
    strategy.size = size
    batch = strategy.evaluation_batch(examples, 32 if size == 2 else 8)
    rest = examples % batch
    assert batch == expected
    assert rest == 0 or rest > -(-rest // size) * (size - 1)


def test_too_few_test_examples_for_the_devices_are_refused():
    strategy = object.__new__(MirroredStrategy)
    strategy.size = 4
    with pytest.raises(UsageError, match="5 test examples cannot be divided into batches that give each of 4 devices"):
        strategy.evaluation_batch(5, 8)


@pytest.mark.parametrize("strategy", ["single"])
def test_compression_without_an_exchange_is_refused(strategy):
    with pytest.raises(UsageError, match="--strategy=single has no compression: it trains in one process"):
        create(strategy).distribute(keras.optimizers.Adam(), compression=None)
