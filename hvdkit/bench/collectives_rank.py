"""The rank program of `collectives`: time the collectives of Horovod and other transports in a TensorFlow graph.

python -m hvdkit.launch -np 2 -- python -m hvdkit.bench.collectives_rank RESULT.json BYTES,BYTES,... SECONDS
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

import hvdkit as hvd
from hvdkit import collectives, world
from hvdkit.collectives import transports, wire
from hvdkit.collectives.transports import Kind

_FEWEST = 5  # minimum number of timings for one size


def operations(elements: int) -> dict[str, Callable[[tf.Tensor], tf.Tensor]]:
    """Return the operations to time by name, each a function of a float32 tensor with `elements` elements."""
    everyone = world.horovod().global_process_set
    sums = {"op": world.horovod().Sum}
    found = {
        "allreduce": lambda x: wire.run("allreduce", [x], f"bench.allreduce.{elements}", **sums)[0],
        "allgather": lambda x: wire.run("allgather", [x], f"bench.allgather.{elements}")[0],
        "broadcast": lambda x: wire.run("broadcast", [x], f"bench.broadcast.{elements}", root_rank=0)[0],
    }
    if own := _own_transport("allreduce"):
        found[f"{own.key}_allreduce"] = lambda x: collectives.reduce_dense(
            [x], f"bench.{own.key}.{elements}", process_set=everyone, **sums
        )[0]
    if world.size() == 2:
        found |= _transfers(elements)
    return found


def _own_transport(kind: Kind) -> transports.Transport | None:
    """Return the transport that replaces Horovod, or None."""
    chosen = transports.choose(kind, tf.float32, world.horovod().global_process_set)
    return None if isinstance(chosen, transports.Horovod) else chosen


def _transfers(elements: int) -> dict[str, Callable[[tf.Tensor], tf.Tensor]]:
    """Return collectives that can send a tensor from rank 0 to rank 1, besides broadcast and allreduce."""
    sends, everyone = world.rank() == 0, world.horovod().global_process_set
    splits = tf.constant([0, elements] if sends else [0, 0])

    def alltoall(x: tf.Tensor) -> tf.Tensor:
        rows, _ = wire.run("alltoall", [x if sends else x[:0], splits], f"bench.send.alltoall.{elements}")
        return tf.concat([rows, [0.0]], axis=0)  # the sender gets nothing back

    def allgather(x: tf.Tensor) -> tf.Tensor:
        return wire.run("allgather", [x if sends else x[:0]], f"bench.send.allgather.{elements}")[0]

    def by_own_transport(x: tf.Tensor) -> tf.Tensor:
        return collectives.gather_rows(x if sends else x[:0], f"bench.send.own.{elements}", everyone)

    found = {"send_by_alltoall": alltoall, "send_by_allgather": allgather}
    own = _own_transport("allgather")
    return found | ({f"send_by_{own.name.replace(' ', '_')}": by_own_transport} if own else {})


def timings(operation: Callable[[tf.Tensor], tf.Tensor], elements: int, seconds: float) -> list[float]:
    """Time an operation many times; return the seconds of one call for each timing, on the slowest rank."""

    @tf.function
    def repeat(x: tf.Tensor, times: tf.Tensor) -> tf.Tensor:
        total = 0.0  # use the results, because TensorFlow prunes unused operations
        for _ in tf.range(times):
            tf.autograph.experimental.set_loop_options(parallel_iterations=1)
            with tf.control_dependencies([total]):
                total += tf.reshape(operation(tf.identity(x)), [-1])[0]
        return total

    x = tf.ones([elements])
    repeat(x, tf.constant(3))  # trace the graph, and fill Horovod's response cache
    collectives.barrier(name="bench")
    began = time.perf_counter()
    repeat(x, tf.constant(3))
    once = collectives.broadcast_object((time.perf_counter() - began) / 3, name="bench.once")
    times = max(1, int(seconds / 20 / once))
    measured = []
    for _ in range(max(_FEWEST, min(20, int(seconds / once / times)))):
        began = time.perf_counter()
        repeat(x, tf.constant(times))
        measured.append((time.perf_counter() - began) / times)
    everyone = collectives.allgather_object(measured, name="bench.measured")
    return [float(value) for value in np.max(everyone, axis=0)]


def main(argv: list[str]) -> None:
    """Time all operations at all sizes; rank 0 writes the result to a file."""
    me = hvd.init()
    # The collective's input is constant in the loop, so TensorFlow would otherwise hoist the collective out of it.
    tf.config.optimizer.set_experimental_options({"loop_optimization": False})
    rows = []
    for size in map(int, argv[2].split(",")):
        elements = max(1, size // 4)
        for name, operation in operations(elements).items():
            measured = timings(operation, elements, float(argv[3]))
            low, middle, high = np.quantile(measured, [0.25, 0.5, 0.75])
            row: dict[str, Any] = {
                "operation": name,
                "bytes": elements * 4,
                "seconds": middle,
                "quartiles": [low, high],
            }
            rows.append(row)
    if me.rank == 0:
        content = {"kind": "collectives", "ranks": me.size, "hosts": me.cross_size, "local_size": me.local_size}
        Path(argv[1]).write_text(json.dumps({**content, "rows": rows}))
    hvd.shutdown()


if __name__ == "__main__":
    main(sys.argv)
