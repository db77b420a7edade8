"""The main job, `python -m hvdkit.train`: flags, data, model, training and artifacts side by side.

This package loads nothing: `flags` must check a command line without TensorFlow.
"""

import os

# TensorFlow's start-up notices, one set for each rank, would bury what the job prints.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as hvdkit.launch.binding sets it, with or without a launcher
