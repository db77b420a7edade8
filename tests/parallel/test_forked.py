"""Tests that a program run by `tests/forked.py` ends, and sees its surroundings, as one run by `python`."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests import forked

TELL = """
import json, os, sys
loaded = "tensorflow" in sys.modules
print(json.dumps([sys.argv[1:], os.getcwd(), os.environ["GIVEN"], sorted(os.sched_getaffinity(0)), __name__, loaded]))
"""


def _run(program, *arguments, prefix=(), timeout=60, **options):
    return subprocess.run(
        [*prefix, *forked.command(program, *arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        **options,
    )


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_program_has_arguments_directory_environment_and_cores(tmp_path, rank):
    (program := tmp_path / "tell.py").write_text(TELL)
    core = min(os.sched_getaffinity(0))
    environment = {**os.environ, "GIVEN": "now", "HOROVOD_RANK": rank}
    ended = _run(program, "one", "two words", prefix=["taskset", "-c", str(core)], cwd=tmp_path, env=environment)
    assert json.loads(ended.stdout) == [["one", "two words"], str(tmp_path), "now", [core], "__main__", True]
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.skipif(os.geteuid() != 0, reason="root is needed to make namespaces")
def test_a_program_of_a_test_host_is_forked_onto_it(tmp_path):
    names = ("net", "uts", "mnt")
    program = (
        f"import os, sys; print([os.readlink(f'/proc/self/ns/{{n}}') for n in {names}], 'tensorflow' in sys.modules)"
    )
    (file := tmp_path / "where.py").write_text(program)
    beside = f'readlink {" ".join(f"/proc/self/ns/{name}" for name in names)}; exec "$@"'
    ended = _run(file, prefix=["unshare", "--net", "--uts", "--mount", "sh", "-c", beside, "-"])
    *expected, found = ended.stdout.splitlines()
    assert found == f"{expected} True", ended.stderr
    assert expected != [str(Path(f"/proc/self/ns/{name}").readlink()) for name in names]


@pytest.mark.parametrize("variable", ["PYTHONHASHSEED", "LD_LIBRARY_PATH"])
def test_what_is_read_while_loading_needs_a_process_of_its_own(tmp_path, variable):
    (program := tmp_path / "tell.py").write_text(TELL)
    ended = _run(program, env={**os.environ, "GIVEN": "now", variable: "3"}, cwd=tmp_path)
    assert json.loads(ended.stdout)[-1] is False


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("import sys; sys.exit(7)", 7, ""),
        ("import sys; sys.exit('a sentence')", 1, "a sentence\n"),
        ("raise ValueError('not so')", 1, "ValueError: not so\n"),
        ("import os; os.abort()", -signal.SIGABRT, ""),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
        ("import atexit, sys; atexit.register(print, 'at the end', file=sys.stderr)", 0, "at the end\n"),
    ],
)
def test_a_program_ends_as_it_does_alone(tmp_path, program, code, said):
    (file := tmp_path / "program.py").write_text(program)
    ended = _run(file)
    assert ended.returncode == code
    assert ended.stderr.endswith(said)
    assert bool(ended.stderr) == bool(said)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_reaches_the_program(tmp_path, number):
    (file := tmp_path / "program.py").write_text("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    with subprocess.Popen(forked.command(file), stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
        assert pid != process.pid
        assert psutil.Process(pid).is_running()
        process.send_signal(number)
        assert process.wait(20) == -number
        until = time.monotonic() + 20
        while psutil.pid_exists(pid) and time.monotonic() < until:
            time.sleep(0.05)
        assert not psutil.pid_exists(pid)


@pytest.mark.parametrize("said", [b"", (100).to_bytes(8, "big") + b"half an order"])
def test_a_server_outlives_who_is_killed_while_it_asks(tmp_path, said):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[forked.ADDRESSES].split(":")[0])
        connection.sendall(said)
    (file := tmp_path / "program.py").write_text("import sys; sys.exit('tensorflow' in sys.modules and 7)")
    assert _run(file, timeout=20).returncode == 7


def test_nothing_is_forked_without_servers(tmp_path):
    (program := tmp_path / "tell.py").write_text(TELL)
    environment = {name: value for name, value in os.environ.items() if name != forked.ADDRESSES}
    ended = _run(program, env={**environment, "GIVEN": "now"}, cwd=tmp_path)
    assert json.loads(ended.stdout)[-1] is False
    assert sys.executable in forked.command(program)
