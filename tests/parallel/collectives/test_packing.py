"""Messages without their zeros: the same bits arrive, from fewer bytes."""

import itertools
import time

import numpy as np
import pytest

ALWAYS, NEVER = ({"HVDKIT_SHARED_MEMORY": "0", "HVDKIT_PACK_ZEROS": asked} for asked in "10")
FRACTIONS = {"no zeros": 0.0, "few": 0.02, "half": 0.5, "nearly all": 0.99, "all": 1.0}
SPECIAL = [0.0, -0.0, np.nan, np.inf, 1e-42]


def _tensors(rank, fraction, dtype):
    """Of odd lengths, with a block of zeros, and over a message of 1 MiB."""
    generator = np.random.default_rng(rank)
    given = [generator.normal(size=size) for size in (3, 65, 300_001, 64, 129)]
    for values in given:
        values[generator.random(values.size) < fraction] = 0
    given[1][:5] = SPECIAL
    return [values.astype(dtype) for values in given]


def sums_and_bytes():
    """For each case, the bits of the sums, and the bytes that this rank sent."""
    import tensorflow as tf

    import hvdkit as hvd
    from hvdkit import native, world
    from hvdkit.collectives import wire
    from hvdkit.collectives.transports import Scale

    me = hvd.init()
    everyone, found = world.horovod().global_process_set, {}
    for (name, fraction), dtype in itertools.product(FRACTIONS.items(), ("float32", "float16", "float64")):
        mine = [tf.constant(t) for t in _tensors(me.rank, fraction, dtype)]
        reduce = tf.function(lambda x, n=f"{name}.{dtype}": wire.allreduce(x, n, everyone, Scale()), autograph=False)
        before = native.sockets_times()[3]
        time.sleep(0.05 * me.rank)  # the others' messages arrive before this rank expects them
        sums = reduce(mine)
        bits = b"".join(s.numpy().tobytes() for s in sums)
        found[name, dtype] = bits, native.sockets_times()[3] - before
    return found


@pytest.mark.parametrize("number", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_same_bits_arrive_from_fewer_bytes(ranks, number):
    packed, plain = (ranks(number, sums_and_bytes, env=env) for env in (ALWAYS, NEVER))
    for mine, theirs in zip(packed, plain, strict=True):
        assert [bits for bits, _ in mine.values()] == [bits for bits, _ in theirs.values()]
    ratio = {case: packed[0][case][1] / plain[0][case][1] for case in packed[0]}
    assert all(ratio["no zeros", dtype] == 1 for dtype in ("float32", "float16", "float64"))
    assert all(0 < value <= 1 for value in ratio.values())
    masks = 1 / 32
    if number == 2:  # the sums of more ranks have fewer zeros than what each rank sends
        assert ratio["half", "float32"] == pytest.approx(0.5 + masks, abs=0.01)
    assert ratio["all", "float32"] == pytest.approx(masks, abs=0.002)
