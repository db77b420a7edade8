"""launch/slurm.sh under a real Slurm: its daemons on test hosts, two nodes, no ssh."""

import json
import os
import re
import shutil
import sys
import time

import pytest

from tests.conftest import ROOT, remains, run_command

CONFIGURATION = """
ClusterName=test
SlurmctldHost=h1
SlurmUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ReturnToService=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=h[1-2] CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


class Slurm:
    """A controller and two nodes, on h1 and h2."""

    def __init__(self, cluster, folder):
        self.cluster = cluster
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # v2 is not mounted everywhere
        for name in ("state", "h1", "h2"):
            (folder / name).mkdir()

    def run(self, *command, host="h1", env=None):
        ended = self.cluster.run(host, *command, timeout=60, env={**self.environment, **(env or {})})
        assert ended.code == 0, ended.output
        return ended.output

    def up(self):
        self.run("slurmctld", "-c")
        for host in ("h1", "h2"):
            self.run("slurmd", "-N", host, host=host)
        self.wait(lambda: self.run("sinfo", "--noheader", "--format=%D %t") == "2 idle\n", "the nodes to be idle", 60)

    def down(self):
        self.run("scancel", "--full", "-u", "root")
        self.run("scontrol", "shutdown")
        self.wait(lambda: not list(self.folder.glob("*.pid")), "Slurm's daemons to end", 60)

    def wait(self, holds, what, seconds):
        until = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > until:
                logs = [f"{log}:\n{log.read_text(errors='replace')[-3000:]}" for log in self.folder.glob("*.log")]
                pytest.fail(f"waited for {what} for {seconds} s\n" + "\n".join(logs))
            time.sleep(0.3)


class Batch:
    """A submitted job; an `ssh` that tells of its use and fails comes first on its PATH."""

    def __init__(self, slurm, folder, *command):
        self.slurm = slurm
        self.out = folder / "out"
        self.ssh_used = folder / "ssh-was-used"
        stand_in = folder / "bin" / "ssh"
        stand_in.parent.mkdir()
        stand_in.write_text(f"#!/bin/sh\ntouch {self.ssh_used}\nexit 255\n")
        stand_in.chmod(0o755)
        path = {"PATH": f"{stand_in.parent}:{os.environ['PATH']}"}
        submitted = slurm.run("sbatch", f"--output={self.out}", *command, env=path)
        self.id = re.search(r"Submitted batch job (\d+)", submitted)[1]

    def output(self):
        return self.out.read_text(errors="replace") if self.out.exists() else ""

    def wait_for(self, text, seconds=240):
        self.slurm.wait(lambda: text in self.output(), f"{text!r} in {self.output()[-2000:]}", seconds)

    def about(self):
        return dict(re.findall(r"(\w+)=(\S+)", self.slurm.run("scontrol", "show", "job", self.id)))

    def finish(self, seconds=240):
        """Waits for the job's end; returns its state and exit code."""
        over = ("COMPLETED", "FAILED", "CANCELLED")
        self.slurm.wait(lambda: self.about()["JobState"] in over, f"job {self.id} to end", seconds)
        about = self.about()
        return about["JobState"], int(about["ExitCode"].partition(":")[0])


@pytest.fixture(scope="module")
def slurm(cluster, tmp_path_factory):
    missing = [name for name in ("slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=_path())]
    if missing:
        refuse = pytest.fail if os.environ.get("HVDKIT_TEST_HOSTS") else pytest.skip
        refuse(f"no {', '.join(missing)}: apt-get install slurm-wlm")
    slurm = Slurm(cluster, tmp_path_factory.mktemp("slurm"))
    slurm.up()
    yield slurm
    slurm.down()


def _path():
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


@pytest.fixture
def submit(slurm, tmp_path):
    jobs = []

    def run(*command):
        jobs.append(Batch(slurm, tmp_path, *command))
        return jobs[-1]

    yield run
    for job in jobs:
        assert not job.ssh_used.exists()
        slurm.run("scancel", "--full", job.id)
        slurm.wait(lambda: "RUNNING" not in slurm.run("squeue", "--format=%T"), "jobs to end", 60)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_that_is_told_to_leave_is_queued_again_and_goes_on(submit, slurm, tmp_path):
    workdir = tmp_path / "w"
    flags = ["--model=mnist_mlp", "--dataset=digits", "--epochs=60", "--notensorboard", f"--workdir={workdir}"]
    job = submit(ROOT / "launch" / "slurm.sh", *flags)
    job.wait_for("epoch 3/60")
    slurm.run("scancel", "--signal=USR1", "--batch", job.id)  # as --signal=B:USR1@120 does near the time limit
    job.wait_for("slurm.sh: stop requested; the run is queued again")
    slurm.wait(lambda: job.about()["JobState"] == "PENDING", "the job to be queued", 60)
    # Slurm itself waits two minutes before it starts a job again. Its nodes need one second: a node does not tell the
    # job's new credential from the one that was revoked in the same second, and the job fails.
    slurm.run("scontrol", "update", f"JobId={job.id}", "StartTime=now+2")
    assert job.finish() == ("COMPLETED", 0), job.output()
    output = job.output()
    assert "resuming from" in output
    result = json.loads((workdir / "result.json").read_text())
    assert (result["size"], result["steps"], len(result["train_loss"])) == (2, 60 * 44, 60)
    epochs = [int(n) for n in re.findall(r"^epoch (\d+)/60", output, re.M)]
    assert sorted(set(epochs)) == epochs, "no epoch is done twice"
    logs = [(workdir / "logs" / f"rank-000{rank}.log").read_text() for rank in (0, 1)]
    assert ["rank 1@h2" in log for log in logs] == [False, True]


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_job_with_its_exit_code(submit, tmp_path):
    script = tmp_path / "job.sh"
    fails = 'echo "rank $HOROVOD_RANK on $(hostname)"; [ $HOROVOD_RANK = 1 ] && exit 7; sleep 600'
    launcher = f"{sys.executable} -m hvdkit.launch --hosts-from slurm"
    script.write_text(f"#!/bin/sh\ncd {ROOT}\n{launcher} -- sh -c '{fails}'\n")
    job = submit("--nodes=2", "--ntasks-per-node=1", script)
    assert job.finish() == ("FAILED", 7), job.output()
    lines = job.output().splitlines()
    assert "rank 0 on h1" in lines
    assert "[1] rank 1 on h2" in lines
    assert lines[-1] == "hvdkit.launch: rank 1 on host h2 was the first to fail, with exit code 7."


@pytest.mark.slow
def test_nothing_is_left_of_a_job_that_is_cancelled(submit, slurm, tmp_path):
    script = tmp_path / "job.sh"
    ranks = "trap '' TERM; setsid sleep 986 & echo begins; while :; do sleep 0.2; done"
    launcher = f"{sys.executable} -m hvdkit.launch --hosts-from slurm"
    script.write_text(f'#!/bin/sh\ncd {ROOT}\n{launcher} -- sh -c "{ranks}"\n')
    job = submit("--nodes=2", "--ntasks-per-node=1", script)
    job.wait_for("[1] begins")
    assert len(_sleepers()) == 2
    slurm.run("scancel", "--full", job.id)
    slurm.wait(lambda: not remains() and not _sleepers(), "the ranks and their children to end", 90)


def _sleepers():
    return run_command(["pgrep", "-f", "^sleep 986$"], timeout=60).output.split()


@pytest.mark.slow
def test_mistakes(cluster, submit, tmp_path):
    ended = run_command([ROOT / "launch" / "slurm.sh"], timeout=60, env={"SLURM_JOB_ID": ""})
    assert (ended.code, ended.output.startswith("slurm.sh: this script runs inside a Slurm job")) == (2, True)
    launcher = [sys.executable, "-m", "hvdkit.launch", "--remote-shell", "srun", "-np", "1", "--", "true"]
    ended = run_command(launcher, timeout=60)
    assert ended.code == 2
    assert "--remote-shell srun was given outside of a Slurm job (SLURM_JOB_ID is not set)." in ended.output
    elsewhere = submit(f"--export=ALL,HVDKIT_HOME={tmp_path}", ROOT / "launch" / "slurm.sh")
    assert elsewhere.finish() == ("FAILED", 2)
    assert re.search(r"slurm.sh: \S+ has no launch/local.sh; submit from the checkout", elsewhere.output())
