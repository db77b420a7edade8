"""What ranks tell each other before TensorFlow starts.

TensorFlow's devices and cluster are fixed with the first tensor, and a user's script may still want to set them after
`hvdkit.init`. So Horovod's operations run in a session here, which has a runtime of its own. The pool of threads alone
is shared by all runtimes of a process, and made by the first: it gets the size that was set until then.
"""

import json
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit import world


def introduce(mine: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Returns the dictionaries of all ranks, in their order; TensorFlow's eager runtime is not started.

    Args:
        mine: what this rank tells, of a kind that JSON has.
        name: what it is about; the same on all ranks.
    """
    if world.size() == 1:
        return [mine]
    hvd = world.horovod()
    text = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    on_cpu = tf.compat.v1.ConfigProto(
        device_count={"GPU": 0},  # a GPU's memory is for the model
        intra_op_parallelism_threads=tf.config.threading.get_intra_op_parallelism_threads(),
        inter_op_parallelism_threads=tf.config.threading.get_inter_op_parallelism_threads(),
    )
    with tf.Graph().as_default(), tf.compat.v1.Session(config=on_cpu) as session:
        lengths = hvd.allgather(tf.constant([text.size]), name=f"hvdkit.{name}.lengths")
        texts = hvd.allgather(tf.constant(text), name=f"hvdkit.{name}.texts")
        all_lengths, all_texts = session.run([lengths, texts])
    return [json.loads(part.tobytes()) for part in np.split(all_texts, np.cumsum(all_lengths)[:-1])]
