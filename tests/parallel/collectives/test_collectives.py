"""The collectives, against closed forms in the rank."""

import re

import numpy as np
import pytest


def collectives_of_all_kinds():
    import keras
    import tensorflow as tf

    import hvdkit as hvd
    from hvdkit import collectives

    world = hvd.init()
    process_set = hvd.world.horovod().global_process_set
    mine = world.rank + 1
    found = {
        "sum": collectives.allreduce_sum(np.full([3], mine, np.int64), "test").tolist(),
        "gathered": hvd.allgather_object({"rank": world.rank}),
        "broadcast": hvd.broadcast_object("from the root" if world.rank == 1 else None, root_rank=1),
    }
    variables = [
        keras.Variable(np.full([2], mine), dtype=dtype)
        for dtype in ("float32", "bfloat16", "float16", "int64", "uint32", "int8")
    ]
    hvd.broadcast_variables(variables, root_rank=world.size - 1)
    found["variables"] = [keras.ops.convert_to_numpy(keras.ops.cast(v, "float32")).tolist() for v in variables]

    weight, same = keras.Variable([float(mine), 0.0]), keras.Variable([0.1, 0.2, 0.3])
    hvd.average_variables([weight, same])
    found["averaged"] = np.asarray(weight).tolist(), np.asarray(same).tolist()

    tensors = [tf.fill([5], float(mine)), tf.fill([2, 2], tf.cast(mine, tf.bfloat16)), tf.ones([1], tf.float64)]
    graph = tf.function(
        lambda: collectives.reduce_dense(tensors, "test", op=hvd.Average, process_set=process_set), autograph=False
    )
    found["dense"] = [tf.cast(t, tf.float32).numpy().tolist() for t in graph()]
    found["rows"] = collectives.gather_rows(tf.fill([mine, 2], mine), "rows", process_set).numpy().tolist()
    hvd.barrier()
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_collectives(ranks, size):
    total = size * (size + 1) // 2
    mean = total / size
    for found in ranks(size, collectives_of_all_kinds):
        assert found["sum"] == [total] * 3
        assert found["gathered"] == [{"rank": r} for r in range(size)]
        assert found["broadcast"] == "from the root"
        assert found["variables"] == [[size, size]] * 6
        assert found["averaged"] == ([mean, 0.0], np.float32([0.1, 0.2, 0.3]).tolist())
        assert found["dense"] == [[mean] * 5, [[mean] * 2] * 2, [1.0]]
        assert found["rows"] == [[r + 1] * 2 for r in range(size) for _ in range(r + 1)]


def compressed_gradients(kind):
    import keras
    import tensorflow as tf

    import hvdkit as hvd
    from hvdkit.optimizers.gradients import GradientExchange

    world = hvd.init()
    exchange = GradientExchange("test", compression=getattr(hvd.Compression, kind))
    generator = np.random.default_rng(5)
    everyone = generator.normal(size=[world.size, 1001]).astype("float32")
    rows = generator.normal(size=[world.size, 4, 3]).astype("float32")
    mine = tf.constant(everyone[world.rank])
    slices = tf.IndexedSlices(tf.constant(rows[world.rank]), tf.constant([0, 2, 2, world.rank]), tf.constant([9, 3]))
    dense, none, sparse = tf.function(lambda: exchange([mine, None, slices]), autograph=False)()
    assert none is None
    reference = np.zeros([9, 3])
    for rank in range(world.size):
        np.add.at(reference, [0, 2, 2, rank], rows[rank] / world.size)
    errors = np.abs(dense.numpy() - everyone.mean(0)).max(), np.abs(tf.convert_to_tensor(sparse) - reference).max()
    return (
        [float(e) for e in errors],
        type(sparse).__name__,
        dense.dtype.name,
        keras.ops.convert_to_numpy(dense).tobytes(),
    )


@pytest.mark.parametrize(("kind", "bound"), [("none", 1e-6), ("fp16", 4e-3), ("bf16", 3e-2)])
def test_compression_keeps_the_mean_and_the_kind_of_gradient(ranks, kind, bound):
    results = ranks(3, compressed_gradients, kind=kind)
    for (dense, sparse), name, dtype, bits in results:
        assert max(dense, sparse) < bound
        assert kind == "none" or dense > 1e-5, "a compression that loses nothing has not been used"
        assert (name, dtype) == ("IndexedSlices", "float32")
        assert bits == results[0][3], "all ranks must get the same bits"


def different_models():
    import keras

    import hvdkit as hvd

    world = hvd.init()
    model = keras.Sequential([keras.layers.Input([4]), keras.layers.Dense(2 + world.rank)])
    try:
        hvd.broadcast_variables(model.weights)
    except ValueError as error:
        return str(error)


def test_different_models_are_named(ranks):
    for message in ranks(2, different_models):
        assert "kernel is (4, 2) float32 on rank 0 and (4, 3) float32 on rank 1" in message


def alike_but_one():
    import keras

    import hvdkit as hvd
    from hvdkit.collectives import wire

    me = hvd.init()
    sent, run = [], wire.run
    wire.run = lambda kind, tensors, name, *rest, **more: (
        sent.append((kind, name)) or run(kind, tensors, name, *rest, **more)
    )
    variables = [keras.Variable([1.0, 2.0]), keras.Variable([float(me.rank)]), keras.Variable([3], dtype="int32")]
    hvd.broadcast_variables(variables, root_rank=1)
    return [name for kind, name in sent if kind == "broadcast"], [v.numpy().tolist() for v in variables]


def test_only_what_differs_travels(ranks):
    for sent, values in ranks(2, alike_but_one, fresh=True):
        assert sent == ["hvdkit.broadcast.1"]
        assert values == [[1.0, 2.0], [1.0], [3]]


def in_graphs():
    """What is called in a `tf.function`, in the session of a TensorFlow 1 graph, and from the elastic state."""
    import keras
    import tensorflow as tf

    import hvdkit as hvd

    me = hvd.init()
    mine = float(me.rank + 1)
    weight, half, whole = tf.Variable([mine]), keras.Variable([mine], dtype="bfloat16"), tf.Variable([mine])
    found = {}

    @tf.function
    def step(first):
        if first:  # as in Horovod's examples
            hvd.broadcast_variables([weight, half], root_rank=1)
        return [hvd.rank_op(), hvd.size_op(), hvd.local_rank_op(), hvd.local_size_op(), hvd.process_set_included_op()]

    found["ranks"] = [int(number) for number in step(True)]
    found["in a function"] = [float(weight[0]), float(np.asarray(half)[0])]
    found["in place"] = [float(value[0]) for value in hvd.broadcast_([whole], 1, name="in_place")]
    found["by a function"] = hvd.broadcast_object_fn(root_rank=1)(mine)

    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        old = tf.compat.v1.get_variable("old", initializer=[mine], use_resource=False)
        new = tf.compat.v1.get_variable("new", initializer=[mine], use_resource=True)
        session.run(tf.compat.v1.global_variables_initializer())
        session.run(hvd.broadcast_global_variables(root_rank=1))
        found["in a session"] = [*session.run(old), *session.run(hvd.broadcast_([new], 1))[0]]
        found["objects in a session"] = [hvd.broadcast_object(mine, 1), hvd.allgather_object(mine)]

    variables = [tf.Variable([mine], dtype=tf.float64), tf.Variable(me.rank)]
    state = hvd.elastic.TensorFlowState(variables, epoch=me.rank + 10)
    state.sync()
    found["state"] = [float(variables[0][0]), int(variables[1]), state.epoch]
    variables[0].assign([7.0])
    state.epoch = 20
    state.restore()
    found["restored"] = [float(variables[0][0]), state.epoch]
    return found


def test_graphs_sessions_and_states_of_variables(ranks):
    for rank, found in enumerate(ranks(2, in_graphs)):
        assert found == {
            "ranks": [rank, 2, rank, 2, 1],
            "in a function": [2.0, 2.0],
            "in place": [2.0],
            "by a function": 2.0,
            "in a session": [2.0, 2.0],
            "objects in a session": [2.0, [1.0, 2.0]],
            "state": [1.0, 0, 10],
            "restored": [1.0, 10],
        }


def diverged():
    import keras

    import hvdkit as hvd
    from hvdkit.collectives.agreement import check_equal

    world = hvd.init()
    check_equal(["same"], ["x"])
    weights = [keras.Variable([1.0]), keras.Variable([float(world.rank == 2)])]
    try:
        check_equal(["first", "second"], [hvd.collectives.digest([w]) for w in weights])
    except hvd.ReplicasDiverged as error:
        return str(error)


def test_replicas_that_differ_are_named(ranks):
    for message in ranks(3, diverged):
        assert message.startswith(
            "The replicas' weights differ: second on rank(s) 2 is not that of rank 0 (of 3 ranks)"
        )


def failing_on_one_rank():
    import hvdkit as hvd

    world = hvd.init()
    if world.rank == 1:
        raise ValueError("this rank has a problem")
    hvd.barrier()


def test_a_rank_that_fails_ends_the_job(ranks):
    ended = ranks(2, failing_on_one_rank, fails=True, timeout=120)
    assert ended.code == 1
    assert "[1] ValueError: this rank has a problem" in ended.output
    # Rank 0 loses its partner at the same moment: either may be gone first.
    assert re.search(r"hvdkit.launch: rank [01] on host \S+ was the first to fail, with exit code 1\.", ended.output)
