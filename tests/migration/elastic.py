"""Training on digits that can be picked up at any epoch, on ranks that come and go."""

import sys

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import hvdkit as hvd


def data():
    images, labels = load_digits(return_X_y=True)
    dataset = hvd.data.shard(tf.data.Dataset.from_tensor_slices(((images / 16).astype("float32"), labels)))
    return dataset.shuffle(len(images), seed=1).batch(32, drop_remainder=True)


def main(epochs):
    hvd.init()
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.layers.Input([64]),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dropout(0.25),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(hvd.scaled(0.001)))
    model.compile(optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    state = hvd.elastic.KerasState(model, epoch=0, batch=0)

    @hvd.elastic.run
    def train(state):
        callbacks = hvd.callbacks.standard()
        callbacks.append(hvd.elastic.UpdateEpochStateCallback(state))
        callbacks.append(hvd.elastic.UpdateBatchStateCallback(state))
        callbacks.append(hvd.elastic.CommitStateCallback(state, batches_per_commit=10))
        model.fit(data(), epochs=epochs - state.epoch, callbacks=callbacks, verbose=2)

    train(state)
    return sum(float(np.abs(w).sum()) for w in model.get_weights())


if __name__ == "__main__":
    print("weights", main(int(sys.argv[1])))
