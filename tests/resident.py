"""Resident ranks: the launcher starts them once, and they run the functions of many tests.

Starting a rank takes several seconds of CPU time, and most tests train for less. A `Pool` keeps the ranks of the last
job sizes. A call that fails stops its ranks, and the next call gets new ones.
"""

import collections
import contextlib
import json
import pickle
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from tests import forked

RANK_MAIN = Path(__file__).parent / "parallel" / "rank_main.py"
_KEPT = 2  # number of jobs, of different sizes, that are kept for the next call
_START_SECONDS = 240
_OTHERS_SECONDS = 5  # after one rank fails, time for the other ranks to report their errors
MARK = "resident"  # HVDKIT_TEST of these processes, which belong to no single test


class Pool:
    """The resident ranks of one test process.

    Args:
        environment: the environment variables of the ranks, before any test changes them.
    """

    def __init__(self, environment):
        self._environment = {**environment, "HVDKIT_TEST": MARK, "TF_CPP_MIN_LOG_LEVEL": "2"}
        self._jobs = collections.OrderedDict()

    def call(self, number, file, timeout):
        """Run the call in `file` on `number` ranks, and return their results in the order of ranks."""
        job = self._jobs.pop(number, None) or Ranks(number, self._environment)
        while len(self._jobs) >= _KEPT:
            self._jobs.popitem(last=False)[1].end()
        try:
            job.call(file, timeout)
        except BaseException:
            job.end()
            raise
        self._jobs[number] = job
        return [pickle.loads((file.parent / f"{rank}.pickle").read_bytes()) for rank in range(number)]

    def close(self):
        """Stop all ranks."""
        while self._jobs:
            self._jobs.popitem()[1].end()


class Ranks:
    """The ranks of one job, each connected by a socket."""

    def __init__(self, number, environment):
        self._last = "its start"
        self._folder = tempfile.TemporaryDirectory(prefix="hvdkit-ranks-")
        self._log = Path(self._folder.name, "log")
        address = str(Path(self._folder.name, "socket"))
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, self._log.open("wb") as log:
            listener.bind(address)
            listener.listen(number)
            command = [sys.executable, "-m", "hvdkit.launch", "-np", str(number), "--"]
            command += forked.command(RANK_MAIN, "--serve", address)
            self._launcher = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
            )
            self._connections = []
            self._readers = {}
            self._accept(listener, number)

    def _accept(self, listener, number):
        until = time.monotonic() + _START_SECONDS
        listener.settimeout(1)
        while len(self._connections) < number:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                if self._launcher.poll() is not None or time.monotonic() > until:
                    self.end()
                    pytest.fail(f"{number} ranks did not start; their output:\n{self._said}")
            else:
                self._connections.append(connection)
                reader = connection.makefile("r")
                self._readers[connection] = (json.loads(reader.readline())["rank"], reader)

    def call(self, file, timeout):
        """Run one call on all ranks, then reset their state for the next call."""
        begin = self._log.stat().st_size
        self._ask(json.dumps(str(file)), "the call", timeout, begin)
        self._ask('"begin anew"', "clearing up", 60, begin)
        self._last = file.read_text()

    def _ask(self, order, what, timeout, begin):
        errors = {}
        for connection in self._connections:
            try:
                connection.sendall(order.encode() + b"\n")
            except ConnectionError as error:
                errors[self._readers[connection][0]] = f"{error}: its process ended after {self._last}\n"
                begin = 0  # its last words came before this call
        until = time.monotonic() + (_OTHERS_SECONDS if errors else timeout)
        with selectors.DefaultSelector() as selector:
            for connection in self._connections:
                selector.register(connection, selectors.EVENT_READ)
            while selector.get_map() and time.monotonic() < until:
                for key, _ in selector.select(1):
                    selector.unregister(key.fileobj)
                    rank, reader = self._readers[key.fileobj]
                    line = reader.readline()
                    error = json.loads(line)["error"] if line else "its process ended\n"
                    if error:
                        errors[rank] = error
                        until = min(until, time.monotonic() + _OTHERS_SECONDS)
            waiting = [self._readers[key.fileobj][0] for key in selector.get_map().values()]
        if errors or waiting:
            self.end()
            said = self._said[begin:].decode(errors="replace")
            shown = "".join(f"---- rank {rank}: {error}" for rank, error in sorted(errors.items()))
            late = f"rank(s) {waiting} were not done after {timeout} s\n" if waiting else ""
            pytest.fail(f"{what} failed: {late}{shown}---- their output:\n{said}")

    def end(self):
        """Stop the ranks and keep their output."""
        if not self._log.exists():  # ended before
            return
        for connection in self._connections:
            connection.close()
        for _, reader in self._readers.values():
            reader.close()
        try:
            self._launcher.wait(5)
        except subprocess.TimeoutExpired:
            for process in [*psutil.Process(self._launcher.pid).children(recursive=True), self._launcher]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self._launcher.wait()
        self._said = self._log.read_bytes()
        self._folder.cleanup()
