"""Training on digits that can be picked up at any epoch, in one process."""

import sys

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits


def data():
    images, labels = load_digits(return_X_y=True)
    dataset = tf.data.Dataset.from_tensor_slices(((images / 16).astype("float32"), labels))
    return dataset.shuffle(len(images), seed=1).batch(32, drop_remainder=True)


def main(epochs):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.layers.Input([64]),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dropout(0.25),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    optimizer = keras.optimizers.Adam(0.001)
    model.compile(optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"])

    def train():
        callbacks = []
        model.fit(data(), epochs=epochs, callbacks=callbacks, verbose=2)

    train()
    return sum(float(np.abs(w).sum()) for w in model.get_weights())


if __name__ == "__main__":
    print("weights", main(int(sys.argv[1])))
