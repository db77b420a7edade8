"""Horovod's runner, without its question whether Gloo is there: what `hvdkit.launch` starts in place of `horovodrun`.

`horovodrun` asks that by importing TensorFlow in a process of its own, for seconds, before the first rank starts. A
rank without Gloo says so itself, and `launch/bootstrap.sh` always builds it.
"""

import sys

from horovod.runner import launch

if __name__ == "__main__":
    launch.gloo_built = lambda verbose=False: True
    sys.exit(launch.run_commandline())
