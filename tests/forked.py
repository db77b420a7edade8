"""Run Python programs in processes forked from a server that has already imported TensorFlow.

Importing TensorFlow takes longer than most tests train. Use `python -S -E forked.py -m package.module ...` or
`python -S -E forked.py program.py ...` in place of `python` with the same arguments:

- The launcher starts this process, the stand-in. It sends its arguments, environment, cores and outputs to a server.
- The server forks a process that runs the program, on the stand-in's test host.
- The stand-in forwards signals to the forked process, and exits with its exit code or signal.

The server runs no TensorFlow operation before it forks, because threads do not survive a fork.

Some programs need a real `python` process, because a forked one would differ. Then the stand-in runs `python` itself:
if the server has another user, limits or control group, if variables that are read during imports differ, or if the
forked process may not join the host.

There are two servers, one for even ranks and one for odd ranks. Each has its own hash seed, as real ranks do, so tests
detect ranks that rely on the order of a set.
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

ADDRESSES = "HVDKIT_TEST_FORKED"  # variable with the servers' socket files; without it, `python` runs
NOT_FORKED = {ADDRESSES: ""}  # environment for programs whose launcher must see their death at once
_LOADING_SECONDS = 180
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_JOINED = ("net", "uts", "ipc", "mnt")  # namespaces; mounts last, because /proc may be another one then
_READ_WHILE_LOADING = ("LD_", "PYTHON", "OMP_", "KERAS_", "TF_ENABLE_", "TF_USE_", "TF_FORCE_", "OPENBLAS_")


def command(*arguments):
    """Return the command to run in place of `python *arguments`."""
    return [sys.executable, "-S", "-E", __file__, *map(str, arguments)]


# ---------------------------------------------------------------------------------------------- In place of `python`


def stand_in(arguments):
    """Let a server run `python *arguments`, and exit with the same exit code or signal."""
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
        "process": os.getpid(),
    }
    # Block signals until there is a process to forward them to.
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
        os.close(end)  # then readers see the end of the output when the forked process closes it
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
            if not os.path.isdir(os.path.dirname(address)):  # the test run has ended
                return None
            time.sleep(0.1)
        else:
            return connection
    return None


def surroundings():
    """Return the properties of this process that a forked process inherits and cannot change."""
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
        "namespaces": [os.readlink(f"/proc/self/ns/{name}") for name in ("pid", "user")],
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
    with contextlib.suppress(ProcessLookupError):  # it has ended; the server sends its exit code
        os.killpg(pid, number)


# -------------------------------------------------------------------------------------------------------- The server


def start(folder):
    """Start both servers, with their sockets and logs in `folder`."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TF_ENABLE_ONEDNN_OPTS": "1"}  # as in launched ranks
    environment.pop(ADDRESSES, None)
    addresses = [os.path.join(folder, str(number)) for number in (0, 1)]
    servers = []
    for address in addresses:
        with open(f"{address}.log", "wb") as log:  # TensorFlow logs messages when imported
            program = [sys.executable, __file__, "--serve", address]
            servers.append(subprocess.Popen(program, stdin=subprocess.PIPE, stderr=log, env=environment))
    os.environ[ADDRESSES] = ":".join(addresses)
    return servers


def stop(servers, folder):
    """Stop the servers and their forked processes; return the logs of servers that had already ended."""
    import shutil

    said = []
    for number, server in enumerate(servers):
        if server.poll() is not None:
            with open(os.path.join(folder, f"{number}.log")) as log:
                said.append(log.read())
    for server in servers:
        server.communicate()  # a server exits when its input is closed
    shutil.rmtree(folder)
    return said


def serve(address):
    """Fork a process for each request. In the forked process, return the arguments to run."""
    import hvdkit.train.run  # noqa: F401 - imports TensorFlow, Keras, and the parts of hvdkit that training needs

    gc.collect()
    gc.freeze()  # otherwise garbage collection in a forked process would copy all memory pages
    own = surroundings()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"{address}.new")
    listener.listen(64)
    os.rename(f"{address}.new", address)
    children = {}  # by the pidfd of the child, and by the connection of its stand-in
    while True:
        # Handle the listener last: a new child may get the file descriptor number of one that this loop has closed.
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
    with contextlib.suppress(OSError):  # the stand-in has ended
        connection.sendall(json.dumps(what).encode() + b"\n")


def _receive(connection):
    """Return the request and its outputs; the request is None if the stand-in was killed before it was complete."""
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
    """Clean up after the child or its stand-in has ended. If the stand-in ended first, kill the child."""
    if not os.waitid(os.P_PIDFD, end, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        _signal(pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)  # the child may not have its own process group yet
    _answer(connection, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    del children[end], children[connection]
    os.close(end)
    connection.close()


def _become(order, outputs, connection):
    import ctypes
    import random

    import numpy

    os.setsid()
    library = ctypes.CDLL(None, use_errno=True)
    library.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: the kernel kills it when the server ends
    if not _join_namespaces(library, order["process"]):
        _answer(connection, None)  # the stand-in runs `python`
        os._exit(0)
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
    connection.detach()  # keep it open until this process ends; its child processes do not inherit it
    return order["arguments"]


def _join_namespaces(library, process):
    """Move this process to the test host of another one; return whether that is allowed."""
    there = [f"/proc/{process}/ns/{name}" for name in _JOINED]
    names = zip(there, (f"/proc/self/ns/{name}" for name in _JOINED), strict=True)
    files = [os.open(theirs, os.O_RDONLY) for theirs, ours in names if os.readlink(theirs) != os.readlink(ours)]
    joined = all(library.setns(file, 0) == 0 for file in files)
    _close(*files)
    return joined


def run(arguments):
    """Run a program as `python *arguments` does."""
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
