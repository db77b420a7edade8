"""Sweeps of real trainings: on this host's slots, through crashes and kills, and on hosts of which one is lost.

Each test starts TensorFlow once a sweep, so one sweep shows several things.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import keras
import pytest

from tests import forked
from tests.conftest import remains, run_command
from tests.integration.test_launcher import wait_until

pytestmark = pytest.mark.timeout(900)

SWEEP = forked.command("-m", "hvdkit.sweep")
MODEL = f"--model={Path(__file__).parent / 'gated_model.py'}:build"


def sweep(workdir, *arguments, timeout=400, env=None):
    return run_command([*SWEEP, f"--workdir={workdir}", *arguments], timeout=timeout, env=env)


def read(workdir):
    return json.loads((workdir / "result.json").read_text())


def tries(workdir, number):
    return len(list((workdir / "trials" / f"{number:04d}").glob("try-*")))


class Gate:
    """A folder where tasks say who they are, and wait for each other's test."""

    def __init__(self, folder):
        self.folder = folder
        self.env = {"SWEEP_GATE": str(folder)}
        folder.mkdir()

    def open(self):
        (self.folder / "open").touch()

    def arrived(self):
        """(host, process id) of the tasks that have come so far."""
        names = [path.name.rpartition("-") for path in self.folder.iterdir() if path.name != "open"]
        return [(host, int(pid)) for host, _, pid in names]

    def wait_for(self, number):
        wait_until(lambda: len(self.arrived()) >= number, f"{number} task(s) did not begin", 240)
        return self.arrived()


@pytest.fixture
def gate(tmp_path):
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


@pytest.fixture
def start(tmp_path):
    """Starts a sweep, and keeps what it says in a file."""
    started = []

    def run(workdir, *arguments, env=None, command=None, name="said"):
        said = (tmp_path / name).open("w+")
        process = subprocess.Popen(
            [str(part) for part in command or [*SWEEP, f"--workdir={workdir}", *arguments]],
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
        )
        started.append((process, said))
        process.said = lambda: (tmp_path / name).read_text()
        return process

    yield run
    for process, said in started:
        process.kill()
        process.wait()
        said.close()


@pytest.mark.slow
def test_a_grid_is_finished_and_the_best_model_is_kept(tmp_path):
    workdir = tmp_path / "sweep"
    search = ["-np", "2", "--grid", "optimizer=adam,sgd", "--grid", "global_batch=32,64,100000", "--", "--epochs=2"]
    ended = sweep(workdir, *search)
    assert ended.code == 0, ended.output
    result = read(workdir)
    states = [(t["values"]["global_batch"], t["state"], t["notes"]["tries"]) for t in result["trials"]]
    assert sorted(states) == sorted([(32, "done", 1), (64, "done", 1), (100000, "failed", 1)] * 2)
    error = next(t["notes"]["error"] for t in result["trials"] if t["state"] == "failed")
    assert "A local batch of 100000 is larger than a share of 1293 training examples" in error  # a tenth validates
    best = max(t["value"] for t in result["trials"] if t["state"] == "done")
    kept = json.loads((workdir / "best" / "result.json").read_text())
    assert result["best"]["value"] == best == kept["validation_accuracy"] >= 0.9
    assert keras.saving.load_model(workdir / "best" / "model.keras").count_params() > 0
    assert len(list(workdir.glob("trials/*/try-*/model.keras"))) == 1, "those of the others take room"
    for plot in ("history", "parallel_coordinate", "importance"):
        assert (workdir / f"{plot}.png").stat().st_size > 1000
    assert re.search(r"^ +0 +adam +\d+ +done +0\.\d{4} ", ended.output, re.MULTILINE), ended.output

    again = sweep(workdir, *search)
    assert again.code == 0, again.output
    assert [tries(workdir, number) for number in range(6)] == [1] * 6, "nothing is done twice"
    other = sweep(workdir, "-np", "2", "--grid", "optimizer=adam,sgd", "--", "--epochs=3")
    assert (other.code, "has another sweep: its parameters, flags differ" in other.output) == (2, True)


@pytest.mark.slow
def test_kills_and_hangs_lose_nothing(tmp_path, gate, start):
    workdir = tmp_path / "sweep"
    search = ["-np", "2", "--stall_timeout=20", "--grid", "seed=1,2,3,4", "--", MODEL, "--dataset=digits", "--epochs=2"]
    run = start(workdir, *search, env=gate.env)
    first = gate.wait_for(2)
    os.kill(first[0][1], signal.SIGKILL)
    gate.wait_for(3)
    assert "failed on" in run.said()
    assert "killed by SIGKILL" in run.said()
    frozen = next(pid for _, pid in gate.arrived() if (None, pid) not in first and pid != first[0][1])
    os.kill(frozen, signal.SIGSTOP)
    gate.open()
    wait_until(lambda: "hung: none of its files changed for 20 s" in run.said(), "it is not found to hang", 120)
    run.kill()
    run.wait()
    wait_until(lambda: not remains(), "the tasks outlive their sweep")
    finished = {path: path.stat().st_mtime_ns for path in workdir.glob("trials/*/try-*/result.json")}

    ended = sweep(workdir, *search, env=gate.env)
    assert ended.code == 0, ended.output
    trials = read(workdir)["trials"]
    assert [t["state"] for t in trials] == ["done"] * 4
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "what was finished is not done again"
    assert sum(tries(workdir, number) for number in range(4)) >= 6, "the killed and the hung one were tried again"
    assert len(list(workdir.glob("trials/*/try-*/result.json"))) == 4


@pytest.mark.slow
def test_bad_trials_end_early_and_a_sweep_that_was_told_to_leave_goes_on(tmp_path, start):
    workdir = tmp_path / "sweep"
    search = ["-np", "1", "--asha=2:1", "--goal=loss", "--grid", "learning_rate=0.005,1e-8,1e-9", "--"]
    search += ["--dataset=digits", "--epochs=60", "--lr_schedule=constant"]
    run = start(workdir, *search)
    checkpoints = workdir / "trials" / "0000" / "try-1" / "checkpoints"
    wait_until(lambda: checkpoints.exists() and any(checkpoints.glob("0*")), "there is no checkpoint", 240)
    run.terminate()
    assert run.wait(60) == 85, run.said()
    assert "The same command goes on with this sweep." in run.said()
    ended = sweep(workdir, *search)
    assert ended.code == 0, ended.output
    trials = read(workdir)["trials"]
    assert [t["state"] for t in trials] == ["done", "ended early", "ended early"], ended.output
    assert all(t["notes"]["epochs"] < 60 for t in trials[1:])
    history = (workdir / "trials" / "0000" / "try-2" / "history.csv").read_text().splitlines()
    assert len(history) == 61, "the second try went on from the first one's checkpoint, with its history"


@pytest.mark.slow
def test_folds_are_tasks_and_the_best_is_trained_on_all(tmp_path):
    workdir = tmp_path / "sweep"
    search = ["--folds=3", "--random", "learning_rate=1e-3..1e-2 log", "--trials=1", "--seed=3"]
    ended = sweep(workdir, "-np", "2", *search, "--", "--dataset=digits", "--epochs=2")
    assert ended.code == 0, ended.output
    result = read(workdir)
    folds = [json.loads((workdir / f"trials/0000/fold-{i}/try-1/result.json").read_text()) for i in range(3)]
    values = [fold["test_accuracy"] for fold in folds]
    assert result["trials"][0]["notes"]["values"] == values
    assert result["best"]["value"] == pytest.approx(sum(values) / 3)
    log = (workdir / "trials/0000/fold-0/try-1/logs/task.log").read_text()
    assert "958 training examples" in log, "two thirds of 1,437"
    final = json.loads((workdir / "best" / "config.json").read_text())
    assert (final["fold"], final["learning_rate"]) == (None, result["best"]["values"]["learning_rate"])
    assert (workdir / "best" / "model.keras").exists()


@pytest.mark.slow
def test_a_task_of_two_ranks(tmp_path):
    workdir = tmp_path / "sweep"
    ended = sweep(workdir, "-np", "2", "--ranks_per_task=2", "--grid", "epochs=1,2", "--", "--dataset=digits")
    assert ended.code == 0, ended.output
    sizes = [json.loads(path.read_text())["size"] for path in sorted(workdir.glob("trials/*/try-1/result.json"))]
    assert sizes == [2, 2]


@pytest.mark.slow
@pytest.mark.parametrize(("lose", "find"), [("cut", "mend"), ("halt", "boot")])
def test_a_host_is_lost(cluster, tmp_path, gate, start, lose, find):
    workdir = tmp_path / "sweep"
    arguments = ["-H", "h1:1,h2:1", "--host_timeout=5", "--grid", "seed=1,2,3", "--"]
    arguments += [MODEL, "--dataset=digits", "--epochs=2"]
    # Not forked: on h2, sshd starts the same interpreter, without the variables that tests/python needs.
    command = cluster.command("h1", sys.executable, "-m", "hvdkit.sweep", f"--workdir={workdir}", *arguments)
    run = start(workdir, env={**cluster.environment, **gate.env}, command=command)
    where = {host for host, _ in gate.wait_for(2)}
    assert where == {"h1", "h2"}, run.said()
    cluster.change(lose, "h2")
    try:
        wait_until(lambda: "host h2 gets no tasks until it answers" in run.said(), "it is not found to be lost", 120)
        gate.open()
        assert run.wait(400) == 0, run.said()
    finally:
        cluster.change(find, "h2")
    trials = read(workdir)["trials"]
    assert [t["state"] for t in trials] == ["done"] * 3, run.said()
    lost = next(t for t in trials if "h2" in t["notes"]["hosts"])
    assert (lost["notes"]["hosts"], lost["notes"]["tries"]) == (["h2", "h1"], 2)
    wait_until(lambda: not remains(), "processes are left on h2", 60)
