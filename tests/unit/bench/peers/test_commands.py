"""How each peer is started on this host and on several, and on which cores."""

import os
import sys

import pytest

from hvdkit.bench import jobs
from hvdkit.bench.peers import commands, environments
from hvdkit.bench.peers.commands import ONE_CORE, PEERS, SCRIPT
from hvdkit.bench.peers.place import Place
from hvdkit.errors import UsageError

HERE, HOSTS = Place(2), Place(2, "h1:1,h2:1", (0, 1))


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Environments that look made, so that nothing is installed; those of other hosts are not asked for."""
    monkeypatch.setenv("HVDKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(jobs, "run", lambda command, *_: calls.append(command))
    calls = []
    for environment in environments.ENVIRONMENTS.values():
        programs = tmp_path / "peers" / environment.name / "bin"
        programs.mkdir(parents=True)
        (programs / "horovodrun").write_text("")
        (programs / "horovodrun").chmod(0o755)
        (programs.parent / ".hvdkit-ready").write_text(repr(environment.installs))
    return calls


def test_hvdkit_binds_its_ranks_unless_their_cores_are_named():
    program = [sys.executable, str(commands._PROGRAMS / "keras_fit.py"), "hvdkit"]
    start = [sys.executable, "-m", "hvdkit.launch", "-np", "2"]
    bound = [sys.executable, str(commands._PROGRAMS / "bound.py"), "0,1"]
    assert PEERS[SCRIPT].command(HERE) == [*start, "--", *program]
    assert PEERS[SCRIPT].command(HOSTS) == [*start, "-H", "h1:1,h2:1", "--bind", "none", "--", *bound, *program]


@pytest.mark.parametrize("peer", ["torch_ddp", "keras_jax", "multiworker_tf_keras"])
def test_peers_without_a_launcher_for_hosts_take_hvdkits(made, tmp_path, peer):
    command = PEERS[peer].command(HOSTS)
    assert command[1:9] == ["-m", "hvdkit.launch", "-np", "2", "-H", "h1:1,h2:1", "--bind", "none"]
    environment = PEERS[peer].environment
    python = str(tmp_path / "peers" / environment.name / "bin" / "python")
    assert command[command.index("0,1") + 1 :][:2] == [python, "-E"]
    ((_, *making),) = made
    assert making[:5] == ["-m", "hvdkit.launch", "-H", "h1,h2", "--"], "once on each host"
    assert making[-2:] == ["hvdkit.bench.peers.environments", environment.name]


def test_horovod_has_its_own_launcher(made, tmp_path):
    command = PEERS["horovod_tape"].command(HOSTS)
    assert command[1].endswith("horovodrun")
    options = ["-np", "2", "-H", "h1:1,h2:1", "--gloo", "--start-timeout", "300", "--disable-cache"]
    assert command[2:10] == options
    command = PEERS["horovod_keras2"].command(HERE)
    folder = tmp_path / "peers" / "horovod-keras2" / "bin"
    assert command[:3] == [str(folder / "python"), "-E", str(folder / "horovodrun")]
    assert made == [], "nothing to make on other hosts"


def test_one_process_cannot_use_several_hosts():
    with pytest.raises(UsageError, match="its replicas are in one process"):
        PEERS["mirrored"].command(HOSTS)
    assert PEERS["mirrored"].command(HERE)[-1] == "mirrored"


def test_one_core_is_one():
    first = str(jobs.usable_cores()[0])
    assert PEERS[ONE_CORE].command(HERE)[1:3] == [str(commands._PROGRAMS / "bound.py"), first]
    assert PEERS[ONE_CORE].command(Place(2, "h1:1,h2:1", (7, 3)))[2] == "7"


@pytest.mark.parametrize(
    ("peer", "place", "threads"),
    [
        (SCRIPT, HERE, []),
        (ONE_CORE, HERE, []),
        ("torch_ddp", HERE, [("4", "1"), ("4", "0"), ("8", "0")]),
        ("torch_ddp", Place(2, "h1:1,h2:1"), [("8", "1"), ("8", "0")]),
        ("torch_ddp", Place(2, "", (0, 1)), [("1", "0")]),
        ("mirrored", HERE, [("8", "1"), ("8", "0")]),
        ("mirrored", Place(2, "", (0, 1)), [("2", "0")]),
    ],
)
def test_threads_to_try(monkeypatch, peer, place, threads):
    monkeypatch.setattr(commands, "usable_cores", lambda: 8)
    found = [setting.values() for setting in commands.settings(peer, place) if setting]
    assert [tuple(values) for values in found] == threads


def test_a_rank_is_bound_to_its_cores():
    cores = jobs.usable_cores()[:2]
    show = "import os; print(*os.sched_getaffinity(0), os.environ['HVDKIT_OWN_CORES'])"
    command = [*commands.bound(Place(2, "", tuple(cores))), sys.executable, "-c", show]
    for rank, core in enumerate(cores):
        found = jobs.run(command, {"HOROVOD_RANK": str(rank), "HOROVOD_SIZE": str(len(cores))})
        assert found.split() == [str(core), "1"]
    alone = {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "1"}
    assert jobs.run(command, alone).split() == [*map(str, sorted(cores)), "1"]
    assert os.sched_getaffinity(0) >= set(cores)
