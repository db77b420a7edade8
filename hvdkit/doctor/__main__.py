"""Examines the hosts of a job before the job does: connects from each to each, and says what to fix.

    hvdkit doctor -H h1:2,h2:2

The exit code is 0 if all is well, 1 if something failed, 2 if the command line is wrong. Hosts are left as they were.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import signal
import sys
from pathlib import Path

from hvdkit import outcome, reporting
from hvdkit.command.arguments import Parser
from hvdkit.doctor import report
from hvdkit.doctor.checks import CHECKS, judge
from hvdkit.doctor.checks.registry import FAILED
from hvdkit.doctor.examination import Examination, Settings
from hvdkit.errors import UsageError
from hvdkit.launch import hosts
from hvdkit.launch.shells import Ssh
from hvdkit.train.settings import TASKS

_SSH_SECONDS = 5


def main(argv: list[str]) -> int:
    """Examine the hosts, print the report and return the exit code."""
    arguments = parser().parse_args(argv[1:])
    if arguments.list:
        print(reporting.fields([(check.name, check.title) for check in CHECKS]))
        return 0
    try:
        skip = _skipped(arguments.skip)
        settings = dataclasses.replace(_settings(arguments), loads="build" not in skip)
        if arguments.json:
            _try_to_write(Path(arguments.json))
    except UsageError as error:
        print(f"hvdkit.doctor: {error}", file=sys.stderr)
        return outcome.USAGE
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # exit normally, to stop the probes
    found = Examination(settings).run()
    results = judge(found, skip)
    print(report.show(found, results))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report.as_json(found, results), indent=2) + "\n")
    return int(any(result.status == FAILED for result in results))


def _settings(arguments: argparse.Namespace) -> Settings:
    given = hosts.from_file(arguments.hostfile) if arguments.hostfile else hosts.from_list(arguments.hosts)
    dataset = arguments.dataset
    if dataset and dataset.startswith(("./", "../", "~")):
        dataset = str(Path(dataset).expanduser().resolve())
    return Settings(
        hosts=given,
        python=os.path.abspath(arguments.python),  # noqa: PTH100 - a venv's python is a link that must not be followed
        directory=str(Path.cwd()),
        workdir=str(Path(arguments.workdir).expanduser().absolute()),
        dataset=dataset,
        data_dir=str(Path(arguments.data_dir).expanduser().absolute()) if arguments.data_dir else None,
        schema={
            "task": arguments.task,
            "label_column": arguments.label_column,
            "text_column": arguments.text_column,
            "feature_columns": tuple(filter(None, arguments.feature_columns.split(","))),
            "encoding": arguments.encoding,
        },
        ssh=Ssh(shlex.split(arguments.ssh_args), patience=_SSH_SECONDS),
    )


def _skipped(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = [check.name for check in CHECKS]
    for name in names:
        if name not in known:
            raise UsageError(f"--skip was given {name!r}, and expects names out of: {', '.join(known)}.")
    return names


def _try_to_write(file: Path) -> None:
    try:
        with file.open("a"):
            pass
    except OSError as error:
        raise UsageError(
            f"--json {file} cannot be written: {error.strerror}. Name a file in a folder of yours."
        ) from None


def parser() -> Parser:
    """Create the doctor's argument parser."""
    made = Parser("doctor", description=__doc__)
    one = made.add_mutually_exclusive_group(required=True)
    one.add_argument("-H", dest="hosts", metavar="h1:2,h2:2", help="hosts, and how many ranks each is to take")
    one.add_argument("--hostfile", metavar="FILE", help="a file with lines like: h1 slots=2")
    one.add_argument("--list", action="store_true", help="list the checks")
    made.add_argument("--workdir", default="runs", metavar="DIR", help="where the job is to write [%(default)s]")
    made.add_argument("--dataset", help="what the job is to read, as for hvdkit train")
    made.add_argument("--task", choices=TASKS, default="auto", help="what the job is to learn [%(default)s]")
    made.add_argument("--label-column", metavar="NAME", help="a table's column of labels")
    made.add_argument("--text-column", metavar="NAME", help="a table's column of texts")
    made.add_argument("--feature-columns", default="", metavar="NAME,NAME", help="a table's columns of features")
    made.add_argument("--encoding", metavar="NAME", help="encoding of a text file with a table, such as cp1252")
    made.add_argument("--data-dir", metavar="DIR", help="where TFDS data sets lie [~/tensorflow_datasets]")
    made.add_argument(
        "--python", default=sys.executable, metavar="PATH", help="the job's Python, on every host [this one]"
    )
    made.add_argument("--ssh-args", default="", metavar="ARGS", help="more arguments for ssh, as in: '-p 2222'")
    made.add_argument(
        "--skip",
        default="",
        metavar="CHECKS",
        help="leave these out, as in: ssh,bandwidth; without "
        "build, TensorFlow is not loaded, and no data set is read and no rank started",
    )
    made.add_argument("--json", metavar="FILE", help="write results and findings there, too")
    return made


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv))
    sys.exit(130)
