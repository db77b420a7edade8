"""What each rank of a parallel test runs: calls functions of tests, and writes down what they returned.

`rank_main.py CALL.json` makes one call. `rank_main.py --serve SOCKET` makes all that `tests/resident.py` asks for, one
after another; Horovod is shut down and Keras is cleared after each, so that every call begins as the first one did.
"""

import contextlib
import gc
import importlib.util
import json
import os
import pickle
import socket
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `tests.conftest`, as pytest has it


def call(file):
    """Calls what the file says, and writes what it returned beside it."""
    what = json.loads(file.read_text())
    os.environ.update(what["environment"])
    spec = importlib.util.spec_from_file_location("rank_program", what["file"])
    module = importlib.util.module_from_spec(spec)
    sys.modules["rank_program"] = module  # where TensorFlow's autograph looks for the source of a function
    spec.loader.exec_module(module)
    returned = getattr(module, what["function"])(**what["arguments"])
    file.with_name(f"{_rank()}.pickle").write_bytes(pickle.dumps(returned))


def serve(address):
    """Makes one call after another, until the socket closes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(address)
        orders = connection.makefile("r")

        def say(**what):
            connection.sendall(json.dumps(what).encode() + b"\n")

        import hvdkit.train.run  # noqa: F401 - what most calls need

        gc.freeze()  # collecting garbage would look at all of TensorFlow each time
        say(rank=_rank())
        for order in orders:
            # In two steps: no rank shuts Horovod down before all have returned.
            say(error=_attempt(call, Path(json.loads(order))))
            if not orders.readline():
                return
            say(error=_attempt(_begin_anew))


def _rank():
    return int(os.environ.get("HOROVOD_RANK", 0))


def _attempt(function, *arguments):
    """The traceback of what went wrong, or None."""
    environment, folder = dict(os.environ), Path.cwd()
    try:
        function(*arguments)
    except Exception:
        return traceback.format_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
    return None


def _begin_anew():
    import keras
    import psutil
    import tensorflow as tf

    import hvdkit as hvd

    hvd.shutdown()
    keras.backend.clear_session()  # it collects garbage, too
    keras.config.set_dtype_policy("float32")
    tf.config.run_functions_eagerly(False)
    if left := psutil.Process().children():
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        raise RuntimeError(f"the test left processes running: {left}")


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
    else:
        call(Path(sys.argv[1]))
