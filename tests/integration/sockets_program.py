"""A rank on test hosts: sums over all ranks, and the bytes that this host has sent for it."""

import hashlib
import json
from pathlib import Path

import numpy as np
import tensorflow as tf

import hvdkit as hvd
from hvdkit import world
from hvdkit.collectives import transports, wire
from hvdkit.collectives.transports import Scale

ELEMENTS, TIMES = 700_003, 8


def main():
    me = hvd.init()
    parts = [np.random.default_rng(rank).normal(size=ELEMENTS).astype("float32") for rank in range(me.size)]
    everyone = world.horovod().global_process_set
    reduce = tf.function(lambda x: wire.allreduce([x], "sum", everyone, Scale(average=True))[0])
    total = reduce(parts[me.rank])
    hvd.barrier()
    start = tf.function(lambda x: wire.allreduce_start([x], "half", everyone, Scale(average=True), "slot"))
    done = tf.function(
        lambda x: wire.allreduce_done([x], "half", everyone, Scale(average=True), "slot", tf.constant(True))
    )
    start(parts[me.rank])
    halves = done(tf.zeros_like(parts[me.rank]))[0]
    hvd.barrier()
    before = sent()
    for _ in range(TIMES):
        total = reduce(parts[me.rank])
    hvd.barrier()
    result = {
        "rank": me.rank,
        "transport": transports.in_use()[0].name,
        "same_in_halves": bool(np.array_equal(halves, total)),
        "error": float(np.abs(total.numpy() - np.mean(parts, axis=0)).max()),
        "bits": hashlib.sha256(total.numpy().tobytes()).hexdigest(),
        "sent": (sent() - before) / TIMES / (4 * ELEMENTS),
    }
    print("found " + json.dumps(result), flush=True)
    hvd.shutdown()


def sent():
    """The bytes that this host has sent through its interface."""
    (line,) = [line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("eth0:")]
    return int(line.split()[9])


if __name__ == "__main__":
    main()
