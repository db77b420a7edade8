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
    reduce = tf.function(lambda x: wire.allreduce(x, "large", world.horovod().global_process_set, Scale(average=True)))
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
        size: tf.function(lambda x, size=size: wire.allreduce([x], f"size.{size}", everyone, Scale())[0])
        for size in (10, 50_000, 2_000_000)
    }
    order = sorted(reduce, reverse=me.rank == 1)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda size: (size, reduce[size](tf.fill([size], me.rank + 1.0))), order))
    return {size: np.unique(total).tolist() for size, total in found}


def test_ranks_may_start_collectives_in_different_orders(ranks):
    assert ranks(2, in_two_orders, env=BY_SOCKETS) == [{10: [3.0], 50_000: [3.0], 2_000_000: [3.0]}] * 2


def mismatched():
    import tensorflow as tf

    import hvdkit as hvd
    from hvdkit import world
    from hvdkit.collectives import wire
    from hvdkit.collectives.transports import Scale

    me = hvd.init()
    try:
        wire.allreduce([tf.zeros([3 + me.rank])], "grads", world.horovod().global_process_set, Scale())
    except tf.errors.AbortedError as error:
        return str(error)
    return "no error"


def test_different_shapes_are_an_error_that_names_rank_and_sizes(ranks):
    found = ranks(2, mismatched, env=BY_SOCKETS, fresh=True)
    assert any("Mismatched sizes: rank 1 sent 16 bytes where this rank expected 12." in text for text in found)
