"""Checkpoints: the complete state of a training run on disk. A run can resume in the middle of an epoch.

`hvdkit.callbacks.CheckpointCallback` writes and restores them. It uses these modules:

- `store`: one folder for each checkpoint, published atomically; which one is used, and which are removed;
- `writer`: the thread that writes while training continues;
- `lock`: one job at a time in a directory;
- `plain`: values as JSON and arrays, without pickle;
- `variables`: weights, optimizer slots, metrics and seeds; one value for each rank where ranks differ;
- `callback_state`: the state of callbacks (Keras', hvdkit's and yours), and of attributes of your layers and metrics;
- `learnt`: what layers have learnt in `adapt`;
- `rates`: learning rates, with another number of ranks;
- `best`: which epochs are among the best;
- `randomness`: the global random generators of Python, NumPy and Keras;
- `running_fit`: makes a running `Model.fit` start in the middle of an epoch;
- `preemption`: SIGTERM and SIGUSR1.

This file imports nothing, so `store` can be used without TensorFlow.
"""
