"""The hard cases: kinds of models and of training in which ranks are known to hang, to diverge or to report wrong."""

import contextlib
import functools
import logging
import os

import numpy as np
import pytest

LOCAL_BATCH = 8
STEPS = 4


def _examples(ranks, seed=5):
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=[STEPS, ranks * LOCAL_BATCH, 6]).astype("float32")
    return inputs, generator.integers(3, size=[STEPS, ranks * LOCAL_BATCH])


def _flat(model):
    return np.concatenate([np.ravel(np.asarray(w)) for w in model.get_weights()])


@contextlib.contextmanager
def _warnings(name):
    """A list to which each message of a logger is added."""
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger(name).addHandler(handler)
    yield said
    logging.getLogger(name).removeHandler(handler)


def _sequential(keras):
    return keras.Sequential([keras.layers.Input([6]), keras.layers.Dense(8, "tanh"), keras.layers.Dense(3)])


def _unbuilt(keras):
    return keras.Sequential([keras.layers.Dense(8, "tanh"), keras.layers.Dense(3)])


def _functional_with_a_shared_layer(keras):
    inputs = keras.Input([6])
    shared = keras.layers.Dense(6, "tanh")
    return keras.Model(inputs, keras.layers.Dense(3)(shared(shared(inputs))))


def _subclassed(keras):
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden, self.out = keras.layers.Dense(8, "tanh"), keras.layers.Dense(3)

        def call(self, inputs):
            return self.out(self.hidden(inputs))

    return Subclassed()


def _with_a_train_step_of_its_own(keras):
    import tensorflow as tf

    class Custom(keras.Sequential):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True)) + 0.01 * tf.add_n(
                    [tf.reduce_sum(v.value**2) for v in self.trainable_variables]
                )
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            return {"loss": loss}

    return Custom([keras.layers.Input([6]), keras.layers.Dense(8, "tanh"), keras.layers.Dense(3)])


def _with_two_optimizers(keras, wrap):
    import tensorflow as tf

    class Two(keras.Sequential):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(gradients[:2], self.trainable_variables[:2])
            self.second.apply(gradients[2:], self.trainable_variables[2:])
            return {"loss": loss}

    model = Two([keras.layers.Input([6]), keras.layers.Dense(8, "tanh"), keras.layers.Dense(3)])
    model.second = wrap(keras.optimizers.Adam(1e-2))
    model.second.build(model.trainable_variables[2:])
    return model


def _two_inputs_and_outputs(keras):
    left, right = keras.Input([4], name="left"), keras.Input([2], name="right")
    hidden = keras.layers.Concatenate()([keras.layers.Dense(4, "tanh")(left), keras.layers.Dense(4)(right)])
    outputs = {"class": keras.layers.Dense(3, name="class")(hidden), "size": keras.layers.Dense(1, name="size")(hidden)}
    return keras.Model({"left": left, "right": right}, outputs)


_MODELS = {
    "sequential": _sequential,
    "unbuilt": _unbuilt,
    "shared layer": _functional_with_a_shared_layer,
    "subclassed": _subclassed,
    "custom train_step": _with_a_train_step_of_its_own,
}


def kinds_of_models():
    import keras

    import hvdkit as hvd

    world = hvd.init()
    inputs, labels = _examples(world.size)
    mine = slice(world.rank * LOCAL_BATCH, (world.rank + 1) * LOCAL_BATCH)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    whole = slice(None)

    def schedule():
        return keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(2e-2, 2, 0.5))

    def by_fit(build, wrap, part, *, optimizer=schedule, freeze=False, dictionary=False):
        # No callback broadcasts: each rank starts from weights of its own, and rank 0's are to be taken.
        keras.utils.set_random_seed(4 if part is whole else 4 + world.rank)
        model = build(keras)
        losses = {"class": loss, "size": "mse"} if dictionary else loss
        for epoch in range(1 + freeze):
            model.compile(wrap(optimizer()), loss=losses, jit_compile=False)
            x, y = inputs[:, part].reshape([-1, 6]), labels[:, part].reshape([-1])
            batch = len(x) // STEPS
            if dictionary:
                x, y = {"left": x[:, :4], "right": x[:, 4:]}, {"class": y, "size": x[:, :1]}
            model.fit(x, y, batch_size=batch, shuffle=False, verbose=0)
            model.layers[0 if epoch else -1].trainable = False  # for the second epoch
        return _flat(model)

    def by_batch(build, wrap, part):
        keras.utils.set_random_seed(4)
        model = build(keras)
        model.compile(wrap(keras.optimizers.SGD(0.1, clipvalue=0.01)), loss=loss, jit_compile=False)
        for x, y in zip(inputs[:, part], labels[:, part], strict=True):
            model.train_on_batch(x, y)
        return _flat(model)

    runs = {name: functools.partial(by_fit, build) for name, build in _MODELS.items()} | {
        "frozen midway": lambda wrap, part: by_fit(_sequential, wrap, part, freeze=True),
        "inputs and outputs by name": lambda wrap, part: by_fit(_two_inputs_and_outputs, wrap, part, dictionary=True),
        "train_on_batch": lambda wrap, part: by_batch(_sequential, wrap, part),
        "two optimizers": lambda wrap, part: by_fit(lambda k: _with_two_optimizers(k, wrap), wrap, part),
    }
    ours = {name: run(hvd.DistributedOptimizer, mine) for name, run in runs.items()}
    # What one process makes of all examples: each rank trains some, for all.
    own = {name: runs[name](lambda optimizer: optimizer, whole) for name in list(runs)[world.rank :: world.size]}
    alone = {name: weights for part in hvd.allgather_object(own) for name, weights in part.items()}
    return {name: float(np.abs(ours[name] - alone[name]).max()) for name in runs}


def test_every_kind_of_model_trains_as_in_one_process(ranks):
    for found in ranks(2, kinds_of_models):
        assert len(found) == 9
        assert {name: d for name, d in found.items() if not d < 2e-6 * STEPS} == {}


def plans_of_each_rank():
    import keras

    import hvdkit as hvd

    rank = hvd.init().rank
    model = _sequential(keras)
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), loss="mse", jit_compile=False)
    x, y = np.ones([8, 6], "float32"), np.ones([8, 3], "float32")

    def fit(**options):
        try:
            model.fit(x, y, batch_size=4, verbose=0, **options)
        except hvd.UsageError as error:
            return str(error)

    alone = {"validation_data": (x, y)} if rank == 0 else {}
    return [
        fit(**alone),
        fit(epochs=1 + rank),
        fit(epochs=3, initial_epoch=rank),
        fit(epochs=2, validation_split=0.5, validation_freq=1 + rank),
        fit(epochs=2, validation_data=(x[: 4 + rank], y[: 4 + rank])),
    ]


def test_ranks_that_would_train_or_validate_at_other_times_are_refused(ranks):
    for messages in ranks(2, plans_of_each_rank):
        said = (
            "validation=True on rank 0, and validation=False on rank(s) 1: all ranks must train and validate together"
        )
        assert said in messages[0]
        names = ["epochs=1 on rank 0, and epochs=2", "initial_epoch=0", "validation_freq=1"]
        assert all(name in message for name, message in zip(names, messages[1:], strict=False))
        assert messages[4] is None


def deciding_callbacks(folder):
    """Each rank has other data, so each would decide for itself."""
    import keras

    import hvdkit as hvd

    world = hvd.init()
    generator = np.random.default_rng(world.rank)
    inputs = generator.normal(size=[64, 6]).astype("float32")
    labels = generator.integers(3, size=64)
    validation = generator.normal(size=[32, 6]).astype("float32"), generator.integers(3, size=32)

    class Leave(keras.callbacks.Callback):
        """Wants to leave on rank 1 alone."""

        def __init__(self, epoch, batch=None):
            super().__init__()
            self.when, self.seen = (epoch, batch), []

        def on_epoch_begin(self, epoch, logs=None):
            self.epoch = epoch

        def on_train_batch_end(self, batch, logs=None):
            self.seen.append((self.epoch, batch))
            if (self.epoch, batch) == self.when and world.rank == 1:
                self.model.stop_training = True

        def on_epoch_end(self, epoch, logs=None):
            if (epoch, None) == self.when and world.rank == 1:
                self.model.stop_training = True

    model = _sequential(keras)
    model.compile(
        hvd.DistributedOptimizer(keras.optimizers.SGD(0.5)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,
    )
    initial = model.get_weights()

    def train(callbacks, epochs=12, bad=False):
        model.set_weights(initial)
        model.optimizer.learning_rate = 0.5
        x = np.where(np.arange(64)[:, None] == 40, np.nan, inputs) if bad and world.rank == 1 else inputs
        history = model.fit(
            x,
            labels,
            batch_size=8,
            epochs=epochs,
            verbose=0,
            shuffle=False,
            callbacks=callbacks,
            validation_data=validation,
        )
        rate = float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))
        return {"epochs": len(history.history["loss"]), "rate": rate, "weights": _flat(model).tobytes()}

    found = {
        "early stopping": train([keras.callbacks.EarlyStopping(patience=1, min_delta=0.1, restore_best_weights=True)]),
        "plateau": train([keras.callbacks.ReduceLROnPlateau(patience=1, min_delta=0.1, factor=0.5)]),
    }
    watch = Leave(None)
    found["nan"] = {**train([keras.callbacks.TerminateOnNaN(), watch], bad=True), "weights": None}
    found["nan"]["last"] = watch.seen[-1]
    leaving = {"at a step": Leave(1, 2), "at the last step": Leave(1, 7), "at an epoch's end": Leave(2)}
    for name, callback in leaving.items():
        with _warnings("hvdkit.model.guard") as said:
            found[name] = {**train([callback]), "last": callback.seen[-1]}
        found[name, "said"] = said
    path = os.path.join(folder, "best.weights.h5")  # noqa: PTH118
    writes = []

    save = keras.Model.save_weights
    keras.Model.save_weights = lambda model, *args, **kwargs: (writes.append(1), save(model, *args, **kwargs))
    train([keras.callbacks.ModelCheckpoint(path, save_best_only=True, save_weights_only=True)], epochs=4)
    on_rank_0 = [keras.callbacks.ModelCheckpoint(path, save_best_only=True)] if world.is_root else []
    found["on rank 0 alone"] = train(on_rank_0, epochs=2)  # Horovod's idiom
    found["checkpoint"] = {"writes": len(writes), "at": path}
    return found


def test_all_ranks_leave_at_the_same_step_for_a_common_reason(ranks, tmp_path):
    first, second = ranks(2, deciding_callbacks, fresh=True, folder=str(tmp_path))
    for name in ("at a step", "at the last step", "at an epoch's end"):
        epoch = first[name]["last"][0] + 1
        reason = f"Training stops in epoch {epoch} on all ranks, because rank(s) 1 asked for it."
        assert first.pop((name, "said")).count(reason) == 1, "rank 0 says why all leave"
        assert reason not in second.pop((name, "said"))
    for name in set(first) - {"checkpoint"}:
        assert first[name] == second[name], f"{name}: the ranks differ"
    assert 1 < first["early stopping"]["epochs"] < 12
    assert first["plateau"]["rate"] < 0.5
    assert first["nan"]["epochs"] == 1
    assert first["nan"]["last"] == (0, 6), "rank 1 meets the NaN in step 5, and tells the others with step 6"
    assert first["at a step"]["last"] == (1, 3), "one step later, when the others have been told"
    assert first["at the last step"]["last"] == (1, 7)
    assert first["at an epoch's end"] == {**first["at an epoch's end"], "epochs": 3, "last": (2, 7)}
    assert first["checkpoint"]["writes"] >= 1
    assert second["checkpoint"]["writes"] == 0, "no checkpoint is written twice"


def compiled_by_xla(jit_compile):
    import keras
    import tensorflow as tf

    import hvdkit as hvd

    world = hvd.init()
    keras.Model._resolve_auto_jit_compile = lambda model: True  # what "auto" is where there is a GPU
    inputs, labels = _examples(world.size)
    mine = slice(world.rank * LOCAL_BATCH, (world.rank + 1) * LOCAL_BATCH)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def train(wrap, part, jit_compile):
        keras.utils.set_random_seed(4)
        model = _sequential(keras)
        model.compile(wrap(keras.optimizers.Adam(1e-2)), loss=loss, metrics=["accuracy"], jit_compile=jit_compile)
        x, y = inputs[:, part].reshape([-1, 6]), labels[:, part].reshape([-1])
        model.fit(x, y, batch_size=len(x) // STEPS, shuffle=False, verbose=0, validation_data=(x, y))
        for a, b in zip(inputs[:, part], labels[:, part], strict=True):
            model.train_on_batch(a, b)
        return model

    ours = train(hvd.DistributedOptimizer, mine, jit_compile)
    nodes = []
    for function in _functions_of(ours):
        nodes += [(node.op, node.attr["_XlaCompile"].b) for node in function.graph.as_graph_def().node]
        for inner in function.graph.as_graph_def().library.function:
            nodes += [(node.op, node.attr["_XlaCompile"].b) for node in inner.node_def]
    message = None
    step = tf.function(
        lambda: ours.optimizer.apply([tf.zeros(v.shape) for v in ours.trainable_variables], ours.trainable_variables),
        jit_compile=True,
    )
    try:
        step()
    except RuntimeError as error:
        message = str(error)
    difference = np.abs(_flat(ours) - _flat(train(lambda o: o, slice(None), False))).max()
    return float(difference), nodes, ours.jit_compile, message


def _functions_of(model):
    """The concrete functions behind a model's training step."""
    import tensorflow as tf

    seen = []
    for cell in model.train_function.__closure__:
        value = cell.cell_contents
        if isinstance(value, tf.types.experimental.PolymorphicFunction):
            seen += value._list_all_concrete_functions()
    return seen


@pytest.mark.parametrize("asked", ["auto", pytest.param(True, marks=pytest.mark.slow)])
def test_xla_compiles_the_step_around_the_exchange(ranks, asked):
    for difference, nodes, jit_compile, message in ranks(2, compiled_by_xla, fresh=True, jit_compile=asked):
        assert difference < 1e-5
        assert jit_compile is True, "what the user asked for is kept"
        exchanges = [marked for op, marked in nodes if op.startswith(("Horovod", "Hvdkit"))]
        multiplications = [marked for op, marked in nodes if op == "MatMul"]
        assert exchanges
        assert not any(exchanges), "XLA cannot compile Horovod's operations"
        assert multiplications
        assert all(multiplications)
        assert "XLA cannot compile the exchange of gradients between ranks" in message


def what_is_forgotten(case):
    import keras
    import tensorflow as tf

    import hvdkit as hvd

    world = hvd.init()
    generator = np.random.default_rng(world.rank)
    inputs, labels = generator.normal(size=[32, 6]).astype("float32"), generator.integers(3, size=32)
    keras.utils.set_random_seed(world.rank)  # as if nobody had broadcast

    class Around(keras.Sequential):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.__wrapped__.apply(gradients, self.trainable_variables)
            return {"loss": loss}

    class WithItsOwn(keras.Sequential):
        """As GANs are written: compile's optimizer is never used."""

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = keras.losses.sparse_categorical_crossentropy(y, self(x, training=True), from_logits=True)
            gradients = tape.gradient(loss, self.trainable_variables)
            self.own_optimizer.apply(gradients, self.trainable_variables)
            return {"loss": tf.reduce_mean(loss)}

    kind = {"goes around": Around, "optimizer of its own": WithItsOwn}.get(case, keras.Sequential)
    units = 8 + world.rank if case == "another model" else 8
    model = kind([keras.layers.Input([6]), keras.layers.Dense(units, "tanh"), keras.layers.Dense(3)])
    optimizer = keras.optimizers.SGD(0.1)
    if case == "optimizer of its own":
        model.own_optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    elif case != "unwrapped":
        optimizer = hvd.DistributedOptimizer(optimizer)
    model.compile(optimizer, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    if case == "not a sum":  # as if Horovod gave each rank its own back
        hvd.collectives.reduce_dense = lambda tensors, *args, **kwargs: list(tensors)
    rows = slice(0, 24 if case == "fewer steps" and world.rank == 1 else 32)
    with _warnings("hvdkit.model.guard") as said:
        try:
            model.fit(inputs[rows], labels[rows], batch_size=8, verbose=0)
        except (RuntimeError, ValueError, hvd.UsageError) as error:
            return str(error), said
    return _flat(model).tobytes(), said


@pytest.mark.parametrize(
    ("case", "error"),
    [
        ("goes around", "exchanged no gradients, although the optimizer of model"),
        ("not a sum", "a vector known in closed form came back wrong in the first steps of fit"),
        ("fewer steps", "different numbers of steps an epoch (rank 0: 4, rank 1: 3)"),
        ("another model", "kernel is (6, 8) float32 on rank 0 and (6, 9) float32 on rank 1"),
    ],
)
def test_what_is_wrong_ends_fit_on_all_ranks(ranks, case, error):
    for found, _ in ranks(2, what_is_forgotten, fresh=case == "not a sum", case=case):
        assert error in found


@pytest.mark.parametrize("case", ["unwrapped", "not broadcast", "optimizer of its own"])
def test_what_is_forgotten_is_not_silent(ranks, case):
    (first, said), (second, also_said) = ranks(2, what_is_forgotten, case=case)
    warned = [any("differ between the ranks when training begins" in line for line in s) for s in (said, also_said)]
    alone = [any("is not distributed: each of the 2 ranks trains" in line for line in s) for s in (said, also_said)]
    assert (first == second, warned, alone) == (
        (False, [False] * 2, [True] * 2) if case == "unwrapped" else (True, [True] * 2, [False] * 2)
    ), "the starting point is made common, with a warning, but each rank of an unwrapped optimizer trains its own"
