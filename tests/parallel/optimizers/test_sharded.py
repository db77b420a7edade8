"""`ShardedOptimizer`: N ranks, each with 1/N of the state, train the model of one process."""

import subprocess

import numpy as np
import pytest

from tests.conftest import sys
from tests.parallel.checkpoint.test_checkpoint import verify_resume

STEPS, LOCAL_BATCH = 8, 4

# Each elementwise optimizer of Keras, and all that Keras does around an update, spread over them.
CASES = {
    "SGD": ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
    "RMSprop": ("RMSprop", {"momentum": 0.9, "centered": True, "clipvalue": 0.02}),
    "Adam": ("Adam", {"amsgrad": True, "global_clipnorm": 0.1}),
    "AdamW": ("AdamW", {"weight_decay": 5e-2, "clipnorm": 0.05}),
    "Adadelta": ("Adadelta", {"learning_rate": 1.0, "use_ema": True, "ema_overwrite_frequency": 3}),
    "Adagrad": ("Adagrad", {"clipnorm": 0.1}),
    "Adamax": ("Adamax", {"weight_decay": 1e-2, "loss_scale_factor": 8.0}),
    "Nadam": ("Nadam", {"global_clipnorm": 0.05}),
    "Ftrl": ("Ftrl", {"l2_regularization_strength": 1e-3}),
    "Lion": ("Lion", {"weight_decay": 1e-2}),
    "without decay of biases": ("AdamW", {"weight_decay": 0.5, "exclude": ["bias"]}),
    "averages": ("SGD", {"use_ema": True, "ema_momentum": 0.5}),
    "accumulation": ("Adam", {"gradient_accumulation_steps": 3, "global_clipnorm": 0.1}),
    "accumulation and averages": (
        "SGD",
        {"gradient_accumulation_steps": 2, "use_ema": True, "ema_overwrite_frequency": 2},
    ),
    "schedule": ("Adam", {"schedule": True}),
    "loss scale": ("Adam", {"loss_scale": True, "clipnorm": 0.1}),
}


def _optimizer(kind, learning_rate=1e-2, exclude=None, schedule=False, loss_scale=False, **more):
    import keras

    rate = keras.optimizers.schedules.ExponentialDecay(learning_rate, 2, 0.5) if schedule else learning_rate
    optimizer = getattr(keras.optimizers, kind)(rate, **more)
    if exclude:
        optimizer.exclude_from_weight_decay(var_names=exclude)
    return keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=128.0) if loss_scale else optimizer


def _model(optimizer):
    """An Embedding, a layer under a constraint, and one that no gradient reaches; 3 odd sizes."""
    import keras

    keras.utils.set_random_seed(1)
    tokens = keras.layers.Input([3], dtype="int32")
    body = keras.layers.Flatten()(keras.layers.Embedding(11, 5)(tokens))
    body = keras.layers.Dense(7, "tanh", kernel_constraint=keras.constraints.MaxNorm(0.9))(body)
    idle = keras.layers.Dense(2, name="idle")(body)
    output = keras.layers.Dense(3)(body)
    model = keras.Model(tokens, [output, idle])
    model.compile(
        optimizer, loss=[keras.losses.SparseCategoricalCrossentropy(from_logits=True), None], jit_compile=False
    )
    return model


def _batches(ranks):
    generator = np.random.default_rng(7)
    count = [STEPS, ranks * LOCAL_BATCH]
    return generator.integers(11, size=[*count, 3]), generator.integers(3, size=count)


def _train(model, inputs, labels):
    """All weights after each step; in the middle a callback's doing, a lower rate; at the end, `fit`'s."""
    path = []
    for step, (x, y) in enumerate(zip(inputs, labels, strict=True)):
        if step == STEPS // 2 and not callable(getattr(model.optimizer, "_learning_rate", None)):
            model.optimizer.learning_rate = 3e-3
        model.train_on_batch(x, y)
        path.append([np.array(w) for w in model.get_weights()])
    model.optimizer.finalize_variable_values(model.trainable_variables)
    return [*path, [np.array(w) for w in model.get_weights()]]


def _dense(optimizer):
    """As the gradients of a `ShardedOptimizer` are: an Embedding's, too."""
    import tensorflow as tf

    apply = optimizer.apply
    optimizer.apply = lambda grads, variables=None: apply(
        [g if g is None else tf.convert_to_tensor(g) for g in grads], variables
    )
    return optimizer


def against_one_process(cases):
    import hvdkit as hvd
    from hvdkit.optimizers import heartbeat

    me = hvd.init()
    inputs, labels = _batches(me.size)
    mine = slice(me.rank * LOCAL_BATCH, (me.rank + 1) * LOCAL_BATCH)
    found = {}
    # What one process makes of all the data and of rank 0's share: each rank trains some of the cases, for all.
    own = {name: _alone(*cases[name], inputs, labels) for name in list(cases)[me.rank :: me.size]}
    references = {name: found for part in hvd.allgather_object(own) for name, found in part.items()}
    for name, (kind, arguments) in cases.items():
        expected, expected_slots, alone = references[name]
        heartbeat.current().begin()
        sharded = _model(hvd.ShardedOptimizer(_optimizer(kind, **arguments), name=name))
        path = _train(sharded, inputs[:, mine], labels[:, mine])
        proven = heartbeat.current().read()[0]
        state = sharded.optimizer.gather()
        pairs = list(zip(state, expected_slots, strict=True)) if me.rank == 0 else []
        difference = max(
            float(np.abs(a - b).max()) for s, t in zip(path, expected, strict=True) for a, b in zip(s, t, strict=True)
        )
        slots = [_relative(a, b) for a, b in pairs]
        # At the path's end: overwriting with averages may come between.
        own = max(float(np.abs(a - b).max()) for a, b in zip(alone, expected[-1], strict=True))
        found[name] = difference, max(slots, default=0.0), own, proven, sharded.optimizer.state_bytes()
    return found


def _alone(kind, arguments, inputs, labels):
    """The path and slots of one process with all the data, and its last weights with rank 0's share alone."""
    model = _model(_dense(_optimizer(kind, **arguments)))
    model.optimizer.build(model.trainable_variables)
    variables = [*model.variables, *model.optimizer.variables]
    at_first = [np.array(v) for v in variables]
    path = _train(model, inputs, labels)
    slots = [np.array(v) for v in model.optimizer.variables]
    for variable, value in zip(variables, at_first, strict=True):
        variable.assign(value)
    return path, slots, _train(model, inputs[:, :LOCAL_BATCH], labels[:, :LOCAL_BATCH])[-1]


def _relative(ours, reference):
    assert ours.shape == reference.shape, "the slots are in the order of one process"
    return float(np.linalg.norm(ours - reference) / max(np.linalg.norm(reference), 0.05))


SOME = ("AdamW", "Lion", "accumulation", "loss scale")
OTHERS = tuple(name for name in CASES if name not in SOME)


@pytest.mark.parametrize(
    ("number", "shared", "names"),
    [
        (2, "1", SOME),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, "1", OTHERS), (3, "0", SOME))),
    ],
)
def test_n_ranks_equal_one_process(ranks, number, shared, names):
    """Two ranks add up in shared memory; three reduce-scatter by Horovod."""
    cases = {name: CASES[name] for name in names}
    everyone = ranks(number, against_one_process, cases=cases, env={"HVDKIT_SHARED_MEMORY": shared})
    for rank, found in enumerate(everyone):
        for name, (difference, slots, own, proven, (mine, whole)) in found.items():
            assert difference < 1e-5, f"{name}, rank {rank}: the weights differ by {difference:.2g}"
            assert slots < 1e-4, f"{name}: the optimizer's state differs by {slots:.2g}"
            assert own > 1e-4, f"{name}: training on the own share alone should differ, or this test proves nothing"
            assert proven >= STEPS, f"{name}: the heartbeat came back wrong"
            assert mine < whole * (1 / number + 0.3), f"{name}: a rank holds {mine} bytes of {whole}"


WITHOUT_SOME = {
    "Adam": ("Adam", {}),
    "AdamW": ("AdamW", {"weight_decay": 0.5, "use_ema": True, "ema_momentum": 0.5}),
    "overwritten": ("SGD", {"momentum": 0.9, "use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2}),
    "accumulation": ("RMSprop", {"momentum": 0.9, "gradient_accumulation_steps": 2}),
    "loss scale": ("Adam", {"loss_scale": True}),
}


def without_some_gradients():
    """By how much the weights of one process differ, where some variables have no gradient in some steps."""
    import warnings

    import keras
    import tensorflow as tf

    import hvdkit as hvd

    hvd.init()
    warnings.simplefilter("ignore")  # Keras warns of each such step

    def train(optimizer):
        variables = [keras.Variable(np.full(size, 0.5, "float32"), name=f"v{size}") for size in (3, 40, 20)]
        optimizer.build(variables)
        path = []
        for number, present in enumerate(("012", "02", "0", "12", "02", "1")):
            grads = [tf.sin(tf.range(1.0, v.shape[0] + 1) + number) for v in variables]
            optimizer.apply([g if str(n) in present else None for n, g in enumerate(grads)], variables)
            path += [v.numpy() for v in variables]
        optimizer.finalize_variable_values(variables)
        return [*path, *(v.numpy() for v in variables)]

    found = {}
    for name, (kind, arguments) in WITHOUT_SOME.items():
        expected, path = (
            train(_optimizer(kind, **arguments)),
            train(hvd.ShardedOptimizer(_optimizer(kind, **arguments))),
        )
        found[name] = max(float(np.abs(a - b).max()) for a, b in zip(path, expected, strict=True))
    return found


def test_a_variable_without_a_gradient_stays_as_it_is(ranks):
    for found in ranks(2, without_some_gradients):
        assert all(difference < 1e-6 for difference in found.values()), found


def with_an_overflow(folder):
    """float16 on all ranks, and infinite inputs in step 2 on rank 1 alone; then a file that plain Keras reads."""
    import keras

    import hvdkit as hvd

    me = hvd.init()
    keras.config.set_dtype_policy("mixed_float16")
    keras.utils.set_random_seed(me.rank)  # other weights on each rank: fit begins with those of rank 0
    model = keras.Sequential([keras.layers.Input([5]), keras.layers.Dense(9, "relu"), keras.layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(hvd.ShardedOptimizer(keras.optimizers.Adam(1e-2)), loss=loss, jit_compile=False)
    x = np.random.default_rng(me.rank).normal(size=[40, 5]).astype("float32")
    y = np.random.default_rng(me.rank).integers(3, size=40)
    x[8:12] = np.inf if me.rank == 1 else x[8:12]
    path = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs=None: path.append(np.ravel(model.get_weights()[0]))
    )
    callbacks = [*hvd.callbacks.standard(guard_every=2), note]
    model.fit(x, y, batch_size=4, epochs=1, shuffle=False, verbose=0, callbacks=callbacks)
    scale = float(keras.ops.convert_to_numpy(model.optimizer.dynamic_scale))
    if me.rank == 0:
        model.save(f"{folder}/without.keras")
    model.optimizer.gather()
    if me.rank == 0:
        model.save(f"{folder}/model.keras")
    model.fit(x[:4], y[:4], batch_size=4, verbose=0)  # both go on from the same place
    return np.array(path), scale, isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)


_IN_PLAIN_KERAS = """
import sys
sys.modules["hvdkit"] = None
import keras, numpy as np, warnings
for file, how in (("model", "error"), ("without", "default")):
    with warnings.catch_warnings():
        warnings.simplefilter(how)
        model = keras.saving.load_model(f"{sys.argv[1]}/{file}.keras")
    assert type(model.optimizer).__name__ == "LossScaleOptimizer", type(model.optimizer)
    print(int(model.optimizer.iterations.numpy()), float(np.abs(model.optimizer.variables[-1].numpy()).sum()))
    model.fit(np.ones([4, 5]), np.zeros([4]), verbose=0)
"""


@pytest.mark.slow
def test_ranks_skip_an_overflow_together_and_the_file_opens_in_plain_keras(ranks, tmp_path):
    one, other = ranks(2, with_an_overflow, folder=str(tmp_path))
    for path, scale, is_scaled in (one, other):
        assert np.array_equal(path[1], path[2]), "the step with the overflow moved the weights"
        assert not np.array_equal(path[2], path[3])
        assert scale == 2.0**14, "halved once"
        assert is_scaled
        assert np.array_equal(path, one[0])
    command = [sys.executable, "-c", _IN_PLAIN_KERAS, tmp_path]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    (steps, velocity), without_state = (line.split() for line in ended.stdout.splitlines())
    assert int(steps) == 9
    assert float(velocity) > 0
    assert without_state == ["0", "0.0"]


def taken_over():
    """A plain optimizer with state is wrapped, and goes on as it would have; also on one rank of two."""
    import keras

    import hvdkit as hvd
    from hvdkit.collectives.mesh import Shard, mark

    alone = keras.optimizers  # noqa: F841 - Keras is loaded before Horovod begins
    only = hvd.ProcessSet([0])
    me = hvd.init(process_sets=[only])
    inputs, labels = _batches(me.size)
    mine = slice(me.rank * LOCAL_BATCH, (me.rank + 1) * LOCAL_BATCH)
    make = lambda: _optimizer("AdamW", weight_decay=0.1, exclude=["bias"])  # noqa: E731
    plain, wrapped = _model(_dense(make())), _model(make())
    for model in (plain, wrapped):
        _dense(model.optimizer)
        _train(model, inputs[:4], labels[:4])
    expected = _train(plain, inputs[4:], labels[4:])
    wrapped.optimizer = hvd.ShardedOptimizer(wrapped.optimizer)
    wrapped.train_function = None
    path = _train(wrapped, inputs[4:, mine], labels[4:, mine])
    difference = max(float(np.abs(a - b).max()) for a, b in zip(path[-1], expected[-1], strict=True))
    identity = hvd.ShardedOptimizer(_optimizer("Adam"), process_set=only)
    model = _model(identity)
    expected = _train(_model(_optimizer("Adam")), inputs[:, mine], labels[:, mine])
    same = all(
        np.array_equal(a, b)
        for s, t in zip(_train(model, inputs[:, mine], labels[:, mine]), expected, strict=True)
        for a, b in zip(s, t, strict=True)
    )
    divided = keras.Variable(np.zeros([2]))
    mark(divided, Shard(hvd.Mesh(model=2), 0))
    refusals = []
    for attempt in (
        lambda: hvd.elastic.KerasState(wrapped),
        lambda: _model(keras.optimizers.LossScaleOptimizer(hvd.ShardedOptimizer(_optimizer("SGD")))).optimizer.build(
            wrapped.trainable_variables
        ),
        lambda: hvd.ShardedOptimizer(_optimizer("SGD")).build([divided]),
    ):
        try:
            attempt()
        except hvd.UsageError as error:
            refusals.append(str(error))
    sent, whole = wrapped.optimizer.wire_bytes(wrapped.trainable_variables)
    hvd.barrier()  # what each has done alone takes different times, and Horovod ends for all with the first to leave
    return difference, same, refusals, sent / whole


def test_state_is_taken_over_and_one_rank_is_as_without(ranks):
    for difference, same, refusals, sent in ranks(2, taken_over):
        assert difference < 1e-5
        assert same
        assert [r.split(",")[0] for r in refusals] == [
            "KerasState cannot keep the state of a ShardedOptimizer: it is divided over the ranks",
            "A ShardedOptimizer is inside a LossScaleOptimizer",
            "ShardedOptimizer divides the state of a model that all ranks hold whole",
        ]
        assert 1 <= sent < 1.5, "of a model of 300 weights: zeros between variables, and the heartbeat"


@pytest.mark.slow
def test_a_sharded_run_goes_on_bit_for_bit_after_sigkill(tmp_path):
    _, outcome = verify_resume(
        tmp_path,
        "--kills=1",
        "--shard_optimizer",
        "--optimizer=adamw:clipnorm=0.5",
        "--epochs=2",
        "--checkpoint_every=7",
    )
    assert outcome["equal"]


def checkpointed(folder, sharded):
    """A training that goes on from what is in `folder`: steps taken here, weights, and the whole state."""
    import keras

    import hvdkit as hvd

    me = hvd.init()
    model = _model((hvd.ShardedOptimizer if sharded else hvd.DistributedOptimizer)(_optimizer("AdamW", use_ema=True)))
    inputs, labels = (array.reshape(-1, *array.shape[2:]) for array in _batches(12))
    taken = []
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs=None: taken.append(batch))
    keeper = hvd.callbacks.CheckpointCallback(folder)
    x, y = hvd.data.shard((inputs, labels))
    model.fit(x, y, batch_size=48 // me.size, verbose=0, callbacks=[*hvd.callbacks.standard(), keeper, count])
    state = model.optimizer.gather() if sharded else [v.numpy() for v in model.optimizer.variables]
    return len(taken), model.get_weights(), state


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_sharded_or_not(ranks, tmp_path):
    """Three ranks train; two ranks, two without sharding, and one process take over all that they had."""
    runs = [(3, True), (2, True), (2, False), (1, False), (1, True)]
    whole = [ranks(n, checkpointed, folder=str(tmp_path / "c"), sharded=sharded)[0] for n, sharded in runs]
    steps, weights, state = whole[0]
    assert steps == 8
    assert len(state) == 2 + 3 * len(weights), "counter and rate; two slots and an average of each weight"
    assert sum(np.any(array) for array in state) == 2 + 3 * 5 + 1, "of the idle layer's only the average is not zero"
    for taken, other_weights, other_state in whole[1:]:
        assert taken == 0
        assert all(np.array_equal(a, b) for a, b in zip(weights, other_weights, strict=True))
        assert all(np.array_equal(a, b) for a, b in zip(state, other_state, strict=True))


def clipped_doubles():
    """The largest difference to Keras, of float64 weights after one step that is clipped by norm."""
    import keras
    import tensorflow as tf

    import hvdkit as hvd

    hvd.init()
    values = [np.linspace(0.1, 1.3, 7), np.linspace(0.7, 0.9, 6).reshape(2, 3)]
    worst = 0.0
    for clipping in ({"clipnorm": 0.1}, {"global_clipnorm": 0.1}):
        found = []
        for wrap in (hvd.ShardedOptimizer, lambda optimizer: optimizer):
            optimizer = wrap(keras.optimizers.SGD(1.0, **clipping))
            variables = [keras.Variable(np.zeros(v.shape), dtype="float64") for v in values]
            optimizer.build(variables)
            optimizer.apply([tf.constant(v) for v in values], variables)
            found.append([np.asarray(v) for v in variables])
        worst = max([worst, *(float(np.abs(a - b).max()) for a, b in zip(*found, strict=True))])
    return worst


def test_norms_of_doubles_are_doubles(ranks):
    assert max(ranks(2, clipped_doubles)) < 1e-15
