"""What the ranks of test_watchdog.py run: `watchdog_program.py FUNCTION [ARGUMENT...]`."""

import os
import signal
import sys
import threading
import time

import keras
import numpy as np
import tensorflow as tf

import hvdkit as hvd
from hvdkit import collectives, watchdog


class Mark(keras.callbacks.Callback):
    """Tells the watchdog where `fit` is, and does something in a step of a rank."""

    def __init__(self, what=lambda: None, rank=None, step=3):
        super().__init__()
        self.what, self.rank, self.step = what, rank, step
        self.epoch = 0

    def on_train_begin(self, logs=None):
        watchdog.in_phase("training")

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        watchdog.at_step(self.epoch, batch)
        if batch == self.step and hvd.rank() == self.rank:
            self.what()

    def on_train_end(self, logs=None):
        watchdog.in_phase("between")


def fit(steps, *callbacks):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Input([4]), keras.layers.Dense(1)])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), loss="mse", jit_compile=False)
    data = tf.data.Dataset.from_tensors((np.ones([2, 4]), np.ones([2, 1]))).repeat(steps)
    model.fit(data, verbose=0, shuffle=False, callbacks=[*(callbacks or [Mark()])])


def allreduce(name, shape=(1,)):
    return collectives.allreduce_sum(np.zeros(shape), name)


def only_rank_0():
    def best():
        allreduce("best_loss")

    fit(3, Mark(best, 0, step=1))


def other_order():
    for name in ("loss", "weight") if hvd.rank() == 0 else ("weight", "loss"):
        allreduce(name)
    time.sleep(60)


def raise_in_fit(rank):
    def fail():
        time.sleep(2)  # the others are in the exchange by now
        raise ValueError("no such label: 17")

    fit(8, Mark(fail, int(rank)))


def die_in_fit(rank, name):
    def die():
        time.sleep(2)
        os.kill(os.getpid(), getattr(signal, name))

    fit(8, Mark(die, int(rank)))


def other_models():
    """In a loop of one's own nothing compares the models before the first exchange."""
    watchdog.in_phase("training")
    watchdog.at_step(0, 0)
    head = keras.layers.Dense(3 + hvd.rank(), name="head")
    head.build([None, 4])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    optimizer.build(head.trainable_variables)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(head(tf.ones([2, 4])))
        optimizer.apply(tape.gradient(loss, head.trainable_variables), head.trainable_variables)

    while True:
        step()
        time.sleep(0.1)


def many_stalls():
    """With HVDKIT_STALL_ACTION=warn: one stall after the other, each of which ends when a rank gives in."""
    hvd_lib = hvd.world.horovod()
    calls = {
        "loss": lambda: hvd_lib.allreduce(tf.zeros([1]), name="loss"),
        "seed": lambda: hvd_lib.broadcast(tf.zeros([1]), 0, name="seed"),
    }

    def call(name):
        with watchdog.waiting(name):
            calls[name]()

    if hvd.rank() == 1:  # the other way round, until a thread helps
        late = threading.Timer(9, calls["loss"])
        late.start()
        call("seed")
        late.join()
    else:
        call("loss")
        call("seed")
    own_loop(0, 3 if hvd.rank() == 0 else 5)  # uneven data; rank 0 takes the missing steps later
    if hvd.rank() == 0:
        time.sleep(9)
        own_loop(3, 5)
    hvd.barrier()
    if hvd.rank() == 1:
        list(slow_input())
    hvd.barrier()
    mismatched_shapes()


def uneven_generators(validates):
    """`fit` cannot know how many batches a generator has."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Input([4]), keras.layers.Dense(1)])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), loss="mse", jit_compile=False)
    batch = np.ones([2, 4]), np.ones([2, 1])
    validation = {"validation_data": batch} if validates == "validates" else {}
    model.fit((batch for _ in range(3 + 2 * hvd.rank())), verbose=0, **validation)


@tf.function
def exchange(value):  # a constant's exchange would be folded into the graph, and run once
    return hvd.world.horovod().allreduce(value, name="step", ignore_name_scope=True)


def own_loop(first, last):
    """As `fit`, which would refuse uneven data."""
    watchdog.in_phase("training")
    for step in range(first, last):
        watchdog.at_step(0, step)
        exchange(tf.zeros([1]))
    watchdog.in_phase("between")


def slow_input():
    def examples():
        time.sleep(9)  # a slow disk
        yield 1.0

    return tf.data.Dataset.from_generator(examples, output_signature=tf.TensorSpec([]))


def mismatched_shapes():
    try:
        allreduce("validation", (2 + hvd.rank(),))
    except tf.errors.FailedPreconditionError as error:
        print("explained:", watchdog.explain(error), flush=True)
    hvd.barrier()


def healthy(end):
    fit(3)
    hvd.barrier()
    if end == "again":
        hvd.shutdown()
        hvd.init()
        hvd.barrier()
    if hvd.rank() == 1:
        time.sleep(1)  # ranks end at different times
        if end == "os._exit":
            os._exit(0)
    if end == "hub" and hvd.rank() == 0:
        os._exit(0)
    if end == "sys.exit":
        sys.exit(0)


def no_door():
    hvd.barrier()
    print("went on", watchdog.reason(0), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "no_door" and os.environ["HOROVOD_RANK"] == "1":
        watchdog.own_address = lambda world: "192.0.2.1"  # not this host's: it cannot be listened on
    hvd.init()
    globals()[sys.argv[1]](*sys.argv[2:])
