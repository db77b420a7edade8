"""The launcher when ranks and hosts are lost, come and go: each known way in which elastic Horovod jobs hang or die.

The ranks are shell scripts that do what real ones would: leave with 85 when they are told to save, or not at all.
"""

import signal
import sys

import pytest

from tests.conftest import remains
from tests.integration.test_hosts import launch, start  # noqa: F401 - fixtures
from tests.integration.test_launcher import arrive, end, read_until, wait_until

SAVES = "trap 'exit 85' TERM; "  # what a rank does that saves and leaves
WAIT = "while :; do sleep 0.1; done"
# Each start adds a line to the file; the number of lines is then that of the start.
COUNT = '[ $HOROVOD_RANK = 0 ] && echo $HOROVOD_SIZE >>"$STARTS"; sleep 0.5; n=$(wc -l <"$STARTS"); '


@pytest.fixture
def starts(tmp_path):
    """The file in which rank 0 of each start writes how many ranks there are."""
    return tmp_path / "starts"


@pytest.fixture
def elastic(start, starts, tmp_path):  # noqa: F811
    """Starts an elastic job from h1, of a shell script."""

    def run(script, *arguments):
        env = {"STARTS": str(starts)}
        return start("--elastic", "--workdir", tmp_path / "w", *arguments, "--", "sh", "-c", COUNT + script, env=env)

    return run


def sizes(starts):
    return [int(line) for line in starts.read_text().split()]


def test_a_rank_that_is_killed_is_started_again_with_all_others(elastic, starts):
    job = elastic("[ $n = 1 ] && [ $HOROVOD_RANK = 1 ] && kill -9 $$; [ $n = 2 ] || sleep 600", "-H", "h1:1,h2:1")
    code, output = end(job)
    assert code == 0, output
    assert sizes(starts) == [2, 2]
    assert "rank 1 on host h2 was the first to fail, killed by SIGKILL" in output
    assert "hvdkit.launch: restart 1 of 10." in output


def test_when_all_ranks_die_all_are_started_again(elastic, starts):
    """horovod#3264: the job ended when all workers died."""
    job = elastic("[ $n = 2 ] || kill -9 $$", "-H", "h1:2,h2:1")
    code, output = end(job)
    assert (code, sizes(starts)) == (0, [3, 3]), output


def test_restarts_end(elastic, starts):
    job = elastic("exit 7", "-H", "h1:1,h2:1", "--restarts", "2")
    code, output = end(job)
    assert (code, sizes(starts)) == (7, [2, 2, 2]), output
    assert "the job has failed 3 time(s), and --restarts 2 allows no more" in output


def test_a_mistake_of_the_users_is_not_repeated(elastic, starts):
    code, output = end(elastic("exit 2", "-H", "h1:1,h2:1"))
    assert (code, sizes(starts)) == (2, [2]), output


@pytest.mark.slow
def test_a_host_that_is_cut_off_is_done_without_and_taken_back(cluster, elastic, starts):
    script = SAVES + f"[ $n = 3 ] && exit 0; echo begins; {WAIT}"
    job = elastic(script, "-H", "h1:1,h2:1", "--host-timeout", "4", "--output", "rank0")
    try:
        read_until(job, "^begins$")
        cluster.change("cut", "h2")
        found = read_until(job, r"(Host h2 has sent no heartbeat for 4 s|started 1 rank\(s\) on h1:1|^begins$)", 3)
        assert found[1:] == ["started 1 rank(s) on h1:1", "begins"]
    finally:
        cluster.change("mend", "h2")
    code, output = end(job, 120)
    assert (code, sizes(starts)) == (0, [2, 1, 2]), output
    assert "the hosts change (slots for 2 ranks, 1 in use): the ranks save and exit." in output
    assert "restart 2" not in output, "a change of hosts is no failure"


@pytest.mark.slow
def test_with_too_few_hosts_it_waits_and_goes_on_when_they_are_back(cluster, elastic, starts):
    """horovod#3494: below --min-np the job hung for ever."""
    script = SAVES + f"[ $n = 2 ] && exit 0; echo begins; {WAIT}"
    job = elastic(script, "-H", "h1:1,h2:1", "--min-np", "2", "--host-timeout", "4", "--output", "rank0")
    try:
        read_until(job, "^begins$")
        cluster.change("cut", "h2")
        read_until(job, r"waiting for hosts: there are slots for 1 rank\(s\), and --min-np is 2")
    finally:
        cluster.change("mend", "h2")
    code, output = end(job, 120)
    assert (code, sizes(starts)) == (0, [2, 2]), output


@pytest.mark.slow
def test_with_too_few_hosts_for_too_long_it_ends(cluster, elastic):
    job = elastic(
        f"echo begins; {WAIT}",
        "-H",
        "h1:1,h2:1",
        "--min-np",
        "2",
        "--host-timeout",
        "4",
        "--elastic-timeout",
        "3",
        "--output",
        "rank0",
    )
    try:
        read_until(job, "^begins$")
        cluster.change("cut", "h2")
        code, output = end(job, 120)
    finally:
        cluster.change("mend", "h2")
    assert code == 75, "it may be started again"
    last = output.splitlines()[-1]
    assert last.startswith("hvdkit.launch: For 3 s there were slots for only 1 rank(s), and --min-np is 2.")
    assert last.endswith("The same command resumes from its last checkpoint.")
    wait_until(lambda: not remains(), "processes are left")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hosts that a script prints", "host file"])
def test_hosts_come_and_go_as_they_are_listed(elastic, starts, tmp_path, kind):
    listed = tmp_path / "hosts"
    listed.write_text("h1 slots=1\n")
    if kind == "host file":
        where = ["--hostfile", listed]
    else:
        script = tmp_path / "discover.sh"
        script.write_text(f"#!/bin/sh\nsed 's/ slots=/:/' {listed}\n")
        script.chmod(0o755)
        where = ["--host-discovery-script", script]
    job = elastic(SAVES + f"[ $n = 3 ] && exit 0; echo begins; {WAIT}", *where, "--output", "rank0")
    for hosts in ("h1 slots=1\nh2 slots=1\nh3 slots=1\n", "h1 slots=1\nh3 slots=1\n"):
        read_until(job, "^begins$")
        aside = listed.with_suffix(".new")
        aside.write_text(hosts)
        aside.replace(listed)
    code, output = end(job, 120)
    assert (code, sizes(starts)) == (0, [1, 3, 2]), output
    assert "h2 no longer available" in output
    assert "started 2 rank(s) on h1:1,h3:1." in output


@pytest.mark.slow
def test_a_new_host_whose_rank_hangs_at_start_is_done_without(start, tmp_path):  # noqa: F811
    """horovod#2652: a new worker that hung at start took the job with it."""
    listed = tmp_path / "hosts"
    listed.write_text("h1\n")
    # With rank 1 the first start that has one hangs: only rank 0 comes to the rendezvous.
    come = [part.replace("'", "'\\''") for part in arrive("0", 600)[1:]]
    python = f"{sys.executable} {come[0]} '{come[1]}'"
    script = f"trap 'kill $!; exit 85' TERM; {python} & wait"
    job = start(
        "--elastic",
        "--workdir",
        tmp_path / "w",
        "--hostfile",
        listed,
        "--start-timeout",
        "4",
        "--output",
        "rank0",
        "--",
        "sh",
        "-c",
        script,
    )
    read_until(job, r"started 1 rank\(s\) on h1:1")
    listed.write_text("h1\nh2\n")
    found = read_until(job, r"(Rank 1 on h2 did not reach hvd.init\(\) within 4 s|started \d rank\(s\) on \S+)", 3)
    assert found[0] == "started 2 rank(s) on h1:1,h2:1."
    assert found[2] == "started 1 rank(s) on h1:1."
    job.terminate()
    _, output = end(job)
    assert "hvdkit.launch: ended by SIGTERM." in output


@pytest.mark.slow
def test_a_new_host_that_is_not_fit_is_done_without(cluster, elastic, starts, tmp_path):
    """The others go on: before it came, nothing was wrong."""
    listed = tmp_path / "hosts"
    listed.write_text("h1\n")
    lacks = '[ "$(hostname)" = h3 ] && { echo "no data set here"; exit 2; }; '
    job = elastic(
        lacks + SAVES + f"[ $n = 3 ] && exit 0; echo begins; {WAIT}", "--hostfile", listed, "--output", "rank0"
    )
    read_until(job, "^begins$")
    listed.write_text("h1\nh3\n")
    code, output = end(job, 120)
    assert (code, sizes(starts)) == (0, [1, 2, 1]), output
    assert "hvdkit.launch: continuing without h3." in output


def test_a_number_of_ranks_that_cannot_be_used_is_lowered(elastic, starts):
    """hvdkit.train leaves with 86 if the global batch cannot be divided over the ranks."""
    code, output = end(elastic("[ $HOROVOD_SIZE = 3 ] && exit 86; exit 0", "-H", "h1:2,h2:1"))
    assert (code, sizes(starts)) == (0, [3, 2]), output
    assert "the command cannot use 3 ranks; trying 2." in output


def test_a_signal_to_the_launcher_ends_the_job_saved(elastic, starts):
    job = elastic(SAVES + f"echo begins; {WAIT}", "-H", "h1:1,h2:1", "--output", "rank0")
    read_until(job, "^begins$")
    job.send_signal(signal.SIGTERM)
    code, output = end(job)
    assert (code, sizes(starts)) == (85, [2]), output
    wait_until(lambda: not remains(), "processes are left")


def test_no_orphan_when_the_launcher_of_an_elastic_job_is_killed(elastic):
    job = elastic(f"trap '' TERM; echo begins; {WAIT}", "-H", "h1:1,h2:1", "--output", "rank0")
    read_until(job, "^begins$")
    job.kill()
    end(job)
    wait_until(lambda: not remains(), "processes are left")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--elastic", "-np", "2"], "resume from what the job has saved: give the folder with --workdir DIR"),
        (["--min-np", "1", "-np", "2"], "--min-np was given without --elastic"),
        (["--elastic", "--workdir", "w", "--mpi", "-np", "2"], "--elastic and --mpi exclude each other"),
        (["--elastic", "--workdir", "w", "--min-np", "3", "--max-np", "2"], "--max-np 2 is less than --min-np 3"),
        (["--elastic", "--workdir", "w", "--host-discovery-script", "x", "-H", "h1"], "exclude each other"),
        (["--elastic", "--workdir", "w", "--host-discovery-script", "/no/script"], "cannot be run"),
    ],
)
def test_mistakes(launch, arguments, message, tmp_path):  # noqa: F811
    ended = launch(*arguments, "--directory", tmp_path, "--", "true")
    assert (ended.code, "Traceback" in ended.output) == (2, False)
    assert message in ended.output.splitlines()[-1]
