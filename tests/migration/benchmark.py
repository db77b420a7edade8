"""Images a second on made-up images, on many ranks."""

import sys
import time

import keras
import numpy as np
import tensorflow as tf

import hvdkit as hvd


class Timing(keras.callbacks.Callback):
    """Prints the throughput of each epoch."""

    def __init__(self, images):
        super().__init__()
        self.images = images

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        print(f"epoch {epoch}: {self.images / (time.perf_counter() - self.start):.1f} images/s")


def main(epochs, batch=8, steps=4):
    hvd.init()
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.layers.Input([32, 32, 3]),
            keras.layers.Conv2D(16, 3, strides=2, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(hvd.scaled(0.01)))
    model.compile(optimizer, loss="sparse_categorical_crossentropy")

    images = tf.random.uniform([batch, 32, 32, 3])
    labels = tf.random.uniform([batch, 1], maxval=10, dtype=tf.int64)
    dataset = tf.data.Dataset.from_tensor_slices((images, labels)).cache().repeat().batch(batch)

    callbacks = hvd.callbacks.standard()
    if hvd.rank() == 0:
        callbacks.append(Timing(batch * steps * hvd.size()))
    model.fit(dataset, steps_per_epoch=steps, epochs=epochs, callbacks=callbacks, verbose=0)
    return sum(float(np.abs(w).sum()) for w in model.get_weights())


if __name__ == "__main__":
    print("weights", main(int(sys.argv[1])))
