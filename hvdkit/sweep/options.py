"""The sweep's command line. It is checked completely before anything starts, including the training's flags."""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from hvdkit.command.arguments import Parser, dashed
from hvdkit.command.functions import names_function
from hvdkit.errors import UsageError
from hvdkit.launch import job
from hvdkit.launch import options as launch_options
from hvdkit.sweep import space
from hvdkit.sweep.space import Parameter
from hvdkit.train import flags as train_flags

_DESCRIPTION = """\
Searches hyperparameters: trains many models in parallel on the given hosts, and keeps the best one.

    hvdkit sweep -np 2 --workdir=runs/sweep --grid learning-rate=0.01,0.003 --grid optimizer=adam,sgd -- \\
        --model=mnist_mlp --epochs=3
    hvdkit sweep -H h1:4,h2:4 --workdir=DIR --random "learning-rate=1e-4..1e-1 log" \\
        --int local-batch=16..128:16 --trials=40 --asha -- --model=cifar_cnn --dataset=cifar10
    hvdkit sweep -np 2 --workdir=DIR --folds=5 -- --model=mnist_mlp

Flags of hvdkit train follow after --. A task that crashes or hangs, or whose host fails, is retried, on another host if
necessary, from its last checkpoint. The same command resumes an interrupted sweep. Exit code: 0 if all trials have
ended and at least one succeeded, 1 if none did, 2 for a usage error, 75 if no host responds, 85 after SIGTERM.
"""
_OURS = ("workdir", "overwrite", "resume", "fold")  # flags of the training that the sweep sets itself
Direction = Literal["maximize", "minimize"]
_GOALS: dict[str, Direction] = {
    "accuracy": "maximize",
    "auc": "maximize",
    "loss": "minimize",
    "mean_absolute_error": "minimize",
    "r2_score": "maximize",
}
_MODES: dict[str, Direction] = {"min": "minimize", "max": "maximize"}
_OF_VALUES, _OF_LABELS = ("mean_absolute_error", "r2_score"), ("accuracy", "auc")  # goals that only some tasks have


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
        goal: metric to optimize, such as `accuracy` or `loss`, on the validation split or on the folds.
        direction: whether more or less of it is better, in Optuna's terms.
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
    direction: Direction
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
    goal, direction = _goal(given.goal, flags)
    folder = Path(given.workdir).expanduser().resolve()
    launcher = shlex.split(given.launcher)
    where = [*(["-np", str(given.np)] if given.np else []), *(["-H", given.hosts] if given.hosts else [])]
    launch = launch_options.settings(launch_options.parse(["", *where, *launcher, "--", "a task"]))
    for host in launch.hosts:
        if host.slots < given.ranks_per_task:
            raise UsageError(
                f"--ranks-per-task={given.ranks_per_task} does not fit {host.name}, which has {host.slots} slot(s): "
                f"all ranks of a task run on one host. Give the host more slots, or each task fewer ranks."
            )
    return Options(
        parameters=parameters,
        repeats=given.trials or 1,
        search=given.search,
        seed=given.seed,
        asha=asha,
        folds=given.folds,
        goal=goal,
        direction=direction,
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
    _add_space(made)
    _add_search(made)
    _add_hosts(made)
    _add_output(made)
    _add_limits(made)
    made.add_argument("flags", nargs=argparse.REMAINDER, help="-- and the flags that all tasks have in common")
    return made


def _add_space(parser: Parser) -> None:
    group = parser.add_argument_group("search space: flags of hvdkit train")
    for option, metavar, meaning in (
        ("--grid", "FLAG=A,B", "try all values, combined with all other grids; use | to separate values with commas"),
        ("--choice", "FLAG=A,B", "sample one of these values"),
        ("--random", "'FLAG=LOW..HIGH log'", "sample a number from this range; log: uniformly on a logarithmic scale"),
        ("--int", "FLAG=LOW..HIGH:STEP", "sample an integer"),
    ):
        group.add_argument(option, action="append", default=[], metavar=metavar, help=meaning)


def _add_search(parser: Parser) -> None:
    group = parser.add_argument_group("search")
    group.add_argument("--trials", type=int, metavar="N", help="number of samples; with --grid, for each combination")
    group.add_argument(
        "--search",
        choices=("random", "tpe"),
        default="random",
        help="sample independently, or where earlier trials were good (tree-structured Parzen estimator) [%(default)s]",
    )
    group.add_argument("--seed", type=int, default=0, help="random seed of the search [0]")
    group.add_argument(
        "--folds",
        type=int,
        default=0,
        metavar="K",
        help="cross-validation: K tasks per trial, each evaluated on a different fold of the training split; the best "
        "trial is then trained on the whole split",
    )
    group.add_argument(
        "--goal",
        metavar="METRIC",
        help=f"metric to optimize, on the validation split or as the mean over folds: {', '.join(_GOALS)}, or with "
        "min: or max: before it any that the model has, as in max:iou [--monitor of the training; accuracy; with "
        "--task=regression or data of a function loss]",
    )
    group.add_argument(
        "--asha",
        nargs="?",
        const="3:1",
        metavar="ETA:FIRST",
        help="stop bad trials early: after FIRST, FIRST·ETA, FIRST·ETA² ... epochs only the best 1/ETA continue [3:1]",
    )


def _add_hosts(parser: Parser) -> None:
    group = parser.add_argument_group("where")
    group.add_argument("-np", type=int, metavar="N", help="number of ranks on this host")
    group.add_argument(
        "-H", dest="hosts", metavar="h1:2,h2:2", help="hosts, and the number of ranks on each [this host]"
    )
    group.add_argument("--ranks-per-task", type=int, default=1, metavar="K", help="ranks of each task, on one host [1]")
    group.add_argument("--launcher", default="", metavar="ARGS", help="additional options for hvdkit launch")


def _add_output(parser: Parser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        help="folder of the sweep, shared by all hosts; a sweep that is in it already is resumed",
    )
    group.add_argument(
        "--storage",
        metavar="URL",
        help="Optuna's storage: a database URL, or journal:FILE for network file systems [SQLite in the workdir]",
    )
    group.add_argument("--study", metavar="NAME", help="name of the study in the storage [the workdir's name]")
    group.add_argument(
        "--keep-models", action="store_true", help="keep the models of all trials, not only the best one"
    )


def _add_limits(parser: Parser) -> None:
    group = parser.add_argument_group("when tasks fail")
    group.add_argument("--retries", type=int, default=2, metavar="N", help="retries of a task that crashed or hung [2]")
    group.add_argument(
        "--stall-timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds without a step or a line in the log after which a task counts as hung [%(default)g; 0: none]",
    )
    group.add_argument("--time-limit", type=float, default=0.0, metavar="S", help="maximum seconds of a task [none]")
    group.add_argument(
        "--host-timeout", type=float, default=30.0, metavar="S", help="seconds for a host to respond [%(default)g]"
    )


def _check_search(given: argparse.Namespace, parameters: Sequence[Parameter]) -> None:
    drawn = [p for p in parameters if p.kind != "grid"]
    if not parameters and not given.folds:
        raise UsageError(
            "There is nothing to search. Give a search space, as in --grid learning-rate=0.1,0.01, or cross-validate "
            "one model with --folds=5."
        )
    if drawn and given.trials is None:
        raise UsageError(
            f"How many values of --{dashed(drawn[0].flag)} should be sampled? Give their number, as in --trials=20."
        )
    if given.asha and given.folds:
        raise UsageError(
            "--asha and --folds exclude each other: a trial's folds are trained one after the other, so their mean is "
            "known only at the end. Leave one of them out."
        )
    least = {"trials": 1, "ranks_per_task": 1, "retries": 0, "stall_timeout": 0, "time_limit": 0, "host_timeout": 1}
    for name, lowest in least.items():
        value = getattr(given, name)
        if value is not None and value < lowest:
            raise UsageError(f"--{dashed(name)}={value} must be {lowest} or more.")
    if given.folds < 0 or given.folds == 1:
        raise UsageError(
            f"--folds={given.folds} must be 2 or more: each fold tests a model that was trained on the other folds."
        )


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
        raise UsageError(f"--{dashed(both)} is searched, and also fixed after --. Leave one of them out.")
    first = {p.flag: p.extremes()[0] for p in parameters}
    for parameter in parameters:
        for value in parameter.extremes():
            train_flags.parse_for_one_strategy(["hvdkit.sweep", *flags, *space.flags({**first, parameter.flag: value})])
    train_flags.parse_for_one_strategy(["hvdkit.sweep", *flags, *space.flags(first)])


def _goal(given: str | None, flags: Sequence[str]) -> tuple[str, Direction]:
    """Returns the metric to optimize and its direction.

    Raises:
        UsageError: the task of the training has no such metric, or its direction is not known.
    """
    config = train_flags.parse(["hvdkit.sweep", *flags])
    is_regression, is_function = config.task == "regression", names_function(config.dataset or "")
    if given is None and config.monitor:
        given = config.monitor if config.monitor_mode == "auto" else f"{config.monitor_mode}:{config.monitor}"
    given = given or ("loss" if is_regression or is_function else "accuracy")
    mode, _, name = given.rpartition(":")
    if mode:
        if mode not in _MODES or not name:
            raise UsageError(f"--goal={given} is not METRIC, min:METRIC or max:METRIC.")
        return name, _MODES[mode]
    if name not in _GOALS:
        raise UsageError(
            f"--goal={name}: it cannot be known whether less or more of it is better. Write --goal=min:{name} or "
            f"--goal=max:{name}; without it, one of {', '.join(_GOALS)}."
        )
    if not is_function and name in (_OF_LABELS if is_regression else _OF_VALUES):
        others = ", ".join(("loss", *(_OF_VALUES if is_regression else _OF_LABELS)))
        raise UsageError(
            f"--goal={name} is no metric of --task={config.task}. Use one of {others}, or give another --task."
        )
    return name, _GOALS[name]


def _asha(text: str) -> tuple[int, int]:
    eta, _, first = text.partition(":")
    if not eta.isdigit() or int(eta) < 2 or not (first or "1").isdigit() or int(first or 1) < 1:
        raise UsageError(
            f"--asha={text} is not of the form ETA:FIRST, such as 3:1: the best third continues after epoch 1, and of "
            f"these the best third after epoch 3."
        )
    return int(eta), int(first or 1)


def print_error(error: Exception) -> None:
    """Print an error message of the sweep to standard error."""
    print(f"hvdkit.sweep: {error}", file=sys.stderr, flush=True)
