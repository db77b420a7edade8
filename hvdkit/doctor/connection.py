"""The doctor's connection to one host: starts the probe there, over ssh if needed, and asks it questions."""

import contextlib
import json
import secrets
import shlex
import subprocess
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from hvdkit.doctor import probe
from hvdkit.launch.shells import Ssh

LIFETIME_SECONDS = 420  # a probe ends by itself after this time, even if the doctor has died
# Reads the program from standard input, where no other user of the host can see it.
LOADER = "import sys;exec(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())).decode())"
_MOST_COMPLAINTS = 4000  # the last characters of ssh's error output that are kept
_NO_PYTHON = 127


class Lost(Exception):  # noqa: N818 - says what happened
    """There is no connection, or no answer in time. The message says why."""


class Connection:
    """A probe on one host.

    Args:
        host: its name, as the user gave it.
        ssh: how to reach it; None for this host.
        python: the interpreter that the job uses there. If it is missing, the probe runs with python3.
        token: the secret by which the probes of one examination recognize each other.
    """

    def __init__(self, host: str, ssh: Ssh | None, python: str, token: str) -> None:
        self.host = host
        self.hello: Future[dict[str, Any]] = Future()
        self._pending: dict[str, Future[Any]] = {}
        self._lock = threading.Lock()
        self._said = ""
        choice = f'p={shlex.quote(python)}; [ -x "$p" ] || p=python3; exec "$p" -I -S -c {shlex.quote(LOADER)}'
        program = ["sh", "-c", choice]
        self._process = subprocess.Popen(
            program if ssh is None else ssh.command(host, shlex.join(program)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C goes to the doctor only, which then closes the connection
        )
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._read_complaints, self._read)]
        for thread in self._threads:
            thread.start()
        source = Path(probe.__file__).read_bytes()
        begin = {"name": host, "token": token, "lifetime": LIFETIME_SECONDS}
        self._write(b"%d\n" % len(source) + source + json.dumps(begin).encode() + b"\n")

    def ask(self, what: str, **arguments: Any) -> "Future[Any]":
        """Asks for `Probe.answer_<what>`; the future raises `Lost` if there is no answer."""
        number, future = secrets.token_hex(4), Future[Any]()
        with self._lock:
            self._pending[number] = future
        self._write(json.dumps({"id": number, "do": what, "with": arguments}).encode() + b"\n")
        if self._process.poll() is not None:
            self._give_up()
        return future

    def close(self) -> None:
        """Ends the probe. A probe that cannot be reached ends by itself."""
        with contextlib.suppress(OSError, ValueError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(3)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for thread in self._threads:
            thread.join(2)

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(OSError, ValueError), self._lock:  # the reader reports why the probe is gone
            if self._process.stdin is not None:
                self._process.stdin.write(data)
                self._process.stdin.flush()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            try:
                content = json.loads(line)
            except ValueError:  # output of the shell's start-up files
                continue
            if not isinstance(content, dict):
                continue
            if "hello" in content:
                self.hello.set_result(content["host"])
            future = self._pending.pop(content.get("id", ""), None)
            if future is not None and "problem" in content:
                future.set_exception(Lost(content["problem"]))
            elif future is not None:
                future.set_result(content["answer"])
        self._give_up()

    def _read_complaints(self) -> None:
        for line in self._process.stderr or ():
            self._said = (self._said + line.decode(errors="replace"))[-_MOST_COMPLAINTS:]

    def _give_up(self) -> None:
        code = self._process.wait()
        self._threads[0].join(2)
        why = Lost(self._said.strip() or f"the connection ended with {code}")
        with self._lock:
            waiting, self._pending = [self.hello, *self._pending.values()], {}
        for future in waiting:
            if not future.done():
                future.set_exception(why)
