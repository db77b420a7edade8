"""Compressors with error feedback: what arrives, what is kept, and what a training makes of it."""

import numpy as np
import pytest

STEPS, LOCAL_BATCH = 12, 8


def exchanged(spec, steps, shapes):
    """What this rank's gradients of some steps came back as, and what it kept; over real ranks."""
    import tensorflow as tf

    import hvdkit as hvd
    from hvdkit.compression import by_name
    from hvdkit.optimizers import heartbeat
    from hvdkit.optimizers.gradients import GradientExchange

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


@pytest.mark.parametrize("number", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("spec", [pytest.param("topk:fraction=1", marks=pytest.mark.slow), "powersgd:rank=30"])
def test_what_sends_everything_is_the_dense_mean(ranks, number, spec):
    for found in ranks(number, exchanged, spec=spec, steps=1, shapes=[*SHAPES[:2], []]):
        for arrived, dense in zip(found["arrived"][0], found["dense"][0], strict=True):
            np.testing.assert_allclose(arrived, dense, atol=2e-5)


@pytest.mark.parametrize("number", [2, pytest.param(3, marks=pytest.mark.slow)])
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
    return sent + sum(f["kept"][1] for f in found)  # each rank has its own part of the sum


def overflowing(spec):
    """An inf on rank 1 alone in the second of three steps; and the same without that step."""
    import tensorflow as tf

    import hvdkit as hvd
    from hvdkit.compression import by_name
    from hvdkit.optimizers.gradients import GradientExchange

    me = hvd.init()
    generator = np.random.default_rng(8)
    first, last = (generator.normal(size=(me.size, 40, 30)).astype("float32")[me.rank] for _ in range(2))
    broken = first.copy()
    if me.rank == 1:
        broken[3, 5], broken[30, 7] = np.inf, np.nan
    found = []
    for name, steps in (("with", [first, broken, last]), ("without", [first, last])):
        exchange = GradientExchange(name, compression=by_name(spec))
        reduce = tf.function(exchange)
        arrived = [reduce([tf.constant(g), tf.constant(g[0])]) for g in steps]
        finite = [all(np.isfinite(a).all() for a in step) for step in arrived]
        found.append((finite, arrived[-1][0].numpy(), [v.numpy() for v in exchange.feedback.own]))
    return found


@pytest.mark.parametrize(
    "spec",
    ["powersgd:rank=2", "onebit", *(pytest.param(s, marks=pytest.mark.slow) for s in ("topk:fraction=0.05", "int8"))],
)
def test_an_overflow_reaches_all_ranks_and_is_not_kept(ranks, spec):
    for broken, clean in ranks(2, overflowing, spec=spec):
        assert broken[0] == [True, False, True]
        assert clean[0] == [True, True]
        assert np.array_equal(broken[1], clean[1]), "the step after the overflow is not as if there had been none"
        assert all(np.array_equal(a, b) for a, b in zip(broken[2], clean[2], strict=True))


@pytest.mark.parametrize("spec", ["topk", "powersgd:rank=2", "int8", "onebit"])
def test_what_is_kept_has_a_shape_that_other_numbers_of_ranks_share(spec):
    from hvdkit.compression import by_name

    shapes = []
    for number in (2, 3, 8):
        compressor = by_name(spec)
        compressor.build(SHAPES, number)
        shapes.append([tuple(v.shape) for v in [*compressor.common, *compressor.own]])
    assert shapes[0] == shapes[1] == shapes[2]


def guarded(turns):
    """`fit` under CompressionGuard, on data whose labels are turned around after the dense steps, or are not."""
    import keras

    import hvdkit as hvd

    me = hvd.init()
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.layers.Input([20]), keras.layers.Dense(2)])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.2), compression=hvd.Compression.int8())
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    generator = np.random.default_rng(me.rank)
    x = generator.normal(size=[640, 20]).astype("float32")
    y = (x[:, 0] > 0).astype("int64")
    if turns and me.rank == 1:  # the loss of one rank alone rises: both must act
        y[320:] = 1 - y[320:]
    dense = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: dense.append(optimizer.compression.is_dense)
    )
    guard = hvd.callbacks.CompressionGuard(dense_steps=10, every=5, smoothing=0.5)
    callbacks = [*hvd.callbacks.standard(guard_every=0), guard, note]
    model.fit(x, y, batch_size=16, epochs=1, shuffle=False, verbose=0, callbacks=callbacks)
    return guard.fell_back_at, dense


def test_the_guard_goes_back_to_dense_on_all_ranks_at_once(ranks):
    one, other = ranks(2, guarded, turns=True)
    assert one == other
    assert one[0] is not None
    assert 20 < one[0] <= 40
    assert one[1] == [step < 10 or step >= one[0] for step in range(1, 41)]
    calm = ranks(2, guarded, turns=False)
    assert [c[0] for c in calm] == [None, None]
    assert calm[0][1] == [step < 10 for step in range(1, 41)]


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


@pytest.mark.parametrize(
    "spec",
    [
        "topk:fraction=0.05",
        "int8",
        *(pytest.param(s, marks=pytest.mark.slow) for s in ("none", "powersgd:rank=2", "onebit")),
    ],
)
def test_models_train_and_the_guards_are_content(ranks, spec):
    one, other = ranks(2, trained, spec=spec)
    assert np.array_equal(one["weights"], other["weights"])
    assert one["accuracy"] > 0.8, f"{spec} does not train"
