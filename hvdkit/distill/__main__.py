"""Trains a small model that also learns from the outputs of a trained one, on several ranks, and compares the two.

    hvdkit distill --teacher=RUN_FOLDER -np 2 --model=mnist_mlp --model-args="hidden=(80,)"

All other options are flags of hvdkit train, among them --temperature and --student-loss-weight. What names the data is
taken from the teacher's run, if it is not given. Each rank has a copy of the teacher. On other hosts, train with the
same flag: hvdkit launch -H h1:4,h2:4 -- hvdkit train --teacher=RUN_FOLDER --model=...
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from hvdkit import outcome, reporting
from hvdkit.command.arguments import Parser
from hvdkit.errors import UsageError
from hvdkit.launch import options
from hvdkit.launch.__main__ import launch
from hvdkit.train import flags as train_flags
from hvdkit.train.teacher_run import data_flags_of, file_of


def parser() -> Parser:
    """Returns the command's parser; what it does not know are flags of the training."""
    made = Parser("distill", description=__doc__)
    add: Any = made.add_argument
    add("--teacher", required=True, metavar="RUN_FOLDER", help="the --workdir of hvdkit train, or a .keras file")
    add("-np", type=int, default=2, metavar="N", help="number of ranks [2]")
    return made


def main(argv: list[str]) -> int:
    """Trains the student, prints both models in a table, and returns the exit code."""
    arguments, given = parser().parse_known_args(argv[1:])
    try:
        workdir, command = _plan(arguments, given)
    except UsageError as error:
        print(f"hvdkit.distill: {error}", file=sys.stderr)
        return outcome.USAGE
    code = launch(options.parse(["", "-np", str(arguments.np), "--", *command]))
    if code:
        return code
    print(table(reporting.read_json(workdir / "result.json")))
    return 0


def _plan(arguments: argparse.Namespace, given: list[str]) -> tuple[Path, list[str]]:
    """Returns the run's folder and the command that trains.

    Raises:
        UsageError: a flag is wrong, or there is no teacher.
    """
    given = train_flags.check([*given, f"--teacher={arguments.teacher}"], one_strategy=True)
    config = train_flags.parse(["", *given])
    if arguments.np < 1:
        raise UsageError(f"-np {arguments.np}: at least one rank is needed.")
    given = [*data_flags_of(file_of(arguments.teacher), config), *given]  # the last one counts
    workdir = config.workdir
    if not workdir:
        workdir = f"runs/{Path(config.model).stem}-distilled-{time.strftime('%Y%m%d-%H%M%S')}"
        given.append(f"--workdir={workdir}")
    return Path(workdir).expanduser(), [sys.executable, "-m", "hvdkit.train", *given]


def table(result: dict[str, Any]) -> str:
    """Formats both models as a table."""
    metric = result["main_metric"]
    rows = [
        [name, f"{found['parameters']:,}", f"{found['test_loss']:.4f}", f"{found[f'test_{metric}']:.4f}"]
        for name, found in (("teacher", result["teacher"]), ("student", result))
    ]
    return reporting.table(["model", "parameters", "test loss", f"test {metric}"], rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
