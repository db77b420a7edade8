"""Runs an allreduce on two ranks: the last step of the image's build, as the image's user, in the final image."""

import keras

import hvdkit as hvd

hvd.init()
total = float(hvd.allreduce(keras.ops.convert_to_tensor(hvd.rank() + 1.0), op=hvd.Sum))
if hvd.size() != 2 or total != 3.0:
    raise SystemExit(f"rank {hvd.rank()} of {hvd.size()}: the allreduce of 1 and 2 gave {total}")
