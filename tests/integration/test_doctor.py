"""The doctor on hosts with an sshd, a network and a name of their own: what it says of healthy and of ill ones."""

import json
import os
import shlex
import sys
from pathlib import Path

import keras
import pytest

from tests.conftest import Cluster, remains

QUICK = ["--skip", "build"]  # what TensorFlow is not needed for


@pytest.fixture
def hosts():
    """Makes hosts of this test's own, which it may spoil."""
    made = Cluster(f"d{os.getpid()}")

    def up(number):
        ended = made.up(number)
        if ended.code != 0:
            refuse = pytest.fail if os.environ.get("HVDKIT_TEST_HOSTS") else pytest.skip
            refuse(f"no test hosts: {ended.output.strip()}")
        return made

    yield up
    made.down()


@pytest.fixture
def examine(tmp_path):
    """Runs the doctor on h1; returns how it ended, and the failures by check and host."""

    def run(cluster, where, *flags, code):
        report = tmp_path / "report.json"
        flags = ["-H", where, "--workdir", tmp_path / "runs", *flags, "--json", report]
        ended = cluster.run("h1", sys.executable, "-m", "hvdkit.doctor", *flags, timeout=500)
        assert ended.code == code, ended.output
        written = json.loads(report.read_text())
        assert written["ok"] is (code == 0)
        return ended.output, {(r["check"], r["where"]): r for r in written["results"] if r["status"] != "ok"}, written

    return run


def test_healthy_hosts_are_well(hosts, examine, tmp_path):
    cluster = hosts(2)
    before = sorted(tmp_path.iterdir())
    output, notable, written = examine(cluster, "h1:2,h2:2", "--dataset", "digits", code=0)
    assert {check for check, _ in notable} <= {"nccl", "bandwidth", "latency"}, output  # the last two: a busy machine
    assert ": all is well" in output.splitlines()[-1]
    ranks = written["findings"]["exchange"]["ranks"]
    assert [(r["rank"], r["size"], r["right"], r["host"]) for r in sorted(ranks, key=lambda r: r["rank"])] == [
        (0, 4, True, "h1"),
        (1, 4, True, "h1"),
        (2, 4, True, "h2"),
        (3, 4, True, "h2"),
    ]
    assert [(link["from"], link["to"]) for link in written["findings"]["links"]] == [("h1", "h2")] * 3 + [
        ("h2", "h1")
    ] * 3
    assert written["findings"]["hosts"]["h2"]["answers"]["ssh"] == {"h1": {"code": 0, "said": ""}}
    left = sorted(p for p in tmp_path.iterdir() if p.name != "report.json")
    assert left == before, "the hosts are left as they were"


@pytest.mark.slow
def test_an_ill_host_is_told_from_a_healthy_one_and_mended(hosts, examine, tmp_path):
    cluster = hosts(2)
    (tmp_path / "data").mkdir()
    rows = "\n".join(f"word {i},{i % 2}" for i in range(20))
    (tmp_path / "data" / "all.csv").write_text(f"text,label\n{rows}\n")
    (tmp_path / "runs").mkdir()
    file = cluster.etc("h2", "hosts")
    file.write_text(file.read_text().replace("10.77.0.2 h2", "127.0.1.1 h2.example.org h2"))
    metadata = next(Path(keras.__file__).parent.parent.glob("keras-3*.dist-info")) / "METADATA"
    (tmp_path / "METADATA").write_text(metadata.read_text().replace(f"Version: {keras.__version__}", "Version: 3.4.9"))
    # Mounts of h2 alone: the hosts share this machine's files.
    for command in (
        f"mount --bind {tmp_path}/METADATA {metadata}",
        f"mount -t tmpfs -o ro tmpfs {tmp_path}/runs",
        f"mount -t tmpfs tmpfs {tmp_path}/data",
        "mount -t tmpfs -o size=16m tmpfs /dev/shm",
        f"prlimit --pid $(cat /run/hvdkit-testhosts/{cluster.name}/h2.pid) --nofile=256:256",
    ):
        assert cluster.run("h2", "sh", "-c", command).code == 0, command

    output, notable, _ = examine(cluster, "h1:1,h2:1", "--dataset", tmp_path / "data" / "all.csv", code=1)

    failed = {key: r for key, r in notable.items() if r["status"] == "FAILED"}
    ill = {"names", "versions", "shm", "workdir", "files", "dataset"}
    # The exchange works even so, as the ranks are told their interface; Gloo by itself would listen on 127.0.1.1.
    assert set(failed) == {(check, "h2") for check in ill}, output
    assert failed["names", "h2"]["found"].startswith("its own name, h2, resolves to 127.0.1.1")
    assert f"keras 3.4.9, and h1 has {keras.__version__}" in failed["versions", "h2"]["found"]
    assert "and a rank needs 1,024" in failed["files", "h2"]["found"]
    assert ": 6 of 17 checks FAILED (names, versions, shm, workdir, files, dataset)" in output.splitlines()[-1]
    for check in ("names", "shm", "workdir", "dataset"):
        for fix in failed[check, "h2"]["fixes"]:
            ended = cluster.run(fix["on"], "sh", "-c", fix["command"])
            assert ended.code == 0, (fix, ended.output)

    _, notable, _ = examine(cluster, "h1:1,h2:1", *QUICK, code=1)

    assert {key for key, r in notable.items() if r["status"] == "FAILED"} == {("versions", "h2"), ("files", "h2")}
    again = cluster.run("h2", "cat", str(tmp_path / "data" / "all.csv"))
    assert again.output == (tmp_path / "data" / "all.csv").read_text(), "it was brought from h1"


@pytest.mark.slow
def test_hosts_that_cannot_be_reached_do_not_hide_the_others(hosts, examine):
    """Of three hosts one has no sshd, and one lets in nothing but ssh."""
    cluster = hosts(3)
    pid = Path(f"/run/hvdkit-testhosts/{cluster.name}/h2.pid").read_text().strip()
    # `run` finds a host by its sshd, which a child of it outlives.
    assert cluster.run("h2", "kill", pid).code == 0
    rule = "ip rule add ipproto tcp sport 1024-65534 dport 1024-65534 prohibit"  # ssh has port 22 at one end
    assert cluster.run("h3", *shlex.split(rule)).code == 0

    output, notable, written = examine(cluster, "h1:1,h2:1,h3:1", *QUICK, code=1)

    failed = {key: r for key, r in notable.items() if r["status"] == "FAILED"}
    assert failed["connect", "h1 -> h2"]["found"] == "it is up, but no sshd listens"
    assert {key for key in failed if key[0] == "ports"} >= {("ports", "h3 -> h1")}, output
    assert {check for check, _ in failed} == {"connect", "ports"}, output
    assert written["findings"]["hosts"]["h1"]["answers"]["ssh"] == {"h3": {"code": 0, "said": ""}}
    assert not [p for p in remains() if "hvdkit.doctor" in " ".join(p.cmdline())]
