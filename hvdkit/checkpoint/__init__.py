"""Checkpoints: all that a training run must not lose, on disk, so that it can go on in the middle of an epoch.

`hvdkit.callbacks.CheckpointCallback` writes and restores them. Here is what it is made of:

- `store`: a folder a checkpoint, published whole or not at all; which one is used, and which are removed;
- `writer`: the thread that writes while training goes on;
- `plain`: values as JSON and arrays, without pickle;
- `variables`: weights, optimizer slots, metrics and seeds, each rank's own where ranks differ;
- `callback_state`: what Keras' callbacks, hvdkit's and yours remember;
- `randomness`: Python's, NumPy's and Keras' global generators;
- `running_fit`: a running `Model.fit`, made to begin in the middle of an epoch;
- `preemption`: SIGTERM and SIGUSR1.

This file holds nothing, so that `store` can be used without TensorFlow.
"""
