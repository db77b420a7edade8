"""The sweep's command line. It is checked completely before anything starts, including the training's flags."""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from hvdkit.command.arguments import Parser, dashed
from hvdkit.errors import UsageError
from hvdkit.launch import job
from hvdkit.launch import options as launch_options
from hvdkit.sweep import space
from hvdkit.sweep.space import Parameter
from hvdkit.train import flags as train_flags

_DESCRIPTION = """\
Runs many trainings over the places at hand, one task a place, and keeps the best model.

    hvdkit sweep -np 2 --workdir=runs/sweep --grid learning-rate=0.01,0.003 --grid optimizer=adam,sgd -- \\
        --model=mnist_mlp --epochs=3
    hvdkit sweep -H h1:4,h2:4 --workdir=DIR --random "learning-rate=1e-4..1e-1 log" \\
        --int local-batch=16..128:16 --trials=40 --asha -- --model=cifar_cnn --dataset=cifar10
    hvdkit sweep -np 2 --workdir=DIR --folds=5 -- --model=mnist_mlp

Behind -- are flags of hvdkit train. A task that crashes or hangs, or whose host dies, is tried again elsewhere, from
its last checkpoint. The same command resumes a sweep that was interrupted. Exit code: 0 if all trials are over and one
is done, 1 if none is, 2 if the command line is wrong, 75 if no host answers, 85 after SIGTERM.
"""
_OURS = ("workdir", "overwrite", "resume", "fold")  # flags of the training that the sweep sets itself
Direction = Literal["maximize", "minimize"]
_GOALS: dict[str, Direction] = {"accuracy": "maximize", "loss": "minimize"}


@dataclasses.dataclass(frozen=True)
class Options:
    """The parsed command line.

    Attributes:
        parameters: the hyperparameters to search.
        repeats: trials of each combination of the grid.
        search: `random` or `tpe`.
        seed: seed of the search.
        asha: reduction factor and first rung in epochs; None to train every trial to its end.
        folds: tasks per trial, each with a different test fold; 0 for no cross-validation.
        goal: metric to optimize, `accuracy` or `loss`, on the test split or on the folds.
        flags: flags of hvdkit.train, as given.
        folder: folder that the sweep writes to.
        storage: URL of Optuna's storage.
        study: name of the study in the storage.
        ranks_per_task: ranks of each task.
        launch: hosts and other settings of the launcher.
        launcher: additional launcher options for each task.
        retries: retries of a task that crashed or hung.
        stall_limit: seconds without progress of a task, after which it counts as hung; 0 for no limit.
        time_limit: maximum seconds of a task; 0 for no limit.
        host_limit: maximum seconds without a heartbeat from a host.
        keep_models: whether to keep the models of all trials, or only the best one.
    """

    parameters: tuple[Parameter, ...]
    repeats: int
    search: str
    seed: int
    asha: tuple[int, int] | None
    folds: int
    goal: str
    flags: tuple[str, ...]
    folder: Path
    storage: str
    study: str
    ranks_per_task: int
    launch: job.Settings
    launcher: tuple[str, ...]
    retries: int
    stall_limit: float
    time_limit: float
    host_limit: float
    keep_models: bool

    @property
    def direction(self) -> Direction:
        """The direction of the goal in Optuna's terms."""
        return _GOALS[self.goal]

    def identity(self) -> dict[str, Any]:
        """Return the options that earlier results depend on; they must be equal when a sweep resumes."""
        return {
            "parameters": [{**vars(p), "values": list(p.values)} for p in self.parameters],
            "flags": list(self.flags),
            "folds": self.folds,
            "goal": self.goal,
            "asha": list(self.asha) if self.asha else None,
            "search": self.search,
            "seed": self.seed,
            "ranks_per_task": self.ranks_per_task,
        }


def parse(argv: list[str]) -> Options:
    """Parse the command line; exit with 0 for `--help`, and with 2 and a message for an error that argparse finds.

    Raises:
        UsageError: any other value is wrong, including flags of hvdkit.train.
    """
    given = parser().parse_args(argv[1:])
    parameters = tuple(space.parse(kind, text) for kind in space.FORMS for text in getattr(given, kind))
    flags = train_flags.spelled(given.flags[1:] if given.flags[:1] == ["--"] else given.flags)
    _check_search(given, parameters)
    _check_flags(parameters, flags)
    asha = _asha(given.asha) if given.asha else None
    folder = Path(given.workdir).expanduser().resolve()
    launcher = shlex.split(given.launcher)
    where = [*(["-np", str(given.np)] if given.np else []), *(["-H", given.hosts] if given.hosts else [])]
    launch = launch_options.settings(launch_options.parse(["", *where, *launcher, "--", "a task"]))
    for host in launch.hosts:
        if host.slots < given.ranks_per_task:
            raise UsageError(
                f"--ranks-per-task={given.ranks_per_task} does not fit {host.name}, which has {host.slots} place(s): a "
                f"task's ranks are all on one host. Give the host more places, or a task fewer ranks."
            )
    return Options(
        parameters=parameters,
        repeats=given.trials or 1,
        search=given.search,
        seed=given.seed,
        asha=asha,
        folds=given.folds,
        goal=given.goal,
        flags=tuple(flags),
        folder=folder,
        storage=given.storage or f"sqlite:///{folder / 'study.db'}",
        study=given.study or folder.name,
        ranks_per_task=given.ranks_per_task,
        launch=launch,
        launcher=tuple(launcher),
        retries=given.retries,
        stall_limit=given.stall_timeout,
        time_limit=given.time_limit,
        host_limit=given.host_timeout,
        keep_models=given.keep_models,
    )


def parser() -> Parser:
    """Create the sweep's argument parser."""
    made = Parser(
        "sweep",
        description=_DESCRIPTION,
        usage="%(prog)s [-np N | -H h1:2,h2:2] --workdir=DIR [options] -- [flags of hvdkit train]",
    )
    what = made.add_argument_group("what is searched: flags of hvdkit.train")
    what.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="FLAG=A,B",
        help="all values, with all of other grids; | separates values that have commas",
    )
    what.add_argument("--choice", action="append", default=[], metavar="FLAG=A,B", help="one of these, drawn")
    what.add_argument(
        "--random",
        action="append",
        default=[],
        metavar="'FLAG=LOW..HIGH log'",
        help="a number of this range, drawn; log: its logarithm is",
    )
    what.add_argument("--int", action="append", default=[], metavar="FLAG=LOW..HIGH:STEP", help="a whole number")
    what.add_argument("--trials", type=int, metavar="N", help="how many are drawn; with --grid, for each point of it")
    what.add_argument(
        "--search",
        choices=("random", "tpe"),
        default="random",
        help="how: independently, or where earlier trials were good (tree-structured Parzen estimator) [%(default)s]",
    )
    what.add_argument("--seed", type=int, default=0, help="of what is drawn [0]")
    what.add_argument(
        "--folds",
        type=int,
        default=0,
        metavar="K",
        help="cross-validation: K tasks a trial, each "
        "tested on another fold of the training split; the best then trains on all of it",
    )
    what.add_argument(
        "--goal", choices=tuple(_GOALS), default="accuracy", help="of the test split, or the folds' mean [%(default)s]"
    )
    what.add_argument(
        "--asha",
        nargs="?",
        const="3:1",
        metavar="ETA:FIRST",
        help="end bad trials early: after FIRST, FIRST·ETA, FIRST·ETA² ... epochs only the best of ETA goes on [3:1]",
    )
    where = made.add_argument_group("where")
    where.add_argument("-np", type=int, metavar="N", help="places for ranks on this host")
    where.add_argument("-H", dest="hosts", metavar="h1:2,h2:2", help="hosts and their places [this host]")
    where.add_argument("--ranks-per-task", type=int, default=1, metavar="K", help="ranks of each task, on one host [1]")
    where.add_argument("--launcher", default="", metavar="ARGS", help="more options for hvdkit.launch")
    output = made.add_argument_group("what is kept")
    output.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        help="where the sweep writes; a sweep that is there is gone on with. All hosts must share it",
    )
    output.add_argument(
        "--storage",
        metavar="URL",
        help="Optuna's: a database by URL, or journal:FILE for network file systems [SQLite in the workdir]",
    )
    output.add_argument("--study", metavar="NAME", help="the study's name there [the workdir's]")
    output.add_argument("--keep-models", action="store_true", help="of all trials, not only of the best")
    limits = made.add_argument_group("when tasks fail")
    limits.add_argument("--retries", type=int, default=2, metavar="N", help="of a task that crashed or hung [2]")
    limits.add_argument(
        "--stall-timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds without a step or a line in the log, after which a task is hung [%(default)g; 0: none]",
    )
    limits.add_argument("--time-limit", type=float, default=0.0, metavar="S", help="seconds of a task in all [none]")
    limits.add_argument(
        "--host-timeout", type=float, default=30.0, metavar="S", help="seconds that a host may be silent [%(default)g]"
    )
    made.add_argument("flags", nargs=argparse.REMAINDER, help="-- and the flags that all tasks have")
    return made


def _check_search(given: argparse.Namespace, parameters: Sequence[Parameter]) -> None:
    drawn = [p for p in parameters if p.kind != "grid"]
    if not parameters and not given.folds:
        raise UsageError(
            "Nothing is to be searched. Say what, as in --grid learning_rate=0.1,0.01, or cross-validate one training "
            "with --folds=5."
        )
    if drawn and given.trials is None:
        raise UsageError(
            f"How many values of --{dashed(drawn[0].flag)} are to be drawn? Give their number, as in --trials=20."
        )
    if given.asha and given.folds:
        raise UsageError(
            "--asha and --folds exclude each other: a trial's folds train one after the other, and their mean is known "
            "at the end only. Leave one of them out."
        )
    least = {"trials": 1, "ranks_per_task": 1, "retries": 0, "stall_timeout": 0, "time_limit": 0, "host_timeout": 1}
    for name, lowest in least.items():
        value = getattr(given, name)
        if value is not None and value < lowest:
            raise UsageError(f"--{dashed(name)}={value} must be {lowest} or more.")
    if given.folds < 0 or given.folds == 1:
        raise UsageError(f"--folds={given.folds} must be 2 or more: a fold is tested on by what the others trained.")


def _check_flags(parameters: Sequence[Parameter], flags: Sequence[str]) -> None:
    """Validate the training's flags with each listed value and with both ends of each range."""
    names = [p.flag for p in parameters]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UsageError(f"--{dashed(twice)} is searched twice. Give all of its values at once.")
    fixed = [flag.lstrip("-").partition("=")[0].removeprefix("no") for flag in flags if flag.startswith("-")]
    for name in [*names, *fixed]:
        if name in _OURS:
            own = "--folds=K of the sweep" if name == "fold" else "the sweep's own --workdir"
            raise UsageError(f"--{dashed(name)} is set for each task by the sweep itself. Leave it out, and use {own}.")
    both = next((name for name in names if name in fixed), None)
    if both:
        raise UsageError(f"--{dashed(both)} is searched, and fixed behind --, too. Leave one of them out.")
    first = {p.flag: p.extremes()[0] for p in parameters}
    for parameter in parameters:
        for value in parameter.extremes():
            train_flags.parse(["hvdkit.sweep", *flags, *space.flags({**first, parameter.flag: value})])
    train_flags.parse(["hvdkit.sweep", *flags, *space.flags(first)])


def _asha(text: str) -> tuple[int, int]:
    eta, _, first = text.partition(":")
    if not eta.isdigit() or int(eta) < 2 or not (first or "1").isdigit() or int(first or 1) < 1:
        raise UsageError(
            f"--asha={text} is not understood. The form is ETA:FIRST, as in 3:1: the best third goes on after epoch 1, "
            f"and of these the best third after epoch 3."
        )
    return int(eta), int(first or 1)


def print_error(error: Exception) -> None:
    """Print an error message of the sweep to standard error."""
    print(f"hvdkit.sweep: {error}", file=sys.stderr, flush=True)
