"""Ranks that come and go while a job runs, started by Horovod's elastic launcher or by hvdkit's, as a user does it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hvdkit.checkpoint import store
from hvdkit.checkpoint.plain import unpack
from tests import forked
from tests.conftest import _environment

pytestmark = pytest.mark.timeout(1200)  # the launcher alone imports TensorFlow twice before it starts ranks
PROGRAM = Path(__file__).with_name("elastic_main.py")


class Elastic:
    """An elastic job whose hosts are what stands in a file."""

    def __init__(self, folder, hosts, *launcher, pace, by="horovodrun", path=()):
        self.hosts = folder / "hosts"
        self.set_hosts(hosts)
        script = folder / "discover.sh"
        script.write_text(f"#!/bin/sh\ncat {self.hosts}\n")
        script.chmod(0o755)
        self.log = folder / "log"
        start = {
            # "lo" spares a minute in which Horovod looks for a network that all hosts share.
            "horovodrun": [Path(sys.executable).with_name("horovodrun"), "--network-interfaces", "lo"],
            "hvdkit": [sys.executable, "-m", "hvdkit.launch", "--elastic", "--workdir", folder, "--output", "all"],
        }[by]
        end = ["--"] if by == "hvdkit" else []
        command = [*start, *launcher, "--host-discovery-script", script, *end, *forked.command(PROGRAM, pace)]
        environment = {"PYTHONPATH": str(PROGRAM.parents[2]), "TF_CPP_MIN_LOG_LEVEL": "2"}
        environment["PATH"] = os.pathsep.join([*map(str, path), os.environ["PATH"]])
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(c) for c in command],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment},
            )

    def set_hosts(self, hosts):
        aside = self.hosts.with_suffix(".new")
        aside.write_text(hosts + "\n")
        aside.replace(self.hosts)

    def wait_for(self, pattern, timeout=500):
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            found = re.findall(pattern, self.log.read_text(errors="replace"))
            if found:
                return found
            if self.process.poll() is not None:
                break
            time.sleep(0.5)
        return pytest.fail(f"{pattern!r} was not printed; the job's output:\n{self.log.read_text(errors='replace')}")

    def wait_for_commit(self, epoch, timeout=60):
        """Wait until a commit of this epoch or a later one is on disk."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            commit = store.newest(self.hosts.parent / "elastic")
            if commit and unpack(commit.state["attributes"], commit.arrays)["epoch"] >= epoch:
                return
            time.sleep(0.1)
        pytest.fail(f"no commit of epoch {epoch} was written")

    def finish(self, timeout=500):
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return pytest.fail(f"the job does not end; its output:\n{self.log.read_text(errors='replace')}")

    def stop(self):
        if self.process.poll() is None:
            for member in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
                try:
                    member.send_signal(signal.SIGKILL)
                except (psutil.NoSuchProcess, ProcessLookupError):
                    continue
            self.process.wait()


@pytest.fixture
def elastic(tmp_path):
    jobs = []

    def start(hosts, *launcher, **options):
        jobs.append(Elastic(tmp_path, hosts, *launcher, **options))
        return jobs[-1]

    yield start
    for job in jobs:
        job.stop()
    # The launcher leaves helpers that end a moment after it.
    mark = os.environ["HVDKIT_TEST"]
    helpers = [p for p in psutil.process_iter() if p.pid != os.getpid() and _environment(p).get("HVDKIT_TEST") == mark]
    psutil.wait_procs(helpers, timeout=30)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["horovodrun", "hvdkit"])
def test_a_rank_that_comes_later_joins_the_training(elastic, by):
    pace = {"horovodrun": 0.7, "hvdkit": 0.3}[by]  # both look at hosts every few seconds only
    job = elastic("localhost:1", "-np", 1, "--min-np", 1, "--max-np", 2, pace=pace, by=by)
    job.wait_for(r"rank 0 of 1 did epoch 1 ")
    job.set_hosts("localhost:2")
    job.wait_for(r"rank 1 of 2 starts at epoch \d+, batch \d+")
    assert job.finish() == 0
    output = job.log.read_text(errors="replace")
    done = re.findall(r"rank (\d) of 2 is done: 6 epochs, (\d+) steps, weights (\S+), seed \[(\d+)\]", output)
    assert sorted(rank for rank, *_ in done) == ["0", "1"], output
    (_, steps, weights, seed), (_, other_steps, other_weights, other_seed) = done
    assert steps == other_steps == "120", "each of 6 epochs has 20 steps, also the one that was interrupted"
    assert weights == other_weights
    assert seed != other_seed, "ranks drop different units"
    epochs = [int(e) for e in re.findall(r"rank 0 of \d did epoch (\d+)", output)]
    assert epochs == [1, 2, 3, 4, 5, 6], "no epoch is lost or done twice"


@pytest.fixture
def ssh_to_here(tmp_path):
    """A folder with an `ssh` that runs the command on this host: 127.0.0.2 is then a second host to Horovod."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text('#!/bin/sh\nfor last; do :; done\nexec /bin/sh -c "$last"\n')
    (folder / "ssh").chmod(0o755)
    return folder


@pytest.mark.slow
def test_after_a_kill_the_survivor_goes_on_from_the_last_commit(elastic, ssh_to_here):
    """Horovod bars the host of a dead process, so it takes two hosts for one rank to survive."""
    hosts = "localhost:1\n127.0.0.2:1"
    job = elastic(hosts, "-np", 2, "--min-np", 1, pace=0.1, path=[ssh_to_here])
    victim = job.wait_for(r"rank \d of 2 did epoch 2 .*\(process (\d+) of 127\.0\.0\.2\)")[0]
    os.kill(int(victim), signal.SIGKILL)
    job.wait_for(r"rank 0 of 1 starts at epoch \d+, batch \d+ \(process \d+ of localhost\)")
    assert job.finish() == 0
    output = job.log.read_text(errors="replace")
    (steps, sizes) = re.findall(r"rank 0 of 1 is done: 6 epochs, (\d+) steps.*sizes \[(.*)\]", output)[0]
    assert steps == "120", f"a step was lost or done twice:\n{output}"
    assert sizes == "2, 1", "the state of before the kill was kept"


@pytest.mark.slow
def test_after_a_kill_new_ranks_go_on_from_the_last_commit(elastic):
    """Under hvdkit's launcher all start anew, also on the host of the dead one."""
    job = elastic("localhost:2", "--min-np", 1, pace=0.1, by="hvdkit")
    victim = job.wait_for(r"rank 1 of 2 did epoch 2 .*\(process (\d+) of ")[0]
    job.wait_for_commit(epoch=2)  # rank 0 writes it in the background
    os.kill(int(victim), signal.SIGKILL)
    job.wait_for(r"hvdkit.launch: restart 1 of 10")
    assert job.finish() == 0
    output = job.log.read_text(errors="replace")
    starts = re.findall(r"rank 0 of 2 starts at epoch (\d+), batch (\d+)", output)
    assert starts[0] == ("0", "0")
    assert len(starts) == 2
    assert (2, 0) <= tuple(map(int, starts[1])) < (4, 0), "what was committed is not done again"
    (steps, sizes) = re.findall(r"rank 0 of 2 is done: 6 epochs, (\d+) steps.*sizes \[(.*)\]", output)[0]
    assert steps == "120", f"a step was lost or done twice:\n{output}"
    assert sizes == "2, 2", "the state of before the kill was kept"
    assert not list((job.hosts.parent / "elastic").iterdir()), "a job that is done leaves no commits behind"
