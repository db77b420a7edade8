"""The sweep's record: an Optuna study that stores each trial's start, progress and end."""

import contextlib
import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from hvdkit.errors import UsageError
from hvdkit.sweep import space
from hvdkit.sweep.options import Options

_STATES = {
    TrialState.WAITING: "waiting",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "ended early",
    TrialState.FAIL: "failed",
}
_MOST_WORDS = 500  # the most characters of an error that are stored


@dataclasses.dataclass(frozen=True)
class Trial:
    """The record of a trial.

    Attributes:
        number: from 0, in the order of the study.
        values: the values of the searched flags.
        state: `waiting`, `running`, `done`, `ended early` or `failed`.
        value: its result; the last value if it ended early.
        notes: the sweep's notes about it: seconds, tries, hosts, folds, error.
    """

    number: int
    values: dict[str, Any]
    state: str
    value: float | None
    notes: dict[str, Any]


class Study:
    """A study in Optuna's storage. Several sweeps can share a study in a database server.

    Args:
        options: the sweep's options.

    Raises:
        UsageError: the storage cannot be opened, or its study has another direction.
    """

    def __init__(self, options: Options) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._options = options
        shown = without_password(options.storage, options.storage)
        self._trials: dict[int, optuna.Trial] = {}  # the trials that run here, by number
        self._epochs: dict[int, int] = {}  # the last reported epoch of each
        try:
            self._study = optuna.create_study(
                study_name=options.study,
                storage=_storage(options.storage),
                direction=options.direction,
                pruner=_pruner(options),
                load_if_exists=True,
            )
        except Exception as error:  # database drivers raise their own exceptions
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            reason = without_password(reason, options.storage)[:300]
            raise UsageError(
                f"--storage={shown} cannot be opened ({reason}). Give an existing database whose driver is "
                f"installed, as in postgresql://user@host/name, or leave the option out for SQLite in the workdir."
            ) from None
        if self._study.direction.name.lower() != options.direction:
            raise UsageError(
                f"The study {options.study} in {shown} is to {self._study.direction.name.lower()}, but "
                f"--goal={options.goal} is to {options.direction}. Name another study: --study=NAME."
            )
        self._fill()

    def _fill(self) -> None:
        """Enqueues the trials that the study does not contain yet."""
        there = {trial.user_attrs.get("point") for trial in self._study.get_trials(deepcopy=False)}
        for number, point in enumerate(space.points(self._options.parameters, self._options.repeats)):
            if number not in there:
                self._study.enqueue_trial(point, user_attrs={"point": number})

    # ---- Trials that begin, move and end -----------------------------------------------------------------------------

    def take(self) -> Trial | None:
        """Starts the next trial and draws its values; None if no trial is left."""
        waiting = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        return self._begin(self._study.ask()) if waiting else None

    def interrupted(self) -> list[Trial]:
        """The trials of this workdir that were running when its sweep ended, to resume them."""
        found = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        # The sweep that took a trial without a workdir was killed at once.
        mine = [t for t in found if t.user_attrs.get("workdir", self._where()) == self._where()]
        self._epochs = {trial.number: trial.last_step or 0 for trial in mine}
        return [self._begin(optuna.Trial(self._study, trial._trial_id)) for trial in mine]

    def _begin(self, trial: optuna.Trial) -> Trial:
        # Drawn values depend only on the seed and the trial's number, not on interruptions of the sweep.
        seed = int(np.random.SeedSequence([self._options.seed, trial.number]).generate_state(1)[0])
        samplers = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
        self._study.sampler = samplers[self._options.search](seed=seed)
        trial.set_user_attr("workdir", self._where())
        values = {p.flag: p.suggest(trial) for p in self._options.parameters}
        self._trials[trial.number] = trial
        return Trial(trial.number, values, "running", None, {})

    def _where(self) -> str:
        """The sweep that a trial belongs to, if several share a storage. A sweep with its own storage may move."""
        is_shared = not self._options.storage.startswith("sqlite:")
        return f"{os.uname().nodename}:{self._options.folder}" if is_shared else "here"

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Records a trial's value after an epoch, counted from 1; returns whether to end the trial early."""
        if epoch <= self._epochs.get(number, 0):
            return False
        self._epochs[number] = epoch
        trial = self._trials[number]
        trial.report(value, epoch)
        return bool(trial.should_prune())

    def end(self, number: int, state: str, value: float | None, notes: dict[str, Any]) -> None:
        """Records how a trial ended: `done` with its value, `ended early` or `failed`."""
        trial = self._trials.pop(number)
        if "error" in notes:
            notes = {**notes, "error": str(notes["error"])[:_MOST_WORDS]}
        trial.set_user_attr("notes", notes)
        ends = {"done": TrialState.COMPLETE, "ended early": TrialState.PRUNED, "failed": TrialState.FAIL}
        self._study.tell(trial, value if state == "done" else None, state=ends[state])

    # ---- What there is -----------------------------------------------------------------------------------------------

    def trials(self) -> list[Trial]:
        """All trials, in order."""
        return [_known(trial) for trial in self._study.get_trials(deepcopy=False)]

    def best(self) -> Trial | None:
        """The best trial that is done; the first of equally good ones."""
        done = [trial for trial in self.trials() if trial.state == "done" and trial.value is not None]
        sign = -1 if self._options.direction == "maximize" else 1
        return min(done, key=lambda trial: (sign * (trial.value or 0.0), trial.number), default=None)

    def plot(self, folder: Path) -> list[str]:
        """Draws Optuna's plots of the study, if it has enough trials, and returns the names of the files."""
        import matplotlib

        matplotlib.use("Agg")  # Optuna draws with pyplot, which would need a display
        from optuna.visualization import matplotlib as draw

        goal = self._options.goal
        plots: dict[str, Callable[[], Any]] = {
            "history": lambda: draw.plot_optimization_history(self._study, target_name=goal),
        }
        if self._options.asha:
            plots["learning"] = lambda: draw.plot_intermediate_values(self._study)
        if self._options.parameters:
            plots["parallel_coordinate"] = lambda: draw.plot_parallel_coordinate(self._study, target_name=goal)
        if self._options.parameters and len({t.value for t in self.trials() if t.state == "done"}) > 1:
            # F. Hutter et al., "An Efficient Approach for Assessing Hyperparameter Importance", ICML 2014. It needs at
            # least two different values.
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            plots["importance"] = lambda: draw.plot_param_importances(
                self._study, evaluator=evaluator, target_name=goal
            )
        if self.best() is None:
            return []
        for name, plot in plots.items():
            with _quiet():
                figure = plot().figure
            figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
            matplotlib.pyplot.close(figure)
        return [f"{name}.png" for name in plots]


def _known(trial: FrozenTrial) -> Trial:
    value = trial.value if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) else None
    values = trial.params or trial.system_attrs.get("fixed_params", {})
    return Trial(trial.number, values, _STATES[trial.state], value, trial.user_attrs.get("notes", {}))


def without_password(text: str, url: str) -> str:
    """Replaces the password of a database URL in a text, which may be the URL itself or a driver's message.

    Args:
        text: the text.
        url: `driver://user:password@host/name`, or with `?password=...`.

    Returns:
        The text with `***` in place of the password, as it is written in the URL or decoded.
    """
    found = re.match(r"[^:]+://[^:/@]*:(?P<password>[^@]*)@", url) or re.search(
        r"[?&]password=(?P<password>[^&]*)", url
    )
    if not found or not found["password"]:
        return text
    for password in sorted({found["password"], unquote_plus(found["password"])}, key=len, reverse=True):
        text = text.replace(password, "***")
    return text


def _storage(url: str) -> Any:
    if not url.startswith("journal:"):
        return url
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(url.removeprefix("journal:")))


def _pruner(options: Options) -> optuna.pruners.BasePruner:
    """Optuna's ASHA (L. Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020)."""
    if options.asha is None:
        return optuna.pruners.NopPruner()
    eta, first = options.asha
    return optuna.pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=eta)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the warnings that Optuna's plots are experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
