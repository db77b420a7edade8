"""Each argument of `DistributedOptimizer` and `DistributedGradientTape`, against closed forms or one process."""

import numpy as np
import pytest

from hvdkit.optimizers import heartbeat

LOCAL_BATCH = 4
STEPS = 6


def _batches(ranks, kind="dense"):
    generator = np.random.default_rng(11)
    count = [STEPS, ranks * LOCAL_BATCH]
    inputs = generator.normal(size=[*count, 5]).astype("float32")
    if kind == "sparse":
        inputs = generator.integers(20, size=[*count, 3])
    return inputs, generator.integers(3, size=count)


def _model(optimizer, kind="dense"):
    import keras

    keras.utils.set_random_seed(2)
    body = [keras.layers.Input([5]), keras.layers.Dense(7, activation="tanh")]
    if kind == "sparse":
        body = [keras.layers.Input([3], dtype="int32"), keras.layers.Embedding(20, 4), keras.layers.Flatten()]
    model = keras.Sequential([*body, keras.layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss=loss, jit_compile=False)
    return model


def _train(model, inputs, labels):
    path = []
    for x, y in zip(inputs, labels, strict=True):
        model.train_on_batch(x, y)
        path.append(np.concatenate([np.ravel(w) for w in model.get_weights()]))
    return np.array(path)


def _mine(world):
    return slice(world.rank * LOCAL_BATCH, (world.rank + 1) * LOCAL_BATCH)


def accumulating(kind):
    import keras

    import hvdkit as hvd
    from hvdkit.optimizers import heartbeat

    world = hvd.init()
    inputs, labels = _batches(world.size, kind)
    mine = _mine(world)
    found = {}
    for name, make in {
        "SGD": lambda **more: keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=0.5, **more),
        "AdamW": lambda **more: keras.optimizers.AdamW(1e-2, use_ema=True, clipnorm=0.3, **more),
        "MultiOptimizer": lambda **more: keras.optimizers.MultiOptimizer(
            keras.optimizers.OptimizerMap(
                keras.optimizers.Adam(1e-2, **more), {".*bias": keras.optimizers.SGD(1e-1, **more)}
            )
        ),
    }.items():
        if not hasattr(keras.optimizers, name):
            continue  # MultiOptimizer is younger than the oldest Keras
        reference = _train(_model(make(gradient_accumulation_steps=3), kind), inputs, labels)
        ways = {
            "gradient_accumulation_steps": lambda make=make: hvd.DistributedOptimizer(
                make(gradient_accumulation_steps=3)
            ),
            "backward_passes_per_step": lambda make=make: hvd.DistributedOptimizer(
                make(), backward_passes_per_step=3, average_aggregated_gradients=True
            ),
        }
        for way, wrap in ways.items():
            heartbeat.current().begin()
            path = _train(_model(wrap(), kind), inputs[:, mine], labels[:, mine])
            exchanges = heartbeat.current().read()[0]
            found[name, way] = float(np.abs(path - reference).max()), exchanges, np.array_equal(path[0], path[1])
    sums = _train(
        _model(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), backward_passes_per_step=3), kind),
        inputs[:, mine],
        labels[:, mine],
    )
    means = _train(_model(keras.optimizers.SGD(0.3, gradient_accumulation_steps=3), kind), inputs, labels)
    found["sums", "backward_passes_per_step"] = float(np.abs(sums - means).max()), 2.0, True
    return found


@pytest.mark.parametrize("kind", [pytest.param("dense", marks=pytest.mark.slow), "sparse"])
def test_accumulated_gradients_are_exchanged_once_and_right(ranks, kind):
    for found in ranks(2, accumulating, kind=kind):
        assert len(found) >= 5
        for case, (difference, exchanges, waited) in found.items():
            assert difference < 1e-5, f"{case}: {difference}"
            # A MultiOptimizer's two parts exchange one after the other.
            assert exchanges == STEPS / 3 * (2 if case[0] == "MultiOptimizer" else 1), case
            assert waited, f"{case}: the weights moved between exchanges"


def with_options():
    import keras

    import hvdkit as hvd

    world = hvd.init()
    inputs, labels = _batches(world.size)
    mine = _mine(world)
    reference = _train(_model(keras.optimizers.Adam(1e-2)), inputs, labels)

    def difference(**options):
        import keras

        optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(1e-2), **options)
        return float(np.abs(_train(_model(optimizer), inputs[:, mine], labels[:, mine]) - reference).max())

    model = _model(keras.optimizers.SGD())
    by_variable = [model.trainable_variables[:1], model.trainable_variables[1:3]]
    grouped = hvd.DistributedOptimizer(keras.optimizers.Adam(1e-2), groups=by_variable)
    model.compile(grouped, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    return {
        "predivide": difference(gradient_predivide_factor=4.0),
        "groups": difference(groups=3),
        "more groups than gradients": difference(groups=99),
        "num_groups": difference(num_groups=2),
        "groups by variable": float(np.abs(_train(model, inputs[:, mine], labels[:, mine]) - reference).max()),
        "positional": difference(name="mine", device_dense="", device_sparse="", compression=hvd.Compression.none),
        "average": difference(op=hvd.Average, process_set=hvd.global_process_set),
    }


@pytest.mark.slow
def test_options_that_change_only_the_way_do_not_change_the_result(ranks):
    for found in ranks(2, with_options):
        assert {name: d for name, d in found.items() if not d < 1e-5} == {}


def in_groups(groups, operation):
    """A step of SGD with rate 1 from 0, and the variables that each such operation sends, in the order of the graph."""
    import keras
    import tensorflow as tf

    import hvdkit as hvd

    world = hvd.init()
    variables = [keras.Variable(np.zeros(length, "float32")) for length in (1_200_000, 5, 1_300_000)]
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), groups=groups)
    optimizer.build(variables)

    @tf.function
    def step(scale):
        optimizer.apply([scale * tf.ones(v.shape) * (i + 1) for i, v in enumerate(variables)], variables)

    step(tf.constant(world.rank + 1.0))
    graph = step.get_concrete_function(tf.TensorSpec([])).graph
    found = [
        [tensor.shape.num_elements() for tensor in node.inputs]
        for node in graph.get_operations()
        if node.type == operation
    ]
    return [np.unique(v).tolist() for v in variables], found


_HOROVOD = ("HorovodGroupedAllreduce", {"HVDKIT_SHARED_MEMORY": "0", "HVDKIT_SOCKETS": "0"})
_SOCKETS = ("HvdkitSocketsSum", {"HVDKIT_SHARED_MEMORY": "0"})
_SHARED = ("HvdkitSharedSum", {})


@pytest.mark.parametrize(
    ("transport", "groups", "expected"),
    [
        (_HOROVOD, None, [[1_200_000, 5, 1_300_000, heartbeat.LENGTH]]),
        (_HOROVOD, 2, [[5, 1_300_000], [1_200_000, heartbeat.LENGTH]]),
        (_SOCKETS, None, [[1_300_000], [1_200_000, 5, heartbeat.LENGTH]]),
        (_SOCKETS, 1, [[1_200_000, 5, 1_300_000, heartbeat.LENGTH]]),
        (_SHARED, None, [[1_200_000, 5, 1_300_000, heartbeat.LENGTH]]),
    ],
)
def test_gradients_travel_in_one_group_or_in_several_the_last_layers_first(ranks, transport, groups, expected):
    operation, environment = transport
    for weights, found in ranks(2, in_groups, groups=groups, operation=operation, env=environment):
        assert weights == [[-1.5], [-3.0], [-4.5]]
        assert found == expected


BUCKETED = 12  # steps


def in_buckets(length):
    """Gradients of steps that depend on nothing before them, so all could be sent at once: what each step received."""
    import tensorflow as tf

    import hvdkit as hvd
    from hvdkit.optimizers.gradients import GradientExchange

    world = hvd.init()
    exchange = GradientExchange("buckets")

    @tf.function
    def steps(scale):
        found = []
        for step in range(BUCKETED):
            grads = [scale * (step + 1) * tf.fill([length], i + 1.0) for i in range(3)]
            found.append(tf.stack([tf.stack([g[0], g[-1]]) for g in exchange(grads)]))
        return tf.stack(found)

    return steps(tf.constant(world.rank + 1.0)).numpy().tolist()


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_buckets_of_one_step_never_meet_those_of_another(ranks, size):
    expected = [[[(step + 1) * (i + 1) * (size + 1) / 2] * 2 for i in range(3)] for step in range(BUCKETED)]
    for found in ranks(size, in_buckets, length=600_000, env=_SOCKETS[1]):
        assert found == expected


def with_sets_and_local_variables():
    import keras
    import tensorflow as tf

    import hvdkit as hvd

    pair = hvd.ProcessSet([0, 2])
    world = hvd.init(process_sets=[pair])
    mine = np.float32(world.rank + 1)

    def step(optimizer, sparse=False):
        """One step of SGD with rate 1 from 0 on the gradient rank + 1: minus the result is what was applied."""
        variables = [keras.Variable(np.zeros([2, 2], "float32")) for _ in range(2)]
        if callable(optimizer):
            optimizer = optimizer(variables)
        gradient = tf.fill([2, 2], mine)
        if sparse:
            gradient = tf.IndexedSlices(tf.fill([1, 2], mine), tf.constant([1]), tf.constant([2, 2]))
        optimizer.apply([gradient, tf.fill([2, 2], mine)], variables)
        return [-np.asarray(v)[1, 0].item() for v in variables]

    def local(scale):
        def make(variables):
            optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), scale_local_gradients=scale)
            optimizer.register_local_var(variables[0])
            return optimizer

        return make

    layers = [keras.layers.Dense(2, use_bias=False), keras.layers.Dense(2, use_bias=False)]
    for layer in layers:
        layer.build([None, 2])
        layer.set_weights([np.zeros([2, 2])])
    partial = hvd.PartialDistributedOptimizer(keras.optimizers.SGD(1.0), local_layers=layers[0])
    partial.apply([tf.fill([2, 2], mine)] * 2, [layer.kernel for layer in layers])
    return {
        "average": step(hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))),
        "sum": step(hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), op=hvd.Sum)),
        "sum of sparse": step(hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), op=hvd.Sum), sparse=True),
        "predivided sparse": step(
            hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), gradient_predivide_factor=2.0), sparse=True
        ),
        "sparse as dense": step(
            hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), sparse_as_dense=True, groups=2), sparse=True
        ),
        "pair": step(hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), process_set=pair)),
        "local": step(local(scale=False)),
        "local, scaled": step(local(scale=True)),
        "local sparse": step(local(scale=True), sparse=True),
        "partial": [-float(layer.kernel.numpy()[0, 0]) for layer in layers],
    }


def test_process_sets_local_variables_and_sums(ranks):
    for rank, found in enumerate(ranks(3, with_sets_and_local_variables)):
        mine = rank + 1
        assert found["average"] == [2, 2]
        assert found["sum"] == found["sum of sparse"] == [6, 6]
        assert found["predivided sparse"] == found["sparse as dense"] == [2, 2]
        assert found["pair"] == ([2, 2] if rank in (0, 2) else [mine, mine])
        assert found["local"] == [mine, 2]
        assert found["local, scaled"] == found["local sparse"] == found["partial"] == pytest.approx([mine / 3, 2])


def fit_with_a_layer_of_its_own():
    import keras
    import tensorflow as tf

    import hvdkit as hvd

    world = hvd.init()
    keras.utils.set_random_seed(world.rank)  # each rank begins with weights of its own
    names = ("shared", "mine", "head")
    layers = {name: keras.layers.Dense(3, use_bias=False, name=name) for name in names}
    model = keras.Sequential([keras.layers.Input([3]), *layers.values()])
    before = layers["mine"].kernel.numpy()
    optimizer = hvd.PartialDistributedOptimizer(keras.optimizers.SGD(0.0), local_layers=layers["mine"])
    model.compile(optimizer, loss="mse", jit_compile=False)
    guard = hvd.callbacks.ReplicaGuardCallback(every=1)
    x = np.ones([4, 3], "float32") * (world.rank + 1)
    model.fit(x, x, batch_size=2, verbose=0, callbacks=[*hvd.callbacks.standard(guard_every=0), guard])
    kept = np.array_equal(layers["mine"].kernel.numpy(), before)
    optimizer.learning_rate = 0.1
    model.fit(x, x, batch_size=2, verbose=0, callbacks=[*hvd.callbacks.standard(guard_every=0), guard])

    broadcast = hvd.callbacks.BroadcastGlobalVariablesCallback(0, local_variables=[layers["head"].kernel])
    layers["head"].kernel.assign(np.full([3, 3], world.rank))
    broadcast.set_model(model)
    broadcast.on_train_begin()
    with tf.GradientTape() as tape:
        loss = float(world.rank + 1) * sum(tf.reduce_sum(layers[name].kernel.value) for name in names)
    tape = hvd.PartialDistributedGradientTape(tape, local_layers=[layers["head"]], scale_local_gradients=False)
    gradients = tape.gradient(loss, [layers[name].kernel.value for name in names])
    weights = {name: layers[name].kernel.numpy().tolist() for name in names}
    return kept, weights, [float(g[0, 0]) for g in gradients]


def test_layers_of_a_ranks_own_stay_so_in_fit(ranks):
    everyone = ranks(2, fit_with_a_layer_of_its_own)
    (_, first, _), (_, second, _) = everyone
    assert first["shared"] == second["shared"]
    assert first["mine"] != second["mine"]
    for rank, (kept, weights, gradients) in enumerate(everyone):
        assert kept, "neither broadcast nor guard may touch what is local"
        assert np.array_equal(weights["head"], np.full([3, 3], rank)), "the callback leaves local_variables alone"
        assert gradients == [1.5, 1.5, rank + 1]


def _adasum_of(vectors):
    """The formula of the paper, in a binary tree."""
    if len(vectors) == 1:
        return vectors[0]
    a, b = _adasum_of(vectors[: len(vectors) // 2]), _adasum_of(vectors[len(vectors) // 2 :])
    return (1 - a @ b / (2 * a @ a)) * a + (1 - a @ b / (2 * b @ b)) * b


def by_adasum():
    import keras
    import tensorflow as tf

    import hvdkit as hvd
    from hvdkit.collectives import adasum

    world = hvd.init()
    everyone = np.random.default_rng(3).normal(size=[world.size, 11])
    parallel, orthogonal = np.ones(4), np.eye(world.size)[world.rank]
    mine = [tf.constant(v, tf.float32) for v in (everyone[world.rank], parallel, orthogonal)]
    reduce = tf.function(lambda: adasum.adasum(mine, "test", hvd.global_process_set), autograph=False)
    found = [t.numpy().tolist() for t in reduce()]

    variable = keras.Variable(np.zeros(11, "float32"))
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.5), op=hvd.Adasum)
    optimizer.apply([mine[0]], [variable])
    with hvd.DistributedGradientTape(tf.GradientTape(), op=hvd.Adasum) as tape:
        loss = tf.reduce_sum(variable.value * mine[0])

    model = keras.Sequential([keras.layers.Input([11]), keras.layers.Dense(1, use_bias=False)])
    model.set_weights([np.zeros([11, 1])])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.5), op=hvd.Adasum)
    model.compile(optimizer, loss=lambda y_true, y_pred: y_pred, jit_compile=False)
    model.fit(everyone[world.rank : world.rank + 1], np.zeros([1, 1]), verbose=0)
    return (
        found,
        [np.asarray(variable).tolist(), model.get_weights()[0][:, 0].tolist()],
        tape.gradient(loss, [variable])[0].numpy().tolist(),
    )


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_adasum_is_that_of_the_paper(ranks, size):
    everyone = np.random.default_rng(3).normal(size=[size, 11])
    expected = _adasum_of(list(everyone))
    for (random, parallel, orthogonal), weights, gradient in ranks(size, by_adasum):
        assert np.allclose(random, expected, atol=1e-5)
        assert np.allclose(parallel, 1), "parallel updates average"
        assert np.allclose(orthogonal, 1), "orthogonal ones add"
        assert np.allclose(weights, -0.5 * expected, atol=1e-5)
        assert np.allclose(gradient, expected, atol=1e-5)


def of_three_by_adasum():
    import keras
    import tensorflow as tf

    import hvdkit as hvd

    hvd.init()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.5), op=hvd.Adasum)
    try:
        optimizer.apply([tf.ones(2)], [keras.Variable([0.0, 0.0])])
    except ValueError as error:
        return str(error)


def test_adasum_of_three_ranks_is_refused(ranks):
    for message in ranks(3, of_three_by_adasum):
        assert "needs 2, 4, 8, ... of them, but there are 3" in message


def custom_loop():
    import keras
    import tensorflow as tf

    import hvdkit as hvd

    world = hvd.init()
    inputs, labels = _batches(world.size)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def train(model, tape_of, inputs, labels, compiled):
        optimizer = keras.optimizers.Adam(1e-2)
        optimizer.build(model.trainable_variables)

        def step(x, y):
            with tape_of(tf.GradientTape()) as tape:
                loss = loss_of(y, model(x, training=True))
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

        step = tf.function(step) if compiled else step
        for x, y in zip(inputs, labels, strict=True):
            step(x, y)
        return np.concatenate([np.ravel(w) for w in model.get_weights()])

    reference = train(_model(None), lambda tape: tape, inputs, labels, True)
    mine = _mine(world)
    differences = [
        float(np.abs(train(_model(None), wrap, inputs[:, mine], labels[:, mine], compiled) - reference).max())
        for wrap in (hvd.DistributedGradientTape, lambda tape: hvd.DistributedGradientTape(tape, groups=2))
        for compiled in (True, False)
    ]
    first, second = tf.Variable(1.0), tf.Variable(2.0)
    with tf.GradientTape() as plain:
        loss = float(world.rank + 1) * (3 * first + second)
    tape = hvd.DistributedGradientTape(plain)  # after recording, as in Horovod's examples
    tape.register_local_source(second)
    local, shared = tape.get_local_and_global_gradients(loss, [first, second])
    return differences, isinstance(tape, tf.GradientTape), float(local[0][1]), float(shared[0][1])


def test_custom_loops_with_a_tape(ranks):
    for rank, (differences, is_tape, local, shared) in enumerate(ranks(2, custom_loop)):
        assert max(differences) < 1e-5, differences
        assert is_tape
        assert (local, shared) == ((rank + 1) / 2, 4.5)


def two_optimizers_of_one_class():
    import keras
    import tensorflow as tf

    import hvdkit as hvd

    world = hvd.init()
    first, second = keras.Variable([0.0]), keras.Variable([0.0])
    optimizers = [hvd.DistributedOptimizer(keras.optimizers.SGD(1.0)) for _ in range(2)]
    for optimizer, variable in zip(optimizers, (first, second), strict=True):
        optimizer.build([variable])

    @tf.function
    def step():
        for optimizer, variable, factor in zip(optimizers, (first, second), (1.0, 10.0), strict=True):
            optimizer.apply([tf.fill([1], factor * (world.rank + 1))], [variable])

    for _ in range(20):
        step()
    return -float(first.numpy()[0]), -float(second.numpy()[0])


def test_two_optimizers_of_one_class_in_one_step(ranks):
    for found in ranks(2, two_optimizers_of_one_class):
        assert found == (20 * 1.5, 20 * 15)


def losses_of_scaled_precision():
    import keras

    import hvdkit as hvd

    world = hvd.init()
    inputs, labels = _batches(1)
    found = {}

    def run(name, wrap, policy="mixed_float16", bad_step=3):
        keras.config.set_dtype_policy(policy if name == "global policy" else "float32")
        optimizer = wrap()
        keras.config.set_dtype_policy(policy)
        model = _model(optimizer)
        keras.config.set_dtype_policy("float32")
        states = []
        for step, (x, y) in enumerate(zip(inputs, labels, strict=True)):
            model.train_on_batch(x * (np.inf if (step, world.rank) == (bad_step, 1) else 1), y)
            scale = float(getattr(model.optimizer, "dynamic_scale", 1.0))
            states.append((model.get_weights()[0].tobytes(), scale, int(model.optimizer.iterations)))
        found[name] = states

    lso = keras.optimizers.LossScaleOptimizer
    run("global policy", lambda: hvd.DistributedOptimizer(keras.optimizers.Adam(1e-2)))
    run("put around by compile", lambda: hvd.DistributedOptimizer(keras.optimizers.Adam(1e-2)))
    run("put around by hand", lambda: lso(hvd.DistributedOptimizer(keras.optimizers.Adam(1e-2))))
    run(
        "inside, accumulating",
        lambda: hvd.DistributedOptimizer(lso(keras.optimizers.Adam(1e-2, gradient_accumulation_steps=2))),
        bad_step=2,
    )
    return found


def test_an_overflow_on_one_rank_is_skipped_by_all_wherever_the_loss_scale_is(ranks):
    first, second = ranks(2, losses_of_scaled_precision)
    assert first == second, "weights, scale and iterations must be equal on the ranks after each step"
    assert len(first) == 4
    for name, states in first.items():
        weights, scales, iterations = zip(*states, strict=True)
        if name == "inside, accumulating":
            assert scales[2] == scales[1] / 2
            assert iterations[-1] == 2, "five micro-steps are two updates"
            assert len(set(weights)) == 3
        else:
            assert weights[2] == weights[3] != weights[4], f"{name}: step 3 is skipped, step 4 is not"
            assert scales[3] == scales[2] / 2
            assert iterations[-1] == STEPS - 1


def in_bfloat16():
    import keras

    import hvdkit as hvd

    world = hvd.init()
    inputs, labels = _batches(world.size)
    mine = _mine(world)
    keras.config.set_dtype_policy("mixed_bfloat16")

    def train(optimizer, part):
        model = _model(optimizer)
        assert not isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)  # there is nothing to scale
        return _train(model, inputs[:, part], labels[:, part])

    reference = train(keras.optimizers.SGD(0.1, momentum=0.9), slice(None))
    ours = train(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9)), mine)
    alone = train(keras.optimizers.SGD(0.1, momentum=0.9), mine)
    return [float(np.abs(path - reference).max()) for path in (ours, alone)], ours.tobytes()


def test_mixed_bfloat16_trains_the_model_of_one_process(ranks):
    everyone = ranks(2, in_bfloat16)
    for (ours, alone), weights in everyone:
        assert ours < 5e-3 < 5e-2 < alone, "equal to the rounding of bfloat16, and only because of the exchange"
        assert weights == everyone[0][1]


def inside_a_loss_scale_that_was_built_without_it():
    import keras
    import tensorflow as tf

    import hvdkit as hvd

    hvd.init()
    variable = keras.Variable([0.0])
    outer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
    outer.build([variable])
    outer.inner_optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    try:
        outer.apply([tf.ones(1)], [variable])
    except RuntimeError as error:
        return str(error)


def test_a_place_that_would_hang_is_refused(ranks):
    for message in ranks(2, inside_a_loss_scale_that_was_built_without_it):
        assert "Put it outside: hvdkit.DistributedOptimizer(keras.optimizers.LossScaleOptimizer(" in message


def wrapped(times):
    """What two steps of an accumulating optimizer do to a shared and to a local weight, wrapped several times."""
    import keras
    import tensorflow as tf

    import hvdkit as hvd

    me = hvd.init()
    layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
    layer.build([None, 1])
    shared = keras.Variable([[0.0]])
    optimizer = keras.optimizers.SGD(1.0, gradient_accumulation_steps=2)
    options = {"op": hvd.Sum, "scale_local_gradients": False}
    first, *_ = (
        hvd.PartialDistributedOptimizer(optimizer, local_layers=layer if number == 0 else None, **options)
        for number in range(times)
    )
    first.build([shared, layer.kernel])
    for _ in range(2):
        first.apply([tf.fill([1, 1], me.rank + 1.0)] * 2, [shared, layer.kernel])
    return float(shared[0, 0]), float(layer.kernel[0, 0])


@pytest.mark.parametrize("times", [1, 2])
def test_an_optimizer_that_is_wrapped_again_is_reduced_once_by_the_wrapper_in_use(ranks, times):
    """As after a second `compile`, or where two models share it."""
    assert ranks(2, wrapped, times=times) == [(-3.0, -1.0), (-3.0, -2.0)]
