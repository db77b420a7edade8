"""Losses that count something else on each replica, under `tf.distribute`: the weights and the loss of one process."""

import keras
import numpy as np
import pytest

from tests.parallel.optimizers import test_weighing as weighing

CASES = ["labels to ignore", "a mask", "mean by weights", "sum"]


def _cases():
    import hvdkit as hvd

    cases = {name: case for name, case in weighing._cases(keras, hvd).items() if name in CASES}
    # Steps of 8 and a last one of 3: tf.distribute gives its two replicas 2 and 1 of these.
    plain = cases["labels to ignore"]
    labels = np.random.default_rng(0).integers(3, size=[19, weighing.TIME])
    inputs = np.eye(3, dtype="float32")[labels] + 0.5
    return cases, (plain[0], weighing._cross_entropy, (inputs, labels))


def _differences(found, reference):
    return float(np.abs(found[0] - reference[0]).max()), abs(found[1] / reference[1] - 1)


def _fitted(build, loss, inputs, labels, wrap, callbacks=(), batch_size=8):
    keras.utils.set_random_seed(1)
    model = build(keras)
    model.compile(wrap(keras.optimizers.SGD(0.3)), loss=loss(keras), jit_compile=False)
    how = {"batch_size": batch_size, "shuffle": False, "verbose": 0, "callbacks": list(callbacks)}
    history = model.fit(inputs, labels, **how).history
    return weighing._flat(model), history["loss"][0]


def _strategy(name):
    """The strategy with two replicas on CPUs; for `tpu`, its code over the devices of `mirrored`."""
    import tensorflow as tf

    from hvdkit import strategies

    if name != "tpu":
        return strategies.create(name, 2)
    with pytest.MonkeyPatch.context() as patch:
        over_cpus = strategies.MirroredStrategy._over_devices
        patch.setattr(strategies.tpu, "_connected", lambda tpu: tpu)
        patch.setattr(tf.distribute, "TPUStrategy", lambda resolver: over_cpus(None, 2))
        return strategies.create(name, 2)


def losses_of_replicas(name):
    strategy = _strategy(name)
    cases, (build, loss, (inputs, labels)) = _cases()
    found = {}
    for name, case in cases.items():
        together = [weighing._together(part) for part in zip(*case[2](2), strict=True)]
        alone = weighing._trained(case, together, lambda o: o)
        with strategy.scope():
            found[name] = _differences(weighing._trained(case, together, strategy.distribute), alone)
    alone = _fitted(build, loss, inputs, labels, lambda o: o)
    with strategy.scope():
        found["batches"] = _differences(_fitted(build, loss, inputs, labels, strategy.distribute), alone)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mirrored", "tpu"])
def test_replicas_train_and_show_what_one_process_does(ranks, name):
    (found,) = ranks(1, losses_of_replicas, fresh=True, name=name)
    assert len(found) == len(CASES) + 1
    assert {name: far for name, far in found.items() if not max(far) < 1e-5} == {}


def multiworker_losses():
    import hvdkit as hvd
    from hvdkit import strategies

    strategy = strategies.create("multiworker")
    rank, average = strategy.world.rank, [hvd.callbacks.MetricAverageCallback()]
    cases, (build, loss, (inputs, labels)) = _cases()
    found = {}
    for name, case in cases.items():
        parts = case[2](2)
        alone = weighing._trained(case, [weighing._together(part) for part in zip(*parts, strict=True)], lambda o: o)
        found[name] = _differences(weighing._trained(case, parts[rank], strategy.distribute, average), alone)
    inputs, labels = inputs[:18], labels[:18]
    alone = _fitted(build, loss, inputs, labels, lambda o: o, batch_size=9)
    mine = np.concatenate([np.arange(s, s + 9)[:5] if rank == 0 else np.arange(s, s + 9)[5:] for s in (0, 9)])
    ours = _fitted(build, loss, inputs[mine], labels[mine], strategy.distribute, average, batch_size=5 - rank)
    found["batches"] = _differences(ours, alone)
    return found


@pytest.mark.slow
def test_workers_train_and_show_what_one_process_does(ranks):
    for found in ranks(2, multiworker_losses, fresh=True):
        assert len(found) == len(CASES) + 1
        assert {name: far for name, far in found.items() if not max(far) < 1e-5} == {}
