"""A model whose building says which process it is, and waits until a test lets it go on."""

import os
import time
from pathlib import Path

from hvdkit_models import mnist_mlp


def build(input_shape, num_classes):
    folder = Path(os.environ["SWEEP_GATE"])
    (folder / f"{os.uname().nodename}-{os.getpid()}").touch()
    while not (folder / "open").exists():
        time.sleep(0.05)
    return mnist_mlp.build(input_shape, num_classes)
