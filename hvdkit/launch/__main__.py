"""Runs a command on N ranks under `horovodrun`, and leaves with the exit code of the first rank that failed.

    python -m hvdkit.launch -np 2 -- python train_mine.py

Horovod's runner does the work. What this adds: rank 0's output as the program wrote it, other ranks' with their number
in front, TensorFlow's start-up notices left out, and, when a rank fails, its number and exit code in place of the
runner's own traceback and exit code 1.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import threading

from hvdkit.launch.console import Console


def main(argv: list[str]) -> int:
    """Launches, waits, and returns the exit code: that of the first rank that failed, 0 if none did."""
    arguments = _parse(argv)
    if importlib.util.find_spec("horovod") is None:
        print(
            f"hvdkit.launch: {sys.executable} has no Horovod; launch/bootstrap.sh builds and installs it.",
            file=sys.stderr,
        )
        return 2
    hosts = ["-H", arguments.hosts] if arguments.hosts else []
    # Ranks write to a pipe, so only the launcher knows whether a person is watching.
    watched = {"HVDKIT_PROGRESS": "bar"} if sys.stderr.isatty() else {}
    process = subprocess.Popen(
        [sys.executable, "-m", "hvdkit.launch.runner", "-np", str(arguments.np), "--gloo", *hosts, *arguments.command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **watched},
    )
    console = Console()

    def cancel(received: int, _: object) -> None:
        console.cancelled = received
        process.send_signal(received)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, cancel)
    readers = [
        threading.Thread(target=console.copy, args=(source, target))
        for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    ]
    for reader in readers:
        reader.start()
    code = process.wait()
    for reader in readers:
        reader.join()
    return console.conclude(code)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m hvdkit.launch", description=__doc__.partition("\n")[0])
    parser.add_argument("-np", type=int, required=True, metavar="N", help="number of ranks")
    parser.add_argument("-H", dest="hosts", metavar="h1:2,h2:2", help="hosts and their slots; by default this host")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command that every rank runs")
    arguments = parser.parse_args(argv[1:])
    if arguments.command[:1] == ["--"]:
        del arguments.command[0]
    if not arguments.command:
        parser.error("no command was given; write it behind --, as in: -np 2 -- python train.py")
    if arguments.np < 1:
        parser.error(f"-np {arguments.np}: at least one rank is needed")
    return arguments


if __name__ == "__main__":
    sys.exit(main(sys.argv))
