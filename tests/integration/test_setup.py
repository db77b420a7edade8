"""What a newcomer meets first: bootstrap, installation, and the launch script."""

import hashlib
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_command

BOOTSTRAP = ROOT / "launch" / "bootstrap.sh"


@pytest.mark.timeout(1300)
def test_bootstrap_has_nothing_to_do_twice():
    assert run_command([BOOTSTRAP], timeout=1200).code == 0
    ended = run_command([BOOTSTRAP], timeout=60)
    assert ended.code == 0
    assert "is ready" in ended.output
    assert len(ended.output.splitlines()) == 1


class Checkout:
    """A checkout whose `.venv` looks set up to bootstrap.sh, and a PATH on which compilers come and go."""

    def __init__(self, folder):
        self.root = folder / "checkout"
        self.bin = folder / "bin"
        self.environment = {"PATH": str(self.bin), "HVDKIT_CACHE": str(folder / "cache"), "CXX": "", "CUDA_HOME": ""}
        for part in ("launch", "hvdkit/native"):
            shutil.copytree(ROOT / part, self.root / part, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        for part in ("requirements.txt", "pyproject.toml"):
            shutil.copy(ROOT / part, self.root)
        self.bin.mkdir()
        for program in [*Path("/usr/bin").iterdir(), *Path("/bin").iterdir()]:
            if not re.match(r"mpi|nvcc", program.name) and not (self.bin / program.name).is_symlink():
                (self.bin / program.name).symlink_to(program)
        venv = self.root / ".venv"
        library = venv / "lib/python3.11/site-packages/horovod/tensorflow/mpi_lib.so.so"
        for file in (venv / "pyvenv.cfg", venv / "bin" / "python", library):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("there")
        self.provide("python", venv / "bin", says=f"started >{self.root}/python-was-started")

    def provide(self, program, folder=None, says="-Lsomewhere"):
        """Puts a program there, as the package manager would."""
        file = (folder or self.bin) / program
        file.unlink(missing_ok=True)
        file.write_text(f"#!/bin/sh\necho {says}\n")
        file.chmod(0o755)
        return file

    def source(self, commands):
        """Runs commands after the functions of bootstrap.sh were read, and returns what they print."""
        line = f"set -eu; source {self.root}/launch/bootstrap.sh; {commands}"
        ended = run_command(["/bin/bash", "-c", line], timeout=60, env=self.environment)
        assert ended.code == 0, ended.output
        return ended.output

    def set_up(self):
        """Leaves the note of a run that has built what the machine has now."""
        facts = "py=3.11 tf_dist=tensorflow tf_version=2.21.0 tf_size=1 pins=2.21.0"
        self.source(f'detect; decide; hash_inputs; {facts}; wheel="built $(ingredients)"; write_note "$(fingerprint)"')

    def plan(self, *options):
        """Whether a run with these options has nothing to do, and the engines that it would build."""
        ready = "if is_ready; then echo ready; else echo build; fi"
        return self.source(
            f"parse_arguments {shlex.join(options)}; detect; decide; hash_inputs; {ready}; echo $engines"
        )

    def run(self, *options):
        """Runs the script, which must find nothing to do; returns its one line."""
        ended = run_command([self.root / "launch" / "bootstrap.sh", *options], timeout=60, env=self.environment)
        assert ended.code == 0, ended.output
        assert not (self.root / "python-was-started").exists()
        (line,) = ended.output.splitlines()
        return line.replace(str(self.root), "")


@pytest.fixture
def checkout(tmp_path):
    """A checkout of its own, set up without MPI and NCCL."""
    place = Checkout(tmp_path)
    place.set_up()
    return place


def test_what_was_installed_since_is_offered_and_not_built(checkout):
    nothing = "==> /.venv is ready: nothing has changed since it was set up"
    assert checkout.run() == nothing
    mpicxx = checkout.provide("mpicxx")
    checkout.provide("nvcc")
    checkout.provide("g++-99")
    checkout.provide("g++", says="13.0.0")
    offer = f"==> /.venv is ready; it was built with gloo. MPI is there now ({mpicxx}): launch/bootstrap.sh --mpi yes"
    assert checkout.run() == f"{offer} builds it in (about 3 min)."
    key = checkout.source(
        "read_note; mpicxx=$(command -v mpicxx); name_engines; mkdir -p $CACHE; echo $CACHE/$(wheel_key)"
    )
    assert "-gcc13.0.0-gloo+mpi-" in key
    Path(key.strip()).mkdir(parents=True)
    (Path(key.strip()) / "SHA256SUMS").touch()
    assert checkout.run() == f"{offer} builds it in (about 1 min: this Horovod is in the cache)."
    assert checkout.plan("--mpi", "yes").split() == ["build", "gloo+mpi"]
    assert checkout.run("--mpi", "no") == nothing
    assert checkout.run() == nothing, "what was declined is offered again"
    mpicxx.unlink()
    assert checkout.plan("--mpi", "yes").split() == ["build", "gloo"], "MPI is missing, and must be installed or named"


def test_what_has_gone_since_is_not_missed(checkout):
    mpicxx = checkout.provide("mpicxx")
    checkout.environment["CXX"] = "g++-99"
    (checkout.root / ".venv" / ".hvdkit-bootstrap").unlink()
    checkout.set_up()
    checkout.environment["CXX"] = ""
    mpicxx.unlink()
    assert checkout.run() == "==> /.venv is ready: nothing has changed since it was set up"
    checkout.environment["CXX"] = "g++-98"
    assert checkout.plan().split() == ["build", "gloo+mpi"]
    checkout.environment["CXX"] = ""
    assert checkout.plan("--mpi", "no").split() == ["build", "gloo"]


def test_a_gpu_that_came_is_offered(checkout):
    offer = checkout.source("detect; decide; read_note; driver=yes here_nvcc=''; offer_gpu")
    assert "requirements.txt 'tensorflow[and-cuda]' installs the CUDA libraries for one GPU." in offer
    offer = checkout.source("detect; decide; read_note; driver=yes here_nvcc=/cuda/nvcc; offer_gpu")
    assert "nvcc are there now: launch/bootstrap.sh --gpu yes builds NCCL in (about 6 min)." in offer
    assert not checkout.source("gpu=no; detect; decide; read_note; driver=yes here_nvcc=/cuda/nvcc; offer_gpu")
    assert not checkout.source("detect; decide; read_note; here_nvcc=/cuda/nvcc; offer_gpu")


def test_changed_requirements_reuse_the_wheel_whatever_has_become_of_the_compilers(checkout):
    mpicxx = checkout.provide("mpicxx")
    (checkout.root / ".venv" / ".hvdkit-bootstrap").unlink()
    checkout.set_up()
    wheel = Path(checkout.environment["HVDKIT_CACHE"]) / "horovod" / "built"
    wheel.mkdir(parents=True)
    (wheel / "horovod.whl").touch()
    (wheel / "SHA256SUMS").write_text(f"{hashlib.sha256().hexdigest()}  horovod.whl\n")
    mpicxx.unlink()
    checkout.provide("g++", says="13.0.0")
    with (checkout.root / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    assert checkout.plan().split() == ["build", "gloo+mpi"]
    stages = "stage() { echo stage $1; exit; }"  # whatever takes time: here it would be fetching Horovod's source
    obtain = f"{stages}; detect; decide; read_note; obtain_wheel"
    assert checkout.source(obtain).split() == ["==>", "Horovod", "is", "in", "the", "cache:", str(wheel)]
    lines = checkout.source(obtain.replace("; obtain", "; tf_version=2.22.0; obtain")).splitlines()
    assert "==> Horovod was built with gloo+mpi, whose compiler has gone; it is now built with gloo" in lines[0]
    assert lines[1].startswith("stage Fetching the source of Horovod")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu", "maybe"], "--gpu was given 'maybe', and expects auto, yes or no"),
        (["--into", "/no/such/place"], "--into was given '/no/such/place', and expects a venv or conda environment"),
        (["--fast"], "there is no option '--fast'"),
    ],
)
def test_bootstrap_answers_mistakes_in_one_sentence(flags, message):
    ended = run_command([BOOTSTRAP, *flags], timeout=60)
    assert ended.code == 2
    assert message in ended.output
    assert len(ended.output.splitlines()) == 1


def test_the_requirements_leave_horovod_to_bootstrap():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert all("==" in line for line in lines if line and not line.startswith("#"))
    assert not any(line.lower().startswith("horovod") for line in lines), "pip would compile it, and fail"


@pytest.mark.slow
def test_pip_install_gives_the_library_and_the_recipes(tmp_path):
    copy = tmp_path / "copy"  # setuptools leaves its traces where it builds
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "runs", "*.egg-info", "__pycache__"))
    installed = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", installed, copy]
    assert run_command(pip, timeout=300).code == 0
    folders = sorted(p.name for p in installed.iterdir() if p.is_dir() and "dist-info" not in p.name)
    assert folders == ["bin", "hvdkit", "hvdkit_models"]
    assert [script.name for script in (installed / "bin").iterdir()] == ["hvdkit"]
    program = "import hvdkit, hvdkit_models as m; print(hvdkit.__file__, m.names(), m.load('resnet').RECIPES)"
    ended = run_command([sys.executable, "-c", program], timeout=60, env={"PYTHONPATH": str(installed)}, cwd=tmp_path)
    assert ended.code == 0, ended.output
    assert str(installed) in ended.output
    assert "'mnist_mlp'" in ended.output


def test_the_launch_script_checks_flags_before_any_rank_starts():
    ended = run_command([ROOT / "launch" / "local.sh", "--modle=mnist_mlp"], timeout=60)
    assert ended.code == 2
    assert ended.output.splitlines()[-1].startswith("hvdkit.train: Unknown command line flag 'modle'")


def test_the_launch_script_shows_the_flags():
    ended = run_command([ROOT / "launch" / "local.sh", "--help"], timeout=60)
    assert ended.code == 0
    assert "--global-batch" in ended.output
