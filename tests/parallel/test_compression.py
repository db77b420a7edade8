"""Compressors with error feedback: what arrives, what is kept, and what a training makes of it."""

import numpy as np
import pytest

STEPS, LOCAL_BATCH = 12, 8


def exchanged(spec, steps, shapes):
    """What this rank's gradients of some steps came back as, and what it kept; over real ranks."""
    import tensorflow as tf

    import hvdkit as hvd
    from hvdkit import heartbeat
    from hvdkit.compression import by_name
    from hvdkit.gradients import GradientExchange

    me = hvd.init()
    exchange = GradientExchange("test", compression=by_name(spec))
    heartbeat.current().begin()
    generator = np.random.default_rng(5)
    everyone = [[generator.normal(size=(me.size, *shape)).astype("float32") for shape in shapes] for _ in range(steps)]

    @tf.function
    def reduce(grads):
        return exchange(grads)

    arrived = [[r.numpy() for r in reduce([g[me.rank] for g in step])] for step in everyone]
    kept = [v.numpy() for v in exchange.feedback.own] if exchange.feedback else []
    return {
        "arrived": arrived,
        "dense": [[g.mean(axis=0) for g in step] for step in everyone],
        "kept": kept,
        "proven": heartbeat.current().read()[0],
        "bytes": exchange.feedback.wire_bytes(shapes, me.size),
    }


SHAPES = [[40, 30], [30], [3, 3, 8, 16], []]


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("spec", ["topk:fraction=1", "powersgd:rank=30"])
def test_what_sends_everything_is_the_dense_mean(ranks, number, spec):
    for found in ranks(number, exchanged, spec=spec, steps=1, shapes=[*SHAPES[:2], []]):
        for arrived, dense in zip(found["arrived"][0], found["dense"][0], strict=True):
            np.testing.assert_allclose(arrived, dense, atol=2e-5)


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("spec", ["topk:fraction=0.05", "powersgd:rank=2", "int8", "onebit"])
def test_nothing_is_lost_only_late(ranks, number, spec):
    """The sum of all that arrived, and the mean of what the ranks keep, is the sum of the gradients."""
    steps = 4
    found = ranks(number, exchanged, spec=spec, steps=steps, shapes=SHAPES)
    totals = [sum(f.size for f in step) for step in found[0]["dense"]]
    for result in found:
        assert result["proven"] == steps, "the heartbeat did not travel with each exchange"
        for step in range(steps):
            for arrived, same in zip(result["arrived"][step], found[0]["arrived"][step], strict=True):
                assert np.array_equal(arrived, same), "the ranks have different gradients"
    arrived = sum(np.concatenate([np.ravel(a) for a in step]) for step in found[0]["arrived"])
    dense = sum(np.concatenate([np.ravel(a) for a in step]) for step in found[0]["dense"])
    kept = _kept(spec, found, totals[0])
    np.testing.assert_allclose(arrived + kept, dense, atol=1e-4)
    assert np.abs(kept).max() > 1e-3, "nothing was left out: nothing was compressed"


def _kept(spec, found, total):
    """What all ranks left out, as the mean's share, in the order of the gradients."""
    if spec.startswith("powersgd"):
        errors = iter(zip(*[f["kept"] for f in found], strict=True))
        parts = []
        for shape in SHAPES:
            big = len(shape) > 1
            parts.append(np.ravel(np.mean(next(errors), axis=0)) if big else np.zeros(int(np.prod(shape))))
        return np.concatenate(parts)
    sent = np.mean([np.ravel(f["kept"][0]) for f in found], axis=0)[:total]
    if spec.startswith("topk"):
        return sent
    return sent + np.concatenate([np.ravel(f["kept"][1]) for f in found])[:total]  # each rank's own part of the sum


def test_bytes_are_as_few_as_promised():
    from hvdkit.compression import by_name

    shapes, dense = [(1000, 1000), (1000,)], 4 * 1_001_000
    bytes_of = {spec: by_name(spec).wire_bytes(shapes, 2) for spec in ("int8", "onebit", "topk", "powersgd:rank=2")}
    assert dense / 4 < bytes_of["int8"] < 1.03 * dense / 4
    assert dense / 32 < bytes_of["onebit"] < dense / 27
    assert bytes_of["topk"] == 8 * 10_010
    assert bytes_of["powersgd:rank=2"] == 4 * (2 * 2000 + 1000)
    assert by_name("int8").wire_bytes(shapes, 8) == pytest.approx(2 * 7 / 8 * dense * 260 / 1024, rel=0.01)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("zip", "--compression=zip is unknown. Choose one of none, fp16, bf16, int8, onebit, topk, powersgd."),
        ("topk:fraction=0", "fraction must be above 0 and up to 1, but is 0.0"),
        ("powersgd:rank=0.5", "rank must be a whole number, 1 or more, but is 0.5"),
        ("fp16:rank=2", "fp16 takes no arguments"),
        ("topk:2", "The form is name:argument=value"),
    ],
)
def test_wrong_compressions_are_told(spec, message):
    from hvdkit.compression import by_name
    from hvdkit.errors import UsageError

    with pytest.raises(UsageError) as error:
        by_name(spec)
    assert message in str(error.value)


def trained(spec):
    import keras

    import hvdkit as hvd
    from hvdkit.compression import by_name

    me = hvd.init()
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.layers.Input([20]), keras.layers.Dense(64, "relu"), keras.layers.Dense(3)])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), compression=by_name(spec))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss=loss, metrics=["accuracy"])
    generator = np.random.default_rng(me.rank)
    x = generator.normal(size=[256, 20]).astype("float32")
    y = np.argmax(x[:, :3], axis=1)
    history = model.fit(x, y, batch_size=16, epochs=8, verbose=0, callbacks=hvd.callbacks.standard(guard_every=8))
    weights = np.concatenate([np.ravel(w) for w in model.get_weights()])
    return {"weights": weights, "accuracy": history.history["accuracy"][-1], "state": len(optimizer.variables)}


@pytest.mark.parametrize("spec", ["none", "topk:fraction=0.05", "powersgd:rank=2", "int8", "onebit"])
def test_models_train_and_the_guards_are_content(ranks, spec):
    one, other = ranks(2, trained, spec=spec)
    assert np.array_equal(one["weights"], other["weights"])
    assert one["accuracy"] > 0.8, f"{spec} does not train"
