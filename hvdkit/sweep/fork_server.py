"""The sweep's fork server: `python -m hvdkit.sweep.fork_server` loads TensorFlow once and forks one process per task.

It serves tasks of one rank on this host, since loading TensorFlow often takes longer than the training. Do not call
TensorFlow before the fork: its threads and GPU contexts do not survive it. Each task has its own process, session and
cores. A task that crashes or is killed affects neither this process nor other tasks. All tasks end with this process,
and this process ends with the sweep.

The input is lines of JSON, {"id", "argv", "cores", "env", "log"}. The output is {"id", "pid"} when a task has started,
and {"id", "code"} when it has ended, with the exit code as in `subprocess`.
"""

import ctypes
import json
import os
import selectors
import signal
import sys
import traceback
from typing import Any

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    """Serves until its input closes, then kills all tasks."""
    from hvdkit.train.__main__ import main as train

    running: dict[int, int] = {}  # tasks, by process id
    awake, alarm = os.pipe()
    for end in (0, awake, alarm):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    selector.register(awake, selectors.EVENT_READ)
    incoming = b""
    while True:
        for key, _ in selector.select():
            data = os.read(key.fd, 1 << 16)
            if key.fd == 0:
                if not data:
                    _kill(running)
                    return 0
                *lines, incoming = (incoming + data).split(b"\n")
                for line in lines:
                    order = json.loads(line)
                    pid = _fork(train, order)
                    running[pid] = order["id"]
                    _say({"id": order["id"], "pid": pid})
        _reap(running)


def _fork(train: Any, order: dict[str, Any]) -> int:
    fork_server = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != fork_server:
            os._exit(1)
        _become_task(order)
        code = train(["hvdkit.train", *order["argv"]])
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # skips the exit handlers of the fork server


def _become_task(order: dict[str, Any]) -> None:
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for end, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(end, target)
    os.environ.update(order["env"])
    if order["cores"]:
        os.sched_setaffinity(0, order["cores"])


def _reap(running: dict[int, int]) -> None:
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            _kill({pid: 0})  # its remaining processes
            _say({"id": running.pop(pid), "code": os.waitstatus_to_exitcode(status)})


def _kill(running: dict[int, int]) -> None:
    for pid in running:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _say(what: dict[str, int]) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
