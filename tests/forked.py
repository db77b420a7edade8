"""Runs Python programs in processes forked from one that has loaded TensorFlow already.

Ranks load TensorFlow for longer than most tests train. `python -S -E forked.py -m package.module ...` and `python -S -E
forked.py program.py ...` do what `python` with these arguments does, but for the loading: this process, of which the
launcher knows, sends its arguments, environment, cores and outputs to a server, which forks; it passes on signals, and
ends as the forked process does. Nothing has been asked of TensorFlow before the fork, as threads would not survive it.

Where a process from the server would not be as `python`'s own, it is `python`'s own: with variables that are read while
modules are loaded, another user, limits, or a network, mounts or control group that are not the server's.

There are two servers, for ranks of even and of odd number: each has a hash seed of its own, as ranks do, and ranks that
rely on the order of a set do not agree by chance.
"""

import array
import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time

ADDRESSES = "HVDKIT_TEST_FORKED"  # the variable with the servers' socket files; without it, all is `python`'s own
NOT_FORKED = {ADDRESSES: ""}  # the environment of programs that die, and whose launcher is to see it at that moment
_LOADING_SECONDS = 180
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_READ_WHILE_LOADING = ("LD_", "PYTHON", "OMP_", "KERAS_", "TF_ENABLE_", "TF_USE_", "TF_FORCE_", "OPENBLAS_")


def command(*arguments):
    """The command in place of `python *arguments`."""
    return [sys.executable, "-S", "-E", __file__, *map(str, arguments)]


# ---------------------------------------------------------------------------------------------- In place of `python`


def stand_in(arguments):
    """Has a server run `python *arguments`, and ends as that does."""
    rank = int(os.environ.get("HOROVOD_RANK", 0))
    servers = os.environ.get(ADDRESSES, "").split(":")
    needs_tensorflow = arguments[0].endswith(".py") or (arguments[0] == "-m" and arguments[1] != "hvdkit.launch")
    connection = _reach(servers[rank % len(servers)]) if needs_tensorflow and servers != [""] else None
    if connection is None:
        os.execv(sys.executable, [sys.executable, *arguments])
    order = {
        "arguments": arguments,
        "surroundings": surroundings(),
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "cores": sorted(os.sched_getaffinity(0)),
    }
    # Signals that come before there is someone to pass them on to wait here.
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
    data = json.dumps(order).encode()
    outputs = array.array("i", [0, 1, 2])
    connection.sendmsg([len(data).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, outputs)])
    connection.sendall(data)
    answers = connection.makefile("rb")
    pid = json.loads(answers.readline() or b"null")
    if pid is None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
        os.execv(sys.executable, [sys.executable, *arguments])
    for number in _PASSED_ON:
        signal.signal(number, lambda number, _: _signal(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    for end in (0, 1, 2):
        os.close(end)  # the outputs are at their end when the other process says so
    code = json.loads(answers.readline())
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _reach(address):
    until = time.monotonic() + _LOADING_SECONDS
    while time.monotonic() < until:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            if not os.path.isdir(os.path.dirname(address)):  # the tests have ended
                return None
            time.sleep(0.1)
        else:
            return connection
    return None


def surroundings():
    """What a forked process has from its server, and cannot change."""
    import resource

    limits = [name for name in sorted(dir(resource)) if name.startswith("RLIMIT_")]
    with open("/proc/self/cgroup") as groups:
        control_groups = groups.read()
    return {
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_READ_WHILE_LOADING) and name != "PYTHONUNBUFFERED"
        },
        "namespaces": [os.readlink(f"/proc/self/ns/{name}") for name in ("net", "mnt", "pid", "uts", "ipc", "user")],
        "control_groups": control_groups,
        "user": [os.getuid(), os.getgid()],
        "limits": [list(resource.getrlimit(getattr(resource, name))) for name in limits],
        "priority": os.getpriority(os.PRIO_PROCESS, 0),
        "umask": _umask(),
        "program": sys.executable,
    }


def _umask():
    os.umask(mask := os.umask(0o077))
    return mask


def _signal(pid, number):
    with contextlib.suppress(ProcessLookupError):  # it has ended, and its code is on its way
        os.killpg(pid, number)


# -------------------------------------------------------------------------------------------------------- The server


def start(folder):
    """Starts both servers, with their sockets and what they say in `folder`."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TF_ENABLE_ONEDNN_OPTS": "1"}  # as launched ranks have it
    environment.pop(ADDRESSES, None)
    addresses = [os.path.join(folder, str(number)) for number in (0, 1)]
    servers = []
    for address in addresses:
        with open(f"{address}.log", "wb") as log:  # TensorFlow greets, in each of them
            program = [sys.executable, __file__, "--serve", address]
            servers.append(subprocess.Popen(program, stdin=subprocess.PIPE, stderr=log, env=environment))
    os.environ[ADDRESSES] = ":".join(addresses)
    return servers


def stop(servers, folder):
    """Ends the servers and what they have forked; returns what servers said that had ended by themselves."""
    import shutil

    said = []
    for number, server in enumerate(servers):
        if server.poll() is not None:
            with open(os.path.join(folder, f"{number}.log")) as log:
                said.append(log.read())
    for server in servers:
        server.communicate()  # it ends when its input is closed
    shutil.rmtree(folder)
    return said


def serve(address):
    """Forks a process for each order that comes in; returns in each such process with what it is to run."""
    import hvdkit.train.run  # noqa: F401 - with TensorFlow, Keras, and all of hvdkit that a training needs

    gc.collect()
    gc.freeze()  # processes that collect garbage would copy all of it otherwise
    own = surroundings()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"{address}.new")
    listener.listen(64)
    os.rename(f"{address}.new", address)
    children = {}  # by the file that tells of a child's end, and by the connection of who asked for it
    while True:
        # The listener is the last: what a new child opens must not pass for what a dead one has closed.
        for ready in select.select([0, *children, listener], [], [])[0]:
            if ready == 0:
                for pid, *_ in children.values():
                    _signal(pid, signal.SIGKILL)
                os._exit(0)
            elif ready in children:
                _bury(*children[ready], children)
            elif ready is listener:
                connection, _ = listener.accept()
                order, outputs = _receive(connection)
                pid = os.fork() if order and order["surroundings"] == own else None
                if pid == 0:
                    _close(listener, *children)
                    return _become(order, outputs, connection)
                _close(*outputs)
                if pid:
                    end = os.pidfd_open(pid)
                    children[end] = children[connection] = (pid, end, connection)
                else:
                    _answer(connection, None)
                    connection.close()


def _close(*files):
    for file in files:
        os.close(file if isinstance(file, int) else file.detach())


def _answer(connection, what):
    with contextlib.suppress(OSError):  # nobody is there to hear of it
        connection.sendall(json.dumps(what).encode() + b"\n")


def _receive(connection):
    """What is to be run, and its outputs; None in place of it if who asks was killed before all of it was said."""
    outputs = array.array("i")
    size, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(3 * outputs.itemsize))
    for *_, files in ancillary:
        outputs.frombytes(files)
    wanted = int.from_bytes(size, "big")
    data = b""
    while part := connection.recv(wanted - len(data)):
        data += part
    return json.loads(data) if data and len(data) == wanted else None, list(outputs)


def _bury(pid, end, connection, children):
    """One of the two has ended: the process, or who asked for it, and with whom it ends."""
    if not os.waitid(os.P_PIDFD, end, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        _signal(pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)  # it may not have a process group of its own yet
    _answer(connection, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    del children[end], children[connection]
    os.close(end)
    connection.close()


def _become(order, outputs, connection):
    import ctypes
    import random

    import numpy

    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the server
    for end, number in zip(outputs, (0, 1, 2), strict=True):
        os.dup2(end, number)
        os.close(end)
    os.chdir(order["directory"])
    os.environ.clear()
    os.environ.update(order["environment"])
    os.sched_setaffinity(0, order["cores"])
    random.seed()
    numpy.random.seed()
    _answer(connection, os.getpid())
    connection.detach()  # open until this process ends; what it starts does not inherit it
    return order["arguments"]


def run(arguments):
    """As `python *arguments`."""
    import runpy

    os.environ["HVDKIT_TEST_PYTHON"] = sys.executable
    sys.executable = os.path.join(os.path.dirname(os.path.abspath(__file__)), "python")
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        run(serve(sys.argv[2]))
    else:
        stand_in(sys.argv[1:])
