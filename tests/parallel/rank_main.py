"""The program of each rank in parallel tests: call test functions and write their results to files.

`rank_main.py CALL.json` makes one call. `rank_main.py --serve SOCKET` makes all calls that `tests/resident.py`
requests. After each call it shuts Horovod down and clears Keras, so every call starts from the same state.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to import `tests.conftest`, as under pytest


def call(file):
    """Make the call that the file describes, and write its result beside the file."""
    what = json.loads(file.read_text())
    os.environ.update(what["environment"])
    spec = importlib.util.spec_from_file_location("rank_program", what["file"])
    module = importlib.util.module_from_spec(spec)
    sys.modules["rank_program"] = module  # TensorFlow's AutoGraph looks here for a function's source
    spec.loader.exec_module(module)
    returned = getattr(module, what["function"])(**what["arguments"])
    file.with_name(f"{_rank()}.pickle").write_bytes(pickle.dumps(returned))


def serve(address):
    """Make one call after another until the socket closes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(address)
        orders = connection.makefile("r")

        def say(**what):
            connection.sendall(json.dumps(what).encode() + b"\n")

        import hvdkit.train.run  # noqa: F401 - most calls need it

        gc.freeze()  # otherwise each garbage collection would scan all objects of TensorFlow
        say(rank=_rank())
        for order in orders:
            # In two steps, because no rank may shut Horovod down before all calls have returned.
            say(error=_attempt(call, Path(json.loads(order))))
            if not orders.readline():
                return
            say(error=_attempt(_begin_anew))


def _rank():
    return int(os.environ.get("HOROVOD_RANK", 0))


def _attempt(function, *arguments):
    """Call the function; return the traceback if it raises, or else None. Restore the environment and folder."""
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
    keras.backend.clear_session()  # this also collects garbage
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
