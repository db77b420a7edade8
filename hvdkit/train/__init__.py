"""The main job, `python -m hvdkit.train`: flags, data, model, training and artifacts.

This file imports only `os`, because `flags` must check a command line without loading TensorFlow.
"""

import os

# Hides TensorFlow's start-up messages of every rank, among which the job's own output is hard to find.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as in hvdkit.launch.binding, for runs without a launcher
