"""Ranks whose shares do not divide evenly: nothing hangs, nothing is lost in silence."""

import numpy as np
import pytest

LOCAL_BATCH = 4


def _examples(number):
    generator = np.random.default_rng(5)
    return generator.normal(size=(number, 6)).astype("float32"), generator.integers(3, size=number)


def _model():
    import keras

    keras.utils.set_random_seed(3)
    return keras.Sequential([keras.layers.Input([6]), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(3)])


def _compile(model, optimizer):
    import keras

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss=loss, weighted_metrics=["accuracy"], jit_compile=False)
    return model


def _flat(model):
    return np.concatenate([np.ravel(w) for w in model.get_weights()])


def trained_on_uneven_data(examples):
    import keras

    import hvdkit as hvd

    world = hvd.init()
    x, y = _examples(examples)
    adam = {"learning_rate": 0.02, "epsilon": 1e-3}
    results = {}
    for policy in ({"uneven": "join", "batch_size": LOCAL_BATCH}, {"uneven": "pad"}, {"uneven": "drop"}):
        share = hvd.data.shard((x, y), **policy)
        model = _compile(_model(), hvd.DistributedOptimizer(keras.optimizers.Adam(**adam)))
        arguments = {} if policy["uneven"] == "join" else {"y": share[1], "batch_size": LOCAL_BATCH, "shuffle": False}
        data = share if policy["uneven"] == "join" else share[0]
        history = model.fit(data, epochs=3, verbose=0, callbacks=hvd.callbacks.standard(), **arguments)
        results[policy["uneven"]] = _flat(model), int(model.optimizer.iterations.numpy()), history.history["loss"]
    seen = [
        row
        for rows, _, weights in hvd.data.shard((x, y), uneven="join", batch_size=LOCAL_BATCH)
        for row in rows.numpy()[weights.numpy() > 0].tolist()
    ]
    alone = _compile(_model(), keras.optimizers.Adam(**adam))
    alone.fit(x, y, batch_size=LOCAL_BATCH * world.size, epochs=3, shuffle=False, verbose=0)
    return results, _flat(alone), seen, _refused_steps(world)


def _refused_steps(world):
    from hvdkit.collectives.agreement import check_equal_steps
    from hvdkit.errors import UsageError

    check_equal_steps(10)
    check_equal_steps(10 if world.is_root else None)  # not known: not compared
    try:
        check_equal_steps(11 if world.is_root else 10)
    except UsageError as error:
        return str(error)


# With 3 ranks: 25 leave 1 for the last round, 23 leave 11 and so a last batch of 4, 4 and 3. Two are no multiple of 2.
@pytest.mark.parametrize(
    ("size", "examples"), [(2, 25), *(pytest.param(3, examples, marks=pytest.mark.slow) for examples in (23, 25))]
)
def test_uneven_shares_train_one_model(ranks, size, examples):
    everyone = ranks(size, trained_on_uneven_data, examples=examples)
    for policy, steps in {"join": -(-examples // (size * LOCAL_BATCH)), "pad": None, "drop": None}.items():
        weights, iterations, losses = zip(*(results[policy] for results, *_ in everyone), strict=True)
        assert all(np.array_equal(w, weights[0]) for w in weights), f"{policy}: the ranks' weights differ"
        assert len(set(iterations)) == 1
        assert losses.count(losses[0]) == size
        assert steps is None or iterations[0] == 3 * steps
    (results, alone, _, message), *_ = everyone
    assert np.abs(results["join"][0] - alone).max() < 1e-5, "join is not one process with the global batch"
    assert np.abs(results["pad"][0] - alone).max() > 1e-4, (
        "pad is expected to train another model; then nothing is shown"
    )
    seen = [tuple(row) for *_, rows, _ in everyone for row in rows]
    assert sorted(seen) == sorted(tuple(row) for row in _examples(examples)[0].tolist()), "each example once"
    assert "rank 0: 11, rank 1: 10" in message
    assert "uneven='drop', 'pad' or 'join'" in message
