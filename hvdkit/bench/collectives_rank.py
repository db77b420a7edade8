"""The rank program of `collectives`: time the collectives of Horovod and other transports in a TensorFlow graph.

    python -m hvdkit.launch -np 2 -- python -m hvdkit.bench.collectives_rank RESULT.json BYTES,BYTES,... SECONDS

`training` in place of the sizes measures what `hvdkit.plan` needs to predict training, in a few seconds on any link.
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
_GROWING = [4, *(1 << bits for bits in range(14, 25, 2))]  # bytes, for `training`
_LONG = 0.2  # seconds of one call, after which no larger size is needed
_LEAST = 1 << 18  # bytes that are always measured: the planner needs two sizes that several ranks divide
_PAUSE, _PAUSES = 0.25, 3  # seconds in which a traffic shaper saves up its rate, and their number


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
        found[f"{own.key}_allgather"] = lambda x: collectives.gather_rows(
            x, f"bench.{own.key}.gather.{elements}", everyone
        )
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
    repeat, x = _repeated(operation), tf.ones([elements])
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


def timings_after_pause(operation: Callable[[tf.Tensor], tf.Tensor], elements: int) -> list[float]:
    """Time single calls, each after a pause; return the seconds on the rank that began last, so waited for nobody."""
    repeat, x = _repeated(operation), tf.ones([elements])
    repeat(x, tf.constant(1))
    measured = []
    for _ in range(_PAUSES):
        collectives.barrier(name="bench")
        time.sleep(_PAUSE)
        began = time.perf_counter()
        repeat(x, tf.constant(1))
        measured.append(time.perf_counter() - began)
    everyone = collectives.allgather_object(measured, name="bench.paused")
    return [float(value) for value in np.min(everyone, axis=0)]


def _repeated(operation: Callable[[tf.Tensor], tf.Tensor]) -> Any:
    """Return a graph function of a tensor and the number of times to run the operation on it, one after the other."""

    @tf.function
    def repeat(x: tf.Tensor, times: tf.Tensor) -> tf.Tensor:
        total = 0.0  # use the results, because TensorFlow prunes unused operations
        for _ in tf.range(times):
            tf.autograph.experimental.set_loop_options(parallel_iterations=1)
            with tf.control_dependencies([total]):
                total += tf.reshape(operation(tf.identity(x)), [-1])[0]
        return total

    return repeat


def all_rows(sizes: list[int], seconds: float) -> list[dict[str, Any]]:
    """Time all operations at all sizes."""
    rows = []
    for size in sizes:
        elements = max(1, size // 4)
        for name, operation in operations(elements).items():
            rows.append(_row(name, elements, timings(operation, elements, seconds)))
    return rows


def rows_of_training(seconds: float) -> list[dict[str, Any]]:
    """Time the collectives that training uses, at sizes that grow until a call takes long.

    They are the allreduce and allgather of the transport that this job uses for gradients; the allreduce after pauses;
    and the smallest allreduce of Horovod, which shows what a negotiation takes.
    """
    own = _own_transport("allreduce")
    prefix = f"{own.key}_" if own else ""
    rows: list[dict[str, Any]] = []
    for size in _GROWING:
        elements = size // 4
        ways = operations(elements)
        for name in (f"{prefix}allreduce", f"{prefix}allgather"):
            rows.append(_row(name, elements, timings(ways[name], elements, seconds)))
        if size == _GROWING[0]:
            rows += [_row("allreduce", elements, timings(ways["allreduce"], elements, seconds))] if own else []
            continue
        name = f"{prefix}allreduce"
        rows.append(_row(f"{name}_after_pause", elements, timings_after_pause(ways[name], elements)))
        if size >= _LEAST and max(row["seconds"] for row in rows) > _LONG:  # the same on all ranks
            break
    return rows


def _row(name: str, elements: int, measured: list[float]) -> dict[str, Any]:
    low, middle, high = map(float, np.quantile(measured, [0.25, 0.5, 0.75]))
    return {"operation": name, "bytes": elements * 4, "seconds": middle, "quartiles": [low, high]}


def main(argv: list[str]) -> None:
    """Time all operations at all sizes; rank 0 writes the result to a file."""
    me = hvd.init()
    # The collective's input is constant in the loop, so TensorFlow would otherwise hoist the collective out of it.
    tf.config.optimizer.set_experimental_options({"loop_optimization": False})
    seconds = float(argv[3])
    rows = rows_of_training(seconds) if argv[2] == "training" else all_rows(list(map(int, argv[2].split(","))), seconds)
    if me.rank == 0:
        content = {"kind": "collectives", "ranks": me.size, "hosts": me.cross_size, "local_size": me.local_size}
        Path(argv[1]).write_text(json.dumps({**content, "rows": rows}))
    hvd.shutdown()


if __name__ == "__main__":
    main(sys.argv)
