"""The launcher's parts: hosts, bindings, what is shown, who failed first, and what the rendezvous refuses."""

import contextlib
import http.client
import io
import pickle
import sys
from pathlib import Path

import pytest

from hvdkit import UsageError, outcome
from hvdkit.launch import binding, environment, failures, hosts, options
from hvdkit.launch.console import Console
from hvdkit.launch.failures import Failure, missing_package, python_program
from hvdkit.launch.hosts import Host
from hvdkit.launch.rendezvous import MOST_BYTES, Rendezvous
from hvdkit.launch.restarts import run_script
from hvdkit.launch.shells import Srun, Ssh

# ---- Hosts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("h1:2,h2:1", [Host("h1", 2), Host("h2", 1)]),
        ("h1, 10.0.0.7:4", [Host("h1", 1), Host("10.0.0.7", 4)]),
        ("h1,h2,h1:3", [Host("h1", 4), Host("h2", 1)]),
    ],
)
def test_lists_of_hosts(text, expected):
    assert hosts.from_list(text) == expected


@pytest.mark.parametrize(
    "text", ["", "h1:0", "h1:two", "h1:2:3", "fe80::1", "-oProxyCommand=touch:1", "h1;id:1", "a b"]
)
def test_wrong_hosts(text):
    with pytest.raises(UsageError, match=r"expected a name or IPv4 address and its number of ranks, as in h1:2"):
        hosts.from_list(text)


def test_host_files(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("# two kinds\nh1 slots=2\n\nh2:3  # and a comment\nh3\nh3\nh4 slots = 2 max_slots=4\n")
    assert hosts.from_file(file) == [Host("h1", 2), Host("h2", 3), Host("h3", 2), Host("h4", 2)]
    file.write_text("h1 slots=2\nh2 places=2\n")
    with pytest.raises(UsageError, match=rf"line 2 of {file} has the host 'h2 places=2'"):
        hosts.from_file(file)
    file.write_text("# nobody\n")
    with pytest.raises(UsageError, match="names no host"):
        hosts.from_file(file)
    with pytest.raises(UsageError, match="cannot be read"):
        hosts.from_file(tmp_path / "none")


@pytest.mark.parametrize(
    ("nodes", "tasks", "expected"),
    [
        ("n1", "2", [("n1", 2)]),
        ("gpu[01-03,7],login", "2(x3),1(x2)", [("gpu01", 2), ("gpu02", 2), ("gpu03", 2), ("gpu7", 1), ("login", 1)]),
        ("a-[9-11]-ib", "1,2,3", [("a-9-ib", 1), ("a-10-ib", 2), ("a-11-ib", 3)]),
        ("n[1-2]", None, [("n1", 1), ("n2", 1)]),
    ],
)
def test_slurm_nodes(nodes, tasks, expected):
    environment = {"SLURM_JOB_NODELIST": nodes, **({"SLURM_TASKS_PER_NODE": tasks} if tasks else {})}
    assert [(host.name, host.slots) for host in hosts.from_slurm(environment)] == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "SLURM_JOB_NODELIST is not set"),
        ({"SLURM_JOB_NODELIST": "n[1-"}, "is not understood"),
        ({"SLURM_JOB_NODELIST": "n[3-1]"}, "'3-1' is no range"),
        ({"SLURM_JOB_NODELIST": "r[1-2]n[1-2]"}, "is not understood"),
        ({"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_TASKS_PER_NODE": "2(x2)"}, "each of the 3 node"),
    ],
)
def test_wrong_slurm_nodes(environment, message):
    with pytest.raises(UsageError, match=message):
        hosts.from_slurm(environment)


def test_the_hosts_of_an_mpijob(tmp_path):
    file = tmp_path / "hostfile"
    with pytest.raises(UsageError, match="Kubeflow MPIJob"):
        hosts.from_kubernetes({"OMPI_MCA_orte_default_hostfile": str(file)})
    file.write_text("pi-worker-0.pi.default.svc slots=2\npi-worker-1.pi.default.svc slots=2\n")
    found = hosts.from_kubernetes({"OMPI_MCA_orte_default_hostfile": str(file)})
    assert found == [Host("pi-worker-0.pi.default.svc", 2), Host("pi-worker-1.pi.default.svc", 2)]


def test_places_are_those_of_horovod():
    slots = hosts.assign([Host("h1", 2), Host("h2", 2)], 3)
    places = [(s.hostname, s.rank, s.local_rank, s.local_size, s.cross_rank, s.cross_size, s.size) for s in slots]
    assert places == [("h1", 0, 0, 2, 0, 2, 3), ("h1", 1, 1, 2, 0, 1, 3), ("h2", 2, 0, 1, 1, 2, 3)]
    with pytest.raises(UsageError, match=r"-np 5 asks for more ranks than the hosts h1:2,h2:2 have slots \(4\)"):
        hosts.assign([Host("h1", 2), Host("h2", 2)], 5)


# ---- Bindings and environment ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "ranks", "expected"),
    [
        ([0, 1, 2, 3], 2, [[0, 1], [2, 3]]),
        ([0, 4, 1, 5, 2], 2, [[0, 4, 1], [5, 2]]),
        ([0, 1, 2, 3, 4, 5, 6], 3, [[0, 1, 2], [3, 4], [5, 6]]),
        ([3], 2, [None, None]),
    ],
)
def test_cores_are_shared_evenly(cores, ranks, expected):
    about = {"cores": cores, "gpus": [], "hostname": "h1"}
    bound = [b.cores for b in binding.bindings(about, ranks, "cores")]
    assert bound == expected
    assert [b.cores for b in binding.bindings(about, ranks, "auto")] == expected, "there are no GPUs"
    assert [b.cores for b in binding.bindings(about, ranks, "none")] == [None] * ranks


def test_cores_are_left_alone_where_gpus_compute_or_a_rank_has_them_all():
    about = {"cores": [0, 1], "gpus": ["0", "1"], "hostname": "h1"}
    assert [(b.cores, b.gpu) for b in binding.bindings(about, 2, "auto")] == [(None, None)] * 2
    assert binding.bindings({**about, "gpus": []}, 1, "auto")[0].cores is None


def test_gpus_are_bound_one_to_a_rank():
    about = {"cores": [0, 1], "gpus": ["2", "5"], "hostname": "h1"}
    bound = binding.bindings(about, 2, "both")
    assert [(b.cores, b.gpu) for b in bound] == [([0], "2"), ([1], "5")]
    slot = hosts.assign([Host("h1", 2)], 2)[1]
    assert environment.rank_environment(slot, bound[1])["CUDA_VISIBLE_DEVICES"] == "5"
    with pytest.raises(UsageError, match=r"host h1 shows 2 GPU\(s\) for 3 ranks"):
        binding.bindings(about, 3, "gpus")


def test_what_the_user_set_goes_before_the_defaults():
    variables = environment.job_environment({"HOROVOD_GLOO_TIMEOUT_SECONDS": "7"}, start_limit=300, stall_limit=None)
    assert variables["HOROVOD_GLOO_TIMEOUT_SECONDS"] == "7"
    assert variables["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"] == "600"
    assert "HVDKIT_STALL_SECONDS" not in variables
    variables = environment.job_environment({"HVDKIT_STALL_SECONDS": "50"}, start_limit=300, stall_limit=40)
    assert variables["HOROVOD_GLOO_TIMEOUT_SECONDS"] == "300"
    assert (variables["HVDKIT_STALL_SECONDS"], variables["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"]) == ("40", "40")


def test_only_what_means_something_elsewhere_is_exported():
    given = {
        "PYTHONPATH": "a",
        "HOME": "b",
        "SSH_AUTH_SOCK": "c",
        "MY_TOKEN": "d",
        "CUDA_VISIBLE_DEVICES": "0",
        "_": "e",
    }
    assert environment.exported(given) == {"PYTHONPATH": "a", "MY_TOKEN": "d"}


def test_variables_of_a_surrounding_mpi_job_are_left_out(monkeypatch):
    for name in ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "OMPI_MCA_btl", "MY_TOKEN"):
        monkeypatch.setenv(name, "1")
    own = environment.own_environment()
    assert {"OMPI_COMM_WORLD_RANK", "PMIX_RANK"}.isdisjoint(own)
    assert own["OMPI_MCA_btl"] == own["MY_TOKEN"] == "1", "options of MPI are the user's"


def test_variables_of_a_notebook_are_left_out(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    for name in ("JPY_SESSION_NAME", "JPY_PARENT_PID", "PYDEVD_USE_FRAME_EVAL", "PYTHONSTARTUP"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TF_CONFIG", "{}")
    monkeypatch.setenv("PYTHONBREAKPOINT", "0")
    own = environment.own_environment()
    assert not [n for n in own if n.startswith(("JPY_", "PYDEVD_", "MPLBACKEND", "PYTHONSTARTUP"))]
    assert own["TF_CONFIG"] == "{}", "the user's cluster, which --strategy=multiworker refuses"
    assert own["PYTHONBREAKPOINT"] == "0", "the user's wish to stop nowhere"
    monkeypatch.setenv("MPLBACKEND", "pdf")
    assert environment.own_environment()["MPLBACKEND"] == "pdf"


# ---- Output ------------------------------------------------------------------------------------------------------


@pytest.fixture
def screen(capsys):
    return lambda: tuple(capsys.readouterr())


def test_lines_are_whole_and_notices_left_out(screen):
    console = Console()
    console.feed(0, b"bar 1\rba", is_error=True)
    console.feed(1, b"hel", is_error=False)
    console.feed(0, b"r 2\n", is_error=True)
    console.feed(1, b"lo\nI0000 00:00:1.2 12 port.cc:153] oneDNN custom operations are on.\nend", is_error=False)
    console.finish(1)
    assert screen() == ("[1] hello\n[1] end\n", "bar 1\rbar 2\n")


class _Bytes(io.TextIOWrapper):
    """A terminal with an encoding, and what it has received."""

    def __init__(self, encoding):
        super().__init__(io.BytesIO(), encoding=encoding)

    def received(self):
        return self.buffer.getvalue()


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_any_bytes_in_lines_of_any_length_arrive_unchanged(monkeypatch, tmp_path, encoding):
    words = "caf\u00e9 \u2501".encode()
    output = words + b"\n" + b"caf\xe9\x00\xff\n" + b'{"long": "' + b"x" * 400_000 + b'"}\r\n' + words
    prefixed = b"".join(b"[1] " + line + b"\n" for line in output.split(b"\n"))
    for rank, expected in ((0, output), (1, prefixed)):
        terminal = _Bytes(encoding)
        monkeypatch.setattr(sys, "stdout", terminal)
        console = Console("all", tmp_path)
        for begin in range(0, len(output), 65_535):  # also in the middle of a line
            console.feed(rank, output[begin : begin + 65_535], is_error=False)
        console.finish(rank)
        assert terminal.received() == expected
        assert "caf\ufffd\x00\ufffd" in console.last_lines(rank), "what the launcher says itself is text"
    log = (tmp_path / "rank-0001.log").read_bytes().split(b"\n", 1)[1]
    assert log.replace(b"\r", b"") == output.replace(b"\r", b"") + b"\n"


def test_a_line_that_never_ends_is_shown_in_parts(monkeypatch, screen):
    monkeypatch.setattr("hvdkit.launch.console._LONGEST", 10)
    console = Console()
    for part in (b"0123456", b"789abcd", b"ef\nnext\n"):
        console.feed(1, part, is_error=False)
    assert screen() == ("[1] 0123456789abcdef\n[1] next\n", "")


def test_a_carriage_return_before_a_line_feed_begins_no_line(screen):
    console = Console()
    console.feed(1, b"done\r", is_error=False)
    console.feed(1, b"\nnext\r\n", is_error=False)
    assert screen() == ("[1] done\r\n[1] next\r\n", "")


@pytest.mark.parametrize(
    ("command", "is_refused"),
    [
        ("python -", True),
        ("/usr/bin/python3.11 -u", True),
        ("bash", True),
        ("sh -s one", True),
        ("python -c print(1)", False),
        ("python -m json.tool", False),
        ("sh -c ls", False),
        ("cat -", False),
    ],
)
def test_a_program_from_standard_input_is_refused(capsys, command, is_refused):
    words = ["hvdkit.launch", "-np", "2", "--", *command.split()]
    if not is_refused:
        assert options.parse(words).command == command.split()
        return
    with pytest.raises(SystemExit) as ended:
        options.parse(words)
    assert ended.value.code == 2
    assert "reads its program from standard input, which ranks do not have" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("all", ("a\n[1] a\n", "b\n[1] b\n")), ("errors", ("a\n", "b\n[1] b\n")), ("rank0", ("a\n", "b\n"))],
)
def test_what_other_ranks_write_is_shown_as_asked(screen, tmp_path, mode, expected):
    console = Console(mode, tmp_path / "logs")
    for rank in (0, 1):
        console.feed(rank, b"a\n", is_error=False)
        console.feed(rank, b"b\n", is_error=True)
        console.finish(rank)
    assert screen() == expected
    lines = (tmp_path / "logs" / "rank-0001.log").read_text().splitlines()
    assert lines[0].startswith("---- started ")
    assert lines[1:] == ["a", "b"]


def test_logs_hold_what_a_progress_bar_ended_with(tmp_path):
    console = Console("rank0", tmp_path)
    console.feed(1, b"1/2\r2/2\r\nnext\rdone", is_error=True)
    console.finish(1)
    assert (tmp_path / "rank-0001.log").read_text().splitlines()[1:] == ["2/2", "done"]


def test_last_lines_begin_with_the_last_traceback():
    console = Console("rank0")
    for number in range(40):
        console.feed(1, b"step %d\n" % number, is_error=False)
    assert console.last_lines(1) == [f"step {number}" for number in range(30, 40)]
    frames = b"".join(b"  File %d\n" % number for number in range(20))
    console.feed(1, b"Traceback (most recent call last):\n" + frames + b"ValueError: no\n", is_error=True)
    lines = console.last_lines(1)
    assert (lines[0], lines[-1], len(lines)) == ("Traceback (most recent call last):", "ValueError: no", 22)
    assert console.last_lines(2) == []


def told(why, code, rank=None, lines=1):
    return outcome.to_line(outcome.Failed(why, code, "it says", rank, rank and f"h{rank}", lines)).encode()


def test_ranks_that_die_because_the_user_cancels_are_no_news(screen):
    console = Console()
    console.cancelled = True
    console.feed(0, told("death", 75, 1, lines=2) + b"hvdkit: rank 1 died.\nand more\nelse\n", is_error=True)
    console.feed(0, told("error", 1, 1) + b"hvdkit: rank 1 failed.\n", is_error=True)
    assert screen() == ("", "else\nhvdkit: rank 1 failed.\n")


@pytest.mark.parametrize("mode", ["all", "errors", "rank0"])
def test_how_the_job_fails_is_shown_whichever_rank_says_it(screen, tmp_path, mode):
    console = Console(mode, tmp_path)
    line = told("stall", 75, lines=2)
    console.feed(1, b" 50%|##" + line[:30], is_error=True)
    console.feed(1, line[30:] + b"hvdkit: the job hangs.\nLikely cause: x\n", is_error=True)
    console.feed(1, b"another line\n", is_error=True)
    console.finish(1)
    own = "" if mode == "rank0" else "[1] another line\n"
    assert screen() == ("", f"[1]  50%|##hvdkit: the job hangs.\n[1] Likely cause: x\n{own}")
    lines = (tmp_path / "rank-0001.log").read_text().splitlines()
    assert lines[1:] == [" 50%|##hvdkit: the job hangs.", "Likely cause: x", "another line"], "logs are for people"
    assert (console.cause, console.leaving) == (None, 75)


def test_what_is_no_failure_is_told_on(screen, tmp_path, monkeypatch):
    monkeypatch.setenv(outcome.VARIABLE, str(tmp_path / "told"))
    console = Console()
    console.feed(0, outcome.to_line(outcome.Unsaved(7, "full")).encode() + told("error", 1, 1), is_error=True)
    console.feed(0, outcome.PREFIX.encode() + b'{"kind": "of another version"}\nnext\n', is_error=True)
    assert outcome.heard(tmp_path / "told")[0] == outcome.Unsaved(7, "full")
    assert outcome.failure(tmp_path / "told") is None, "the launcher tells it, when it knows all"
    assert screen() == ("", "next\n")


def test_a_full_disk_costs_output_but_not_the_job(screen, tmp_path, monkeypatch):
    (tmp_path / "rank-0001.log").symlink_to("/dev/full")
    console = Console("all", tmp_path)
    with Path("/dev/full").open("w", buffering=1) as full:
        monkeypatch.setattr(sys, "stdout", full)
        for rank in (0, 1):
            console.feed(rank, b"one\ntwo\n", is_error=False)
            console.feed(rank, b"error\n", is_error=True)
        monkeypatch.undo()
        for rank in (0, 1):
            console.finish(rank)
        with contextlib.suppress(OSError):
            full.close()
    said = f"hvdkit.launch: a log in {tmp_path} cannot be written (No space left on device); the job continues.\n"
    shown = screen()[1]
    assert shown.replace(said, "") == "error\n[1] error\n"
    assert shown.count(said) == 1, "once"
    assert (tmp_path / "rank-0000.log").read_text().splitlines()[1:] == ["one", "two", "error"]
    assert console.last_lines(1) == ["one", "two", "error"]


# ---- Failures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [b"", b"3/8 ---- 2s 1s/step - loss: 0.5\r"])
@pytest.mark.parametrize(("why", "code"), [("error", 3), ("death", 137), ("left", 137)])
def test_the_watchdog_names_the_rank_that_was_the_cause(screen, before, why, code):
    console = Console()
    console.feed(0, before + told(why, 3, 1), is_error=True)
    console.feed(0, told("error", 1, 0), is_error=True)  # it follows
    known = [Failure(0, 3), Failure(1, -9)]
    first = failures.first(known, console.cause, 0, {0: 3, 1: -9})
    assert (first.rank, first.exit_code) == (1, code)


@pytest.mark.parametrize(
    ("known", "cause", "known_before", "expected"),
    [
        ([(0, 1), (1, 3)], None, 0, (0, 1)),
        ([(0, 1), (1, -9)], None, 0, (1, -9)),  # rank 0 left because rank 1 was killed
        ([(0, -6), (1, -9)], None, 0, (1, -9)),  # rank 0 aborted because rank 1 was killed
        ([(1, -9), (0, 1)], (0, 1), 1, (1, -9)),  # rank 0's exception follows from that death
        ([(0, 1), (1, -9)], (0, 1), 0, (1, -9)),  # also where the exception is heard of first
        ([(1, -6), (0, 1)], (0, 1), 0, (0, 1)),  # and here rank 1's abort follows from the exception
        ([(1, 75)], (0, None), 0, (0, -15)),  # ended by the launcher before its own end was known
        ([], None, 0, None),
    ],
)
def test_who_failed_first(known, cause, known_before, expected):
    first = failures.first([Failure(*one) for one in known], cause, known_before, {0: -15})
    assert first == (Failure(*expected) if expected else None)


@pytest.mark.parametrize(
    ("command", "program"),
    [
        ("python train.py --model=mine.py", "train.py"),
        ("/usr/bin/python3.11 -u -m mine.train --x", "mine.train"),
        ("env X=1 ./train.py", "./train.py"),
        ("python -c pass", None),
        ("sort -m a b", None),
        ("program --script=x.py", None),
    ],
)
def test_which_python_program_a_command_runs(command, program):
    assert python_program(command.split()) == program


@pytest.mark.parametrize(
    ("last", "package"),
    [
        ("ModuleNotFoundError: No module named 'keras'", "keras"),
        ("ModuleNotFoundError: No module named 'keras.nothing'", None),  # keras is there
        ("ModuleNotFoundError: No module named 'my_models'", None),
        ("ValueError: no such label: 17", None),
    ],
)
def test_which_package_of_the_environment_a_program_lacks(last, package):
    assert missing_package(["Traceback (most recent call last):", last]) == package
    assert missing_package([]) is None


def test_failures_in_words():
    assert Failure(0, 3).words() == "with exit code 3"
    assert Failure(0, -11).words() == "killed by SIGSEGV, with exit code 139"
    assert "memory has run out: see dmesg), with exit code 137" in Failure(0, -9).words()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            "@@@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @@@\nHost key verification failed.",
            "has a different key",
        ),
        ("No ED25519 host key is known for h2\nHost key verification failed.", "The key of host h2 is not known here"),
        ("root@h2: Permission denied (publickey).", "ssh-copy-id h2"),
        ("ssh: connect to host h2 port 22: Connection timed out", "Host h2 cannot be reached by ssh"),
        ("ssh: connect to host h2 port 22: Connection refused", "Start sshd on it"),
        ("bash: line 1: /a/python: No such file or directory", "Host h2 has no Python at /a/python"),
        ("", "ssh ended with exit code 255, and said nothing"),
    ],
)
def test_what_ssh_says_is_explained(said, message):
    assert message in Ssh().explain("h2", said, 255, "/a/python")


# ---- The command line --------------------------------------------------------------------------------------------


def parsed(*flags):
    return options.settings(options.parse(["launch", *flags, "--", "true"]))


def test_the_number_of_ranks_comes_from_the_hosts():
    settings = parsed("-H", "h1:2,h2:3")
    assert (settings.ranks, settings.hosts) == (5, [Host("h1", 2), Host("h2", 3)])
    assert parsed("-np", "3").hosts == [Host("localhost", 3)]
    with pytest.raises(UsageError, match="How many ranks"):
        parsed()
    with pytest.raises(UsageError, match="exclude each other"):
        parsed("--hosts-from", "slurm", "-H", "h1:2")
    with pytest.raises(UsageError, match="--hosts-from file needs the file"):
        parsed("--hosts-from", "file")
    with pytest.raises(UsageError, match="--ssh-args"):
        parsed("-np", "1", "--ssh-args='-p")


def test_host_keys_are_checked_unless_the_user_says_otherwise():
    assert "StrictHostKeyChecking=yes" in parsed("-np", "1").shell.options()
    assert "StrictHostKeyChecking=no" in parsed("-np", "1", "--insecure-host-keys").shell.options()
    command = parsed("-np", "1", "--ssh-args=-p 2222").shell.command("h1", "true")
    assert command[:3] == ["ssh", "-p", "2222"]
    assert command[-3:] == ["--", "h1", "true"]


# ---- The rendezvous ----------------------------------------------------------------------------------------------


class SideEffect:
    """A harmless pickle: who loads it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.fixture
def rendezvous():
    opened = Rendezvous(hosts.assign([Host("localhost", 2)], 2), {"127.0.0.1"})
    opened.open("127.0.0.1")
    yield opened
    opened.close()


def ask(rendezvous, method, path, body=None, headers=None, source="127.0.0.1"):
    port = rendezvous.open("127.0.0.1")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10, source_address=(source, 0))
    try:
        connection.request(method, path.replace("TOKEN", f"{rendezvous.token}:{port}"), body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_ranks_that_start_again_do_not_find_each_others_old_addresses(rendezvous):
    for rank in (0, 1):
        assert ask(rendezvous, "PUT", f"/TOKEN/global/{rank}", b"old")[0] == 200
    assert ask(rendezvous, "PUT", "/TOKEN/local/1", b"another scope")[0] == 200
    assert ask(rendezvous, "PUT", "/TOKEN/global/1", b"new")[0] == 200
    assert ask(rendezvous, "GET", "/TOKEN/global/0")[0] == 404, "rank 0 has not started again yet"
    assert ask(rendezvous, "GET", "/TOKEN/local/1") == (200, b"another scope")
    assert ask(rendezvous, "PUT", "/TOKEN/global/0", b"new too")[0] == 200
    assert [ask(rendezvous, "GET", f"/TOKEN/global/{rank}")[1] for rank in (0, 1)] == [b"new too", b"new"]


def test_the_rendezvous_gives_back_what_a_rank_left(rendezvous):
    address = rendezvous.environment("127.0.0.1")["HOROVOD_GLOO_RENDEZVOUS_ADDR"]
    assert address == f"127.0.0.1:{rendezvous.open('127.0.0.1')}/{rendezvous.token}"
    assert ask(rendezvous, "GET", "/TOKEN/global/1")[0] == 404
    assert ask(rendezvous, "PUT", "/TOKEN/global/1", b"where I am")[0] == 200
    assert ask(rendezvous, "GET", "/TOKEN/global/1") == (200, b"where I am")
    assert set(rendezvous.arrived) == {1}
    assert ask(rendezvous, "DELETE", "/TOKEN/global/1")[0] == 200
    assert rendezvous.refused == 0


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("PUT", "/global/0", {}),
        ("PUT", "/worker_addresses/h1:0", {}),
        ("PUT", "/" + "0" * 64 + ":80/global/0", {}),
        ("PUT", "/TOKEN/global/../0", {}),
        ("PUT", "/TOKEN/global/0", {"Content-Length": str(MOST_BYTES + 1)}),
        ("PUT", "/TOKEN/global/0", {"Content-Length": "-1"}),
        ("GET", "/rank_and_size/h1:0", {}),
        ("DELETE", "/global/0", {}),
        ("HEAD", "/pyproject.toml", {}),
        ("POST", "/TOKEN/global/0", {}),
    ],
)
def test_the_rendezvous_refuses_who_does_not_know_the_token(rendezvous, tmp_path, method, path, headers):
    trap = tmp_path / "loaded"
    body = pickle.dumps(SideEffect(trap)) if method == "PUT" else None
    assert ask(rendezvous, method, path, body, headers)[0] in (403, 405, 413, 501)
    assert ask(rendezvous, "GET", "/TOKEN/global/0")[0] == 404
    assert rendezvous.arrived == {}
    assert not trap.exists()


def test_the_rendezvous_hangs_up_on_other_addresses(rendezvous):
    with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
        ask(rendezvous, "GET", "/TOKEN/global/0", source="127.0.0.2")
    assert rendezvous.refused == 1


def test_a_pickle_from_one_who_knows_the_token_is_only_bytes(rendezvous, tmp_path):
    trap = tmp_path / "loaded"
    body = pickle.dumps(SideEffect(trap))
    assert ask(rendezvous, "PUT", "/TOKEN/worker_addresses/h1:0", body)[0] == 200
    assert ask(rendezvous, "GET", "/TOKEN/worker_addresses/h1:0") == (200, body)
    assert not trap.exists()


# ---- Remote shells -----------------------------------------------------------------------------------------------


def test_srun_starts_one_task_on_one_node_beside_all_others():
    command = Srun().command("h2", "exec a 'b c'")
    assert command[0] == "srun"
    assert {"--overlap", "--nodes=1", "--ntasks=1", "--nodelist=h2", "--cpu-bind=none"} <= set(command)
    assert command[-3:] == ["sh", "-c", "exec a 'b c'"]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            "srun: error: Unable to create step: Requested node configuration is not available",
            "is not one of this Slurm",
        ),
        ("srun: error: Unable to confirm allocation for job 3: Invalid job id specified", "The Slurm job is over"),
        ("sh: 1: exec: /a/python: not found", "Node h2 has no Python at /a/python"),
        ("srun: error: Connection refused", "Try, inside of the job: srun -w h2 true. (srun: srun: error: Connection"),
        ("", "srun ended with exit code 1, and said nothing"),
    ],
)
def test_what_srun_says_is_explained(said, message):
    assert message in Srun().explain("h2", said, 1, "/a/python")


def test_srun_is_the_shell_of_a_slurm_job_where_it_is_installed(monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "h[1-2]")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert isinstance(parsed("--hosts-from", "slurm").shell, Ssh)
    (tmp_path / "srun").touch(mode=0o755)
    assert isinstance(parsed("--hosts-from", "slurm").shell, Srun)
    assert isinstance(parsed("--hosts-from", "slurm", "--remote-shell", "ssh").shell, Ssh)
    assert isinstance(parsed("-np", "1").shell, Ssh)


# ---- Hosts that a script prints ----------------------------------------------------------------------------------


def script(tmp_path, text):
    path = tmp_path / "discover.sh"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_script_prints_hosts_with_and_without_places(tmp_path):
    assert run_script(script(tmp_path, "echo h1:4; echo; echo '  h2 '"), 2) == [Host("h1", 4), Host("h2", 2)]
    assert run_script(script(tmp_path, "true"), 2) == [], "no host is there now"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo no route >&2; exit 3", r"ended with exit code 3: no route"),
        ("echo h1 slots=2", r"has the host 'h1 slots=2:1'; expected a name or IPv4 address"),
    ],
)
def test_a_script_that_fails_is_explained(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        run_script(script(tmp_path, text), 1)
    with pytest.raises(UsageError, match=r"--host-discovery-script /no/script cannot be run .*Is it executable"):
        run_script("/no/script", 1)
