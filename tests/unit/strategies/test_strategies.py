"""How strategies are chosen, and batches divided over devices."""

import types

import keras
import pytest

from hvdkit.errors import UsageError
from hvdkit.strategies import MirroredStrategy, SingleStrategy, create, tpu


def test_strategies_are_chosen_by_name(monkeypatch):
    assert isinstance(create("single", 3), SingleStrategy)
    assert list(create("single", 3).shares) == [0, 1, 2]
    with pytest.raises(
        UsageError, match="There is no strategy 'magic'. Choose one of: single, horovod, mirrored, multiworker, tpu"
    ):
        create("magic")
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    for name in ("single", "mirrored", "tpu"):
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


def test_without_a_tpu_the_error_says_what_is_needed(monkeypatch):
    monkeypatch.delenv("TPU_NAME", raising=False)
    with pytest.raises(
        UsageError, match="needs a TPU, and this machine has none, or this TensorFlow is not built for "
    ):
        create("tpu")
    monkeypatch.setenv("TPU_NAME", "grpc://127.0.0.1:1")
    monkeypatch.setattr(tpu.tf.config, "experimental_connect_to_cluster", _cannot_connect)
    with pytest.raises(UsageError, match=r"TPU_NAME=grpc://127.0.0.1:1 cannot be reached.* \(it is off\)"):
        create("tpu")


def _cannot_connect(resolver):
    raise tpu.tf.errors.UnavailableError(None, None, "it is off")


def test_the_cores_of_a_tpu_are_as_many_as_it_has(monkeypatch):
    monkeypatch.setattr(tpu, "_connected", lambda name: name)
    monkeypatch.setattr(
        tpu.tf.distribute, "TPUStrategy", lambda resolver: types.SimpleNamespace(num_replicas_in_sync=8)
    )
    with pytest.raises(UsageError, match="--replicas=4, but this TPU has 8 cores"):
        create("tpu", 4)
