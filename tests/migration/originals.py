"""What has to change in Horovod's own Keras 2 examples: one import, and what Keras 3 no longer has.

Run as a program, it runs one migrated example on a small MNIST in place of the download:

    python originals.py SCRIPT MNIST.npz [the script's own arguments]
"""

import re
import runpy
import sys

# (what is replaced, by what, why)
IMPORT = (
    r"^import horovod(?:\.tensorflow)?\.keras as hvd$",
    "import hvdkit as hvd",
    "the one line",
)
KERAS_3 = [
    (
        r",\s*experimental_run_tf_function=False",
        "",
        "an argument of compile that TensorFlow 2.0 needed and Keras 3 refuses",
    ),
    (
        r"^(?:# Horovod: pin GPU.*\n)?config = tf\.ConfigProto\(\)\n(?:config\..*\n)+K\.set_session\(.*\)\n",
        "",
        "sessions are TensorFlow 1; hvd.init() pins the GPU",
    ),
    (
        r"^from keras\.preprocessing\.image import ImageDataGenerator$",
        "from tensorflow.keras.preprocessing.image import ImageDataGenerator",
        "Keras 3 keeps it under tf.keras alone",
    ),
    (r"\(lr=", "(learning_rate=", "the argument's name in Keras 3"),
    (r"\.fit_generator\(", ".fit(", "fit takes generators"),
    (
        r"tf\.keras\.backend\.set_value\((\S+)\.lr,\s*(.*)\)$",
        r"\1.learning_rate = \2",
        "the attribute's name in Keras 3, which is assigned to",
    ),
]
# So that a test takes seconds: nothing of this is part of the migration.
SHORTER = [(r"500 // hvd\.size\(\)", "6 // hvd.size()"), (r"epochs=24\b", "epochs=2"), (r"12\.0 / ", "2.0 / ")]


def migrate(source):
    """Returns the migrated source, and why each kind of line changed."""
    reasons = []
    for pattern, replacement, reason in [IMPORT, *KERAS_3]:
        source, count = re.subn(pattern, replacement, source, flags=re.MULTILINE)
        if count:
            reasons.append(reason)
    return source, reasons


def shorten(source):
    for pattern, replacement in SHORTER:
        source = re.sub(pattern, replacement, source)
    return source


def run(script, mnist, arguments):
    import keras.src.datasets.mnist

    keras.src.datasets.mnist.get_file = lambda *_, **__: mnist  # the file that it would download
    sys.argv = [script, *arguments]
    variables = runpy.run_path(script, run_name="__main__")
    model = variables.get("model")
    if model is not None:
        import numpy as np

        print("weights", sum(float(np.abs(w).sum()) for w in model.get_weights()))


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], sys.argv[3:])
