"""Injects a fault into a training job on real ranks and hosts, and reports how the job recovers.

    hvdkit drill kill --rank 1 --step 60 -np 2
    hvdkit drill partition --rank 1 --step 60 -H h1:1,h2:1 --model=mnist_mlp --dataset=mnist --data-dir=DIR

    kill        SIGKILL of a rank                         slow        a rank waits 0.2 s before each step
    freeze      SIGSTOP of a rank                         partition   disconnect a rank's host; see --cut and --mend
    term        SIGTERM to a rank, as a scheduler does    disk-full   the checkpoints' disk is full for a while (root)

Other flags are passed to `hvdkit train`. Each rank records hashes of the examples that it trains on. From these the
drill checks that each epoch had each example once. Exit code: 0 if the job succeeded and no example was lost or trained
twice, 1 if not, 2 if the command line is wrong.
"""

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from hvdkit import outcome, reporting
from hvdkit.command.arguments import Parser, new_file
from hvdkit.drill import report
from hvdkit.errors import UsageError
from hvdkit.launch import hosts
from hvdkit.train import flags as train_flags

FAULTS = ("kill", "freeze", "slow", "partition", "disk-full", "term")
_CHILD = "--in-this-process"
_DISK = "32m"
_CUT_SECONDS = 30.0  # with MPI, all ranks restart, so the host must be back by then


def main(argv: list[str]) -> int:
    """Runs the drill, and prints a report and a line of JSON."""
    if argv[1:2] == [_CHILD]:
        from hvdkit.drill import rank

        return rank.main(argv[2], argv[3:])
    arguments, flags = _parse(argv)
    with tempfile.TemporaryDirectory(prefix="hvdkit-drill-") as scratch:
        workdir = Path(arguments.workdir or scratch).resolve()
        notes = workdir / "drill"
        notes.mkdir(parents=True, exist_ok=True)
        if any(notes.iterdir()):
            print(f"hvdkit.drill: {workdir} has a drill already; choose another --workdir.", file=sys.stderr)
            return outcome.USAGE
        with _disk(arguments, workdir), _network(arguments, notes):
            told = Path(scratch) / "outcome.jsonl"
            code = _run(arguments, flags, workdir, notes, told)
        if code == outcome.USAGE:
            return code
        summary = report.make(arguments.fault, workdir, code, outcome.heard(told), flags)
    report.show(summary)
    if arguments.json:
        arguments.json.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return 0 if summary["is_well"] else 1


def parser() -> Parser:
    """The drill's parser; unknown flags belong to the training."""
    made = Parser("drill", description=__doc__)
    made.add_argument("fault", choices=FAULTS)
    made.add_argument("--rank", type=int, default=1, metavar="K", help="the rank with the fault [1; disk-full: 0]")
    made.add_argument("--step", type=int, default=60, metavar="S", help="the step of the fault [60]")
    made.add_argument("-np", type=int, metavar="N", help="number of ranks [all slots of -H, or 2]")
    made.add_argument("-H", dest="hosts", metavar="h1:1,h2:1", help="hosts and their slots [this host]")
    made.add_argument("--mpi", action="store_true", help="use MPI, and restart all ranks [Gloo, elastic]")
    made.add_argument("--launcher", default="", metavar="ARGS", help="additional options for hvdkit launch")
    made.add_argument("--cut", metavar="COMMAND", help="disconnects the host {host} [launch/testhosts.sh cut {host}]")
    made.add_argument("--mend", metavar="COMMAND", help="reconnects it at the end [launch/testhosts.sh mend {host}]")
    made.add_argument("--workdir", metavar="DIR", help="where the job writes; shared by all hosts [temporary]")
    made.add_argument("--json", type=new_file, metavar="FILE", help="write the report to this file, too")
    return made


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    made = parser()
    arguments, flags = made.parse_known_args(argv[1:])
    try:
        flags = train_flags.check(flags, one_strategy=True)
        slots = sum(host.slots for host in hosts.from_list(arguments.hosts)) if arguments.hosts else 2
    except UsageError as error:
        made.error(str(error))
    ranks = slots if arguments.np is None else arguments.np
    if ranks < 1:
        made.error(f"-np {ranks}: at least one rank is needed")
    if not 0 <= arguments.rank < ranks or arguments.step < 1:
        made.error(
            f"--rank {arguments.rank} --step {arguments.step} of {ranks} rank(s): expected are a rank from 0 to "
            f"{ranks - 1}, and a step from 1"
        )
    if arguments.fault == "disk-full" and os.geteuid() != 0:
        made.error("disk-full mounts a small disk for the checkpoints, and needs root for that; run it with sudo")
    if arguments.fault == "partition" and not arguments.hosts:
        made.error("partition cuts one of several hosts off; name them: -H h1:1,h2:1")
    given = " ".join(flags)
    for flag, default in (("checkpoint_every", "20"), ("tensorboard", "false")):
        if f"--{flag}" not in given:
            flags.append(f"--{flag}={default}")
    return arguments, flags


def _run(arguments: argparse.Namespace, flags: list[str], workdir: Path, notes: Path, told: Path) -> int:
    where = ["-H", arguments.hosts] if arguments.hosts else []
    if arguments.np or not arguments.hosts:
        where += ["-np", str(arguments.np or 2)]
    how = ["--mpi", "--restarts", "5"] if arguments.mpi else ["--elastic"]
    rank = 0 if arguments.fault == "disk-full" else arguments.rank
    fault = f"{arguments.fault}:{rank}:{arguments.step}:{notes}"
    timeouts = ["--stall-timeout", "20", "--host-timeout", "10"]
    launcher = [*where, *how, *timeouts, *shlex.split(arguments.launcher), "--workdir", str(workdir)]
    job = [sys.executable, "-m", "hvdkit.drill", _CHILD, fault, *flags, f"--workdir={workdir}"]
    command = [sys.executable, "-m", "hvdkit.launch", *launcher, "--", *job]
    lines = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, outcome.VARIABLE: str(told)},
    ) as process:
        for line in process.stdout or ():
            lines.append(line)
            if "hvdkit.launch: " in line or "hvdkit: " in line:
                print(line, end="", flush=True)
    if process.returncode:
        print("".join(lines)[-3000:], file=sys.stderr)
    return process.returncode


@contextlib.contextmanager
def _disk(arguments: argparse.Namespace, workdir: Path) -> Iterator[None]:
    """Mounts a small disk for the checkpoints, for the fault disk-full."""
    if arguments.fault != "disk-full":
        yield
        return
    checkpoints = workdir / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "hvdkit-drill", str(checkpoints)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(checkpoints)], check=True)


@contextlib.contextmanager
def _network(arguments: argparse.Namespace, notes: Path) -> Iterator[None]:
    """Disconnects a host when its rank has reached the step, for the fault partition."""
    if arguments.fault != "partition":
        yield
        return
    script = f"{shlex.quote(str(Path('launch/testhosts.sh').resolve()))} {{what}} {{host}}"
    commands = {what: getattr(arguments, what) or script.replace("{what}", what) for what in ("cut", "mend")}
    over = threading.Event()
    cut: list[str] = []

    def wait_and_cut() -> None:
        while not over.wait(0.02):
            if fault := reporting.read_json(notes / "fault.json"):
                cut.append(fault["host"])
                _shell(commands["cut"], fault["host"])
                if arguments.mpi and not over.wait(_CUT_SECONDS):
                    _shell(commands["mend"], cut.pop())
                return

    thread = threading.Thread(target=wait_and_cut)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        for host in cut:
            _shell(commands["mend"], host)


def _shell(command: str, host: str) -> None:
    ended = subprocess.run(command.replace("{host}", shlex.quote(host)), shell=True, check=False)
    if ended.returncode:
        print(f"hvdkit.drill: {command!r} failed for {host} with exit code {ended.returncode}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
