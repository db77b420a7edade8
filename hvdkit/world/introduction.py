"""Exchanges data between ranks before TensorFlow's eager runtime starts.

The first tensor fixes TensorFlow's devices and cluster, and a user's script may set them after `hvdkit.init`. So
Horovod's operations run here in a session, which has its own runtime. All runtimes of a process share one thread pool.
The first runtime creates it, with the size that is configured at that time.
"""

import json
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit import world


def introduce(mine: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Returns the dictionaries of all ranks, in the order of the ranks. Does not start TensorFlow's eager runtime.

    Args:
        mine: this rank's dictionary; its values must be valid in JSON.
        name: the name of the collective, the same on all ranks.
    """
    if world.size() == 1:
        return [mine]
    hvd = world.horovod()
    text = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    on_cpu = tf.compat.v1.ConfigProto(
        device_count={"GPU": 0},  # keep GPU memory for the model
        intra_op_parallelism_threads=tf.config.threading.get_intra_op_parallelism_threads(),
        inter_op_parallelism_threads=tf.config.threading.get_inter_op_parallelism_threads(),
    )
    with tf.Graph().as_default(), tf.compat.v1.Session(config=on_cpu) as session:
        lengths = hvd.allgather(tf.constant([text.size]), name=f"hvdkit.{name}.lengths")
        texts = hvd.allgather(tf.constant(text), name=f"hvdkit.{name}.texts")
        all_lengths, all_texts = session.run([lengths, texts])
    return [json.loads(part.tobytes()) for part in np.split(all_texts, np.cumsum(all_lengths)[:-1])]
