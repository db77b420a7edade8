"""Losses whose mean is not over the local batch: N ranks train the model of one process, and show its loss."""

import contextlib
import logging

import numpy as np
import pytest

STEPS, LOCAL, TIME = 3, 4, 6


@contextlib.contextmanager
def _warnings(*names):
    """A list to which each message of these loggers is added."""
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    for name in names:
        logging.getLogger(name).addHandler(handler)
    yield said
    for name in names:
        logging.getLogger(name).removeHandler(handler)


# ---- Data: for each rank (x, y) or (x, y, weights), arrays of STEPS batches -----------------------------------------


def _pixels(ranks, counted=None, batches=None, weighted=False):
    """Places with a class each; `counted` of a rank's are not to be ignored. Weights, if asked for, grow with ranks."""
    parts = []
    for rank in range(ranks):
        generator = np.random.default_rng(rank)
        shape = [STEPS * (LOCAL if batches is None else batches[rank % len(batches)]), TIME]
        y = generator.integers(3, size=shape)
        y[:, TIME if counted is None else counted[rank % len(counted)] :] = 255
        weights = [generator.uniform(0.2, 1, shape).astype("float32") * (rank + 1)] * weighted
        parts.append((generator.normal(size=[*shape, 3]).astype("float32"), y, *weights))
    return parts


def _sequences(ranks, lengths):
    """Sequences that end after `lengths` of their rank."""
    parts = []
    for rank in range(ranks):
        generator = np.random.default_rng(rank)
        x = generator.normal(1, 1, [STEPS * LOCAL, TIME, 3]).astype("float32")
        x[:, lengths[rank % len(lengths)] :] = 0
        parts.append((x, generator.normal(size=[STEPS * LOCAL, TIME, 1]).astype("float32")))
    return parts


def _words(ranks):
    """Sentences padded with 0 to one length, of other lengths on each rank; each word has a class."""
    parts = []
    for rank in range(ranks):
        generator = np.random.default_rng(rank)
        lengths = generator.integers(1, [TIME + 1, 3, 5][rank % 3], size=[STEPS * LOCAL, 1])
        x = np.where(np.arange(TIME) < lengths, generator.integers(1, 9, size=[STEPS * LOCAL, TIME]), 0)
        parts.append((x, x % 3))
    return parts


def _classes(ranks):
    """Examples of one class each, most of them of the rank's own."""
    parts = []
    for rank in range(ranks):
        generator = np.random.default_rng(rank)
        y = np.where(generator.random(STEPS * LOCAL) < 0.7, rank % 3, generator.integers(3, size=STEPS * LOCAL))
        parts.append((generator.normal(size=[len(y), 3]).astype("float32"), y))
    return parts


def _two_labels(ranks):
    return [(x, {"class": y, "size": x[..., :1] ** 2}) for x, y in _pixels(ranks, [6, 1])]


# ---- Models ---------------------------------------------------------------------------------------------------------


def _per_place(keras, kind=None):
    layers = [keras.layers.Input([TIME, 3]), keras.layers.Dense(4, "tanh"), keras.layers.Dense(3)]
    return (kind or keras.Sequential)(layers)


def _per_example(keras):
    return keras.Sequential([keras.layers.Input([3]), keras.layers.Dense(4, "tanh"), keras.layers.Dense(3)])


def _masking(keras):
    layers = [keras.layers.Input([TIME, 3]), keras.layers.Masking(0.0), keras.layers.Dense(4, "tanh")]
    return keras.Sequential([*layers, keras.layers.Dense(1)])


def _tagging(keras):
    """An embedding, whose gradients are sparse, and a recurrent layer, both masked."""
    layers = [keras.layers.Embedding(9, 3, mask_zero=True), keras.layers.GRU(3, return_sequences=True)]
    return keras.Sequential([keras.layers.Input([TIME], dtype="int32"), *layers, keras.layers.Dense(3)])


def _two_outputs(keras):
    x = keras.Input([TIME, 3])
    hidden = keras.layers.Dense(4, "tanh", kernel_regularizer=keras.regularizers.L2(0.1))(x)
    outputs = {"class": keras.layers.Dense(3, name="class")(hidden), "size": keras.layers.Dense(1, name="size")(hidden)}
    return keras.Model(x, outputs)


def _with_a_train_step_of_its_own(keras):
    import tensorflow as tf

    class Custom(keras.Sequential):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
            return {"last_loss": loss}

    return _per_place(keras, Custom)


def _cross_entropy(keras, **options):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **options)


def _ignoring(keras):
    return _cross_entropy(keras, ignore_class=255)


def _cases(keras, hvd):
    """By name: model, loss, data by the number of ranks, and options."""

    def by_weights(keras):
        return _cross_entropy(keras, reduction="mean_with_sample_weight")

    uneven = {"counted": [6, 1, 3]}
    loss_scale = {"optimizer": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.3), 128.0)}
    two_losses = {"loss_weights": {"class": 0.3, "size": 2.0}}
    accumulating = {"optimizer": lambda: keras.optimizers.SGD(0.3, gradient_accumulation_steps=3)}

    def labels(**options):
        return lambda ranks: _pixels(ranks, **options)

    return {
        "equal labels": (_per_place, _ignoring, labels(counted=[2]), {}),
        "labels to ignore": (_per_place, _ignoring, labels(**uneven), {}),
        "no label counts on a rank": (_per_place, _ignoring, labels(counted=[6, 0]), {}),
        "a mask": (_masking, lambda keras: "mse", lambda ranks: _sequences(ranks, [6, 1, 4]), {}),
        "masked words": (_tagging, _cross_entropy, _words, {}),
        "weights": (_per_place, _cross_entropy, labels(weighted=True), {}),
        "weights and labels to ignore": (_per_place, _ignoring, labels(weighted=True, **uneven), {}),
        "mean by weights": (_per_place, by_weights, labels(weighted=True), {}),
        "class weights": (_per_example, by_weights, _classes, {"class_weight": {0: 0.2, 1: 3.0, 2: 1.0}}),
        "batches": (_per_place, _cross_entropy, labels(batches=[6, 2, 4]), {}),
        "batches and labels to ignore": (_per_place, _ignoring, labels(batches=[6, 2], **uneven), {}),
        "sum": (_per_place, lambda k: _cross_entropy(k, reduction="sum"), labels(batches=[4, 4]), {"rate": 0.01}),
        "no reduction": (_per_place, lambda k: _cross_entropy(k, reduction=None), labels(), {"rate": 0.01}),
        "two losses": (_two_outputs, lambda k: {"class": _ignoring(k), "size": "mse"}, _two_labels, two_losses),
        "train_step": (_with_a_train_step_of_its_own, _ignoring, labels(**uneven), {}),
        "accumulated": (_per_place, _ignoring, labels(**uneven), accumulating),
        "sharded": (_per_place, _ignoring, labels(**uneven), {"wrap": hvd.ShardedOptimizer}),
        "loss scale": (_per_place, _ignoring, labels(**uneven), loss_scale),
        "eager": (_per_place, _ignoring, labels(**uneven), {"run_eagerly": True}),
    }


def _trained(case, parts, wrap, callbacks=()):
    """The weights after an epoch, and the loss that `fit` shows."""
    import keras

    build, loss, _, options = case
    options = dict(options)
    optimizer = options.pop("optimizer", lambda: keras.optimizers.SGD(rate))
    rate = options.pop("rate", 0.3)
    own_wrap = options.pop("wrap", wrap)
    how = {"shuffle": False, "verbose": 0, "class_weight": options.pop("class_weight", None)}
    wrap = own_wrap if callbacks else wrap
    keras.utils.set_random_seed(1)
    model = build(keras)
    model.compile(wrap(optimizer()), loss=loss(keras), jit_compile=False, **options)
    x, y, weights = (*parts, None)[:3]
    how |= {"batch_size": len(x) // STEPS, "callbacks": list(callbacks)}
    logs = model.fit(x, y, sample_weight=weights, **how).history
    return _flat(model), logs["last_loss" if "last_loss" in logs else "loss"][0]


def _flat(model):
    return np.concatenate([np.ravel(np.asarray(w)) for w in model.get_weights()])


def _together(parts):
    """Each step's batches of all ranks, one after another."""
    if isinstance(parts[0], dict):
        return {name: _together([part[name] for part in parts]) for name in parts[0]}
    steps = [np.stack(np.split(part, STEPS)) for part in parts]
    return np.concatenate(steps, axis=1).reshape([-1, *parts[0].shape[1:]])


def against_one_process(names=None):
    """By case, how far the weights and the shown loss are from those of one process; by how much that one moves."""
    import keras

    import hvdkit as hvd

    me = hvd.init()
    cases = {name: case for name, case in _cases(keras, hvd).items() if names is None or name in names}
    ours, own = {}, {}
    for number, (name, case) in enumerate(cases.items()):
        parts = case[2](me.size)
        ours[name] = _trained(case, parts[me.rank], hvd.DistributedOptimizer, [hvd.callbacks.MetricAverageCallback()])
        if number % me.size == me.rank:  # each rank is one process for some of the cases
            own[name] = _trained(case, [_together(part) for part in zip(*parts, strict=True)], lambda o: o)
    alone = {name: found for part in hvd.allgather_object(own) for name, found in part.items()}
    return {
        name: (float(np.abs(weights - alone[name][0]).max()), abs(loss / alone[name][1] - 1))
        for name, (weights, loss) in ours.items()
    }


_SHORT = ["labels to ignore", "a mask", "mean by weights", "batches", "sum"]


@pytest.mark.parametrize("names", [_SHORT, pytest.param(None, marks=pytest.mark.slow)])
def test_two_ranks_train_and_show_what_one_process_does(ranks, names):
    for found in ranks(2, against_one_process, names=names):
        assert len(found) == (19 if names is None else 5)
        assert {name: far for name, far in found.items() if not max(far) < 1e-5} == {}


@pytest.mark.slow
def test_three_ranks_train_and_show_what_one_process_does(ranks):
    for found in ranks(3, against_one_process, names=_SHORT):
        assert len(found) == 5
        assert {name: far for name, far in found.items() if not max(far) < 1e-5} == {}


# ---- Data sets whose batches are of one size, but for some ----------------------------------------------------------


def _regression(keras, hvd, data, wrap, steps="1", callbacks=(), **options):
    """The weights after fitting squares, and the loss of each epoch; `steps` in an execution."""
    import os

    os.environ["HVDKIT_STEPS_PER_EXECUTION"] = steps
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.layers.Input([3]), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)])
    model.compile(wrap(keras.optimizers.SGD(0.3)), loss="mse", jit_compile=False)
    history = model.fit(data, verbose=0, callbacks=list(callbacks), **options)
    return _flat(model), history.history["loss"]


def data_sets():
    """How far training is from one process, and what is said, where batches of a data set differ in size."""
    import keras
    import tensorflow as tf

    import hvdkit as hvd
    from hvdkit.optimizers import batch_sizes

    me = hvd.init()
    x = np.random.default_rng(0).normal(size=[58, 3]).astype("float32")
    examples = tf.data.Dataset.from_tensor_slices((x, x[:, :1] ** 2))
    alone = _regression(keras, hvd, examples.batch(16), lambda o: o, epochs=2)  # steps of 16, 16, 16 and 10
    cases = {"unknown length": (examples.filter(lambda x, y: True), "1"), "joined": (examples, "3")}
    found, average = {}, [hvd.callbacks.MetricAverageCallback()]
    for name, (given, steps) in cases.items():
        data = hvd.data.shard(given.batch(8))
        weights, losses = _regression(keras, hvd, data, hvd.DistributedOptimizer, steps, average, epochs=2)
        found[name] = float(np.abs(weights - alone[0]).max()), float(np.abs(np.subtract(losses, alone[1])).max())
    # Batches of other sizes in the middle of an epoch whose length is known: short ones that are repeated, and rows
    # that a function leaves out, which nothing tells before.
    twice = _regression(keras, hvd, examples.take(25).batch(16).repeat(2), lambda o: o)
    data = examples.take(25).shard(2, me.rank).batch(8).repeat(2)  # of 8 and 5, and of 8 and 4
    weights, losses = _regression(keras, hvd, data, hvd.DistributedOptimizer, callbacks=average)
    found["repeated"] = float(np.abs(weights - twice[0]).max()), float(np.abs(np.subtract(losses, twice[1])).max())
    rows = np.float32([[(not me.is_root) and place == 10] for place in range(20)])
    batches = tf.data.Dataset.from_tensor_slices((np.ones([20, 3], "float32"), rows)).batch(4)
    batches = batches.map(lambda x, y: (x[: 4 - tf.cast(tf.reduce_max(y), tf.int32)], y))
    batches = batches.map(lambda x, y: (x, y[: tf.shape(x)[0]]))
    compared = []
    watch = keras.callbacks.Callback()
    watch.on_train_batch_end = lambda batch, logs=None: compared.append(batch_sizes.current().compares)
    with _warnings("hvdkit.model.batch_sizes") as said:
        _regression(keras, hvd, batches, hvd.DistributedOptimizer, callbacks=[watch])
    return found, compared, said, batch_sizes.current().compares


def test_a_short_batch_counts_by_its_examples(ranks):
    for found, compared, said, afterwards in ranks(2, data_sets):
        assert {name: far for name, far in found.items() if not max(far) < 1e-5} == {}
        assert compared == [True, False, False, True, True], "the first step, and all once the ranks know"
        assert [line.split(",")[0] for line in said] == ["The ranks' batches differ in size from step 3 on"]
        assert afterwards, "outside of fit, all losses compare"


# ---- What it costs, and what it changes -----------------------------------------------------------------------------


def with_weights_and_without():
    """By loss, how many more collectives six steps have if losses are weighed, and how far the weights are apart."""
    import keras
    import tensorflow as tf

    import hvdkit as hvd
    from hvdkit.collectives import transports
    from hvdkit.model import losses

    me = hvd.init()
    shared = transports.choose("allreduce", tf.float32, hvd.global_process_set)
    (x, y), *_ = _pixels(me.size, [6, 1])[me.rank :]
    x, y = np.concatenate([x, x]), np.concatenate([y, y])

    def trained(loss):
        data = tf.data.Dataset.from_tensor_slices((x, np.where(y == 255, 0, y) if loss is _cross_entropy else y))
        keras.utils.set_random_seed(1)
        model = _per_place(keras)
        model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.3)), loss=loss(keras), jit_compile=False)
        before = shared.usage().collectives
        model.fit(data.batch(LOCAL), verbose=0)
        return shared.usage().collectives - before, _flat(model)

    found = {}
    for loss in (_cross_entropy, _ignoring):
        number, weights = trained(loss)
        scope, losses._scope_of = losses._scope_of, lambda *_: contextlib.nullcontext()
        without, plain = trained(loss)
        losses._scope_of = scope
        found[loss.__name__] = number - without, float(np.abs(weights - plain).max())
    return found


def test_equal_batches_cost_no_message_and_change_no_bit(ranks):
    for found in ranks(2, with_weights_and_without, env={"HVDKIT_STEPS_PER_EXECUTION": "1"}):
        assert found["_cross_entropy"] == (2, 0), "the first step and the last one compare sizes, the others do not"
        more, difference = found["_ignoring"]
        assert more == 6
        assert difference > 1e-3, "unweighed, the ranks train another model; or this file proves nothing"


# ---- Training loops of one's own ------------------------------------------------------------------------------------


def _looped(model, optimizer, loss, batches, wrap, compiled):
    """The losses that a loop shows, and the weights after it."""
    import tensorflow as tf

    def step(x, y):
        with wrap(tf.GradientTape()) as tape:
            value = loss(y, model(x, training=True))
        optimizer.apply(tape.gradient(value, model.trainable_variables), model.trainable_variables)
        return value

    optimizer.build(model.trainable_variables)
    run = tf.function(step, reduce_retracing=True) if compiled else step
    return [float(run(tf.constant(x), tf.constant(y))) for x, y in batches], _flat(model)


def loops():
    """How far loops with `hvd.shard_loss` are from one process, and what is said of loops without it."""
    import keras

    import hvdkit as hvd
    from hvdkit.optimizers import weighing

    me = hvd.init()
    parts = _pixels(me.size, [6, 2], batches=[5, 2])
    mine = [np.split(a, STEPS) for a in parts[me.rank]]
    together = [np.split(_together(a), STEPS) for a in zip(*parts, strict=True)]

    def looped(loss, wrap, optimizer, batches, compiled):
        keras.utils.set_random_seed(1)
        batches = list(zip(*batches, strict=True))
        return _looped(_per_place(keras), optimizer(keras.optimizers.SGD(0.3)), loss, batches, wrap, compiled)

    def same(given):
        return given

    values, weights = looped(_ignoring(keras), same, same, together, True)
    found = {}
    for name, wrap, optimizer, compiled in (
        ("tape", hvd.DistributedGradientTape, same, False),
        ("optimizer", same, hvd.DistributedOptimizer, True),
    ):
        shown, ours = looped(hvd.shard_loss(_ignoring(keras)), wrap, optimizer, mine, compiled)
        shown = hvd.allreduce(np.array(shown)).numpy()
        found[name] = float(np.abs(ours - weights).max()), float(np.abs(shown - values).max())
    weighing._warned.clear()
    said = {}
    equal = [np.split(a, STEPS) for a in _pixels(me.size)[me.rank]]
    for name, loss, batches in (("mean", _cross_entropy(keras), equal), ("mask", _ignoring(keras), mine)):
        with _warnings("hvdkit.optimizers.weighing") as said[name]:
            looped(loss, hvd.DistributedGradientTape, same, batches, False)
    return found, said


def test_loops_with_shard_loss_train_what_one_process_does(ranks):
    for found, said in ranks(2, loops):
        assert {name: far for name, far in found.items() if not max(far) < 1e-5} == {}
        assert said["mean"] == []
        (line,) = said["mask"]
        assert line.startswith("The loss 'sparse_categorical_crossentropy' is a mean over what its mask or its weights")
        assert line.endswith("wrap it: loss = hvd.shard_loss(loss).")


# ---- What cannot be weighed -----------------------------------------------------------------------------------------


def what_cannot_be_weighed():
    import keras
    import tensorflow as tf

    import hvdkit as hvd
    from hvdkit.optimizers import weighing

    me = hvd.init()
    x, y = _pixels(me.size, [6, 1])[me.rank]
    weighing._warned.clear()

    class Direct(keras.Sequential):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = _ignoring(keras)(y, self(x, training=True))
            self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
            return {"loss": loss}

    class One(keras.losses.Loss):
        def call(self, y_true, y_pred):
            return keras.ops.mean(keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True))

    def said_in_fit(loss, wrap=hvd.DistributedOptimizer, kind=None, labels=y, **options):
        model = _per_place(keras, kind)
        model.compile(wrap(keras.optimizers.SGD(0.1)), loss=loss, jit_compile=False, run_eagerly=True)
        with _warnings("hvdkit.optimizers.weighing") as said:
            try:
                model.fit(x[:LOCAL], labels[:LOCAL], batch_size=LOCAL, verbose=0, **options)
            except hvd.UsageError as error:
                return [*said, str(error)]
        return said

    numbers = {"labels": np.where(y == 255, 0, y), "sample_weight": np.ones([LOCAL, TIME], "float32")}
    return {
        "LocalSGD": said_in_fit(_ignoring(keras), lambda o: hvd.LocalSGD(o, 2)),
        "Adasum": said_in_fit(_ignoring(keras), lambda o: hvd.DistributedOptimizer(o, op=hvd.Adasum)),
        "train_step": said_in_fit(None, kind=Direct),
        "one number": said_in_fit(One(name="one"), **numbers),
        "shard_loss": said_in_fit(hvd.shard_loss(_ignoring(keras))),
    }


def test_what_cannot_be_weighed_is_said(ranks):
    for said in ranks(2, what_cannot_be_weighed):
        told = {name: " ".join(lines) for name, lines in said.items()}
        assert "With hvd.LocalSGD each rank trains alone" in told["LocalSGD"]
        assert "Adasum combines the ranks' updates and knows no weights" in told["Adasum"]
        assert "wrap it: loss = hvd.shard_loss(loss)" in told["train_step"]
        assert "The loss 'one' returns one number" in told["one number"]
        assert "fit weighs losses by itself" in told["shard_loss"]
        assert {len(lines) for lines in said.values()} == {1}
