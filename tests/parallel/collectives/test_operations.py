"""Horovod's operations on tensors, against closed forms in the rank: rank r contributes r + 1."""

import numpy as np
import pytest


def _plain(value):
    import keras
    import tensorflow as tf

    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, tf.IndexedSlices):
        return {"values": _plain(value.values), "indices": _plain(value.indices), "shape": _plain(value.dense_shape)}
    return np.asarray(keras.ops.cast(value, "float64")).tolist()


def _reductions(hvd, mine):
    """Every way to give a value, as functions: they are called eagerly, and in one graph."""
    import keras
    import tensorflow as tf

    variable, keras_variable = tf.Variable([mine, 0.0]), keras.Variable([mine, 0.0])
    rows = tf.IndexedSlices(tf.fill([1, 2], mine), [int(mine)], [9, 2])
    wide = tf.IndexedSlices(tf.fill([1, 3], mine), [0], [5, 3])
    several = [rows, tf.constant(mine), wide, tf.constant(int(mine))]
    return {
        "mean": lambda: hvd.allreduce([mine, 0.0]),
        "scalar": lambda: hvd.allreduce(mine),
        "array": lambda: hvd.allreduce(np.full([2], mine), op=hvd.Sum),
        "variable": lambda: hvd.allreduce(variable, name="v", op=hvd.Sum),
        "keras variable": lambda: hvd.allreduce(keras_variable, op=hvd.Sum),
        "old average": lambda: hvd.allreduce([mine], average=False),
        "largest": lambda: hvd.allreduce([mine], op=hvd.Max),
        "smallest": lambda: hvd.allreduce([mine], op=hvd.Min),
        "product": lambda: hvd.allreduce([mine], op=hvd.Product),
        "scaled": lambda: hvd.allreduce([mine], None, None, 2.0, 0.5, hvd.Sum),
        "half": lambda: hvd.allreduce([mine], op=hvd.Sum, compression=hvd.Compression.fp16),
        "bfloat16": lambda: hvd.allreduce(tf.constant([mine], tf.bfloat16), op=hvd.Sum),
        "uint16": lambda: hvd.allreduce(tf.constant([int(mine)], tf.uint16), op=hvd.Sum),
        "rows": lambda: hvd.allreduce(rows, op=hvd.Sum),
        "scaled rows": lambda: hvd.allreduce(rows, op=hvd.Average, prescale_factor=2.0),
        "several": lambda: hvd.grouped_allreduce(several, op=hvd.Sum),
        "sum by its place": lambda: hvd.allreduce([mine], False),
        "by the other name": lambda: hvd.allreduce(tensor=[mine], op=hvd.Sum),
        "mean of integer rows": lambda: hvd.allreduce(tf.IndexedSlices([[int(mine)]], [0], [1, 1])),
        "mean of large bytes": lambda: hvd.allreduce(tf.constant([199 + int(mine)], tf.uint8)),
        "mean of large integers": lambda: hvd.allreduce(tf.constant([2**62 + 3 * int(mine)], tf.int64)) - 2**62,
        "means towards zero": lambda: hvd.allreduce(tf.constant([-min(2, int(mine)), min(2, int(mine))])),
        "mean of large halves": lambda: hvd.allreduce(tf.constant([4e4], tf.float16)),
        "double factor": lambda: hvd.allreduce(tf.constant([1e10], tf.float64), op=hvd.Sum, prescale_factor=0.1),
        "same line": lambda: [hvd.allreduce(mine * n, op=hvd.Sum) for n in range(3)],
    }


def _movements(hvd, rank, mine):
    import tensorflow as tf

    mixed = [tf.fill([rank + 1], mine), tf.fill([1], rank)]
    return {
        "gathered": lambda: hvd.allgather([[mine]] * (rank + 1)),
        "gathered bytes": lambda: hvd.allgather(tf.constant([rank], tf.uint32)),
        "gathered bfloat16": lambda: hvd.allgather(tf.constant([mine], tf.bfloat16)),
        "several gathered": lambda: hvd.grouped_allgather(mixed),
        "sent": lambda: hvd.broadcast([mine, mine], root_rank=1),
        "sent complex": lambda: tf.math.imag(hvd.broadcast(tf.complex(0.0, mine), root_rank=2)),
        "part": lambda: hvd.reducescatter([mine] * 4, op=hvd.Sum),
        "part by its place": lambda: hvd.reducescatter([mine] * 3, "", hvd.Compression.none, hvd.Sum),
        "part of a mean": lambda: hvd.reducescatter(tf.constant([100] * 3, tf.int8)),
        "parts": lambda: hvd.grouped_reducescatter([[mine] * 3, tf.constant([rank] * 3, tf.int8)], op=hvd.Sum),
        "exchanged": lambda: hvd.alltoall([mine * 10, mine * 10 + 1, mine * 10 + 2]),
        "exchanged unevenly": lambda: hvd.alltoall([mine] * 3, splits=[0, 1, 2]),
    }


def all_operations():
    import tensorflow as tf

    import hvdkit as hvd

    world = hvd.init()
    mine = float(world.rank + 1)
    calls = {**_reductions(hvd, mine), **_movements(hvd, world.rank, mine)}
    eagerly = {name: _plain(call()) for name, call in calls.items()}
    graph = tf.function(lambda: {name: call() for name, call in calls.items()})()
    with tf.GradientTape() as tape:
        x = tf.Variable([mine])
        y = tf.reduce_sum(hvd.allreduce(x, op=hvd.Sum) * mine)
    gradient = tape.gradient(y, x).numpy().tolist()
    with tf.GradientTape() as tape:  # Horovod takes a gradient of another dtype than the result's
        wide = tf.Variable(tf.ones([world.size], tf.float64))
        moved = hvd.alltoall(wide)
    gradient += tape.gradient(moved, wide, 2 * tf.ones([world.size])).numpy().tolist()
    has_more = world.rank > 0  # the first rank has less data than the others
    late = hvd.allreduce([mine], name="late", op=hvd.Sum).numpy().tolist() if has_more else None
    last = int(hvd.join())
    hvd.barrier()
    return eagerly, {name: _plain(value) for name, value in graph.items()}, gradient, late, last


def _expected(rank):
    rows = {"values": [[1, 1], [2, 2], [3, 3]], "indices": [1, 2, 3], "shape": [9, 2]}
    scaled = {**rows, "values": [[2 / 3] * 2, [4 / 3] * 2, [2, 2]]}
    wide = {"values": [[1] * 3, [2] * 3, [3] * 3], "indices": [0, 0, 0], "shape": [5, 3]}
    return {
        "mean": [2, 0],
        "scalar": 2,
        "array": [6, 6],
        "variable": [6, 0],
        "keras variable": [6, 0],
        "old average": [6],
        "largest": [3],
        "smallest": [1],
        "product": [6],
        "scaled": [6],
        "half": [6],
        "bfloat16": [6],
        "uint16": [6],
        "rows": rows,
        "scaled rows": scaled,
        "several": [rows, 6, wide, 6],
        "sum by its place": [6],
        "by the other name": [6],
        "mean of integer rows": {"values": [[1 / 3], [2 / 3], [1]], "indices": [0, 0, 0], "shape": [1, 1]},
        "mean of large bytes": [201],
        "mean of large integers": [6],
        "means towards zero": [-1, 1],
        "mean of large halves": [4e4],
        "double factor": [3e9],
        "same line": [0, 6, 12],
        "gathered": [[1], [2], [2], [3], [3], [3]],
        "gathered bytes": [0, 1, 2],
        "gathered bfloat16": [1, 2, 3],
        "several gathered": [[1, 2, 2, 3, 3, 3], [0, 1, 2]],
        "sent": [2, 2],
        "sent complex": 3,
        "part": [6, 6] if rank == 0 else [6],
        "part by its place": [6],
        "part of a mean": [100],
        "parts": [[6], [3]],
        "exchanged": [10 + rank, 20 + rank, 30 + rank],
        "exchanged unevenly": [[1] * rank + [2] * rank + [3] * rank, [rank] * 3],
    }


def test_every_operation_eagerly_and_in_a_graph(ranks):
    for rank, (eagerly, graph, gradient, late, last) in enumerate(ranks(3, all_operations)):
        expected = _expected(rank)
        assert eagerly.keys() == graph.keys() == expected.keys()
        for name, value in expected.items():
            for found in (eagerly[name], graph[name]):
                assert _alike(found, value), f"{name}: {found}, not {value}"
        assert gradient == [6, 2, 2, 2]
        assert late == (None if rank == 0 else [5]), "a rank that has joined takes part with zeros"
        assert last in range(3)


def with_an_optimizer_of_tensorflow_1():
    import tensorflow as tf

    import hvdkit as hvd

    old, me = tf.compat.v1, hvd.init()
    with tf.Graph().as_default(), old.Session() as session:
        weight = old.get_variable("weight", initializer=[1.0])
        optimizer = hvd.DistributedOptimizer(old.train.GradientDescentOptimizer(0.1), name="old")
        step = optimizer.minimize(weight[0] * (me.rank + 1.0))
        session.run(old.global_variables_initializer())
        session.run(step)
        return session.run(weight).tolist()


def test_an_optimizer_of_tensorflow_1_averages_as_in_horovod(ranks):
    assert ranks(2, with_an_optimizer_of_tensorflow_1) == [[pytest.approx(0.85)]] * 2


def _alike(found, expected):
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(_alike(found[k], v) for k, v in expected.items())
    if isinstance(expected, list):
        return len(found) == len(expected) and all(_alike(f, e) for f, e in zip(found, expected, strict=True))
    return abs(found - expected) < 1e-6


def refusals():
    import tensorflow as tf

    import hvdkit as hvd

    alone = hvd.ProcessSet([0])
    world = hvd.init(process_sets=[alone])
    rows = tf.IndexedSlices(tf.ones([1, 2]), [0], [3, 2])
    calls = [
        lambda: hvd.allreduce([True]),
        lambda: hvd.allreduce(1.0, average=True, op=hvd.Sum),
        lambda: hvd.allreduce(rows, op=hvd.Max),
        lambda: hvd.allreduce(1.0, op="sum"),
        lambda: hvd.reducescatter([1.0], op=hvd.Max),
        lambda: hvd.allgather(1.0),
        lambda: hvd.allgather(["text"]),
        lambda: hvd.allgather(rows),
        lambda: hvd.broadcast(1.0, root_rank=5),
        lambda: hvd.broadcast_object(1, root_rank=-1),
        lambda: hvd.broadcast_variables([], root_rank=2),
        lambda: hvd.allreduce(1.0, process_set=hvd.ProcessSet([0, 1])),
        lambda: hvd.reducescatter([1.0], op=hvd.Adasum),
        lambda: hvd.broadcast_global_variables(0),
        lambda: hvd.allreduce([1], op=hvd.Adasum),
        lambda: hvd.allreduce(1.0, "loss", "", ""),
        tf.function(lambda: hvd.broadcast_object(1)),
        tf.function(lambda: hvd.allgather_object(1)),
    ]
    messages = []
    for call in calls:
        with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
            call()
        messages.append(f"{caught.type.__name__}: {caught.value}")
    assert isinstance(_error(lambda: hvd.allreduce(rows, op=hvd.Max)), NotImplementedError), "as in Horovod"
    if world.rank == 1:  # a set of one rank is no excuse to return the value of a rank outside of it
        for call in (hvd.allreduce, lambda x, **to: hvd.broadcast(x, 0, **to), hvd.allgather_object):
            error = _error(lambda call=call: call(1.0, process_set=alone))
            assert isinstance(error, ValueError)
            assert isinstance(error, tf.errors.InvalidArgumentError), "as in Horovod"
            assert str(error).startswith("Rank 1 is not among the ranks [0] of the process set")
    hvd.barrier()  # a rank that has left ends the job for the other process set
    return messages


def _error(call):
    try:
        call()
    except Exception as error:
        return error
    return None


def test_what_cannot_be_done_is_said_in_a_sentence(ranks):
    for messages in ranks(2, refusals):
        for message, part in zip(
            messages,
            [
                "TypeError: allreduce cannot reduce values of dtype bool. Cast them to one of float16",
                "ValueError: The op parameter supersedes average.",
                "UnsupportedOperationError: tf.IndexedSlices can be summed or averaged",
                "ValueError: op must be one of hvdkit.Average, hvdkit.Sum, hvdkit.Adasum",
                "ValueError: reducescatter can sum or average",
                "ValueError: allgather works along the first dimension, but was given a scalar",
                "TypeError: Tensors of dtype string cannot be sent between ranks",
                "TypeError: tf.IndexedSlices can be reduced by allreduce and grouped_allreduce only",
                "NotInProcessSetError: root_rank=5 does not take part; the ranks are [0, 1].",
                "NotInProcessSetError: root_rank=-1 does not take part",
                "NotInProcessSetError: root_rank=2 does not take part",
                "is not registered: pass it to hvdkit.init(process_sets=[...])",
                "ValueError: reducescatter can sum or average",
                "RuntimeError: broadcast_global_variables(0) has no variables to broadcast",
                "TypeError: op=hvdkit.Adasum combines floats, but was given values of dtype int32",
                "ArgumentsError: allreduce was given ('loss', '', ''), which are neither",
                "UsageError: in user code",
                "UsageError: in user code",
            ],
            strict=True,
        ):
            assert part in message


def on_a_process_set(dynamic):
    import tensorflow as tf

    import hvdkit as hvd

    odd, even = hvd.ProcessSet([1, 3]), hvd.ProcessSet([0, 2])
    world = hvd.init() if dynamic else hvd.init(process_sets=[odd, even])
    if dynamic:
        odd, even = hvd.add_process_set(odd), hvd.add_process_set([0, 2])
    here, elsewhere = (odd, even) if world.rank % 2 else (even, odd)
    variable = tf.Variable([float(world.rank)])
    found = [
        _plain(hvd.allreduce([float(world.rank)], op=hvd.Sum, process_set=here)),
        _plain(hvd.allreduce(tf.IndexedSlices([[1.0]], [0], [1, 1]), process_set=here).values),
        _plain(hvd.allgather([world.rank], process_set=here)),
        _plain(hvd.broadcast(world.rank, here.ranks[1], process_set=here)),
        _plain(hvd.reducescatter([1.0, 2.0], op=hvd.Sum, process_set=here)),
        _plain(hvd.alltoall([world.rank] * 2, process_set=here)),
        hvd.allgather_object(world.rank, process_set=here),
        hvd.broadcast_object(world.rank, here.ranks[0], process_set=here),
        _plain(hvd.allreduce(tf.constant([1.0], tf.bfloat16), op=hvd.Sum, process_set=here)),
        _plain(hvd.allreduce([3.0], op=hvd.Adasum, process_set=here)),
        _plain(hvd.allreduce(tf.constant([1e300, 1 + 1e-12], tf.float64), op=hvd.Adasum, process_set=here)),
        _plain(hvd.allreduce(tf.constant([1e-300], tf.float64), op=hvd.Adasum, process_set=here)),
    ]
    hvd.broadcast_variables([variable], root_rank=here.ranks[1], process_set=here)
    found.append(_plain(variable))
    hvd.barrier(process_set=here)
    with pytest.raises(ValueError, match=r"only those may call. Write `if process_set.included\(\)"):
        hvd.allreduce(1.0, process_set=elsewhere)
    with pytest.raises(ValueError, match="does not take part; the ranks are"):
        hvd.broadcast(1.0, elsewhere.ranks[0], process_set=here)
    hvd.barrier()  # a rank that has left ends the job for the other process set
    if dynamic:
        found.append([hvd.remove_process_set(odd), odd.process_set_id])
    return found


@pytest.mark.parametrize("dynamic", [False, True])
def test_process_sets(ranks, dynamic):
    environment = {"HOROVOD_DYNAMIC_PROCESS_SETS": "1"} if dynamic else {}
    for rank, found in enumerate(ranks(4, on_a_process_set, dynamic=dynamic, env=environment)):
        first, second = rank % 2, rank % 2 + 2
        place = (rank - first) // 2
        expected = [
            [first + second],
            [[0.5], [0.5]],
            [first, second],
            second,
            [2.0 * (place + 1)],
            [first, second],
            [first, second],
            first,
            [2],
            [3],
            [1e300, 1 + 1e-12],
            [1e-300],
            [second],
        ]
        assert found[: len(expected)] == expected
        assert found[len(expected) :] == ([[True, None]] if dynamic else [])


def in_different_order(named):
    import hvdkit as hvd

    world = hvd.init()

    def weights():
        return hvd.allreduce([1.0], op=hvd.Sum, name="weights" if named else None)

    def losses():
        return hvd.allreduce([100.0], op=hvd.Sum, name="losses" if named else None)

    return [float(call()[0]) for call in ((weights, losses) if world.rank else (losses, weights))]


@pytest.mark.parametrize("named", [False, True])
def test_calls_in_different_order_stop_the_job_and_are_named(ranks, named):
    """Horovod would pair them up, and rank 0 would take 101 for its weights and its losses."""
    limits = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "2", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "6"}
    ended = ranks(2, in_different_order, named=named, env=limits, fails=True, timeout=120)
    names = ["losses", "weights"]
    for name in names:
        expected = name if named else f"hvdkit.allreduce.test_operations.py.{name}."
        assert expected in ended.output, f"the report of what waits does not name {expected}:\n{ended.output}"


def objects_from_two_lines():
    import hvdkit as hvd

    world = hvd.init()
    if world.is_root:
        found = hvd.broadcast_object({"epoch": 3})
        value = hvd.broadcast(7.0, 0)
    else:
        found = hvd.broadcast_object(None)
        value = hvd.broadcast(0.0, 0)
    return found, float(value)


def test_the_two_branches_of_a_broadcast_meet(ranks):
    assert ranks(2, objects_from_two_lines) == [({"epoch": 3}, 7.0)] * 2


def timeline(path):
    import hvdkit as hvd

    hvd.init()
    hvd.start_timeline(path)
    hvd.allreduce([1.0], name="drawn")
    hvd.stop_timeline()
    answers = [getattr(hvd, f)() for f in ("mpi_built", "mpi_enabled", "gloo_built", "gloo_enabled")]
    with pytest.raises(ValueError, match="Horovod MPI is not enabled"):
        hvd.mpi_threads_supported()
    built = [getattr(hvd, f"{name}_built")() for name in ("nccl", "ddl", "ccl", "cuda", "rocm")]
    return answers, built, hvd.is_homogeneous(), hvd.global_process_set.size()


def test_the_timeline_is_written_and_horovods_own_names_answer(ranks, tmp_path):
    path = tmp_path / "timeline.json"
    for answers, built, homogeneous, size in ranks(2, timeline, path=str(path), env={"HOROVOD_TIMELINE": "DYNAMIC"}):
        assert answers[1:] == [False, True, True], "this job runs over Gloo"
        assert len(built) == 5
        assert homogeneous is True
        assert size == 2
    assert "drawn" in path.read_text()
