"""The sweep's main loop: assigns tasks to slots, watches them, and handles their ends.

Only this loop's thread changes the sweep's state. The study and the tries' folders record every step before it takes
effect, so the same command resumes a sweep that was killed at any moment.
"""

import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from hvdkit import outcome
from hvdkit.errors import UsageError
from hvdkit.launch.failures import Failure
from hvdkit.sweep import space, tasks
from hvdkit.sweep.hosts import Slot, SweepHost
from hvdkit.sweep.options import Options
from hvdkit.sweep.runs import ForkServer, Launched, Run
from hvdkit.sweep.study import Study, Trial
from hvdkit.sweep.tasks import Task, Try

_TICK = 0.1  # seconds per loop; long enough to leave the cores to the tasks
_LOOK_SECONDS = 0.5  # between two looks at the files of tasks
_END_SECONDS = 15.0  # from the request to end a task to SIGKILL
_LEAVE_SECONDS = 40.0  # for tasks to save and exit
_LOAD_SECONDS = 120.0  # at least, for a task to load TensorFlow
_ALONE_SECONDS = 600.0  # to wait while no host answers
_MOST_LOST_HOSTS = 10  # lost hosts per task, in addition to its retries


class Coordinator:
    """Runs a sweep.

    Args:
        options: the sweep's options.
        study: the record of its trials.
        say: called with one line per event.

    Attributes:
        open: running trials with their tasks.
        hosts: all hosts, including those that do not answer.
        number: the number of trials in the study.
        ended: how many of them are `done`, `ended early` and `failed`.
        best: the best trial that is done.
        stopped_by: the signal that stopped the sweep; 0 for none.
    """

    def __init__(self, options: Options, study: Study, say: Callable[[str], None]) -> None:
        self.options = options
        self.study = study
        self.open: dict[int, tuple[Trial, list[Task]]] = {}
        self.stopped_by = 0
        before = study.trials()
        self.number = len(before)
        self.ended = {state: sum(t.state == state for t in before) for state in ("done", "ended early", "failed")}
        self.best = study.best()
        self._say = say
        for stale in options.folder.glob(".seen-*"):  # left by a sweep that was killed
            stale.rmdir()
        self._probe = options.folder / f".seen-{os.getpid()}-{time.time_ns()}"
        self._probe.mkdir()
        self.hosts = [
            SweepHost(host, options.launch, self._probe, options.ranks_per_task) for host in options.launch.hosts
        ]
        self._suspects: dict[SweepHost, list[Task]] = {host: [] for host in self.hosts}
        self._fork_server: ForkServer | None = None
        self._alone_since: float | None = None
        self._final: Task | None = None
        self._left: list[Task] = []  # running tasks of trials that are over
        self._all_begun = False
        self._watched = 0.0

    # ---- Start and end -----------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Checks all hosts. Meanwhile loads TensorFlow if tasks are forked on this host.

        Raises:
            UsageError: no host answers.
        """
        if self._forks() and any(host.name == "localhost" for host in self.options.launch.hosts):
            self._fork_server = ForkServer(self.options.folder / "fork-server.log")
        for host in self.hosts:
            host.ask()
        while any(host.is_asked for host in self.hosts):
            for host in self.hosts:
                host.hear()
            time.sleep(0.02)
        if not any(host.is_up for host in self.hosts):
            raise UsageError(self.hosts[0].why)
        for host in self.hosts:
            if not host.is_up:
                self._say(f"host {host.name} is left out until it answers. {host.why}")

    def run(self, draw: Callable[[], None]) -> int:
        """Runs all trials, or until a signal comes, and returns the exit code. Calls `draw` once per loop."""
        self._restore_best()
        for trial in self.study.interrupted():
            self._say(f"resuming trial {trial.number}")
            self._open(trial)
        while True:
            self._hear_hosts()
            self._collect()
            self._watch()
            if self.stopped_by:
                return self._leave()
            if self._is_alone():
                return outcome.STALLED
            self._fill()
            if self._all_begun and not self.open and not self._left and not self._refit():
                return 0
            draw()
            time.sleep(_TICK)

    def close(self) -> None:
        """Ends all remaining processes."""
        for task in self.running():
            if task.current:
                task.current.run.kill()
        if self._fork_server:
            self._fork_server.close()
        shutil.rmtree(self._probe, ignore_errors=True)

    def running(self) -> list[Task]:
        """The tasks that occupy a slot."""
        return [task for task in [*self._tasks(), *self._left] if task.current]

    def slots(self) -> list[Slot]:
        """All slots of the hosts that answer."""
        return [slot for host in self.hosts if host.is_up for slot in host.slots]

    def _tasks(self) -> list[Task]:
        return [task for _, each in self.open.values() for task in each]

    def _forks(self) -> bool:
        """Whether tasks on this host are forked and need no launcher."""
        return "--strategy=single" in _defaults(self.options) and not self.options.launcher

    # ---- Trials ------------------------------------------------------------------------------------------------------

    def _open(self, trial: Trial) -> None:
        """Starts or resumes a trial. Finished tasks do not run again."""
        folder = self.folder(trial.number)
        own = [*self.options.flags, *space.flags(trial.values), *_defaults(self.options)]
        if self.options.folds:
            folds = range(self.options.folds)
            each = [
                Task(trial.number, fold, folder / f"fold-{fold}", [*own, f"--fold={fold}/{self.options.folds}"])
                for fold in folds
            ]
        else:
            each = [Task(trial.number, None, folder, own)]
        self.open[trial.number] = (trial, each)
        found = [task.find_result() for task in each]
        if all(found):
            self._conclude(trial.number)

    def folder(self, number: int) -> Path:
        """A trial's folder."""
        return self.options.folder / "trials" / f"{number:04d}"

    def _conclude(self, number: int) -> None:
        """Ends a trial whose tasks are all done. Its value is their mean."""
        trial, each = self.open[number]
        values = [tasks.value(task.result or {}, self.options.goal) for task in each]
        value = sum(values) / len(values)
        if not math.isfinite(value):
            goal = self.options.goal
            why = f"its {goal} is {value}: the training diverged, or the model's own compile() has no metric {goal}"
            self._say(f"trial {number} failed for good: {why}")
            self._close_trial(number, "failed", None, error=why)
            return
        before = self.best
        self._close_trial(number, "done", value, values=values)
        best = self.best = self.study.best()
        is_best = best is not None and best.number == number
        if is_best and not self.options.folds and each[0].result:
            self._point_to(Path(each[0].result["folder"]))
        mark = ", the best so far" if is_best else ""
        self._say(
            f"trial {number}: {self.options.goal} {value:.4f} in {sum(t.seconds for t in each):.1f} s{mark} "
            f"({space.words(trial.values)})"
        )
        for task in each:
            task.clean(keep_model=self.options.keep_models or (is_best and not self.options.folds))
        if is_best and before is not None and not self.options.keep_models:
            Task(before.number, None, self.folder(before.number), []).clean(keep_model=False)

    def _close_trial(self, number: int, state: str, value: float | None, **notes: object) -> None:
        _, each = self.open[number]
        notes |= {
            "seconds": round(sum(task.seconds for task in each), 2),
            "tries": sum(len(task.tries()) for task in each),
            "hosts": list(dict.fromkeys(host for task in each for host in task.hosts)),
        }
        self.study.end(number, state, value, notes)
        self.ended[state] += 1
        del self.open[number]
        self._left += [task for task in each if task.current]
        if state != "done":
            for task in each:
                task.clean(keep_model=False)

    def _restore_best(self) -> None:
        """Points `best` to the best trial. A killed sweep may have recorded the trial without moving the link."""
        best = self.study.best()
        if best and not self.options.folds:
            task = Task(best.number, None, self.folder(best.number), [])
            if task.find_result() and task.result:
                self._point_to(Path(task.result["folder"]))

    def _point_to(self, folder: Path) -> None:
        """Points the link `best` to a try's folder, atomically."""
        aside = self.options.folder / ".best"
        aside.unlink(missing_ok=True)
        aside.symlink_to(folder.relative_to(self.options.folder))
        aside.replace(self.options.folder / "best")

    def _refit(self) -> bool:
        """With folds, trains the best trial again on the whole training split; returns whether to wait for it."""
        best = self.study.best()
        if not self.options.folds or best is None:
            return False
        if self._final is None:
            own = [*self.options.flags, *space.flags(best.values), *_defaults(self.options)]
            self._final = Task(best.number, None, self.folder(best.number) / "final", own)
            self._say(f"training the best trial, {best.number}, on the whole training split")
        task = self._final
        if not task.find_result():
            if task.failures > self.options.retries:
                self._say(f"training the best trial on the whole training split failed: {task.last}")
                return False
            self.open[best.number] = (best, [task])
            return True
        task.clean(keep_model=True)
        self._point_to(Path((task.result or {})["folder"]))
        return False

    # ---- Slots -------------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Assigns tasks to free slots."""
        taken = [task.current.slot for task in self.running() if task.current]
        for slot in self.slots():
            if slot not in taken and (task := self._next(slot)):
                self._start(task, slot)

    def _next(self, slot: Slot) -> Task | None:
        waiting = [task for task in self._tasks() if self._waits(task)]
        for task in waiting:
            others = any(host.is_up and host not in task.avoided for host in self.hosts)
            if slot.host not in task.avoided or not others:
                return task
        while not self._all_begun:
            trial = self.study.take()
            if trial is None:
                self._all_begun = True
                break
            self._open(trial)
            if trial.number in self.open:  # otherwise its tasks were already finished
                return self.open[trial.number][1][0]
        return None

    def _waits(self, task: Task) -> bool:
        judged = any(task in suspects for suspects in self._suspects.values())
        return task.current is None and task.result is None and not judged

    def _start(self, task: Task, slot: Slot) -> None:
        folder, flags = task.next_try()
        log = folder / "logs" / "task.log"
        flags = [*task.flags, *flags]
        run: Run
        if slot.host.is_here and self._forks():
            if self._fork_server is None or not self._fork_server.is_alive:
                self._fork_server = ForkServer(self.options.folder / "fork-server.log")
            run = self._fork_server.start(slot, flags, log, tasks.outcome_file(folder))
        else:
            run = Launched(self.options, slot, flags, log, tasks.outcome_file(folder))
        task.current = Try(run, slot, folder)
        task.hosts.append(slot.host.name)
        again = f", try {folder.name.partition('-')[2]}" if folder.name != "try-1" else ""
        self._say(f"{task.name} on {slot.name}{again}: {space.words(self.open[task.trial][0].values)}")

    # ---- While tasks run ---------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        if time.monotonic() - self._watched < _LOOK_SECONDS:
            return
        self._watched = time.monotonic()
        for task in self.running():
            current = task.current
            if current is None:
                continue
            if current.why:
                if time.monotonic() - current.ended_at > _END_SECONDS:
                    current.run.kill()
                continue
            patience = self._patience(current)
            if patience and current.still_for() > patience:
                self._end(task, f"hung: none of its files changed for {patience:g} s")
            elif self.options.time_limit and current.seconds() > self.options.time_limit:
                self._end(task, f"over its time limit of {self.options.time_limit:g} s")
            elif self.options.asha and self._falls_behind(task, current):
                self._end(task, "ended early")

    def _patience(self, current: Try) -> float:
        """Seconds without a change of its files after which a task counts as hung; 0 for no limit."""
        # The watchdog of a job of several ranks knows more, so let it report first.
        limit = self.options.stall_limit * (2 if self.options.ranks_per_task > 1 else 1)
        return limit if current.run.has_begun() or not limit else max(limit, _LOAD_SECONDS)

    def _falls_behind(self, task: Task, current: Try) -> bool:
        epochs = tasks.history(current.folder, f"val_{self.options.goal}")
        return any(self.study.report(task.trial, epoch, value) for epoch, value in enumerate(epochs, 1))

    def _end(self, task: Task, why: str) -> None:
        if task.current:
            task.current.why, task.current.ended_at = why, time.monotonic()
            task.current.run.end()

    # ---- When tasks end ----------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        for task in self.running():
            current = task.current
            code = current.run.poll() if current else None
            if current is None or code is None:
                continue
            task.seconds += current.seconds()
            task.current = None
            if task in self._left:
                self._left.remove(task)
                task.clean(keep_model=False)
            else:
                self._on_end(task, current, code)

    def _on_end(self, task: Task, current: Try, code: int) -> None:
        if current.why == "ended early":
            epochs = tasks.history(current.folder, f"val_{self.options.goal}")
            self._close_trial(task.trial, "ended early", None, epochs=len(epochs))
            self._say(f"trial {task.trial}: ended early, after epoch {len(epochs)}, at {epochs[-1]:.4f}")
        elif task.find_result():
            if task is not self._final:
                if all(one.result for one in self.open[task.trial][1]):
                    self._conclude(task.trial)
            else:
                del self.open[task.trial]
        elif not self.stopped_by:
            self._on_failure(task, current, code)

    def _on_failure(self, task: Task, current: Try, code: int) -> None:
        log = current.folder / "logs" / "task.log"
        told = outcome.failure(tasks.outcome_file(current.folder))
        said = str(told or tasks.last_words(log if log.exists() else self.options.folder / "fork-server.log"))
        how = current.why or Failure(0, code).words()
        task.last = f"{how}: {said}" if said else how
        self._say(f"{task.name} failed on {current.slot.name}, {task.last} ({log})")
        if code == outcome.USAGE and told and told.why == "usage":  # a retry would fail in the same way
            task.failures = self.options.retries + 1
            self._judge(task)
            return
        task.avoided.add(current.slot.host)
        if current.slot.host.is_here:
            task.failures += 1
            self._judge(task)
        else:  # if the host is down, the failure does not count against the task
            self._suspects[current.slot.host].append(task)
            current.slot.host.ask()

    def _judge(self, task: Task) -> None:
        """Ends the trial of a task that has failed too often."""
        lost = len(task.tries()) - task.failures
        if task.failures <= self.options.retries and lost <= _MOST_LOST_HOSTS:
            return
        if task is self._final:
            del self.open[task.trial]
            return
        for other in self.open[task.trial][1]:
            if other.current:
                self._end(other, "another fold failed")
        self._say(f"trial {task.trial} failed for good: {task.last}")
        self._close_trial(task.trial, "failed", None, error=task.last)

    def _hear_hosts(self) -> None:
        for host in self.hosts:
            was_judging = bool(self._suspects[host])
            if not host.hear():
                continue
            if not host.is_up and was_judging:
                self._say(f"host {host.name} gets no tasks until it answers. {host.why}")
            elif host.is_up and not was_judging:
                self._say(f"host {host.name} answers again")
            judged, self._suspects[host] = self._suspects[host], []
            for task in judged:
                task.failures += host.is_up
                if task.trial in self.open:
                    self._judge(task)

    # ---- Ends --------------------------------------------------------------------------------------------------------

    def _is_alone(self) -> bool:
        """Whether no host has answered for `_ALONE_SECONDS`."""
        if any(host.is_up or host.is_asked for host in self.hosts) or self.running():
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = time.monotonic()
            self._say(f"no host answers; the sweep waits for {_ALONE_SECONDS:g} s")
        return self._alone_since is not None and time.monotonic() - self._alone_since > _ALONE_SECONDS

    def _leave(self) -> int:
        """Lets tasks save and exit, within `_LEAVE_SECONDS`. The same command resumes them."""
        running = self.running()
        self._say(f"{signal.Signals(self.stopped_by).name}: {len(running)} task(s) save and exit")
        for task in running:
            if task.current:
                task.current.run.leave()
        until = time.monotonic() + _LEAVE_SECONDS
        while self.running() and time.monotonic() < until:
            self._collect()
            time.sleep(_TICK)
        return 128 + signal.SIGINT if self.stopped_by == signal.SIGINT else outcome.PREEMPTED


def _defaults(options: Options) -> list[str]:
    """The sweep's defaults for flags that the user does not set."""
    searched = [parameter.flag for parameter in options.parameters]
    wanted = {"tensorboard": "false"}
    if options.ranks_per_task == 1:
        wanted["strategy"] = "single"
    if not options.folds:
        wanted["validation"] = "yes"
    if options.asha:
        wanted["eval_every"] = "1"
    given = {flag.lstrip("-").partition("=")[0].removeprefix("no") for flag in options.flags}
    return [f"--{name}={value}" for name, value in wanted.items() if name not in given and name not in searched]
