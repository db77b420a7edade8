"""The doctor's judgement of findings that were captured on two hosts, and its probe on this one."""

import copy
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hvdkit.doctor import __main__ as doctor
from hvdkit.doctor import connection as connections
from hvdkit.doctor import ranks, report
from hvdkit.doctor.checks import CHECKS, judge
from hvdkit.doctor.connection import Connection, Lost
from hvdkit.doctor.findings import Findings
from hvdkit.errors import UsageError

# What `--json` wrote of two healthy hosts, with the paths of that machine changed.
WELL = json.loads(Path(__file__).with_name("well.json").read_text())
GPU = {"name": "NVIDIA H100 80GB HBM3", "mebibytes": "81559", "driver": "550.54.15"}


def findings(change=None):
    content = copy.deepcopy(WELL)
    if change:
        change(content)
    return Findings.from_json(content)


def answers(content, host="h2"):
    return content["hosts"][host]["answers"]


def bad(results):
    return [r for r in results if r.status in ("FAILED", "warning")]


def test_healthy_hosts_are_found_healthy():
    results = judge(findings())
    assert not bad(results)
    assert [r.check for r in results] == [check.name for check in CHECKS], "one result each"
    assert {r.check for r in results if r.status == "not run"} == {"nccl"}


def forget(question, problem):
    def change(content):
        del answers(content)[question]
        content["hosts"]["h2"]["problems"][question] = problem

    return change


def unreachable(said):
    def change(content):
        content["hosts"]["h2"].update(unreachable=said, answers={})
        content["links"], content["streams"] = [], []
        content["hosts"]["h1"]["answers"]["ssh"] = {}
        content["exchange"] = {"skipped": "h2 was not reached"}

    return change


def fails(**said):
    return lambda content: answers(content)["ssh"]["h1"].update(said)


def resolves(host, name, *addresses):
    def change(content):
        answers(content, host)["names"][name] = {"addresses": list(addresses), "problem": None}

    return change


def blocked(kind, problem, ports=3):
    def change(content):
        for link in [link for link in content["links"] if link["from"] == "h1"][:ports]:
            link.update(kind=kind, problem=problem, seconds=None)

    return change


def with_firewall(name):
    def change(content):
        blocked("silence", "timed out")(content)
        answers(content)["host"].update(firewalls=["iptables", name], is_root=False)

    return change


def installed(package, version):
    return lambda content: answers(content)["versions"]["packages"].update({package: version})


def built(**options):
    return lambda content: answers(content)["build"]["built"].update(options)


def with_gpus(h1, h2, usable=None, nccl=(0, 0)):
    def change(content):
        for host, count, version in (("h1", h1, nccl[0]), ("h2", h2, nccl[1])):
            answers(content, host)["gpus"]["gpus"] = [GPU] * count
            answers(content, host)["usable_gpus"] = [f"GPU:{i}" for i in range(count)]
            answers(content, host)["build"]["built"]["nccl"] = version
        if usable is not None:
            answers(content)["usable_gpus"] = ["GPU:0"] * usable

    return change


def first_rank_of_h2(**content_of_rank):
    def change(content):
        rank = next(r for r in content["exchange"]["ranks"] if r["host"] == "h2")
        rank.update(content_of_rank)

    return change


def put(*path, value):
    def change(content):
        place = answers(content)
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


def give(**settings):
    return lambda content: content["settings"].update(settings)


def both(*changes):
    def change(content):
        for each in changes:
            each(content)

    return change


NO_KEY = "Host key verification failed."
READ_ONLY = "OSError: [Errno 30] Read-only file system: '/home/ann/hvdkit/runs'"
OLD_DATA = {"sizes": {"train": 1000, "test": 360}}
# What is changed; the checks that must speak, and where; a part of what they found; the host and a part of the fix.
ILL = {
    "down": (
        unreachable("ssh: connect to host h2 port 22: Connection timed out"),
        "connect",
        "h1 -> h2",
        "nothing answers",
        "h2",
        "systemctl enable --now ssh",
    ),
    "no sshd": (
        unreachable("ssh: connect to host h2 port 22: Connection refused"),
        "connect",
        "h1 -> h2",
        "no sshd listens",
        "h2",
        "systemctl enable --now ssh",
    ),
    "unknown key": (
        unreachable(f"No ED25519 host key is known for h2.\n{NO_KEY}"),
        "connect",
        "h1 -> h2",
        "its host key is not known",
        "h1",
        "ssh h2 true",
    ),
    "changed key": (
        fails(code=255, said=f"REMOTE HOST IDENTIFICATION HAS CHANGED!\n{NO_KEY}"),
        "ssh",
        "h2 -> h1",
        "not the known one",
        "h2",
        "ssh-keygen -R h1",
    ),
    "no key": (
        fails(code=255, said="root@h1: Permission denied (publickey)."),
        "ssh",
        "h2 -> h1",
        "without a password",
        "h2",
        "ssh-copy-id h1",
    ),
    "odd": (fails(code=255, said="kex: no common algorithm"), "ssh", "h2 -> h1", "no common algorithm", "h2", "ssh -v"),
    "trap": (
        resolves("h2", "h2", "127.0.1.1"),
        "names",
        "h2",
        "its own name, h2, resolves to 127.0.1.1",
        "h2",
        "'10.77.0.2 h2' | tee /etc/hosts",
    ),
    "other's trap": (resolves("h1", "h2", "127.0.1.1"), "names", "h1", "h2, resolves to 127.0.1.1", "h1", "/etc/hosts"),
    "wrong address": (
        resolves("h1", "h2", "10.9.9.9"),
        "names",
        "h1",
        "but its addresses are 10.77.0.2",
        "h1",
        r"/^10\.9\.9\.9[[:space:]]/",
    ),
    "unknown name": (resolves("h2", "h1"), "names", "h2", "h1, does not resolve", "h2", "echo '10.77.0.1 h1'"),
    "no interface": (put("host", "interfaces", value=[]), "interface", "h2", "no interface", "h2", "dhclient"),
    "no way": (
        both(
            lambda c: answers(c, "h1")["ssh"].update(h2={"code": 255, "said": "Connection timed out"}),
            blocked("no way", "No route to host"),
        ),
        "interface",
        "h2",
        "can be reached from all",
        "h1",
        "ip route get 10.77.0.2",
    ),
    "firewall": (
        blocked("silence", "timed out"),
        "ports",
        "h1 -> h2",
        "3 of 3 ports",
        "h2",
        "iptables -I INPUT -s 10.77.0.1",
    ),
    "one port": (blocked("refused", "Connection refused", 1), "ports", "h1 -> h2", "1 of 3 ports", "h2", "iptables"),
    "ufw": (with_firewall("ufw"), "ports", "h1 -> h2", "nothing answers", "h2", "sudo ufw allow from 10.77.0.1"),
    "firewalld": (with_firewall("firewall-cmd"), "ports", "h1 -> h2", "", "h2", "--add-source=10.77.0.1"),
    "rule": (blocked("no way", "Permission denied"), "ports", "h1 -> h2", "forbid it", "h1", "ip rule"),
    "clock": (put("clock", "ahead", value=-75.0), "clock", "h2", "75.0 s behind h1's", "h2", "chronyc makestep"),
    "keras": (
        installed("keras", "3.14.0"),
        "versions",
        "h2",
        "keras 3.14.0, and h1 has 3.15.1",
        "h2",
        "-m pip install keras==3.15.1",
    ),
    "no numpy": (installed("numpy", None), "versions", "h2", "numpy is not installed", "h2", "pip install numpy=="),
    "horovod": (installed("horovod", "0.28.0"), "versions", "h2", "horovod 0.28.0", "h2", "launch/bootstrap.sh --into"),
    "hvdkit": (installed("hvdkit", "0.1.0 (00000000)"), "versions", "h2", "hvdkit 0.1.0 (00000000)", "h1", "rsync -a"),
    "python": (
        put("versions", "python", value="3.12.1"),
        "versions",
        "h2",
        "Python 3.12.1",
        "h2",
        "python3.11 -m venv",
    ),
    "no python": (
        forget("versions", "FileNotFoundError: [Errno 2] No such file or directory: '/x/python'"),
        "versions",
        "h2",
        "there is no Python at",
        "h2",
        "launch/bootstrap.sh",
    ),
    "no folder": (
        forget("versions", "FileNotFoundError: there is no directory /home/ann/hvdkit"),
        "versions",
        "h2",
        "there is no directory",
        "h2",
        "mkdir -p /home/ann/hvdkit",
    ),
    "no horovod": (
        forget("build", "ModuleNotFoundError: No module named 'horovod'"),
        "build",
        "h2",
        "No module named 'horovod'",
        "h2",
        "launch/bootstrap.sh --into",
    ),
    "other options": (built(mpi=1), "build", "h2", "Horovod has Gloo, MPI, and h1's has Gloo", "h2", "--mpi no"),
    "other tensorflow": (
        put("build", "built_with", value="2.20.0"),
        "build",
        "h2",
        "built for TensorFlow 2.20.0",
        "h2",
        "bootstrap.sh",
    ),
    "driver": (
        put("gpus", "problem", value="nvidia-smi says: Failed to initialize NVML"),
        "gpus",
        "h2",
        "NVML",
        "h2",
        "dmesg",
    ),
    "gpu missing": (with_gpus(2, 0, nccl=(22105, 22105)), "gpus", "h2", "it has no GPU", "h2", "nvidia-smi"),
    "few gpus": (with_gpus(2, 1, nccl=(22105, 22105)), "gpus", "h2", "2 ranks, but 1 GPU(s)", None, "use -H h2:1"),
    "cuda": (
        with_gpus(2, 2, usable=0, nccl=(22105, 22105)),
        "gpus",
        "h2",
        "TensorFlow can use 0",
        "h2",
        "'tensorflow[and-cuda]==2.21.0'",
    ),
    "no nccl": (with_gpus(2, 2, nccl=(22105, 0)), "nccl", "h2", "without NCCL", "h2", "--gpu yes"),
    "other nccl": (with_gpus(2, 2, nccl=(22105, 22003)), "nccl", "h2", "NCCL 2.20.3, and h1 has 2.21.5", "h2", "--gpu"),
    "shm": (
        put("shm", value={"free": 10 << 20, "size": 16 << 20}),
        "shm",
        "h2",
        "10 MiB of 16 MiB is free",
        "h2",
        "mount -o remount,size=2G /dev/shm",
    ),
    "disk": (put("disk", "workdir", "free", value=100 << 20), "disk", "h2", "100 MiB is free for runs", "h2", "df -h"),
    "read-only": (forget("workdir", READ_ONLY), "workdir", "h2", "Read-only", "h2", "mount -o remount,rw"),
    "not mine": (
        forget("workdir", "PermissionError: [Errno 13] Permission denied"),
        "workdir",
        "h2",
        "denied",
        "h2",
        "install -d -o",
    ),
    "a file": (
        forget("workdir", "NotADirectoryError: [Errno 20] Not a directory"),
        "workdir",
        "h2",
        "Not a",
        "h2",
        "--workdir=DIR",
    ),
    "open files": (put("files", "soft", value=256), "files", "h2", "at most 256", "h2", "nofile 65536"),
    "no data": (
        both(give(dataset="mnist", data_dir="/data/sets"), forget("dataset", "UsageError: not under /data")),
        "dataset",
        "h2",
        "mnist cannot be read: not under /data",
        "h1",
        "data/sets | ssh h2 tar",
    ),
    "other data": (
        put("dataset", value=OLD_DATA),
        "dataset",
        "h2",
        "1,000 train, 360 test, and h1",
        "h2",
        "--download",
    ),
    "far": (
        lambda c: [link.update(seconds=0.02) for link in c["links"] if link["from"] == "h2"],
        "latency",
        "h2 -> h1",
        "20.0 ms",
        "h2",
        "ping",
    ),
    "slow": (
        lambda c: c["streams"][1].update(bytes=5e6, seconds=0.4),
        "bandwidth",
        "h2 -> h1",
        "0.10 Gbit/s",
        "h1",
        "ethtool eth0",
    ),
    "broken": (
        lambda c: c["streams"][1].update(problem="OSError: reset"),
        "bandwidth",
        "h2 -> h1",
        "reset",
        "h2",
        "ip -s",
    ),
    "wrong sum": (first_rank_of_h2(right=False), "allreduce", "h2", "wrong sum", "h2", "dmesg"),
    "dead rank": (
        first_rank_of_h2(problem="it ended with -6"),
        "allreduce",
        "h2",
        "ended with -6",
        None,
        "run the doctor",
    ),
}


@pytest.mark.parametrize("name", ILL)
def test_what_is_wrong_is_found_and_its_mend_told(name):
    change, check, where, part, on, command = ILL[name]
    results = bad(judge(findings(change)))
    others = {r.check for r in results} - {check}
    # Without a way there, ssh cannot come there, either.
    assert others <= ({"ssh"} if check == "interface" else set()), results
    result = next(r for r in results if r.where == where)
    assert part in result.found
    assert [m for m in result.fixes if m.on == on and command in m.command], result.fixes


def test_the_trap_is_none_on_a_single_host():
    def alone(content):
        resolves("h1", "h1", "127.0.1.1")(content)
        del content["hosts"]["h2"], content["hosts"]["h1"]["answers"]["names"]["h2"]
        content["hosts"]["h1"]["answers"]["ssh"], content["links"], content["streams"] = {}, [], []
        content["exchange"]["ranks"] = [r for r in content["exchange"]["ranks"] if r["host"] == "h1"]

    assert not bad(judge(findings(alone)))


def test_one_way_round_a_firewall_is_enough():
    """Hosts have addresses that nobody uses: a bridge for containers, a network for storage."""

    def second(content):
        answers(content)["host"]["interfaces"].append(
            {"name": "docker0", "address": "172.17.0.1", "mask": "255.255.0.0"}
        )
        unused = {"from": "h1", "to": "h2", "address": "172.17.0.1", "port": 1}
        content["links"].append({**unused, "problem": "timed out", "kind": "silence", "seconds": None})

    assert not bad(judge(findings(second)))


@pytest.mark.parametrize("question", [q for q in WELL["hosts"]["h2"]["answers"] if q not in ("host", "unmark")])
def test_a_question_without_an_answer_breaks_nothing(question):
    """A probe's answers may lack in every combination; the table must come all the same."""
    results = judge(findings(forget(question, "no answer within 20 s")))
    assert {r.check for r in results} == {check.name for check in CHECKS}


def test_one_question_without_an_answer_does_not_hide_the_others():
    def change(content):
        forget("gpus", "no answer within 20 s")(content)
        put("files", "soft", value=256)(content)

    assert [(r.check, r.where) for r in bad(judge(findings(change)))] == [("gpus", "h2"), ("files", "h2")]


def test_the_report_has_one_table_the_mends_and_one_verdict():
    found = findings(both(resolves("h2", "h2", "127.0.1.1"), put("files", "soft", value=256)))
    text = report.show(found, judge(found))
    assert text.splitlines()[0].split() == ["check", "result", "where", "found"]
    assert "  files: on h2: printf" in text
    assert text.splitlines()[-1] == "h1:2, h2:2: 2 of 17 checks FAILED (names, files), in 21 s."
    (names,) = (line for line in text.splitlines() if line.startswith("names "))
    assert names.split(maxsplit=3)[3] == next(r.found for r in judge(found) if r.status == "FAILED")
    well = report.show(findings(), judge(findings()))
    assert well.splitlines()[-1] == "h1:2, h2:2: all is well; 17 checks in 21 s."
    assert "To fix" not in well


def test_what_is_written_for_machines_can_be_judged_again():
    found = findings(resolves("h2", "h2", "127.0.1.1"))
    written = json.loads(json.dumps(report.as_json(found, judge(found))))
    assert written["ok"] is False
    assert [(r["check"], r["where"]) for r in written["results"] if r["status"] == "FAILED"] == [("names", "h2")]
    assert Findings.from_json(written["findings"]) == found


def test_left_out_checks_do_not_fail():
    results = judge(findings(put("files", "soft", value=256)), skip=["files"])
    assert not bad(results)
    assert "left out with --skip" in {r.found for r in results if r.check == "files"}


def test_the_mend_of_the_trap_mends_a_hosts_file(tmp_path):
    found = findings(resolves("h2", "h2", "127.0.1.1"))
    (fix,) = next(r for r in judge(found) if r.check == "names").fixes
    file = tmp_path / "hosts"
    file.write_text("127.0.0.1 localhost h2\n127.0.1.1\th2.example.org h2 h2\n10.77.0.1 h1\n::1 h22\n")
    subprocess.run(["sh", "-c", fix.command.replace("/etc/hosts", str(file))], check=True, stdout=subprocess.DEVNULL)
    assert file.read_text() == "127.0.0.1 localhost\n127.0.1.1\th2.example.org\n10.77.0.1 h1\n::1 h22\n10.77.0.2 h2\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-H", "h1:x"], "'h1:x'"),
        (["--hostfile", "/no/such/file"], "/no/such/file cannot be read"),
        (["-H", "h1", "--skip", "port"], "--skip was given 'port', and expects names out of: connect, ssh, names"),
        (["-H", "h1", "--json", "/no/such/folder/x"], "--json /no/such/folder/x cannot be written"),
    ],
)
def test_mistakes_are_told_in_one_sentence(arguments, sentence, capsys):
    assert doctor.main(["doctor", *arguments]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert len(said.splitlines()) == 1


def test_hosts_must_be_given():
    with pytest.raises(SystemExit) as ended:
        doctor.main(["doctor"])
    assert ended.value.code == 2


def test_the_checks_are_listed_with_what_they_say(capsys):
    assert doctor.main(["doctor", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CHECKS)
    assert lines[0] == "connect    The doctor reaches every host, and finds Python there."


def test_tensorflow_is_not_loaded():
    program = "import hvdkit.doctor.__main__, sys; sys.exit('tensorflow' in sys.modules or 'horovod' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.fixture
def probe():
    connection = Connection("here", None, sys.executable, "the token of this test")
    connection.hello.result(60)
    yield connection
    connection.close()


def test_a_probe_answers_and_says_what_it_cannot_do(probe, tmp_path):
    assert probe.ask("files").result(60)["soft"] > 0
    (tmp_path / "file").touch()
    with pytest.raises(Lost, match="NotADirectoryError"):
        probe.ask("workdir", workdir=str(tmp_path / "file" / "runs"), mark="1").result(60)


def test_a_probe_leaves_the_workdir_as_it_was(tmp_path):
    connection = Connection("here", None, sys.executable, "token")
    assert connection.ask("workdir", workdir=str(tmp_path / "a" / "b"), mark="1").result(60) == {"made": True}
    assert connection.ask("marks", workdir=str(tmp_path / "a" / "b"), mark="1").result(60) == ["here"]
    connection.close()
    assert not list(tmp_path.iterdir())


def test_a_probe_talks_to_none_but_probes(probe):
    address, (port, *_) = next(iter(probe.ask("listen").result(60).items()))
    with socket.create_connection((address, port), timeout=60) as stranger:
        assert len(stranger.recv(16)) == 16, "the challenge"
        stranger.sendall(bytes(16 + 32))
        assert stranger.recv(1) == b"", "no proof, no answer"
    (link,) = probe.ask("reach", peers=[["here", address, port]]).result(60)
    assert link["problem"] is None
    assert link["seconds"] > 0
    with socket.create_server((address, 0)) as other:  # listens, and never answers
        (link,) = probe.ask("reach", peers=[["here", address, other.getsockname()[1]]]).result(60)
    assert link["kind"] == "silence"


def ask_for_ever(connection):
    while True:
        connection.ask("time").result(60)


def test_a_probe_that_nobody_ends_ends_itself(monkeypatch):
    monkeypatch.setattr(connections, "LIFETIME_SECONDS", 1)
    connection = Connection("here", None, sys.executable, "token")
    with pytest.raises(Lost, match="ended"):
        ask_for_ever(connection)
    connection.close()


def test_a_program_that_does_not_start_is_told():
    connection = Connection("here", None, sys.executable, "token")
    arguments = {"program": "", "env": {}, "directory": "/"}
    with pytest.raises(Lost, match="FileNotFoundError"):
        connection.ask("start_ranks", command=["/no/such/python"], **arguments).result(60)
    connection.ask("start_ranks", command=[sys.executable, "-c", "raise SystemExit('broken')"], **arguments).result(60)
    with pytest.raises(Lost, match="it ended with 1: broken"):
        connection.ask("ranks", order=None).result(60)
    connection.close()


def test_a_data_set_is_opened_as_the_job_will_open_it(tmp_path):
    (tmp_path / "x.csv").write_text("size,price\n" + "".join(f"{i},{i}.5\n" for i in range(10)))
    schema = {"task": "regression", "label_column": "price", "text_column": None, "feature_columns": []}
    assert ranks.read_dataset(str(tmp_path / "x.csv"), None, schema) == {"sizes": {"train": 8, "test": 2}}
    with pytest.raises(UsageError, match="measured values"):
        ranks.read_dataset(str(tmp_path / "x.csv"), None, schema | {"task": "auto"})
    given = doctor.parser().parse_args(["-H", "h1:1", "--dataset=x.csv", "--task=regression", "--feature-columns=a,b"])
    assert doctor._settings(given).schema["feature_columns"] == ("a", "b")
