"""A convolutional network on handwritten digits, on many ranks."""

import sys

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import hvdkit as hvd


def main(epochs):
    hvd.init()
    keras.utils.set_random_seed(1)
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16).astype("float32")
    dataset = hvd.data.shard(tf.data.Dataset.from_tensor_slices((images, labels)))
    dataset = dataset.shuffle(len(images), seed=1).batch(32, drop_remainder=True)

    model = keras.Sequential(
        [
            keras.layers.Input([8, 8, 1]),
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.MaxPooling2D(2),
            keras.layers.Dropout(0.25),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(hvd.scaled(0.001)))
    model.compile(optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"])

    callbacks = hvd.callbacks.standard(warmup_epochs=1)
    if hvd.rank() == 0:
        callbacks.append(keras.callbacks.ModelCheckpoint("checkpoint-{epoch}.keras"))
    model.fit(dataset, epochs=epochs, callbacks=callbacks, verbose=2)
    return sum(float(np.abs(w).sum()) for w in model.get_weights())


if __name__ == "__main__":
    print("weights", main(int(sys.argv[1])))
