"""What is shared memory's own: chunks, its segments' end, and ranks that cannot use it.

test_transports.py has what it has in common with the other transports.
"""

import os
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.conftest import sys

SEGMENTS = Path("/dev/shm")
SHAPES = [[3], [], [0], [700, 512], [131072], [5, 7]]  # about three chunks of half a MiB in float32; one ends in one


def summed(transport="shared memory"):
    """Two exchanges of several tensors, and what NumPy makes of them in float64."""
    import tensorflow as tf

    import hvdkit as hvd
    from hvdkit import collectives, world
    from hvdkit.collectives import transports

    me = hvd.init()
    memory = transports.in_use()[0]
    assert memory.name == transport
    everyone = world.horovod().global_process_set
    generator = np.random.default_rng(4)
    parts = [[generator.normal(size=shape) for shape in SHAPES] for _ in range(me.size)]
    mine = [tf.cast(part, tf.float32) for part in parts[me.rank]]

    @tf.function
    def reduce(tensors):
        average = world.horovod().Average
        return collectives.reduce_dense(tensors, "t", op=average, process_set=everyone, prescale=0.25, postscale=4.0)

    reduce(mine)
    results = reduce(mine)
    eager = collectives.reduce_dense(mine[:1], "e", op=world.horovod().Sum, process_set=everyone)
    exact = [
        np.mean([np.asarray(tf.cast(tf.cast(p[i], tf.float32), tf.float64)) for p in parts], axis=0)
        for i in range(len(SHAPES))
    ]
    return {
        "results": [tf.cast(r, tf.float64).numpy() for r in results],
        "exact": exact,
        "eager": (tf.cast(eager[0], tf.float64).numpy(), exact[0] * me.size),
        "bits": [r.numpy().tobytes() for r in results],
        "left": [f.name for f in SEGMENTS.glob(f"hvdkit-{memory.token}-*")] if transport == "shared memory" else [],
    }


@pytest.mark.parametrize("number", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_sums_are_right_and_alike(ranks, number):
    """Five ranks divide the adding among themselves."""
    found, bound = ranks(number, summed), 1e-6
    for result in found:
        for got, exact in zip(result["results"], result["exact"], strict=True):
            np.testing.assert_allclose(got, exact, rtol=bound, atol=bound)
        np.testing.assert_allclose(*result["eager"], rtol=bound, atol=bound)
        assert result["bits"] == found[0]["bits"]
        assert result["left"] == [], "a segment can still be seen"


@pytest.mark.parametrize(
    ("transport", "sockets"), [("sockets", "1"), pytest.param("horovod", "0", marks=pytest.mark.slow)]
)
def test_sockets_and_horovod_give_the_same_bits_on_two_ranks(ranks, transport, sockets):
    one = ranks(2, summed)
    env = {"HVDKIT_SHARED_MEMORY": "0", "HVDKIT_SOCKETS": sockets}
    other = ranks(2, summed, transport=transport, env=env)
    assert one[0]["bits"] == other[0]["bits"]


def traced_anew():
    """A rank that traces its step again, for a batch of another size, goes on where the others are."""
    import tensorflow as tf

    import hvdkit as hvd
    from hvdkit import collectives, world

    me = hvd.init()
    everyone = world.horovod().global_process_set

    @tf.function
    def step(batch):
        x = tf.reduce_mean(batch, axis=0)
        return collectives.reduce_dense([x], "g", op=world.horovod().Sum, process_set=everyone)[0]

    rows = [4, 4, 3, 4, 2] if me.rank else [4] * 5
    return [float(step(tf.fill([r, 8], float(me.rank + i)))[0]) for i, r in enumerate(rows)]


def test_a_step_that_one_rank_traces_anew_still_meets_the_others(ranks):
    assert ranks(2, traced_anew) == [[2.0 * i + 1 for i in range(5)]] * 2


def joining():
    import tensorflow as tf

    import hvdkit as hvd
    from hvdkit import collectives, world

    me = hvd.init()
    everyone = world.horovod().global_process_set
    collectives.reduce_dense([tf.ones([3])], "g", op=world.horovod().Sum, process_set=everyone)
    if me.rank == 1:
        hvd.join()
    collectives.reduce_dense([tf.ones([3])], "g", op=world.horovod().Sum, process_set=everyone)


def test_a_rank_cannot_leave_the_others_waiting(ranks):
    ended = ranks(2, joining, fails=True, timeout=120)
    assert "hvdkit.join() was called after exchanges through shared memory, which need all ranks." in ended.output


def test_what_is_lacking_is_told_and_the_job_goes_on(ranks, tmp_path):
    found = ranks(2, without_library, fresh=True)
    assert found == [(["horovod"], 3.0)] * 2


def without_library():
    import logging

    import tensorflow as tf

    import hvdkit as hvd
    from hvdkit import collectives, native, world
    from hvdkit.collectives import transports

    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("hvdkit.collectives.transports.shared_memory").addHandler(handler)
    native.is_built = lambda: False
    me = hvd.init()
    everyone = world.horovod().global_process_set
    (total,) = collectives.reduce_dense(
        [tf.constant([me.rank + 1.0])], "g", op=world.horovod().Sum, process_set=everyone
    )
    expected = "because hvdkit.native is not compiled for this TensorFlow: python -m hvdkit.native."
    assert [expected in message for message in told] == ([True] if me.rank == 0 else [])
    return [transport.name for transport in transports.in_use()], float(total[0])


@pytest.mark.slow
def test_a_killed_job_leaves_no_memory_behind(tmp_path):
    """Also one that is killed with all its ranks at once, in the middle of its steps."""
    flags = ["--model=mnist_mlp", "--dataset=synthetic:28x28x1:10:4096", "--steps=1000000", f"--workdir={tmp_path}/run"]
    process = psutil.Popen(
        [sys.executable, "-m", "hvdkit.launch", "-np", "2", "--", sys.executable, "-m", "hvdkit.train", *flags]
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "loss.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1)
    family = [process, *process.children(recursive=True)]
    held = {m.path for p in family for m in _maps(p) if m.path.startswith("/dev/shm/hvdkit-")}
    for member in family:
        os.kill(member.pid, signal.SIGKILL)
    psutil.wait_procs(family, timeout=30)
    assert held, "the ranks did not share memory"
    assert not [path for path in held if Path(path.removesuffix(" (deleted)")).exists()]


def _maps(process):
    try:
        return process.memory_maps()
    except psutil.Error:
        return []
