"""Trains one model on two ranks with different data and prints each rank's weights' checksum: are they one model?

.venv/bin/horovodrun -np 2 .venv/bin/python tests/parallel/two_ranks.py horovod.tensorflow.keras
.venv/bin/horovodrun -np 2 .venv/bin/python tests/parallel/two_ranks.py hvdkit
"""

import hashlib
import importlib
import sys

import keras
import numpy as np

hvd = importlib.import_module(sys.argv[1])
hvd.init()
keras.utils.set_random_seed(0)
model = keras.Sequential([keras.layers.Input([8]), keras.layers.Dense(3)])
model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(0.01)), loss="mse", jit_compile=False)
examples = np.random.default_rng(hvd.rank()).normal(size=(64, 8)).astype("float32")
model.fit(examples, examples[:, :3], epochs=2, verbose=0)
checksum = hashlib.sha256(b"".join(w.tobytes() for w in model.get_weights())).hexdigest()
print(f"rank {hvd.rank()} has the weights {checksum[:16]}")
