"""The launcher on several hosts: training, deaths, cut links, strangers, keys; and the hosts that tests are made of.

The programs of most jobs are shell scripts, which start at once; what they show does not depend on what a rank runs.
"""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys

import psutil
import pytest

from hvdkit.plan import links
from tests import forked, resident
from tests.conftest import ROOT, Cluster, remains, run_command
from tests.integration.test_launcher import STUBBORN, SideEffect, arrive, end, read_until, wait_until

TWO = ["-H", "h1:1,h2:1"]


@pytest.fixture
def launch(cluster):
    """Runs a job from h1 to its end."""

    def run(*arguments, timeout=120, env=None):
        return cluster.run("h1", sys.executable, "-m", "hvdkit.launch", *arguments, timeout=timeout, env=env)

    return run


@pytest.fixture
def start(cluster):
    """Starts a job from h1."""

    def run(*arguments, env=None):
        command = cluster.command("h1", sys.executable, "-m", "hvdkit.launch", *arguments)
        env = {**os.environ, **cluster.environment, **(env or {})}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)

    return run


@pytest.fixture
def edited(cluster):
    """Changes a file of a host for the time of a test; in place, because it lies under a bind mount."""
    before = {}

    def edit(host, file, text):
        path = cluster.etc(host, file)
        before.setdefault(path, path.read_text())
        path.write_text(text)

    yield edit
    for path, text in before.items():
        path.write_text(text)


# ---- Jobs --------------------------------------------------------------------------------------------------------


def test_ranks_run_where_they_belong(launch):
    script = 'echo "$HOROVOD_RANK $HOROVOD_LOCAL_RANK $HOROVOD_CROSS_RANK $(hostname) $HOROVOD_GLOO_IFACE $WORD $(pwd)"'
    ended = launch("-H", "h1:1,h2:2", "--", "sh", "-c", script, env={"WORD": "a'b"})
    assert ended.code == 0, ended.output
    here = os.getcwd()  # noqa: PTH109 - as the shell says it
    assert sorted(ended.output.splitlines()) == [
        f"0 0 0 h1 eth0 a'b {here}",
        f"[1] 1 0 1 h2 eth0 a'b {here}",
        f"[2] 2 1 0 h2 eth0 a'b {here}",
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_training_on_two_hosts_gives_the_model_of_one(cluster, train, tmp_path):
    script = ROOT / "launch" / "hosts.sh"
    flags = ["--model=mnist_mlp", "--dataset=digits", "--notensorboard"]
    ended = cluster.run("h1", script, *TWO, *flags, f"--workdir={tmp_path}/two", timeout=600)
    assert ended.code == 0, ended.output
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert (result["size"], result["test_accuracy"] >= 0.95) == (2, True)
    assert "rank 1@h2 hvdkit.train: digits: 1437 training examples" in (
        (tmp_path / "two" / "logs" / "rank-0001.log").read_text()
    )
    assert train(2, *flags, f"--workdir={tmp_path}/one", timeout=600).code == 0
    weights = [json.loads((tmp_path / name / "result.json").read_text())["weights_sha256"] for name in ("one", "two")]
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_model_divided_over_two_hosts_is_that_of_one_process(cluster, train, tmp_path):
    flags = ["--model=mnist_mlp", "--dataset=digits", "--notensorboard", "--steps=22", "--checkpoint_every=never"]
    assert train(0, "--strategy=single", *flags, f"--workdir={tmp_path}/single").code == 0
    expected = json.loads((tmp_path / "single" / "result.json").read_text())
    for strategy in ("tensor", "pipeline"):
        where = [*TWO, *flags, f"--strategy={strategy}", f"--workdir={tmp_path}/{strategy}"]
        ended = cluster.run("h1", *forked.command("-m", "hvdkit.train.local", *where), timeout=400)
        assert ended.code == 0, ended.output
        result = json.loads((tmp_path / strategy / "result.json").read_text())
        assert result["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-3), strategy
        assert result["test_accuracy"] == pytest.approx(expected["test_accuracy"], abs=0.01), strategy


LOSSES = ["labels to ignore", "a mask", "masked words", "weights", "mean by weights", "class weights", "batches", "sum"]
LOSSES += ["two losses"]
NORMALIZED = ["functional", "changed", "local"]


def losses_and_layers(path):
    """How far losses and layers are from one process, and what carries the gradients: one launch for all."""
    from hvdkit.collectives import transports
    from tests.parallel.callbacks.test_batch_losses import SHORT, evaluated
    from tests.parallel.model.test_adapting import learnt_together, trained_after_adapting
    from tests.parallel.model.test_batch_normalization import trained_with_normalization
    from tests.parallel.optimizers.test_weighing import against_one_process, data_sets

    trained, (short, *_), (shown, in_fit) = against_one_process(LOSSES), data_sets(), evaluated(SHORT)
    adapted, said = learnt_together(), trained_after_adapting()
    normalized = trained_with_normalization(path, NORMALIZED)
    return (trained, short, shown, in_fit), (adapted, said, normalized), transports.in_use()[0].name


@pytest.mark.slow
def test_each_loss_and_layer_on_two_hosts_is_that_of_one_process(launch, tmp_path):
    from tests.parallel.model.test_adapting import check_what_fit_says, check_what_was_learnt
    from tests.parallel.model.test_batch_normalization import check_normalization

    arguments = {"path": str(tmp_path / "x.keras")}
    call = {"file": __file__, "function": "losses_and_layers", "arguments": arguments, "environment": {}}
    (tmp_path / "call.json").write_text(json.dumps(call))
    ended = launch(*TWO, "--", *forked.command(resident.RANK_MAIN, tmp_path / "call.json"), timeout=300)
    assert ended.code == 0, ended.output
    losses, layers, used = zip(*(pickle.loads((tmp_path / f"{r}.pickle").read_bytes()) for r in (0, 1)), strict=True)
    assert used == ("sockets", "sockets")
    for trained, short, shown, in_fit in losses:
        assert len(trained) == len(LOSSES)
        assert {name: far for name, far in {**trained, **short}.items() if not max(far) < 1e-5} == {}
        for name, (alone, both, _) in shown.items():
            assert both == [{key: pytest.approx(value, rel=1e-5) for key, value in alone.items()}] * 2, name
        assert in_fit[0] == pytest.approx(in_fit[1], rel=1e-5)
    adapted, said, normalized = zip(*layers, strict=True)
    check_what_was_learnt(adapted)
    check_what_fit_says(said)
    for found in normalized:
        check_normalization(found, NORMALIZED)


@pytest.mark.parametrize(
    ("hosts", "size", "share"),
    [("h1:1,h2:1", 2, 1), pytest.param("h1:2,h2:1,h3:2", 5, 4 / 3, marks=pytest.mark.slow)],
)
def test_each_host_sends_what_one_rank_would(launch, hosts, size, share):
    """The bytes of a ring allreduce between the hosts, however many ranks they have: 2 (hosts - 1) / hosts."""
    ended = launch("-H", hosts, "--", *forked.command(ROOT / "tests" / "integration" / "sockets_program.py"))
    assert ended.code == 0, ended.output
    found = [json.loads(line) for line in re.findall(r"found (\{.*\})", ended.output)]
    assert sorted(f["rank"] for f in found) == list(range(size))
    assert {f["transport"] for f in found} == {"sockets"}
    assert max(f["error"] for f in found) < 1e-6
    assert len({f["bits"] for f in found}) == 1
    assert all(f["same_in_halves"] for f in found), "a sum in two halves has other bits"
    assert [f["sent"] for f in found] == [pytest.approx(share, rel=0.1)] * size


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_planner_measures_the_links_that_gradients_use(cluster, tmp_path):
    file = tmp_path / "tried.json"
    options = ["--shared-machine", "--threads", "1", "--batch", "32", "--seconds", "1", "--modes", "data parallel"]
    flags = ["--model=mnist_mlp", "--dataset=synthetic:28x28x1:10:6400"]
    measure = [sys.executable, "-m", "hvdkit.plan", "measure", *TWO, *options, "--json", file, "--", *flags]
    ended = cluster.run("h1", *measure, timeout=600)
    assert ended.code == 0, ended.output
    content = json.loads(file.read_text())
    assert [(row["mode"], row["predicted"] > 0, row["measured"] > 0) for row in content["rows"]] == [
        ("data parallel", True, True)
    ]
    between = content["links"]["between"]
    assert (between["ranks"], between["hosts"]) == (2, 2)
    link, _ = links.read(str(file))
    assert link.transport == "sockets"
    by_horovod = next(row["seconds"] for row in between["rows"] if row["operation"] == "allreduce")
    assert link.agreeing == by_horovod, "what an alltoall pays"


def test_a_dry_run_asks_the_hosts(launch):
    ended = launch(*TWO, "--bind", "cores", "--dry-run", "--", "touch", "a")
    assert ended.code == 0, ended.output
    assert re.search(r"^ +0 +h1 +0\S* +.* is this host$", ended.output, re.M), ended.output
    assert re.search(r"^ +1 +h2 +0\S* +.* by ssh as 10\.77\.0\.2$", ended.output, re.M), ended.output


# ---- Deaths ------------------------------------------------------------------------------------------------------


def test_a_remote_rank_that_is_killed_ends_the_job(start):
    job = start("-H", "h1:1,h2:1,h3:1", "--", "sh", "-c", STUBBORN)
    pids = dict(read_until(job, r"rank (\d) is (\d+)", 3))
    os.kill(int(pids["1"]), signal.SIGKILL)
    code, output = end(job)
    assert code == 128 + signal.SIGKILL, output
    assert "rank 1 on host h2 was the first to fail, killed by SIGKILL" in output.splitlines()[-1]
    wait_until(lambda: not remains(), "processes are left")


def test_no_orphan_on_any_host_when_the_launcher_is_killed(start):
    secret = "s3cret-of-the-user"
    job = start(*TWO, "--", "sh", "-c", STUBBORN, env={"SECRET": secret})
    ranks = [psutil.Process(int(pid)) for pid in read_until(job, r"rank \d is (\d+)", 2)]
    assert [p.environ()["SECRET"] for p in ranks] == [secret] * 2
    commands = subprocess.run(["ps", "-e", "-ww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert "hvdkit-agent" in commands, "the agent's command line is among them"
    assert secret not in commands
    assert ranks[0].environ()["HOROVOD_GLOO_RENDEZVOUS_ADDR"].rpartition("/")[2] not in commands
    job.kill()
    end(job)
    wait_until(lambda: not remains(), "processes are left")


@pytest.mark.slow
def test_a_cut_link_ends_both_sides(cluster, start):
    job = start(*TWO, "--host-timeout", "5", "--", "sh", "-c", STUBBORN)
    read_until(job, r"rank \d is", 2)
    cluster.change("cut", "h2")
    try:
        code, output = end(job)
        assert code == 75, output
        assert "hvdkit.launch: Host h2 has sent no heartbeat for 5 s: it is down, unresponsive or cut off." in output
        wait_until(lambda: not remains(), "processes are left on h2, which is still cut off")
    finally:
        cluster.change("mend", "h2")


# ---- Strangers ---------------------------------------------------------------------------------------------------

ATTACK = """
import http.client, sys
host, port, path, body = sys.argv[1:]
connection = http.client.HTTPConnection(host, int(port), timeout=10)
try:
    connection.request("PUT", path, bytes.fromhex(body))
    print(connection.getresponse().status)
except OSError as error:
    print(type(error).__name__)
"""


@pytest.mark.slow
def test_pickles_of_strangers_are_refused(cluster, start, tmp_path):
    trap = tmp_path / "loaded"
    body = pickle.dumps(SideEffect(trap)).hex()
    job = start(*TWO, "--", *arrive("01", 25))
    found = read_until(job, r"rank \d 200 ([\d.]+):(\d+)", 2)
    assert found[0] == found[1]
    host, port = found[0]
    assert host == "10.77.0.1", "the address of the job's interface"

    def attack(by, address, path="/worker_addresses/h1:0"):
        return cluster.run(by, sys.executable, "-c", ATTACK, address, port, path, body).output.strip()

    hung_up = ("RemoteDisconnected", "ConnectionResetError", "BrokenPipeError")
    assert attack("h3", host) in hung_up, "a third host"
    assert attack("h1", "127.0.0.1") == "ConnectionRefusedError", "nobody listens on loopback"
    for by in ("h1", "h2"):  # a stranger on a host of the job
        assert attack(by, host) == "403"
        assert attack(by, host, f"/{'0' * 64}:{port}/global/0") == "403"
    code, output = end(job)
    assert (code, output) == (0, "")
    assert not trap.exists()


# ---- Hosts that are not as they should be ------------------------------------------------------------------------


def refused(launch, message, *arguments, hosts="h1:1,h2:1"):
    ended = launch("-H", hosts, *arguments, "--", "true")
    assert (ended.code, "Traceback" in ended.output) == (2, False), ended.output
    assert message in ended.output.splitlines()[-1]
    return ended.output


def test_a_host_key_that_changed_is_refused(cluster, launch, edited):
    other = cluster.etc("h3", "ssh/ssh_host_ed25519_key.pub").read_text()
    edited("h1", "ssh/ssh_known_hosts", f"h2 {other}")
    refused(launch, "Host h2 has a different key than the known one")
    edited("h1", "ssh/ssh_known_hosts", "")
    refused(launch, "The key of host h2 is not known here, so it could be any machine.")
    assert launch(*TWO, "--insecure-host-keys", "--", "true").code == 0


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        ("h1:1,10.77.0.99:1", "Host 10.77.0.99 cannot be reached by ssh."),
        ("h1:1,h99:1", "Host h99 is not known here."),
    ],
)
def test_a_host_that_is_not_there(launch, hosts, message):
    refused(launch, message, "--start-timeout", "5", hosts=hosts)


def test_a_host_whose_name_is_that_of_loopback(launch, edited):
    edited("h2", "hosts", "127.0.0.1 localhost\n127.0.1.1 h2\n10.77.0.1 h1\n")
    said = refused(launch, "On host h2 its own name, h2, resolves to 127.0.1.1, and Horovod's Gloo would listen there")
    assert said.endswith("let /etc/hosts say: 10.77.0.2 h2.\n")


def test_a_host_without_what_is_needed(launch, tmp_path):
    refused(launch, "Host h2 has no Python at /no/python.", "--python", "/no/python")
    ended = launch(*TWO, "--", "no-such-program")
    assert ended.code == 2
    assert "cannot start 'no-such-program'" in ended.output


# ---- The hosts themselves ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_hosts_come_and_go_without_a_trace():
    hosts = Cluster(f"u{os.getpid()}")
    try:
        for number in (1, 2):  # up again replaces what was there
            assert hosts.up(number).output.startswith(f"h1 to h{number} are up")
        assert hosts.run("h1", "ssh", "h2", "hostname").output == "h2\n"
        assert hosts.run("h2", "ssh", "-o", "StrictHostKeyChecking=yes", "h1", "pwd; hostname").output.endswith("h1\n")
        wrong = hosts.run("h3", "true")
        assert (wrong.code, "there is no host 'h3'" in wrong.output) == (2, True)
    finally:
        assert hosts.down().code == 0
    assert hosts.down().code == 0, "down again does nothing"
    listed = run_command(["ip", "-o", "link"], timeout=60).output + run_command(["ip", "netns"], timeout=60).output
    assert hosts.name not in listed
    assert not hosts.etc("h1", "hosts").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "'' is not understood"),
        (["up", "0"], "a number of hosts from 1 to 99"),
        (["run", "h1", "ls"], "no host 'h1'"),
    ],
)
def test_the_hosts_script_answers_mistakes_in_one_sentence(arguments, message):
    ended = run_command([Cluster.script, *arguments], timeout=60, env={"HVDKIT_TESTHOSTS": f"v{os.getpid()}"})
    assert ended.code == 2
    assert message in ended.output
    assert len(ended.output.splitlines()) == 1


# ---- MPI ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun: apt-get install openmpi-bin")
def test_a_remote_rank_that_is_killed_under_mpi_is_named(launch, tmp_path):
    script = 'echo "$(hostname) $HOROVOD_CONTROLLER"; sleep 1; [ $OMPI_COMM_WORLD_RANK = 1 ] && kill -9 $$; sleep 600'
    ended = launch("--mpi", *TWO, "--workdir", tmp_path, "--", "sh", "-c", script)
    assert ended.code == 128 + signal.SIGKILL, ended.output
    assert "rank 1 on host h2 was the first to fail, killed by SIGKILL" in ended.output.splitlines()[-1]
    logs = [(tmp_path / "logs" / f"rank-000{rank}.log").read_text() for rank in (0, 1)]
    assert ["h1 mpi\n" in logs[0], "h2 mpi\n" in logs[1]] == [True, True]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun: apt-get install openmpi-bin")
def test_a_host_that_is_cut_off_under_mpi_is_named(cluster, start):
    job = start("--mpi", *TWO, "--host-timeout", "4", "--", "sh", "-c", 'echo "rank $(hostname)"; exec sleep 600')
    read_until(job, r"rank h\d", 2)
    cluster.change("cut", "h2")
    try:
        code, output = end(job, 120)
    finally:
        cluster.change("mend", "h2")
    assert code == 75, output
    assert "hvdkit.launch: Host h2 is down, unresponsive or cut off: mpirun has lost the connection to it." in output
    wait_until(lambda: not remains(), "processes are left", 90)
