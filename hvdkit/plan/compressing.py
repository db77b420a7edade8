"""Measure the compute time of gradient compressors.

This is a separate program because the planner runs several copies in parallel, as ranks run.

python -m hvdkit.plan.compressing int8,topk "[[784, 128], [128]]" THREADS        prints {"int8": seconds, ...}
"""

import json
import os
import statistics
import sys
import time

os.environ["HOROVOD_CYCLE_TIME"] = "0.05"  # one rank waits for no other; `cost` predicts communication
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as in launched ranks

import tensorflow as tf

import hvdkit as hvd
from hvdkit import world
from hvdkit.compression import ErrorFeedback, by_name

_LEAST, _TRIES = 0.5, 10  # minimum total seconds, and minimum number of timings


def seconds(name: str, shapes: list[list[int]]) -> float:
    """Return the median seconds of one compression and decompression on one rank, without communication."""
    compressor = by_name(name)
    if not isinstance(compressor, ErrorFeedback):
        return 0.0
    everyone = world.horovod().global_process_set
    gradients = [tf.Variable(tf.random.normal(shape)) for shape in shapes]
    payload = tf.zeros([3])

    @tf.function
    def once() -> tf.Tensor:
        averages, _ = compressor.reduce([g.read_value() for g in gradients], payload, f"plan.{name}", everyone)
        with tf.control_dependencies(averages):  # to read them belongs to the update, which is measured in training
            return tf.constant(0.0)

    once()
    found: list[float] = []
    while len(found) < _TRIES or sum(found) < _LEAST:
        began = time.perf_counter()
        once().numpy()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def main(argv: list[str]) -> None:
    """Time each compressor and print the result as JSON."""
    tf.config.threading.set_intra_op_parallelism_threads(int(argv[3]))
    hvd.init()
    print(json.dumps({name: seconds(name, json.loads(argv[2])) for name in argv[1].split(",")}))


if __name__ == "__main__":
    main(sys.argv)
