"""N ranks with local batch B train the model that one process trains with global batch N·B, step for step."""

import importlib.metadata

import numpy as np
import pytest
from packaging.version import Version

STEPS = 10
_FLOOR = 0.05  # norms below are taken for this: what cancels to nearly nothing (Ftrl's slots) keeps float32's rounding
LOCAL_BATCH = 8

# Every optimizer that Keras has, with momentum, weight decay, clipping and EMA spread over them so that each is there.
OPTIMIZERS = {
    "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
    "RMSprop": {"momentum": 0.9, "centered": True, "clipvalue": 0.05},
    "Adam": {"amsgrad": True, "global_clipnorm": 0.1, "use_ema": True, "ema_momentum": 0.9},
    "AdamW": {"weight_decay": 1e-2, "clipnorm": 0.1},
    "Adadelta": {"learning_rate": 1.0, "weight_decay": 1e-2, "use_ema": True, "ema_overwrite_frequency": 4},
    "Adagrad": {"clipnorm": 0.1},
    "Adamax": {"weight_decay": 1e-2},
    "Adafactor": {"global_clipnorm": 0.1},
    "Nadam": {"clipvalue": 0.05},
    "Ftrl": {"l2_regularization_strength": 1e-3},
    "Lion": {"weight_decay": 1e-2},
    "Lamb": {"weight_decay": 1e-2, "clipnorm": 0.1},
    "Muon": {"weight_decay": 1e-2},
    "ScheduleFreeAdamW": {"weight_decay": 1e-2},
    "LossScaleOptimizer": {},
    "MultiOptimizer": {},
}
# The Keras that brought an optimizer, where that is not 3.0, and the one that mended it: Muon of 3.10 to 3.12 asks
# TensorFlow's variables for a `path`, which they do not have, and so ends every training on TensorFlow.
SINCE = {"Lamb": (3, 5), "Muon": (3, 10), "ScheduleFreeAdamW": (3, 14), "MultiOptimizer": (3, 15)}
MENDED = {"Muon": (3, 13)}
_KERAS = Version(importlib.metadata.version("keras")).release
BUILT_IN = sorted(name for name in OPTIMIZERS if SINCE.get(name, (3, 0)) <= _KERAS)
AVAILABLE = [name for name in BUILT_IN if MENDED.get(name, (3, 0)) <= _KERAS]

# Keras overwrites weights with their average inside a condition, where tf.distribute cannot exchange.
SOME = ["SGD", "Adam", "LossScaleOptimizer"]
OTHERS = [name for name in ("Adadelta", "Adafactor", "Lamb", "Muon", "MultiOptimizer") if name in AVAILABLE]
_REST = [name for name in AVAILABLE if name not in (*SOME, *OTHERS)]
_UNDER_MIRRORED = [name for name in AVAILABLE if "ema_overwrite_frequency" not in OPTIMIZERS[name]]


def _examples(kind, replicas):
    """Global batches [STEPS, replicas * LOCAL_BATCH, ...]: the part of replica r is the r-th."""
    generator = np.random.default_rng(7)
    count = [STEPS, replicas * LOCAL_BATCH]
    if kind == "dense":
        return generator.normal(size=[*count, 6]).astype("float32"), generator.integers(3, size=count)
    return generator.integers(50, size=[*count, 4]), generator.integers(3, size=count)


def _model(kind, optimizer):
    import keras

    keras.utils.set_random_seed(1)
    body = (
        [keras.layers.Input([6]), keras.layers.Dense(16, activation="tanh")]
        if kind == "dense"
        else [keras.layers.Input([4], dtype="int32"), keras.layers.Embedding(50, 8), keras.layers.Flatten()]
    )
    model = keras.Sequential([*body, keras.layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss=loss, jit_compile=False)
    # Built here, because a slot that starts from the weights (ScheduleFreeAdamW's) starts from 0 if Keras builds it
    # while it traces the first step.
    model.optimizer.build(model.trainable_variables)
    return model


def _optimizer(name):
    import keras

    if name == "LossScaleOptimizer":
        return keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(1e-2), initial_scale=128.0)
    if name == "MultiOptimizer":
        choice = {".*kernel": keras.optimizers.SGD(1e-2, momentum=0.9)}
        return keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(keras.optimizers.Adam(1e-2), choice))
    return getattr(keras.optimizers, name)(**{"learning_rate": 1e-2, **OPTIMIZERS[name]})


def _train(model, inputs, labels):
    """The state after each step: a list of arrays a step."""
    path = []
    for x, y in zip(inputs, labels, strict=True):
        model.train_on_batch(x, y)
        path.append(_state(model))
    return path


def _difference(ours, reference):
    """The largest difference of a variable after a step, relative to its Euclidean norm and the step's number."""
    return max(
        float(np.linalg.norm(a - b) / (max(np.linalg.norm(b), _FLOOR) * (step + 1)))
        for step, (state, expected) in enumerate(zip(ours, reference, strict=True))
        for a, b in zip(state, expected, strict=True)
    )


def _fit(model, inputs, labels):
    """As `_train`, with `fit`, because `train_on_batch` does not divide a batch over replicas."""
    import keras
    import tensorflow as tf

    path = []
    watch = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs=None: path.append(_state(model)))
    model.fit(tf.data.Dataset.from_tensor_slices((inputs, labels)), verbose=0, shuffle=False, callbacks=[watch])
    return path


def _state(model):
    """All weights and all float slots of the optimizer, moving averages of the weights among them."""
    slots = [v for v in model.optimizer.variables if "float" in v.dtype]
    return [np.array(w) for w in model.get_weights()] + [np.array(v.numpy()) for v in slots]


def horovod_against_one_process(kind, names):
    import hvdkit as hvd

    world = hvd.init()
    inputs, labels = _examples(kind, world.size)
    mine = slice(world.rank * LOCAL_BATCH, (world.rank + 1) * LOCAL_BATCH)
    differences = {}
    # What one process makes of all the data and of rank 0's share: each rank trains some of the optimizers, for all.
    own = {name: _alone(kind, name, inputs, labels) for name in names[world.rank :: world.size]}
    references = {name: found for part in hvd.allgather_object(own) for name, found in part.items()}
    for name in names:
        reference, alone = references[name]
        wrapped = _model(kind, hvd.DistributedOptimizer(_optimizer(name), name=name))
        ours = _train(wrapped, inputs[:, mine], labels[:, mine])
        differences[name] = _difference(ours, reference), _difference(alone, reference)
    return differences


def _alone(kind, name, inputs, labels):
    """The paths of one process, with all the data and with rank 0's share alone."""
    model = _model(kind, _optimizer(name))
    variables = [*model.variables, *model.optimizer.variables]
    at_first = [np.array(v) for v in variables]
    everything = _train(model, inputs, labels)
    for variable, value in zip(variables, at_first, strict=True):
        variable.assign(value)
    return everything, _train(model, inputs[:, :LOCAL_BATCH], labels[:, :LOCAL_BATCH])


def mirrored_against_one_process(kind, names):
    from hvdkit import strategies

    strategy = strategies.create("mirrored", 2)
    inputs, labels = _examples(kind, strategy.size)
    differences = {}
    for name in names:
        reference = _train(_model(kind, _optimizer(name)), inputs, labels)
        with strategy.scope():
            model = _model(kind, strategy.distribute(_optimizer(name)))
        differences[name] = _difference(_fit(model, inputs, labels), reference)
    return differences


def test_every_optimizer_of_keras_is_in_the_table():
    import keras

    built_in = {
        name
        for name, value in vars(keras.optimizers).items()
        if isinstance(value, type) and issubclass(value, keras.optimizers.Optimizer) and name != "Optimizer"
    }
    assert built_in == set(BUILT_IN)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("dense", [*SOME, *OTHERS]),
        ("sparse", SOME),
        pytest.param("dense", _REST, marks=pytest.mark.slow),
        pytest.param("sparse", OTHERS, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_equal_one_process(ranks, kind, names):
    for rank, differences in enumerate(ranks(2, horovod_against_one_process, kind=kind, names=names)):
        for name, (ours, alone) in differences.items():
            assert ours < 1e-5, f"{name}, rank {rank}: the state differs from one process's by {ours:.2g}"
            assert alone > 1e-4, f"{name}: training on the own share alone should differ, or this test proves nothing"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_three_ranks_equal_one_process(ranks, kind):
    for differences in ranks(3, horovod_against_one_process, kind=kind, names=SOME):
        assert all(ours < 1e-5 < 1e-4 < alone for ours, alone in differences.values()), differences


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("dense", SOME),
        pytest.param("dense", _UNDER_MIRRORED, marks=pytest.mark.slow),
        pytest.param("sparse", SOME, marks=pytest.mark.slow),
    ],
)
def test_mirrored_equals_one_process(ranks, kind, names):
    (differences,) = ranks(1, mirrored_against_one_process, fresh=True, kind=kind, names=names)
    assert {name: d for name, d in differences.items() if not d < 1e-5} == {}


def mirrored_with_what_it_cannot_do():
    import keras

    from hvdkit import UsageError, strategies

    strategy = strategies.create("mirrored", 2)
    messages = []
    for arguments in ({"gradient_accumulation_steps": 2}, {"use_ema": True, "ema_overwrite_frequency": 2}):
        try:
            strategy.distribute(keras.optimizers.Adam(**arguments))
        except UsageError as error:
            messages.append(str(error))
    return messages


def test_mirrored_refuses_what_tf_distribute_cannot_do(ranks):
    (messages,) = ranks(1, mirrored_with_what_it_cannot_do, fresh=True)
    assert [m.split()[2] for m in messages] == ["gradient_accumulation_steps", "ema_overwrite_frequency"]
