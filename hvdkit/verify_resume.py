"""Verifies exact resume: trains once without interruption, once with kills and resumes, and compares bit for bit.

    hvdkit verify-resume -np 2 --kills=3 --model=mnist_mlp --epochs=5
    hvdkit verify-resume -np 1 --strategy=mirrored

Other flags are passed to `hvdkit train`. Each kill is a SIGKILL of a random rank at a random step; the launcher ends
the other ranks. The final weights, the history and the losses of all steps are compared.

Exit code: 0 if all are equal, 1 if not or if a run failed, 2 if the command line is wrong.
"""

import argparse
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from hvdkit import outcome, reporting
from hvdkit.command.arguments import Parser, new_file
from hvdkit.errors import UsageError
from hvdkit.train import flags as train_flags

_CHILD = "--kill-in-this-process"


@dataclasses.dataclass(frozen=True)
class Kill:
    """A kill of `rank`, `delay` seconds after the execution that reaches `step`."""

    step: int
    rank: int
    delay: float


@dataclasses.dataclass(frozen=True)
class Run:
    """The outcome of one run of the job."""

    kill: Kill | None
    went_on_from: int | None
    code: int


def main(argv: list[str]) -> int:
    """Runs the job several times, prints a table and JSON, and compares."""
    if argv[1:2] == [_CHILD]:
        step, rank, delay = argv[2].split(":")
        return _train_and_die(Kill(int(step), int(rank), float(delay)), argv[3:])
    arguments, flags = _parse(argv)
    with tempfile.TemporaryDirectory(prefix="hvdkit-resume-") as scratch:
        workdir = Path(arguments.workdir or scratch)
        undisturbed, killed = workdir / "undisturbed", workdir / "killed"
        reference = _run(arguments.np, flags, undisturbed, None)
        if reference.code:
            return outcome.USAGE if reference.code == outcome.USAGE else 1
        steps = json.loads((undisturbed / "result.json").read_text())["steps"]
        runs = [_run(arguments.np, flags, killed, kill) for kill in _draw(arguments, steps)]
        runs.append(_run(arguments.np, flags, killed, None))
        if runs[-1].code:
            return 1
        return _report(reference, runs, _compare(undisturbed, killed), arguments.json)


def parser() -> Parser:
    """The job's parser; unknown flags belong to the training."""
    made = Parser("verify_resume", description=__doc__)
    made.add_argument("-np", type=int, default=2, metavar="N", help="number of ranks [2]")
    made.add_argument("--kills", type=int, default=3, help="how often the job is killed [3]")
    made.add_argument("--kill-seed", type=int, default=None, help="seed of the random kills [the clock]")
    made.add_argument("--workdir", help="where to write and keep the two runs [a temporary folder]")
    made.add_argument("--json", type=new_file, help="write the result to this file, too")
    return made


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    made = parser()
    arguments, flags = made.parse_known_args(argv[1:])
    try:
        flags = train_flags.check(flags)
    except UsageError as error:
        made.error(str(error))
    if arguments.np < 1 or arguments.kills < 1:
        made.error(f"-np and --kills must be 1 or more, but are {arguments.np} and {arguments.kills}")
    given = " ".join(flags)
    for flag, default in (("checkpoint_every", "10"), ("tensorboard", "false")):
        if f"--{flag}" not in given:
            flags.append(f"--{flag}={default}")
    return arguments, flags


def _draw(arguments: argparse.Namespace, steps: int) -> list[Kill]:
    """Random kills, in ascending order of steps: a resumed run must be able to reach the next one."""
    chance = random.Random(arguments.kill_seed)
    chosen = sorted(chance.sample(range(1, steps + 1), min(arguments.kills, steps)))
    return [Kill(step, chance.randrange(arguments.np), chance.choice([0.0, 0.01, 0.05])) for step in chosen]


def _run(ranks: int, flags: list[str], workdir: Path, kill: Kill | None) -> Run:
    program = ["-m", "hvdkit.train"]
    if kill:
        program = ["-m", "hvdkit.verify_resume", _CHILD, f"{kill.step}:{kill.rank}:{kill.delay}"]
    launcher = [sys.executable, "-m", "hvdkit.launch", "-np", str(ranks), "--"] if ranks > 1 else []
    command = [*launcher, sys.executable, *program, *flags, f"--workdir={workdir}"]
    with tempfile.TemporaryDirectory(prefix="hvdkit-resume-") as scratch:
        told = Path(scratch) / "outcome.jsonl"
        env = {**os.environ, outcome.VARIABLE: str(told)}
        ended = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=env
        )
        resumed = next((one.step for one in outcome.heard(told) if isinstance(one, outcome.Resumed)), None)
    run = Run(kill, resumed, ended.returncode)
    if ended.returncode and not kill:
        print(ended.stdout[-4000:], file=sys.stderr)
        print(f"hvdkit.verify_resume: training failed with exit code {ended.returncode}; see above.", file=sys.stderr)
    began, disturbed_by = _told(run)
    print(f"began at {began}; disturbed by: {disturbed_by}; exit code {run.code}", file=sys.stderr, flush=True)
    return run


def _told(run: Run) -> tuple[str, str]:
    """Where a run began, and what interrupted it."""
    began = "the beginning" if run.went_on_from is None else f"step {run.went_on_from}"
    return began, f"rank {run.kill.rank} killed at step {run.kill.step}" if run.kill else "nothing"


def _compare(undisturbed: Path, killed: Path) -> dict[str, bool]:
    results = [json.loads((folder / "result.json").read_text()) for folder in (undisturbed, killed)]
    equal = {f"{name}": results[0][name] == results[1][name] for name in ("weights_sha256", "train_loss", "test_loss")}
    for name in ("history.csv", "loss.csv"):
        equal[name] = (undisturbed / name).read_bytes() == (killed / name).read_bytes()
    return equal


def _report(reference: Run, runs: list[Run], equal: dict[str, bool], path: Path | None) -> int:
    kills = sum(run.kill is not None and run.code != 0 for run in runs)
    print(reporting.table(["began at", "disturbed by", "exit code"], [[*_told(r), r.code] for r in [reference, *runs]]))
    print()
    print(reporting.fields([(name, "equal" if same else "DIFFERS") for name, same in equal.items()]))
    verdict = all(equal.values())
    print(f"\n{'equal bit for bit' if verdict else 'NOT equal'} after {kills} kill(s)")
    report: dict[str, Any] = {
        "equal": verdict,
        "kills": kills,
        "compared": equal,
        "runs": [dataclasses.asdict(run) for run in runs],
    }
    print(json.dumps(report))
    if path:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if verdict else 1


def _train_and_die(kill: Kill, flags: list[str]) -> int:
    """What each rank runs if one is to be killed."""
    import keras

    from hvdkit import world
    from hvdkit.train.__main__ import main as train

    class Killer(keras.callbacks.Callback):
        """Kills its own process with SIGKILL, which cannot be handled."""

        checkpointed = False

        def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
            """Stores the epoch."""
            self._epoch = epoch

        def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
            """Kills the process at its step."""
            if world.rank() == kill.rank and self._epoch * self.params["steps"] + batch + 1 >= kill.step:
                threading.Timer(kill.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    return train(["hvdkit.train", *flags], [Killer()])


if __name__ == "__main__":
    sys.exit(main(sys.argv))
