"""Fixtures for all tests: real ranks, test hosts, shared data, and checks for leaked processes and variables."""

import gc
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import psutil
import pytest

from tests import forked, resident

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as in launched ranks
    if config.getoption("dist", "no") == "no":  # tests run in this process
        # Import these before any test, because TensorFlow and TFDS set environment variables when imported.
        import tensorflow  # noqa: F401
        import tensorflow_datasets  # noqa: F401
    elif not hasattr(config, "workerinput"):
        _serve_programs(config)  # before the workers start, because they inherit the servers' addresses


def pytest_collection_finish(session):
    gc.collect()
    gc.freeze()  # otherwise each garbage collection, as in clear_session, would scan all objects of TensorFlow
    is_worker = hasattr(session.config, "workerinput")  # has the controller's servers
    alone = session.config.getoption("dist", "no") == "no" and not is_worker
    if alone and any("unit" not in item.path.parts for item in session.items):
        _serve_programs(session.config)


def _serve_programs(config):
    """Start the servers of `tests/forked.py` for all workers."""
    if os.environ.get(forked.ADDRESSES) != "":
        config.forked = Path(tempfile.mkdtemp(prefix="hvdkit-forked-"))
        config.forked_servers = forked.start(config.forked)


def pytest_unconfigure(config):
    if hasattr(config, "forked"):
        said = forked.stop(config.forked_servers, config.forked)
        assert not said, f"a server of tests/forked.py did not live: {said}"


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """Fail a test that changes environment variables or does not stop its processes."""
    os.environ["HVDKIT_TEST"] = mark = str(uuid.uuid4())  # all processes of the test inherit it
    environment = dict(os.environ)
    yield
    left = remains(mark)
    changed = {k for k in environment.keys() | os.environ.keys() if environment.get(k) != os.environ.get(k)}
    changed -= {"PYTEST_CURRENT_TEST"}
    for name in changed:
        os.environ.pop(name, None)
        if name in environment:
            os.environ[name] = environment[name]
    for process in left:
        process.kill()
    assert not left, f"the test left processes running: {left}"
    assert not changed, f"the test left environment variables changed: {sorted(changed)}"


def _environment(process):
    try:
        return process.environ()
    except psutil.Error:  # the process has ended, is a zombie, or belongs to another user
        return {}


def remains(mark=None):
    """Return the processes of a test that still run, on any test host."""
    mark = mark or os.environ["HVDKIT_TEST"]
    return [p for p in psutil.process_iter() if p.pid != os.getpid() and _environment(p).get("HVDKIT_TEST") == mark]


class Ended:
    """The exit code of a command and everything that it printed."""

    def __init__(self, code, output):
        self.code = code
        self.output = output


def run_command(command, *, timeout, env=None, cwd=None):
    """Run a command; after `timeout` seconds, kill it and all its children and fail the test."""
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env={**os.environ, **(env or {})},
        cwd=cwd,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        family = [process, *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            try:
                member.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        output, _ = process.communicate()
        pytest.fail(f"not done after {timeout} s: {' '.join(map(str, command))}\n{output}")
    return Ended(process.returncode, output)


@pytest.fixture(scope="session")
def resident_ranks():
    """Ranks that keep running from test to test."""
    pool = resident.Pool(dict(os.environ))
    yield pool
    pool.close()


@pytest.fixture
def ranks(tmp_path, resident_ranks):
    """Call a module-level function on N ranks and return each rank's result: `ranks(2, function, key=value)`.

    Calls reuse the ranks of earlier calls. With `fresh=True` or `fails=True`, the launcher starts new ranks. Use
    `fresh=True` if the function changes state of the process, such as modules, devices or signal handlers.
    """

    def start(number, function, *, timeout=540, env=None, fails=False, fresh=False, **arguments):
        folder = tmp_path / f"ranks-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        call = {
            "file": function.__code__.co_filename,
            "function": function.__name__,
            "arguments": arguments,
            "environment": env or {},
        }
        file = folder / "call.json"
        file.write_text(json.dumps(call))
        if not (fails or fresh):
            return resident_ranks.call(number, file, timeout)
        ended = run_command(
            [sys.executable, "-m", "hvdkit.launch", "-np", number, "--", *forked.command(resident.RANK_MAIN, file)],
            timeout=timeout,
            env={"TF_CPP_MIN_LOG_LEVEL": "2", **(env or {})},
        )
        if fails:
            assert ended.code != 0, f"{number} ranks of {function.__name__} were to fail, but did not:\n{ended.output}"
            return ended
        if ended.code != 0:
            pytest.fail(f"{number} ranks of {function.__name__} ended with {ended.code}; their output:\n{ended.output}")
        return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(number)]

    return start


@pytest.fixture
def train(tmp_path):
    """Run `python -m hvdkit.train` on N ranks (0: without a launcher): `train(2, "--model=...")`."""

    def start(number, *flags, timeout=300, cwd=None, env=None):
        launcher = [sys.executable, "-m", "hvdkit.launch", "-np", number, "--"] if number else []
        command = [*launcher, *forked.command("-m", "hvdkit.train", *flags)]
        return run_command(command, timeout=timeout, cwd=cwd or tmp_path, env=env)

    return start


class Cluster:
    """A local test cluster with hosts h1, h2, ..., which `launch/testhosts.sh` creates on this machine."""

    script = ROOT / "launch" / "testhosts.sh"

    def __init__(self, name):
        self.name = name
        self.environment = {"HVDKIT_TESTHOSTS": name}

    def command(self, host, *command):
        """Return the command that runs `command` on a host."""
        return [self.script, "run", host, *command]

    def run(self, host, *command, timeout=120, env=None):
        return run_command(self.command(host, *command), timeout=timeout, env={**self.environment, **(env or {})})

    def etc(self, host, file):
        """Return the path of the host's own version of a file in /etc."""
        return Path(f"/etc/netns/{self.name}-{host}") / file

    def change(self, what, host):
        """Disconnect a host (`cut`) and reconnect it (`mend`), or kill its processes (`halt`) and start it (`boot`)."""
        ended = run_command([self.script, what, host], timeout=60, env=self.environment)
        assert ended.code == 0, ended.output

    def up(self, number):
        return run_command([self.script, "up", number], timeout=120, env=self.environment)

    def down(self):
        return run_command([self.script, "down"], timeout=120, env=self.environment)


@pytest.fixture(scope="session")
def cluster():
    """A cluster of three hosts. Its name contains the process id, because other test runs may have clusters, too."""
    for stale in Path("/run/hvdkit-testhosts").glob("t*"):  # clusters of tests that were killed
        if not psutil.pid_exists(int(stale.name[1:])):
            Cluster(stale.name).down()
    hosts = Cluster(f"t{os.getpid()}")
    ended = hosts.up(3)
    if ended.code != 0:
        # CI sets the variable and requires hosts: a skip would look like success.
        refuse = pytest.fail if os.environ.get("HVDKIT_TEST_HOSTS") else pytest.skip
        refuse(f"no test hosts: {ended.output.strip()}")
    yield hosts
    hosts.down()


@pytest.fixture(scope="session")
def shared_data():
    """The folder of prepared TFDS data sets (MNIST, CIFAR-10, sentence polarity): HVDKIT_TEST_DATA or the default."""
    path = Path(os.environ.get("HVDKIT_TEST_DATA", ROOT.parent / "shared" / "tfds"))
    if not (path / "mnist").is_dir():
        # CI sets the variable and requires the data: a skip would look like success.
        refuse = pytest.fail if "HVDKIT_TEST_DATA" in os.environ else pytest.skip
        refuse(
            f"no prepared TFDS data sets under {path}: set HVDKIT_TEST_DATA to a data_dir that has mnist, cifar10 and "
            f"sentence_polarity"
        )
    return path
