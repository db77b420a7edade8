"""The peers, and the command that starts each.

hvdkit's launcher starts the processes of the tools that have no launcher for several hosts, and of PyTorch and
TensorFlow, whose launchers must be started on each host. The tools then connect their processes by themselves.
"""

import dataclasses
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from hvdkit.bench import jobs
from hvdkit.bench.peers import environments
from hvdkit.bench.peers.environments import Environment
from hvdkit.bench.peers.place import Place
from hvdkit.errors import UsageError
from hvdkit.world.devices import usable_cores

OURS, SCRIPT, ONE_CORE = "hvdkit", "hvdkit_script", "one_core"
_PROGRAMS = Path(__file__).parent / "programs"
_MAKING = 3600  # seconds to create an environment on all hosts
_START = 300  # seconds for horovodrun to reach the hosts: its own 30 are too few for busy ones


@dataclasses.dataclass(frozen=True)
class Peer:
    """A tool to measure.

    Attributes:
        start: returns the command for a place, given the interpreter and the program with its arguments.
        program: file in the folder `programs`, and arguments.
        environment: its Python environment; None for this one.
        sets_threads: whether the tool chooses its threads by itself; for others the bench tries several numbers.
        one_host: why it cannot use several hosts; empty if it can.
    """

    start: Callable[[Place, list[str], list[str]], list[str]]
    program: tuple[str, ...]
    environment: Environment | None = None
    sets_threads: bool = False
    one_host: str = ""

    def command(self, place: Place) -> list[str]:
        """Return the command that starts this peer; create its environment if it is missing.

        Raises:
            UsageError: the peer cannot run in this place; the message gives the reason.
        """
        if place.hosts and self.one_host:
            raise UsageError(self.one_host)
        python = _python(self.environment, place) if self.environment else [sys.executable]
        file, *arguments = self.program
        return self.start(place, python, [*python, str(_PROGRAMS / file), *arguments])


def _python(environment: Environment, place: Place) -> list[str]:
    """Return the interpreter, with the option to ignore PYTHONPATH, which is for this Python's packages."""
    python = environment.python()
    if place.hosts:
        names = ",".join(dict.fromkeys(place.host_of_each_rank()))
        make = [sys.executable, "-m", "hvdkit.bench.peers.environments", environment.name]
        cache = {"HVDKIT_CACHE": str(environments.cache())}
        jobs.run([sys.executable, "-m", "hvdkit.launch", "-H", names, "--", *make], cache, _MAKING)
    return [str(python), "-E"]


def bound(place: Place) -> list[str]:
    """Return the command prefix that binds a rank to its named cores."""
    return _bound_to(place.cpus) if place.cpus else []


def _bound_to(cores: tuple[int, ...]) -> list[str]:
    return [sys.executable, str(_PROGRAMS / "bound.py"), ",".join(map(str, cores))]


def launcher(place: Place) -> list[str]:
    """Return the options of `hvdkit launch`: it binds ranks as it does by default, unless their cores are named."""
    return [*place.launcher_options(), *(["--bind", "none"] if place.cpus else [])]


def _script(place: Place, python: list[str], program: list[str]) -> list[str]:
    return [*python, "-m", "hvdkit.launch", *launcher(place), "--", *bound(place), *program]


def _launched(place: Place, python: list[str], program: list[str]) -> list[str]:
    """Leave the binding to the thread settings that the bench tries."""
    start = [sys.executable, "-m", "hvdkit.launch", *place.launcher_options(), "--bind", "none", "--"]
    return [*start, *bound(place), *program]


def _horovodrun(place: Place, python: list[str], program: list[str]) -> list[str]:
    folder = Path(python[0]).parent
    script = shutil.which("horovodrun", path=str(folder))
    if not script:
        raise UsageError(f"there is no horovodrun in {folder}")
    options = [*place.launcher_options(), "--gloo", "--start-timeout", str(_START)]
    if place.hosts:
        options.append("--disable-cache")  # what it found of hosts with these names an hour ago
    return [*python, script, *options, *bound(place), *program]


def _one_process(place: Place, python: list[str], program: list[str]) -> list[str]:
    return [*bound(place), *program]


def _one_core(place: Place, python: list[str], program: list[str]) -> list[str]:
    """Bind the process to the first core, on this host."""
    return [*_bound_to((place.cpus or tuple(jobs.usable_cores()))[:1]), *program]


PEERS = {
    SCRIPT: Peer(_script, ("keras_fit.py", "hvdkit"), sets_threads=True),
    ONE_CORE: Peer(_one_core, ("keras_fit.py", "single"), sets_threads=True),
    "torch_ddp": Peer(_launched, ("torch_ddp.py",), environments.TORCH),
    "keras_jax": Peer(_launched, ("keras_jax.py",), environments.KERAS_JAX),
    "horovod_keras2": Peer(_horovodrun, ("keras_fit.py", "horovod"), environments.KERAS_2),
    "horovod_tape": Peer(_horovodrun, ("tape.py",)),
    "mirrored": Peer(_one_process, ("keras_fit.py", "mirrored"), one_host="its replicas are in one process"),
    "multiworker_tf_keras": Peer(_launched, ("keras_fit.py", "multiworker"), environments.TF_KERAS),
}


def settings(peer: str, place: Place) -> list[dict[str, str]]:
    """Return the thread settings to try: a rank's share of the cores, bound or not, and all cores.

    There is one if the cores of each rank are named, and an empty one if the tool chooses its threads by itself.
    """
    if PEERS[peer].sets_threads:
        return [{}]
    is_one_process = PEERS[peer].start is _one_process
    if place.cpus:
        tried = [(len(place.cpus) // (1 if is_one_process else place.ranks), "0")]
    else:
        share = max(1, usable_cores() // (1 if is_one_process else place.ranks_of_a_host()))
        tried = list(dict.fromkeys([(share, "1"), (share, "0"), (usable_cores(), "0")]))
    return [{"HVDKIT_BENCH_THREADS": str(threads), "HVDKIT_BENCH_PIN": pin} for threads, pin in tried]
