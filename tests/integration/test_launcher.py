"""The launcher on this host: exit codes, what is shown and kept, who may come in, and that nothing is left behind."""

import http.client
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import remains, run_command

LAUNCH = [sys.executable, "-m", "hvdkit.launch"]
# Ranks that nothing but SIGKILL ends, each with a child that has left its process group.
STUBBORN = "trap '' TERM HUP INT; setsid sleep 987 & echo \"rank $HOROVOD_RANK is $$\"; while :; do sleep 0.2; done"


def launch(*arguments, timeout=120, env=None):
    return run_command([*LAUNCH, *arguments], timeout=timeout, env=env)


def start(*arguments, env=None):
    return subprocess.Popen(
        [*LAUNCH, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(env or {})},
    )


def read_until(process, pattern, times=1):
    """Reads a job's output until so many lines match; returns the matches."""
    found = []
    while len(found) < times:
        line = process.stdout.readline()
        assert line, f"the job ended before {pattern!r} was said"
        found += re.findall(pattern, line)
    return found


def wait_until(holds, what, seconds=60):
    """Waits for what must come; the limit only ends a test that has failed."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, what
        time.sleep(0.1)


def end(process, seconds=60):
    """Waits for a job's end; returns its exit code and the rest of its output."""
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


# ---- How a job ends ----------------------------------------------------------------------------------------------


def test_all_is_well():
    ended = launch("-np", 2, "--", "sh", "-c", "echo $HOROVOD_RANK of $HOROVOD_SIZE")
    assert (ended.code, sorted(ended.output.splitlines())) == (0, ["0 of 2", "[1] 1 of 2"])


def test_the_python_of_another_environment_is_named():
    ended = launch("-np", 2, "--", sys.executable, "-S", "-c", "import keras")  # -S: without site-packages
    assert ended.code == 1
    assert f"has no keras; the launcher runs in {sys.prefix}, which has. Activate that environment" in ended.output
    assert "has no keras" not in launch("-np", 1, "--", sys.executable, "-S", "-c", "import nothing").output


def test_the_first_rank_to_fail_has_the_last_word(tmp_path):
    program = """
import os, sys, time
rank = int(os.environ["HOROVOD_RANK"])
print("rank", rank, "begins")
if rank == 1:
    raise ValueError("no such label: 17")
time.sleep(600)
"""
    ended = launch("-np", 3, "--workdir", tmp_path, "--", sys.executable, "-c", program)
    assert ended.code == 1
    lines = ended.output.splitlines()
    assert "rank 0 begins" in lines
    assert "[1] rank 1 begins" not in lines, "the log has it"
    last = lines.index(f"hvdkit.launch: the last lines of rank 1 ({tmp_path}/logs/rank-0001.log has all):")
    assert lines[last + 1 : last + 3] == ["    rank 1 begins", "    Traceback (most recent call last):"] or (
        lines[last + 1] == "    Traceback (most recent call last):"
    )
    assert lines[-2] == "    ValueError: no such label: 17"
    host = socket.gethostname()
    assert lines[-1] == f"hvdkit.launch: rank 1 on host {host} was the first to fail, with exit code 1."
    assert "rank 2 begins\n" in (tmp_path / "logs" / "rank-0002.log").read_text()
    assert "ValueError: no such label: 17\n" in (tmp_path / "logs" / "rank-0001.log").read_text()


@pytest.mark.parametrize(("number", "name"), [(9, "SIGKILL"), (11, "SIGSEGV")])
def test_a_rank_that_a_signal_killed_wins_over_those_that_left_in_its_wake(number, name):
    script = f"[ $HOROVOD_RANK = 0 ] && sleep 0.3 && exit 7; sleep 0.3; kill -{number} $$; sleep 600"
    ended = launch("-np", 2, "--", "sh", "-c", script)
    assert ended.code == 128 + number
    assert re.search(rf"\nhvdkit\.launch: rank 1 on host \S+ was .* killed by {name}", "\n" + ended.output), (
        ended.output
    )


@pytest.mark.parametrize("code", [2, 75])
def test_ranks_that_have_said_all_are_not_repeated(code):
    ended = launch("-np", 2, "--", "sh", "-c", f"[ $HOROVOD_RANK = 1 ] && echo why && exit {code}; sleep 600")
    assert (ended.code, ended.output) == (code, "[1] why\n")


def test_a_job_that_is_told_to_stop_lets_its_ranks_save():
    save = "trap 'echo saved; exit 85' TERM; trap 'echo asked' USR1; echo ready; while :; do sleep 0.1; done"
    job = start("-np", "2", "--", "sh", "-c", save)
    read_until(job, "ready", 2)
    job.send_signal(signal.SIGUSR1)
    read_until(job, "asked", 2)
    job.send_signal(signal.SIGTERM)
    code, output = end(job)
    assert (code, output.count("saved")) == (85, 2)
    assert output.endswith("hvdkit.launch: ended by SIGTERM.\n")


def test_a_repeated_stop_request_is_the_same_request():
    """A scheduler and a wrapper around the launcher may both send it."""
    job = start("-np", "2", "--", "sh", "-c", "trap 'sleep 1; echo saved; exit 85' TERM; echo ready; sleep 60 & wait")
    read_until(job, "ready", 2)
    for _ in range(2):
        job.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    code, output = end(job)
    assert (code, output.count("saved")) == (85, 2), output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_request_before_the_ranks_have_begun_loses_nothing(number):
    job = start("-np", "2", "--", "sh", "-c", "echo loading; exec sleep 60")
    read_until(job, "loading", 2)
    job.send_signal(number)
    code, output = end(job)
    assert code == 85, output


def test_the_time_to_save_can_be_set():
    job = start("-np", "1", "--stop-timeout", "1", "--", "sh", "-c", STUBBORN)
    read_until(job, r"rank \d is")
    began = time.monotonic()
    job.send_signal(signal.SIGTERM)
    assert end(job)[0] == 128 + signal.SIGTERM
    assert time.monotonic() - began < 15


def test_a_program_that_never_calls_init_is_told_of(tmp_path):
    """Once, when the time to start is over, or at the end; nothing is said of a command that is no Python program."""
    (tmp_path / "mine.py").write_text("import time\ntime.sleep(3)\n")
    for options in ([], ["--start-timeout", "1"]):
        ended = launch("-np", 2, *options, "--", sys.executable, tmp_path / "mine.py")
        assert ended.code == 0
        said = f"hvdkit.launch: no rank has called hvd.init(). Without it the 2 processes of {tmp_path}/mine.py know"
        assert ended.output.count(said) == 1, ended.output


def test_what_ends_a_job_is_shown_also_by_a_rank_that_captures_its_standard_error(tmp_path):
    program = tmp_path / "captured.py"  # as pytest does, and a notebook's kernel
    program.write_text(
        "import os\n"
        "from hvdkit.outcome import STALLED, Failed, tell\n"
        f"os.dup2(os.open({str(tmp_path / 'captured.txt')!r}, os.O_CREAT | os.O_WRONLY), 2)\n"
        "tell(Failed('stall', STALLED, 'the job has made no progress'), 'hvdkit: no progress for 600 s')\n"
        "os._exit(STALLED)\n"
    )
    ended = launch("-np", 1, "--", sys.executable, program)
    assert ended.code == 75
    assert ended.output.splitlines()[0] == "hvdkit: no progress for 600 s"
    assert (tmp_path / "captured.txt").read_text() == "hvdkit: no progress for 600 s\n"


def test_a_full_disk_under_the_output_does_not_end_the_job(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-0001.log").symlink_to("/dev/full")
    script = f"for i in 1 2 3; do echo $i; sleep 0.1; done; touch {tmp_path}/done-$HOROVOD_RANK"
    command = [*LAUNCH, "-np", "2", "--workdir", str(tmp_path), "--output", "all", "--", "sh", "-c", script]
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}
    assert ended.stderr.count("cannot be written (No space left on device); the job continues.") == 1


def test_a_second_interrupt_ends_at_once():
    job = start("-np", "2", "--", "sh", "-c", STUBBORN)
    read_until(job, r"rank \d is", 2)
    job.send_signal(signal.SIGTERM)
    job.send_signal(signal.SIGINT)
    code, output = end(job)
    assert code in (128 + signal.SIGTERM, 128 + signal.SIGINT), output  # Python may handle the later one first
    wait_until(lambda: not remains(), "processes are left")


# ---- Nothing is left behind --------------------------------------------------------------------------------------


def test_no_orphan_when_the_launcher_is_killed():
    job = start("-np", "2", "--", "sh", "-c", STUBBORN)
    read_until(job, r"rank \d is", 2)
    assert len(remains()) > 6, "the launcher, its agent and keeper, two ranks and their children"
    job.kill()
    end(job)
    wait_until(lambda: not remains(), "processes are left")


@pytest.mark.slow
@pytest.mark.parametrize("which", ["keeper", "worker"])
def test_no_orphan_when_the_agent_is_killed(which):
    job = start("-np", "2", "--", "sh", "-c", STUBBORN)
    read_until(job, r"rank \d is", 2)
    keeper = psutil.Process(job.pid).children()[0]
    (keeper if which == "keeper" else keeper.children()[0]).kill()
    code, output = end(job)
    assert code != 0, output
    wait_until(lambda: not remains(), "processes are left")


def test_what_a_rank_left_running_ends_with_the_job():
    ended = launch("-np", 1, "--", "sh", "-c", "setsid sleep 987 & echo done")
    assert (ended.code, ended.output) == (0, "done\n")
    assert not remains()


# ---- Limits ------------------------------------------------------------------------------------------------------

ARRIVE = """
import http.client, os, time
host, _, path = os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"].partition("/")
port, rank = os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"], os.environ["HOROVOD_RANK"]
if rank in WHICH:
    connection = http.client.HTTPConnection(host)
    connection.request("PUT", f"/{path}:{port}/global/{rank}", b"here")
    print("rank", rank, connection.getresponse().status, host, flush=True)
time.sleep(SECONDS)
"""


def arrive(which, seconds):
    return [sys.executable, "-c", ARRIVE.replace("WHICH", repr(which)).replace("SECONDS", str(seconds))]


def test_a_rank_that_does_not_come_is_named():
    ended = launch("-np", 3, "--start-timeout", 2, "--", *arrive("02", 600))
    assert ended.code == 75
    last = ended.output.splitlines()[-1]
    assert last.startswith("hvdkit.launch: Rank 1 on localhost did not reach hvd.init() within 2 s after the first")
    assert "--start-timeout=SECONDS gives more time" in last


# ---- Strangers ---------------------------------------------------------------------------------------------------


class SideEffect:
    """A harmless pickle: who loads it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def outward_addresses():
    found = [a.address for addresses in psutil.net_if_addrs().values() for a in addresses if a.family == socket.AF_INET]
    return [address for address in found if not address.startswith("127.")]


def test_strangers_are_refused_and_the_job_goes_on(tmp_path):
    job = start("-np", "1", "--", *arrive("0", 5))
    ((host, port),) = read_until(job, r"rank 0 200 ([\d.]+):(\d+)")
    assert host == "127.0.0.1"
    trap = tmp_path / "loaded"
    for path in ("/global/0", "/worker_addresses/x:0", f"/{'0' * 64}:{port}/global/0"):
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        connection.request("PUT", path, pickle.dumps(SideEffect(trap)))
        assert connection.getresponse().status == 403
        connection.close()
    for address in outward_addresses():
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((address, int(port)), timeout=10)
    assert end(job) == (0, "")
    assert not trap.exists()


def test_secrets_are_on_no_command_line_and_in_no_log(tmp_path):
    secret = "s3cret-of-the-user"
    job = start(
        "-np",
        "1",
        "--workdir",
        str(tmp_path),
        "--",
        "sh",
        "-c",
        "echo ${#SECRET} $HOROVOD_GLOO_RENDEZVOUS_PORT; sleep 9",
        env={"SECRET": secret},
    )
    ((length, port),) = read_until(job, r"(\d+) (\d+)")
    assert int(length) == len(secret)
    rank = next(p for p in remains() if p.name() == "sh")
    token = rank.environ()["HOROVOD_GLOO_RENDEZVOUS_ADDR"].rpartition("/")[2]
    assert len(token) == 64
    commands = "\n".join(" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"]))
    assert secret not in commands
    assert token not in commands
    code, output = end(job)
    assert (code, token in output) == (0, False)
    assert (tmp_path / "logs" / "rank-0000.log").read_text().splitlines()[1:] == [f"{length} {port}"]


# ---- The command line --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-np", 2], "no command was given"),
        (["-np", 0, "--", "true"], "-np 0: at least one rank is needed"),
        (["--", "true"], "How many ranks?"),
        (["-np", 2, "--", "no-such-program"], "cannot start 'no-such-program': [Errno 2] No such file or directory"),
        (["-np", 3, "-H", "localhost:2", "--", "true"], "-np 3 asks for more ranks than the hosts localhost:2 have"),
        (["-np", 1, "--directory", "/no/such", "--", "true"], "has no directory /no/such"),
        (["-np", 1, "--interface", "none0", "--", "true"], "has no network interface none0"),
        (["-H", "no-such-host.invalid:1", "--", "true"], "getent hosts no-such-host.invalid must find its address"),
        (["-np", 1, "--bind", "gpus", "--", "true"], "shows 0 GPU(s) for 1 ranks"),
    ],
)
def test_mistakes_get_a_sentence(arguments, message):
    ended = launch(*arguments, env={"CUDA_VISIBLE_DEVICES": ""})
    assert ended.code == 2, ended.output
    assert message in ended.output.splitlines()[-1]
    assert "Traceback" not in ended.output


def test_a_dry_run_starts_nothing():
    ended = launch("-np", 2, "--bind", "cores", "--dry-run", "--", "touch", "a b")
    assert ended.code == 0, ended.output
    assert "command of every rank:\n    touch 'a b'\n" in ended.output
    assert "    HOROVOD_GLOO_RENDEZVOUS_ADDR=127.0.0.1:PORT/(the job's token)\n" in ended.output
    assert re.search(r"^ +1 +localhost +\S+ +local rank's \(1\), if any +is this host$", ended.output, re.M)
    assert re.search(r"^    .*HOROVOD_LOCAL_RANK=1 .*HOROVOD_RANK=1 HOROVOD_SIZE=2", ended.output, re.M)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core cannot be shared out")
def test_each_rank_has_its_own_cores():
    program = "import os; print(*sorted(os.sched_getaffinity(0)), 'own', os.environ.get('HVDKIT_OWN_CORES'))"
    ended = launch("-np", 2, "--bind", "cores", "--", sys.executable, "-c", program)
    masks = [set(line.removeprefix("[1] ").partition(" own 1")[0].split()) for line in ended.output.splitlines()]
    assert len(masks) == 2, ended.output
    assert masks[0].isdisjoint(masks[1])
    assert masks[0] | masks[1] == {str(core) for core in os.sched_getaffinity(0)}
