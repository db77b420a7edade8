"""What compressors compute: a program of its own, so that several can be timed side by side, as ranks run.

python -m hvdkit.plan.compressing int8,topk "[[784, 128], [128]]" THREADS        prints {"int8": seconds, ...}
"""

import json
import os
import statistics
import sys
import time

os.environ["HOROVOD_CYCLE_TIME"] = "0.05"  # alone there is nothing to wait for: exchanges are counted elsewhere

import tensorflow as tf

import hvdkit as hvd
from hvdkit import world
from hvdkit.compression import ErrorFeedback, by_name

_LEAST, _TRIES = 0.5, 10  # seconds, and timings


def seconds(name: str, shapes: list[list[int]]) -> float:
    """Of one compression and all that belongs to it, without an exchange."""
    compressor = by_name(name)
    if not isinstance(compressor, ErrorFeedback):
        return 0.0
    everyone = world.horovod().global_process_set
    gradients = [tf.Variable(tf.random.normal(shape)) for shape in shapes]
    payload = tf.zeros([3])

    @tf.function
    def once() -> tf.Tensor:
        averages, _ = compressor.reduce([g.read_value() for g in gradients], payload, f"plan.{name}", everyone)
        return tf.add_n([tf.reduce_sum(a) for a in averages])

    once()
    found: list[float] = []
    while len(found) < _TRIES or sum(found) < _LEAST:
        began = time.perf_counter()
        once().numpy()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def main(argv: list[str]) -> None:
    """Times each, and prints JSON."""
    tf.config.threading.set_intra_op_parallelism_threads(int(argv[3]))
    hvd.init()
    print(json.dumps({name: seconds(name, json.loads(argv[2])) for name in argv[1].split(",")}))


if __name__ == "__main__":
    main(sys.argv)
