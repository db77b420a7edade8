"""Training runs that Hypothesis draws: N ranks end with the weights and show the losses of one process.

A case is a training run in plain data. Ranks take many cases in one call, and train each on their batches; one of them
also trains it as one process does, on the batches of all.
"""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

TIME, CLASSES, TOKENS, IGNORED = 3, 3, 6, 9

# ---- Cases ----------------------------------------------------------------------------------------------------------

# By model: the losses that fit it, and the weights that a user may give it.
MODELS = {
    "dense": (["mse", "huber", "own"], ["none", "examples"]),
    "places": (["classes", "ignoring"], ["none", "places"]),
    "tokens": (["mse"], ["none", "places"]),
    "image": (["classes", "ignoring"], ["none", "examples", "classes"]),
    "two outputs": (["both"], ["none", "places"]),
}
OPTIMIZERS = [
    "SGD",
    "momentum",
    "Adam",
    "AdamW",
    "RMSprop",
    "Adagrad",
]  # not Lion: it takes the sign of rounding errors


@st.composite
def batches(draw, ranks):
    """The sizes of batches, by rank and step, and what they are given as."""
    steps, size = draw(st.integers(1, 3)), st.integers(1, 4)
    kind = draw(st.sampled_from(["equal", "short last", "of each rank", "ragged"]))
    whole = [draw(size)] * ranks if kind in ("equal", "short last") else [draw(size) for _ in range(ranks)]
    sizes = [[one] * steps for one in whole]
    if kind == "short last":
        sizes = [[*of_rank[:-1], draw(st.integers(1, of_rank[0]))] for of_rank in sizes]
    if kind == "ragged":
        sizes = [[draw(size) for _ in range(steps)] for _ in range(ranks)]
    return sizes, draw(st.sampled_from(["data set", "PyDataset"] if kind == "ragged" else ["arrays", "data set"]))


@st.composite
def cases(draw, ranks):
    """A training run: model, loss, weights, batches, optimizer, and how `compile` and `fit` are called."""
    model = draw(st.sampled_from(sorted(MODELS)))
    losses, weights = MODELS[model]
    sizes, given = draw(batches(ranks))
    wrap = draw(st.sampled_from(["DistributedOptimizer", "DistributedOptimizer", "ShardedOptimizer"]))
    # Sharded, the gradient of an embedding is dense: slots of all rows move, and its norm is another one.
    is_dense = (model, wrap) == ("tokens", "ShardedOptimizer")
    clips = [None] if is_dense else [None, None, "clipnorm", "global_clipnorm", "clipvalue"]
    return {
        "model": model,
        "loss": draw(st.sampled_from(losses)),
        "reduction": draw(
            st.sampled_from(["sum_over_batch_size", "sum_over_batch_size", "sum", "mean_with_sample_weight"])
        ),
        "weights": draw(st.sampled_from(weights)),
        "counted": [draw(st.integers(0, TIME)) for _ in range(ranks)],  # labels or tokens that count on each rank
        "sizes": sizes,
        "given": given,
        "wrap": wrap,
        "optimizer": draw(st.sampled_from(["SGD"] if is_dense else OPTIMIZERS)),
        "clip": draw(st.sampled_from(clips)),
        "accumulated": draw(st.sampled_from([None, None, 2, 3])),
        "regularized": draw(st.booleans()),
        "epochs": draw(st.sampled_from([[1], [2], [1, 1]])),  # of each fit
        "steps": draw(st.sampled_from([*[0] * 8, 1, 2])),  # of an execution; 0: eagerly, as no graph is traced
        "seed": draw(st.integers(0, 3)),
    }


def drawn(number, ranks):
    """As many cases, the same in each run."""
    found = []

    @hypothesis.settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=cases(ranks))
    def collect(case):
        found.append(case)

    for case in COUNTEREXAMPLES:
        if len(case["sizes"]) == ranks:
            collect = hypothesis.example(case=case)(collect)
    collect()
    return found


_PLAIN = {
    "model": "dense",
    "loss": "mse",
    "reduction": "sum_over_batch_size",
    "weights": "none",
    "counted": [1, 2],
    "sizes": [[2, 2], [2, 2]],
    "given": "arrays",
    "wrap": "DistributedOptimizer",
    "optimizer": "SGD",
    "clip": None,
    "accumulated": None,
    "regularized": False,
    "epochs": [1],
    "steps": 0,
    "seed": 0,
}
# Cases that failed once.
COUNTEREXAMPLES = [
    # What the ranks had accumulated when the first fit ended was taken from rank 0.
    {**_PLAIN, "accumulated": 3, "epochs": [1, 1], "steps": 1},
    # In eager training nothing showed before the first update that the ranks exchange gradients.
    {**_PLAIN, "accumulated": 3, "sizes": [[2, 2, 2], [2, 2, 2]]},
    # The ranks' sums were shown as if all had as many examples.
    {**_PLAIN, "reduction": "sum", "sizes": [[2, 2], [1, 1]]},
    # Batches of other sizes in the middle of an epoch were noticed one step late.
    {**_PLAIN, "sizes": [[3, 2, 1], [3, 1, 2]], "given": "PyDataset"},
]

# ---- In a rank ------------------------------------------------------------------------------------------------------


def _model(case):
    import keras

    l2 = keras.regularizers.L2(0.1) if case["regularized"] else None
    hidden = keras.layers.Dense(4, "tanh", kernel_regularizer=l2)
    if case["model"] == "dense":
        return keras.Sequential([keras.Input([3]), hidden, keras.layers.Dense(2)])
    if case["model"] == "places":
        return keras.Sequential([keras.Input([TIME, 3]), hidden, keras.layers.Dense(CLASSES)])
    if case["model"] == "tokens":
        embedding = keras.layers.Embedding(TOKENS, 4, mask_zero=True)
        return keras.Sequential([keras.Input([TIME], dtype="int32"), embedding, hidden, keras.layers.Dense(1)])
    if case["model"] == "image":
        convolution = keras.layers.Conv2D(2, 2, activation="tanh", kernel_regularizer=l2)
        layers = [keras.Input([3, 3, 1]), convolution, keras.layers.Flatten(), keras.layers.Dense(CLASSES)]
        return keras.Sequential(layers)
    x = keras.Input([TIME, 3])
    outputs = {"class": keras.layers.Dense(CLASSES, name="class"), "size": keras.layers.Dense(1, name="size")}
    return keras.Model(x, {name: layer(hidden(x)) for name, layer in outputs.items()})


def _loss(case):
    import keras

    how = {"reduction": case["reduction"]}
    classes = {"classes": None, "ignoring": IGNORED, "both": IGNORED}
    if case["loss"] == "own":
        return lambda y, p: keras.ops.mean(keras.ops.square(y - p), axis=-1)
    if case["loss"] in ("mse", "huber"):
        return {"mse": keras.losses.MeanSquaredError, "huber": keras.losses.Huber}[case["loss"]](**how)
    ignored = classes[case["loss"]]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=ignored, **how)
    return {"class": loss, "size": keras.losses.MeanSquaredError(**how)} if case["loss"] == "both" else loss


def _optimizer(case):
    import keras

    rate = 0.01 if case["reduction"] == "sum" else 0.1
    options = {case["clip"]: 0.1} if case["clip"] else {}
    if case["accumulated"]:
        options["gradient_accumulation_steps"] = case["accumulated"]
    if case["optimizer"] == "momentum":
        return keras.optimizers.SGD(rate, momentum=0.9, **options)
    if case["optimizer"] in ("Adam", "AdamW", "RMSprop", "Adagrad"):
        options["epsilon"] = 1e-2  # otherwise a gradient that is 0 but for rounding makes a step
    return getattr(keras.optimizers, case["optimizer"])(rate, **options)


def _examples(case, rank, size):
    """A rank's inputs, labels and, if there are any, weights, with a first axis of `size`."""
    generator = np.random.default_rng([case["seed"], rank, size])
    counted = np.arange(TIME) < case["counted"][rank]
    shapes = {"dense": [3], "image": [3, 3, 1]}
    x = generator.normal(size=[size, *shapes.get(case["model"], [TIME, 3])]).astype("float32")
    labels = generator.integers(CLASSES, size=[size, TIME])
    ignoring = np.where(counted, labels, IGNORED) if case["loss"] in ("ignoring", "both") else labels
    by_model = {
        "dense": lambda: (x, x[:, :2] ** 2),
        "places": lambda: (x, ignoring),
        "tokens": lambda: (np.where(counted, generator.integers(1, TOKENS, [size, TIME]), 0), x[..., :1]),
        "image": lambda: (x, ignoring[:, -1]),
        "two outputs": lambda: (x, {"class": ignoring, "size": x[..., :1] ** 2}),
    }
    x, y = by_model[case["model"]]()
    shape = {"examples": [size], "places": [size, TIME]}.get(case["weights"])
    if shape is None:
        return x, y
    weights = generator.uniform(0.2, rank + 1, shape).astype("float32")
    return x, y, dict.fromkeys(y, weights) if isinstance(y, dict) else weights


def _steps(case, ranks):
    """Each step's batch, of these ranks together."""
    import keras

    steps = []
    for rank in ranks:
        whole, ends = _examples(case, rank, sum(case["sizes"][rank])), np.cumsum(case["sizes"][rank])[:-1]
        leaves = [np.split(leaf, ends) for leaf in keras.tree.flatten(whole)]
        steps.append(
            [keras.tree.pack_sequence_as(whole, leaves_of_step) for leaves_of_step in zip(*leaves, strict=True)]
        )
    return [_joined(parts) for parts in zip(*steps, strict=True)]


def _joined(parts):
    import keras

    return keras.tree.map_structure(lambda *arrays: np.concatenate(arrays), *parts)


def _data(case, steps):
    """The arguments of `fit` for these batches."""
    import keras
    import tensorflow as tf

    sizes = [len(x) for x, *_ in steps]
    if case["given"] == "arrays" and all(size == sizes[0] for size in sizes[:-1]) and sizes[-1] <= sizes[0]:
        given = dict(zip(("x", "y", "sample_weight"), _joined(steps), strict=False))
        return {**given, "batch_size": sizes[0], "shuffle": False}
    if case["given"] == "PyDataset":
        return {"x": _py_data_set(steps), "shuffle": False}
    specs = keras.tree.map_structure(lambda a: tf.TensorSpec([None, *a.shape[1:]], a.dtype), steps[0])
    data = tf.data.Dataset.from_generator(lambda: iter(steps), output_signature=specs)
    # Without a known length all steps compare sizes. With one, fit expects batches of one size but for the last.
    ragged = any(size != of_rank[0] for of_rank in case["sizes"] for size in of_rank[:-1])
    return {"x": data if ragged else data.apply(tf.data.experimental.assert_cardinality(len(steps)))}


def _py_data_set(steps):
    import keras

    class Steps(keras.utils.PyDataset):
        def __len__(self):
            return len(steps)

        def __getitem__(self, step):
            return steps[step]

    return Steps()


def _trained(case, ranks, wrap, callbacks=()):
    """The weights after each fit, and the losses that they show."""
    import keras

    keras.utils.set_random_seed(1)
    model = _model(case)
    how = {"run_eagerly": True} if not case["steps"] else {"steps_per_execution": case["steps"]}
    model.compile(wrap(_optimizer(case)), loss=_loss(case), jit_compile=False, **how)
    data, losses = _data(case, _steps(case, ranks)), []
    if case["weights"] == "classes":
        data["class_weight"] = {0: 0.5, 1: 1.0, 2: 2.0, IGNORED: 1.0}
    for epochs in case["epochs"]:
        losses += model.fit(**data, epochs=epochs, verbose=0, callbacks=list(callbacks)).history["loss"]
    return np.concatenate([np.ravel(w) for w in model.get_weights()]), np.array(losses)


def _attempted(*arguments):
    """What `_trained` returns; the message of a failure, which all ranks share."""
    try:
        return _trained(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def compared(cases):
    """For each case, how far weights and losses are from those of one process, or what failed."""

    import hvdkit as hvd

    me = hvd.init()
    average = [hvd.callbacks.MetricAverageCallback()]
    ours, own = [], {}
    for number, case in enumerate(cases):
        ours.append(_attempted(case, [me.rank], getattr(hvd, case["wrap"]), average))
        if number % me.size == me.rank:
            own[number] = _attempted(case, range(me.size), lambda optimizer: optimizer)
    alone = {number: found for part in hvd.allgather_object(own) for number, found in part.items()}
    return [_distances(mine, alone[number]) for number, mine in enumerate(ours)]


def _distances(mine, alone):
    if isinstance(mine, str) or isinstance(alone, str):
        return f"ranks: {str(mine)[:300]}; one process: {str(alone)[:300]}"
    return [float(np.abs(a - b).max()) for a, b in zip(mine, alone, strict=True)]


# ---- Tests ----------------------------------------------------------------------------------------------------------


def _failures(ranks, cases, number):
    """The cases in which a rank is not where one process is, with what was found."""
    found = ranks(number, compared, cases=cases)
    return [
        (case, results)
        for case, *results in zip(cases, *found, strict=True)
        if not all(isinstance(one, list) and max(one) < 2e-5 for one in results)
    ]


_PARTS = [(160, 2, slice(part, None, 5)) for part in range(5)] + [(40, 3, slice(part, None, 2)) for part in range(2)]


@pytest.mark.parametrize(
    ("number", "size", "part"),
    [
        (len(COUNTEREXAMPLES), 2, slice(None)),
        *(pytest.param(*case, marks=pytest.mark.slow, id=f"{case[0]}-{case[1]}-{case[2].start}") for case in _PARTS),
    ],
)
def test_ranks_train_and_show_what_one_process_does(ranks, number, size, part):
    cases = drawn(number, size)
    assert len(cases) >= number
    cases = cases[part]
    failures = _failures(ranks, cases, size)
    assert not failures, f"{len(failures)} of {len(cases)}:\n" + "\n".join(f"{f}: {case!r}" for case, f in failures)
