"""Augmented digits, with a rate that falls on a plateau, validation and evaluation, on many ranks."""

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
    labels = keras.utils.to_categorical(labels, 10)
    training = hvd.data.shard(tf.data.Dataset.from_tensor_slices((images[:1500], labels[:1500])))
    training = training.shuffle(1500, seed=1).batch(32, drop_remainder=True)
    validation = tf.data.Dataset.from_tensor_slices((images[1500:], labels[1500:])).batch(32)

    model = keras.Sequential(
        [
            keras.layers.Input([8, 8, 1]),
            keras.layers.RandomRotation(0.02),
            keras.layers.RandomTranslation(0.08, 0.08),
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adadelta(hvd.scaled(1.0)))
    model.compile(optimizer, loss="categorical_crossentropy", metrics=["accuracy"])

    callbacks = hvd.callbacks.standard(warmup_epochs=1)
    callbacks.append(keras.callbacks.ReduceLROnPlateau(patience=1))
    if hvd.rank() == 0:
        callbacks.append(keras.callbacks.ModelCheckpoint("checkpoint-{epoch}.keras"))
    model.fit(training, validation_data=validation, epochs=epochs, callbacks=callbacks, verbose=2)
    return sum(float(np.abs(w).sum()) for w in model.get_weights())


if __name__ == "__main__":
    print("weights", main(int(sys.argv[1])))
