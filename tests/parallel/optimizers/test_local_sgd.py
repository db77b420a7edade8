"""Local SGD and DiLoCo: against dense training where they are the same, and against the paper's algorithm in NumPy."""

import json

import numpy as np
import pytest

STEPS, LOCAL_BATCH = 12, 4


def _batches(size):
    generator = np.random.default_rng(3)
    inputs = generator.normal(size=[STEPS, size * LOCAL_BATCH, 5]).astype("float32")
    return inputs, generator.normal(size=[STEPS, size * LOCAL_BATCH, 1]).astype("float32")


def trained(make, arguments, steps=STEPS, finish=True):
    """A linear model's weights after each step on this rank's part of each batch."""
    import keras

    import hvdkit as hvd

    me = hvd.init()
    keras.utils.set_random_seed(2)
    model = keras.Sequential([keras.layers.Input([5]), keras.layers.Dense(1)])
    optimizer = getattr(hvd, make)(keras.optimizers.SGD(0.05), **arguments)
    model.compile(optimizer, loss="mse", jit_compile=False)
    optimizer.build(model.trainable_variables)
    inputs, targets = _batches(me.size)
    mine = slice(me.rank * LOCAL_BATCH, (me.rank + 1) * LOCAL_BATCH)
    path = []
    for x, y in zip(inputs[:steps], targets[:steps], strict=True):
        model.train_on_batch(x[mine], y[mine])
        path.append(np.concatenate([np.ravel(w) for w in model.get_weights()]))
    if make == "LocalSGD" and finish:
        optimizer.synchronise()
        path.append(np.concatenate([np.ravel(w) for w in model.get_weights()]))
    return np.array(path)


@pytest.mark.parametrize("number", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_one_local_step_and_the_mean_is_dense_training(ranks, number):
    local = {"steps": 1, "outer_learning_rate": 1.0, "outer_momentum": 0.0}
    dense = ranks(number, trained, make="DistributedOptimizer", arguments={})
    for path in ranks(number, trained, make="LocalSGD", arguments=local, finish=False):
        np.testing.assert_allclose(path, dense[0], rtol=1e-5, atol=1e-6)


def _diloco(size, every, rate, momentum, start):
    """Algorithm 1 of Douillard et al. for a linear model with SGD inside, ended by an exchange."""
    inputs, targets = _batches(size)
    anchor, velocity = start.copy(), np.zeros_like(start)
    models, since = [start.copy() for _ in range(size)], 0
    for step in range(STEPS):
        for rank in range(size):
            rows = slice(rank * LOCAL_BATCH, (rank + 1) * LOCAL_BATCH)
            x = np.c_[inputs[step][rows], np.ones(LOCAL_BATCH)]
            error = x @ models[rank] - targets[step][rows][:, 0]
            models[rank] = models[rank] - 0.05 * 2 * x.T @ error / LOCAL_BATCH
        since += 1
        if since == every or step == STEPS - 1:
            change = np.mean([anchor - model for model in models], axis=0)
            velocity = momentum * velocity + change
            anchor = anchor - rate * (change + momentum * velocity)
            models, since = [anchor.copy() for _ in range(size)], 0
    return anchor


@pytest.mark.parametrize(("number", "every"), [(2, 5), pytest.param(3, 4, marks=pytest.mark.slow)])
def test_diloco_is_the_papers(ranks, number, every):
    arguments = {"steps": every, "outer_learning_rate": 0.7, "outer_momentum": 0.9}
    found = ranks(number, trained, make="LocalSGD", arguments=arguments)
    start = ranks(1, trained, make="DistributedOptimizer", arguments={}, steps=0)  # the seed's weights
    assert start[0].size == 0
    first = _start()
    expected = _diloco(number, every, 0.7, 0.9, first)
    for path in found:
        np.testing.assert_allclose(path[-1], expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(found[0][0], found[1][0]), "the ranks did not train alone"
    assert np.array_equal(found[0][every - 1], found[1][every - 1]), "they did not agree after so many steps"


def _start():
    import keras

    keras.utils.set_random_seed(2)
    model = keras.Sequential([keras.layers.Input([5]), keras.layers.Dense(1)])
    return np.concatenate([np.ravel(w) for w in model.get_weights()]).astype(np.float64)


TRANSPORTS = {
    "shared memory": {},
    "sockets": {"HVDKIT_SHARED_MEMORY": "0"},
    "horovod": {"HVDKIT_SHARED_MEMORY": "0", "HVDKIT_SOCKETS": "0"},
}
STREAMED = 17  # steps, which end while a fragment is under way


def _two_layers():
    """A linear model of two layers; its weights have 20, 4, 4 and 1 elements."""
    import keras

    keras.utils.set_random_seed(2)
    return keras.Sequential([keras.layers.Input([5]), keras.layers.Dense(4), keras.layers.Dense(1)])


def _streamed_batches(size):
    generator = np.random.default_rng(3)
    inputs = generator.normal(size=[STREAMED, size * LOCAL_BATCH, 5]).astype("float32")
    return inputs, generator.normal(size=[STREAMED, size * LOCAL_BATCH, 1]).astype("float32")


def streamed(transport, arguments, joined=1):
    """This rank's weights after every `joined` steps, and after a last synchronization."""
    import keras
    import tensorflow as tf

    import hvdkit as hvd
    from hvdkit.collectives import transports

    me = hvd.init()
    assert transports.choose("allreduce", "float32", hvd.global_process_set).name == transport
    model = _two_layers()
    optimizer = hvd.LocalSGD(keras.optimizers.SGD(0.05), **arguments)
    optimizer.build(model.trainable_variables)
    optimizer.start()
    mine = slice(me.rank * LOCAL_BATCH, (me.rank + 1) * LOCAL_BATCH)
    x, y = (tf.constant(part[:, mine]) for part in _streamed_batches(me.size))

    @tf.function(autograph=False)
    def steps(first):
        def step(number):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(x[number]) - y[number]) ** 2)
            optimizer.apply(tape.gradient(loss, [v.value for v in model.trainable_variables]))
            return (number + 1,)

        until = tf.minimum(first + joined, STREAMED)
        tf.while_loop(lambda n: n < until, step, [first], parallel_iterations=1)

    path = []
    for first in range(0, STREAMED, joined):
        steps(tf.constant(first))
        path.append(model.get_weights())
    optimizer.synchronise()
    place = {id(variable): i for i, variable in enumerate(model.trainable_variables)}
    return path, model.get_weights(), [[place[id(v)] for v in part] for part in optimizer.fragments]


class Reference:
    """Algorithm 2 of Douillard et al. 2025 in NumPy, for SGD and two linear layers.

    `path` has the weights of each rank after each step, and `anchors` those after a last synchronization.
    """

    rate, momentum = 0.7, 0.9

    def __init__(self, size, every, parts, overlap, mixing):
        self.parts, self.mixing = parts, mixing
        start = [w.astype(np.float64) for w in _two_layers().get_weights()]
        self.anchors, self.velocities = [w.copy() for w in start], [np.zeros_like(w) for w in start]
        self.ranks, self.path, flying = [[w.copy() for w in start] for _ in range(size)], [], {}
        inputs, targets = _streamed_batches(size)
        for t in range(1, STREAMED + 1):
            for rank, weights in enumerate(self.ranks):
                rows = slice(rank * LOCAL_BATCH, (rank + 1) * LOCAL_BATCH)
                self.train(weights, inputs[t - 1][rows], targets[t - 1][rows])
            for p in [p for p, (began, _) in flying.items() if began + overlap == t]:
                self.step_outside(parts[p], flying.pop(p)[1])
                self.mix(parts[p], mixing)
            now = [p for p in range(len(parts)) if (t - every * (p + 1) // len(parts)) % every == 0]
            for p in now:
                if overlap:
                    flying[p] = (t, self.changes_of(parts[p]))
                else:
                    self.step_outside(parts[p], self.changes_of(parts[p]))
                    self.mix(parts[p], 0)
            self.path.append([[w.copy() for w in weights] for weights in self.ranks])
        for p in set(range(len(parts))) - (set() if overlap else set(now)):
            self.step_outside(parts[p], self.changes_of(parts[p]))

    def train(self, weights, x, y):
        w1, b1, w2, b2 = weights
        hidden = x @ w1 + b1
        error = 2 * (hidden @ w2 + b2 - y) / LOCAL_BATCH
        back = error @ w2.T
        for i, gradient in enumerate((x.T @ back, back.sum(0), hidden.T @ error, error.sum(0))):
            weights[i] = weights[i] - 0.05 * gradient

    def changes_of(self, part):
        return [np.mean([self.anchors[i] - weights[i] for weights in self.ranks], axis=0) for i in part]

    def step_outside(self, part, changes):
        for i, change in zip(part, changes, strict=True):
            self.velocities[i] = self.momentum * self.velocities[i] + change
            self.anchors[i] = self.anchors[i] - self.rate * (change + self.momentum * self.velocities[i])

    def mix(self, part, mixing):
        for weights in self.ranks:
            for i in part:
                weights[i] = mixing * weights[i] + (1 - mixing) * self.anchors[i]


SCHEDULES = {  # H, P, the variables of each fragment, τ, α
    "no overlap": (6, 2, [[0], [1, 2, 3]], 0, 0.5),
    "three fragments": (7, 3, [[0], [1, 3], [2]], 2, 0.5),
    "all the time": (4, 2, [[0], [1, 2, 3]], 2, 0.25),
    "one fragment": (5, 1, [[0, 1, 2, 3]], 5, 0.0),
}


@pytest.mark.parametrize(
    ("number", "transport", "joined"),
    [
        (2, "sockets", 1),
        pytest.param(3, "sockets", 5, marks=pytest.mark.slow),
        pytest.param(2, "shared memory", 5, marks=pytest.mark.slow),
        pytest.param(2, "horovod", 5, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_streaming_diloco_is_the_papers(ranks, number, transport, joined, schedule):
    every, fragments, parts, overlap, mixing = SCHEDULES[schedule]
    arguments = {"steps": every, "fragments": fragments, "overlap": overlap, "mixing": mixing}
    env = TRANSPORTS[transport]
    found = ranks(number, streamed, transport=transport, arguments=arguments, joined=joined, env=env)
    expected = Reference(number, every, parts, overlap, mixing)
    seen = [expected.path[min(first + joined, STREAMED) - 1] for first in range(0, STREAMED, joined)]
    for rank, (weights, last, fragments) in enumerate(found):
        assert fragments == parts
        for step, (got, right) in enumerate(zip(weights, seen, strict=True)):
            for one, other in zip(got, right[rank], strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5, err_msg=f"execution {step}")
        for one, other, first in zip(last, expected.anchors, found[0][1], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
            assert np.array_equal(one, first), "the ranks differ after synchronise()"


def fitted(every, compression="none", **streaming):
    """`fit` with validation, guards and an Embedding: what ends with one model on all ranks."""
    import keras

    import hvdkit as hvd
    from hvdkit.compression import by_name

    me = hvd.init()
    keras.utils.set_random_seed(me.rank)  # other weights on each rank: fit begins with those of rank 0
    model = keras.Sequential(
        [
            keras.layers.Input([4], dtype="int32"),
            keras.layers.Embedding(30, 8),
            keras.layers.Flatten(),
            keras.layers.Dense(16, "relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(2),
        ]
    )
    optimizer = hvd.LocalSGD(
        keras.optimizers.Adam(5e-3), every, 1.0, 0.0, compression=by_name(compression), **streaming
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss=loss, metrics=["accuracy"], steps_per_execution=3)
    generator = np.random.default_rng(me.rank)
    x = generator.integers(30, size=[240, 4])
    y = (x[:, 0] > 14).astype("int64")
    history = model.fit(
        x,
        y,
        batch_size=10,
        epochs=5,
        verbose=0,
        validation_data=(x[:100], y[:100]),
        callbacks=hvd.callbacks.standard(guard_every=5),
    )
    weights = np.concatenate([np.ravel(w) for w in model.get_weights()])
    return weights, history.history["val_accuracy"], history.history["accuracy"][-1]


@pytest.mark.parametrize(
    ("every", "compression", "streaming", "transport"),
    [
        pytest.param(7, "none", {}, "shared memory", marks=pytest.mark.slow),
        pytest.param(4, "int8", {}, "shared memory", marks=pytest.mark.slow),
        (7, "none", {"fragments": 3}, "sockets"),
        pytest.param(7, "bf16", {"fragments": 3, "overlap": 0}, "sockets", marks=pytest.mark.slow),
        pytest.param(7, "fp16", {"overlap": 3}, "shared memory", marks=pytest.mark.slow),
    ],
)
def test_fit_ends_with_one_model(ranks, every, compression, streaming, transport):
    one, other = ranks(2, fitted, every=every, compression=compression, **streaming, env=TRANSPORTS[transport])
    assert np.array_equal(one[0], other[0])
    assert one[1] == other[1], "evaluations are of the model that they agreed on"
    assert one[2] > 0.9


def around_synchronizations():
    """For each optimizer, what constraints, moving averages, a schedule and a local weight are after 8 steps."""
    import keras

    import hvdkit as hvd

    me = hvd.init()
    makes = {
        "LocalSGD": lambda o: hvd.LocalSGD(o, steps=3),
        "fragments": lambda o: hvd.LocalSGD(o, steps=4, fragments=2, overlap=1),
        "Adasum": lambda o: hvd.DistributedOptimizer(o, op=hvd.Adasum),
    }
    batches = np.random.default_rng(me.rank).normal(size=[8, 4, 3]).astype("float32")
    found = {}
    for name, make in makes.items():
        keras.utils.set_random_seed(0)
        unit, positive = keras.constraints.UnitNorm(axis=0), keras.constraints.NonNeg()
        hidden = keras.layers.Dense(2, use_bias=False, kernel_constraint=unit)
        head = keras.layers.Dense(1, kernel_constraint=positive)
        model = keras.Sequential([keras.layers.Input([3]), hidden, head])
        optimizer = make(keras.optimizers.SGD(0.3, momentum=0.5, use_ema=True, ema_momentum=0.5))
        if name == "LocalSGD":
            optimizer.register_local_var(head.bias)
        model.compile(optimizer, loss="mse", jit_compile=False)
        optimizer.build(model.trainable_variables)
        norms, least = [], []
        for batch in batches:
            model.train_on_batch(batch, -batch[:, :1])
            norms.append(np.linalg.norm(hidden.kernel.numpy(), axis=0))
            least.append(head.kernel.numpy().min())
        outer = [v for v in optimizer.variables if "outer_momentum" in v.path]
        before = [v.numpy() for v in outer]
        schedule = hvd.callbacks.LearningRateScheduleCallback(None, lambda epoch: 0.5)
        schedule.set_model(model)
        schedule.set_params({"steps": 8})
        schedule.on_train_begin()
        schedule.on_epoch_begin(0)
        scaled = [not np.array_equal(v.numpy(), old) for v, old in zip(outer, before, strict=True)]
        bias = head.bias.numpy()
        if name != "Adasum":
            optimizer.synchronise()
        kept = np.array_equal(bias, head.bias.numpy())
        optimizer.finalize_variable_values(model.trainable_variables)
        found[name] = np.array(norms), min(least), scaled, kept, model.get_weights()
    return found


def test_what_is_around_a_synchronization_is_not_broken_by_it(ranks):
    one, other = ranks(2, around_synchronizations)
    for name, (norms, least, scaled, kept, weights) in one.items():
        np.testing.assert_allclose(
            norms, 1, rtol=1e-3, err_msg=f"{name}: the constraint of the weights that are agreed on"
        )
        assert least >= 0, name
        assert not any(scaled), f"{name}: the outer momentum has no learning rate in it"
        assert len(scaled) == (0 if name == "Adasum" else 3)
        pairs = [np.array_equal(a, b) for a, b in zip(weights, other[name][4], strict=True)]
        assert pairs == [True, True, name != "LocalSGD"], (
            f"{name}: moving averages end as one model; a local bias does not"
        )
        assert kept == (name != "fragments"), "a local weight is not synchronized"


def graphs_of_synchronise():
    """How many graphs three calls of `synchronise` make."""
    import keras
    import tensorflow as tf

    import hvdkit as hvd

    hvd.init()
    variable = keras.Variable(np.zeros(3), name="v")
    optimizer = hvd.LocalSGD(keras.optimizers.SGD(0.1), steps=100)
    optimizer.build([variable])
    traced, agree = [], hvd.LocalSGD._agree
    hvd.LocalSGD._agree = lambda self, *places: traced.append(places) or agree(self, *places)
    try:
        step = tf.function(lambda: optimizer.apply([tf.ones([3])], [variable]))
        step()
        before = len(traced)
        for _ in range(3):
            step()
            optimizer.synchronise()
    finally:
        hvd.LocalSGD._agree = agree
    return len(traced) - before


def test_synchronise_makes_one_graph(ranks):
    assert ranks(2, graphs_of_synchronise) == [1, 1]


@pytest.mark.slow
def test_the_main_job_trains_with_few_exchanges(train, tmp_path):
    ended = train(2, f"--workdir={tmp_path}/a", "--local_steps=11", "--outer_learning_rate=1", "--outer_momentum=0")
    assert ended.code == 0, ended.output
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert result["test_accuracy"] > 0.9
    assert result["wire_bytes_per_step"] == pytest.approx(result["dense_wire_bytes_per_step"] / 11, rel=0.01)
    stopped = train(2, f"--workdir={tmp_path}/b", "--local_steps=11", "--steps=95", "--checkpoint_every=30")
    assert stopped.code == 0, stopped.output


@pytest.mark.slow
def test_a_run_that_is_resumed_between_two_exchanges_ends_bit_for_bit(tmp_path):
    from tests import forked
    from tests.conftest import run_command

    flags = ["--model=mnist_mlp", "--local_steps=8", "--epochs=2", "--checkpoint_every=11", "--compression=int8"]
    ended = run_command(forked.command("-m", "hvdkit.verify_resume", "-np", "2", *flags), timeout=500, cwd=tmp_path)
    assert ended.code == 0, ended.output


@pytest.mark.slow
def test_a_run_that_is_resumed_while_a_fragment_is_under_way_ends_bit_for_bit(tmp_path):
    from tests import forked
    from tests.conftest import run_command

    # A fragment starts after every fourth step, and is applied four steps later: one is always under way.
    flags = ["--model=mnist_mlp", "--local_steps=16", "--fragments=4", "--epochs=2", "--checkpoint_every=10"]
    command = forked.command("-m", "hvdkit.verify_resume", "-np", "2", "--kill_seed=3", *flags)
    ended = run_command(command, timeout=500, cwd=tmp_path, env=TRANSPORTS["sockets"])
    assert ended.code == 0, ended.output


@pytest.mark.slow
def test_the_main_job_trains_in_fragments(train, tmp_path, shared_data):
    """On MNIST, streaming DiLoCo is as accurate as DiLoCo; and its fragments are part of a checkpoint."""
    flags = [f"--data_dir={shared_data}", "--dataset=mnist", "--local_steps=50", "--epochs=1"]
    found = {}
    for fragments in (1, 4):
        ended = train(2, *flags, f"--workdir={tmp_path}/{fragments}", f"--fragments={fragments}", timeout=500)
        assert ended.code == 0, ended.output
        assert ("in 4 fragments of" in ended.output) == (fragments == 4)
        found[fragments] = json.loads((tmp_path / str(fragments) / "result.json").read_text())
    assert found[1]["test_accuracy"] > 0.9
    assert found[4]["test_accuracy"] > found[1]["test_accuracy"] - 0.02
    assert found[4]["wire_bytes_per_step"] == found[1]["wire_bytes_per_step"]
    again = train(2, *flags[:3], "--epochs=2", f"--resume={tmp_path}/4", f"--workdir={tmp_path}/5", "--fragments=2")
    assert again.code == 2
    assert "is of another job: fragments 4 there, and fragments 2 here." in again.output


def test_wrong_arguments_are_told(ranks):
    assert ranks(1, refusals) == [
        [
            "steps must be 1 or more, but is 0.",
            "outer_learning_rate must be above 0, and outer_momentum from 0 up to but not 1, but they are 0.7 and 1.",
            "LocalSGD and gradient_accumulation_steps exclude each other: give a larger `steps`.",
            "fragments must be from 1 to steps, which is 4, but is 5.",
            "overlap must be from 0 to 2, the steps between two fragments (steps / fragments), but is 3.",
            "mixing must be from 0 up to but not 1, but is 1.",
            (
                "Int8 compresses all weights at once, so it excludes fragments and overlap. Leave it out, or use "
                "Compression.fp16 or Compression.bf16."
            ),
        ]
    ]


def refusals():
    import keras

    import hvdkit as hvd

    hvd.init()
    messages = []
    for arguments, more in (
        ({"steps": 0}, {}),
        ({"outer_momentum": 1}, {}),
        ({}, {"gradient_accumulation_steps": 2}),
        ({"steps": 4, "fragments": 5}, {}),
        ({"steps": 4, "fragments": 2, "overlap": 3}, {}),
        ({"steps": 4, "overlap": 1, "mixing": 1}, {}),
        ({"steps": 4, "overlap": 1, "compression": hvd.Compression.int8()}, {}),
    ):
        try:
            hvd.LocalSGD(keras.optimizers.SGD(0.1, **more), **arguments)
        except ValueError as error:
            messages.append(str(error))
    return messages
