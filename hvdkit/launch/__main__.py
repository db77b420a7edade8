"""Runs a command on N ranks, on this host or on many, and leaves with the exit code of the first rank that failed.

python -m hvdkit.launch -np 2 -- python train_mine.py
python -m hvdkit.launch -H host1:4,host2:4 --workdir runs/mine -- python train_mine.py
"""

import importlib.util
import os
import signal
import sys
from collections.abc import Callable

from hvdkit import outcome
from hvdkit.errors import UsageError
from hvdkit.launch import options
from hvdkit.launch.job import Job, Settings, Stopped
from hvdkit.launch.mpi import MpiJob
from hvdkit.launch.options import parser as parser
from hvdkit.launch.restarts import ElasticJob, Roster


def main(argv: list[str]) -> int:
    """Launch the ranks, wait for them, and return the exit code of the first rank that failed, or 0."""
    return launch(options.parse(argv))


def launch(arguments: options.argparse.Namespace) -> int:
    """Launch a parsed command line and return the exit code."""
    try:
        return _launch(arguments)
    except UsageError as error:
        print(f"hvdkit.launch: {error}", file=sys.stderr)
        outcome.tell(outcome.Failed("launch", outcome.USAGE, str(error)))
        return outcome.USAGE
    finally:
        _drop_unwritten_output()


def _launch(arguments: options.argparse.Namespace) -> int:
    if importlib.util.find_spec("horovod") is None:
        raise UsageError(f"{sys.executable} has no Horovod; launch/bootstrap.sh builds and installs it.")
    settings = options.settings(arguments)

    def make(settings: Settings) -> Job:
        return (MpiJob if arguments.mpi else Job)(settings, options.console(arguments))

    policy = options.policy(arguments, settings)
    if policy is None or arguments.dry_run:
        return _run_once(make(settings), arguments.dry_run)
    job = ElasticJob(settings, policy, Roster(lambda: options.discover(arguments), settings.shell), make)
    _receive(job.receive)
    try:
        return job.run()
    except KeyboardInterrupt:
        return job.exit_code


def _run_once(job: Job, is_dry: bool) -> int:
    _receive(job.events.put)
    try:
        job.connect()
        if is_dry:
            print(job.description())
            return 0
        job.start()
        return job.run()
    except Stopped as stopped:
        return stopped.exit_code
    finally:
        job.close()


def _drop_unwritten_output() -> None:
    """Drops output that cannot be written: otherwise Python would try again at its end, and change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, stream.fileno())
            os.close(nothing)


def _receive(take: Callable[[int], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda received, _: take(int(received)))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
