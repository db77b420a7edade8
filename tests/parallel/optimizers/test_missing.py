"""Gradients that only some ranks have count as zeros on the others; those that no rank has stay None."""

import keras
import numpy as np
import tensorflow as tf

SHAPES = {"a": [3], "b": [2, 2], "rows": [4, 2]}
# The variables that have a gradient, by step and rank: some on all ranks, on one, on another, on none.
STEPS = [("a b rows", "a b rows"), ("a b", "a rows"), ("a", "a b"), ("b", "b"), ("a rows", ""), ("rows", "a b rows")]


def _gradient(name, step, rank):
    """A rank's gradient, or None. Those of `rows` are slices, with indices of another dtype on each rank."""
    if name not in STEPS[step][rank].split():
        return None
    generator = np.random.default_rng([step, rank, *map(ord, name)])
    if name != "rows":
        return tf.constant(generator.normal(size=SHAPES[name]), tf.float32)
    rows = generator.choice(SHAPES[name][0], 2, replace=False)
    indices = tf.constant(rows, [tf.int32, tf.int64][rank])
    return tf.IndexedSlices(tf.constant(generator.normal(size=[2, 2]), tf.float32), indices, [4, 2])


def _of_one_process(name, step):
    """What one process has in a step: the mean over ranks, in which a gradient that a rank lacks is zero."""
    there = [g for g in (_gradient(name, step, rank) for rank in (0, 1)) if g is not None]
    if not there:
        return None
    if name != "rows":
        return tf.add_n(there) / 2
    values, indices = tf.concat([g.values for g in there], 0), [tf.cast(g.indices, tf.int64) for g in there]
    return tf.IndexedSlices(values / 2, tf.concat(indices, 0), [4, 2])


def _variables():
    return [keras.Variable(np.ones(shape, "float32"), name=name) for name, shape in SHAPES.items()]


def _trained(optimizer, gradient):
    variables = _variables()
    optimizer.build(variables)
    for step in range(len(STEPS)):
        optimizer.apply([gradient(name, step) for name in SHAPES], variables)
    return [v.numpy() for v in variables]


def _farthest(some, others):
    return max(float(np.abs(one - other).max()) for one, other in zip(some, others, strict=True))


def missing_on_a_rank():
    """How far the ranks' weights are from one process's, by optimizer; and which gradients a tape returns."""
    import hvdkit as hvd

    rank = hvd.init().rank

    def mine(name, step):
        return _gradient(name, step, rank)

    def dense(name, step):
        gradient = _of_one_process(name, step)
        return tf.convert_to_tensor(gradient) if isinstance(gradient, tf.IndexedSlices) else gradient

    def adam(**options):
        return keras.optimizers.Adam(0.1, global_clipnorm=1.0, **options)

    half = {"gradient_accumulation_steps": 2}
    reference = {
        "slices": _trained(adam(), _of_one_process),
        "dense": _trained(adam(), dense),
        "accumulated": _trained(adam(**half), _of_one_process),
    }
    found = {
        "slices": _trained(hvd.DistributedOptimizer(adam()), mine),
        "dense": _trained(hvd.DistributedOptimizer(adam(), sparse_as_dense=True), mine),
        "accumulated": _trained(hvd.DistributedOptimizer(adam(**half)), mine),
    }
    sharded = _trained(hvd.ShardedOptimizer(adam()), mine)
    differences = {name: _farthest(found[name], reference[name]) for name in found}
    differences["sharded"] = _farthest(sharded, reference["dense"])

    a, b, c = (tf.Variable(tf.zeros([2])) for _ in range(3))
    with hvd.DistributedGradientTape(tf.GradientTape()) as tape:
        loss = tf.reduce_sum(4 * a if rank else b)
    return differences, [g if g is None else g.numpy().tolist() for g in tape.gradient(loss, [a, b, c])]


def test_a_gradient_that_a_rank_lacks_is_zero_there(ranks):
    for differences, (a, b, c) in ranks(2, missing_on_a_rank):
        assert {name: far for name, far in differences.items() if not far < 1e-6} == {}
        assert (a, b, c) == ([2, 2], [0.5, 0.5], None)


# ---- fit ------------------------------------------------------------------------------------------------------------


class _Skipping(keras.layers.Layer):
    """Stochastic depth: a block that some steps skip, chosen on each rank by itself."""

    def __init__(self):
        super().__init__()
        self.block = keras.layers.Dense(3, "tanh")
        self.skips = iter(())

    def build(self, shape):
        self.block.build(shape)

    def call(self, x, training=False):
        return x if training and next(self.skips, False) else x + self.block(x)


SKIPS = [[False, False, True, True], [False, True, False, True]]  # by rank and step


def _skipping_model(optimizer):
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.layers.Input([3]), _Skipping(), keras.layers.Dense(1)])
    model.compile(optimizer, loss="mse", run_eagerly=True)
    return model


def skipped_on_a_rank():
    """The weights after a fit with stochastic depth, and those of one process."""
    import hvdkit as hvd

    rank = hvd.init().rank
    data = [np.random.default_rng(r).normal(size=(16, 4)).astype("float32") for r in (0, 1)]
    model = _skipping_model(hvd.DistributedOptimizer(keras.optimizers.Adam(0.1)))
    model.layers[0].skips = iter(SKIPS[rank])
    model.fit(data[rank][:, :3], data[rank][:, 3:], batch_size=4, shuffle=False, verbose=0)

    alone = _skipping_model(keras.optimizers.Adam(0.1))
    variables = alone.trainable_variables
    for step in range(4):
        total = [None] * len(variables)
        for other in (0, 1):
            batch = data[other][4 * step : 4 * step + 4]
            alone.layers[0].skips = iter([SKIPS[other][step]])
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(alone(batch[:, :3], training=True) - batch[:, 3:])) / 2
            grads = tape.gradient(loss, variables)
            total = [g if t is None else t if g is None else t + g for t, g in zip(total, grads, strict=True)]
        alone.optimizer.apply(total, variables)
    return _farthest([v.numpy() for v in model.weights], [v.numpy() for v in alone.weights])


def test_fit_with_stochastic_depth_trains_one_model(ranks):
    assert all(far < 1e-6 for far in ranks(2, skipped_on_a_rank))


# ---- In a graph -----------------------------------------------------------------------------------------------------


def another_head_on_each_rank():
    """Each rank trains a head of its own: heads of one shape, whose gradients look alike."""
    import hvdkit as hvd

    rank = hvd.init().rank
    heads = [keras.Variable(np.ones([2, 2]), name=name) for name in ("first", "second")]
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    optimizer.build(heads)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(heads[rank].value)
        optimizer.apply(tape.gradient(loss, heads), heads)

    for _ in range(1000):
        step()
    hvd.barrier()


def test_ranks_whose_graphs_lack_different_gradients_end(ranks):
    ended = ranks(2, another_head_on_each_rank, fails=True)
    assert (
        "the ranks' gradients differ: in the collective 'DistributedSGD' first has a gradient on rank 0 and none on "
        "rank 1, where the loss does not depend on it"
    ) in ended.output
