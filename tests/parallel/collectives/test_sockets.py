"""Sums through sockets: of more than a message, and in whatever order the ranks start them."""

import numpy as np
import pytest

BY_SOCKETS = {"HVDKIT_SHARED_MEMORY": "0"}
SHAPES = [[3], [1_100_000], [], [0], [700, 512]]  # over a message of 1 MiB, in float32, for each of three ranks


def summed():
    """The largest error of an allreduce, and its bits."""
    import tensorflow as tf

    import hvdkit as hvd
    from hvdkit import world
    from hvdkit.collectives import transports, wire
    from hvdkit.collectives.transports import Scale

    me = hvd.init()
    assert transports.in_use()[0].name == "sockets"
    generator = np.random.default_rng(4)
    parts = [[generator.normal(size=shape).astype("float32") for shape in SHAPES] for _ in range(me.size)]
    reduce = tf.function(
        lambda x: wire.allreduce(x, "large", world.horovod().global_process_set, Scale(average=True)), autograph=False
    )
    for _ in range(3):
        found = reduce([tf.constant(part) for part in parts[me.rank]])
    exact = [np.mean([p[i] for p in parts], axis=0) for i in range(len(SHAPES))]
    worst = max(float(np.abs(f.numpy() - e).max(initial=0)) for f, e in zip(found, exact, strict=True))
    return worst, b"".join(f.numpy().tobytes() for f in found)


@pytest.mark.parametrize("number", [2, 3])
def test_sums_of_many_messages_are_right_and_alike(ranks, number):
    found = ranks(number, summed, env=BY_SOCKETS)
    assert [worst for worst, _ in found] == [pytest.approx(0, abs=1e-6)] * number
    assert len({bits for _, bits in found}) == 1


def in_two_orders():
    """Rank 1 starts the collectives in the opposite order, each in a thread."""
    from concurrent.futures import ThreadPoolExecutor

    import tensorflow as tf

    import hvdkit as hvd
    from hvdkit import world
    from hvdkit.collectives import wire
    from hvdkit.collectives.transports import Scale

    me = hvd.init()
    everyone = world.horovod().global_process_set
    reduce = {
        size: tf.function(
            lambda x, size=size: wire.allreduce([x], f"size.{size}", everyone, Scale())[0], autograph=False
        )
        for size in (10, 50_000, 2_000_000)
    }
    order = sorted(reduce, reverse=me.rank == 1)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda size: (size, reduce[size](tf.fill([size], me.rank + 1.0))), order))
    return {size: np.unique(total).tolist() for size, total in found}


def test_ranks_may_start_collectives_in_different_orders(ranks):
    assert ranks(2, in_two_orders, env=BY_SOCKETS) == [{10: [3.0], 50_000: [3.0], 2_000_000: [3.0]}] * 2


def started_by_one():
    """Both ranks allreduce small tensors while a sum of 8 MB is under way; the results of both."""
    import tensorflow as tf

    import hvdkit as hvd
    from hvdkit import collectives, world
    from hvdkit.collectives import wire
    from hvdkit.collectives.transports import Scale

    me = hvd.init()
    everyone = world.horovod().global_process_set
    start = tf.function(lambda x: wire.allreduce_start([x], "large", everyone, Scale(), "slot"), autograph=False)
    done = tf.function(
        lambda x: wire.allreduce_done([x], "large", everyone, Scale(), "slot", tf.constant(True)), autograph=False
    )
    small = tf.function(lambda x: wire.allreduce([x], "small", everyone, Scale())[0], autograph=False)
    x = tf.fill([2_000_000], me.rank + 1.0)
    if me.rank == 0:
        start(x)
    collectives.barrier(name="started")  # rank 0 does not wait for rank 1, which has not started yet
    if me.rank == 1:
        start(x)
    totals = [float(small(tf.constant(me.rank + number))) for number in (1.0, 2.0)]
    (total,) = done(tf.zeros_like(x))
    return totals, np.unique(total).tolist()


def test_other_sums_go_on_while_one_is_under_way(ranks):
    assert ranks(2, started_by_one, env=BY_SOCKETS, timeout=120) == [([3.0, 5.0], [3.0])] * 2


def cancelled():
    """A step that waits for a sum is cancelled; the sum then goes on, and the connections are whole."""
    import threading
    import time

    import tensorflow as tf
    from tensorflow.python.eager.cancellation import CancellationManager

    import hvdkit as hvd
    from hvdkit import collectives, world
    from hvdkit.collectives import wire
    from hvdkit.collectives.transports import Scale

    me = hvd.init()
    everyone = world.horovod().global_process_set
    spec = tf.TensorSpec([1000])
    start = tf.function(lambda x: wire.allreduce_start([x], "sum", everyone, Scale(), "slot"), autograph=False)
    done = tf.function(
        lambda x: wire.allreduce_done([x], "sum", everyone, Scale(), "slot", tf.constant(True))[0], autograph=False
    )
    start.get_concrete_function(spec), done.get_concrete_function(spec)
    seconds, x = 0.0, tf.ones([1000])
    if me.rank == 0:
        start(x)
        manager = CancellationManager()
        threading.Timer(0.5, manager.start_cancel).start()
        began = time.monotonic()
        try:
            manager.get_cancelable_function(done.get_concrete_function(spec))(x)
        except tf.errors.CancelledError:
            seconds = time.monotonic() - began
    collectives.barrier(name="cancelled")
    if me.rank == 1:
        start(x)
        done(x)
    start(2 * x)
    return 0.4 < seconds < 5 if me.rank == 0 else True, np.unique(done(x)).tolist()


def test_a_cancelled_step_leaves_the_sum_to_its_thread(ranks):
    assert ranks(2, cancelled, env=BY_SOCKETS) == [(True, [4.0])] * 2


def left(how):
    """Rank 1 closes its connections, or dies, while rank 0 waits for a sum that both were to start; rank 0's error."""
    import os
    import signal
    import time

    import tensorflow as tf

    import hvdkit as hvd
    from hvdkit import collectives, native, world
    from hvdkit.collectives import wire
    from hvdkit.collectives.transports import Scale

    me = hvd.init()
    everyone = world.horovod().global_process_set
    x = tf.zeros([2_000_000])
    start = tf.function(lambda x: wire.allreduce_start([x], "sum", everyone, Scale(), "slot"), autograph=False)
    done = tf.function(
        lambda x: wire.allreduce_done([x], "sum", everyone, Scale(), "slot", tf.constant(True))[0], autograph=False
    )
    if me.rank == 0:
        start(x)
    collectives.barrier(name="started")
    if me.rank == 1 and how == "dies":
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    if me.rank == 1:
        native.stop_sockets()
        return ""
    try:
        done(x)
    except tf.errors.AbortedError as error:
        return error.message
    return "no error"


def test_a_connection_that_breaks_while_a_sum_is_under_way_ends_the_wait(ranks):
    message, _ = ranks(2, left, how="leaves", env=BY_SOCKETS, fresh=True, timeout=120)
    assert "Connection closed by peer, rank 1: " in message  # it ended, or was reset with bytes unread


def test_a_rank_that_dies_while_a_sum_is_under_way_ends_the_job(ranks):
    ended = ranks(2, left, how="dies", env=BY_SOCKETS, fails=True, timeout=120)
    assert "rank 1 on host" in ended.output
    assert "was the first to fail, killed by SIGKILL" in ended.output
