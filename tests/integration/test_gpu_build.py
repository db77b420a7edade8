"""Horovod with NCCL, compiled, linked and loaded wherever nvcc is: for that neither a driver nor a GPU is needed.

Nor are most of CUDA's wheels (3 GB): a copy of this environment passes for a user's own, to which bootstrap.sh adds
only what is missing, and NCCL's wheel is the one that compiling and linking need.
"""

import importlib.metadata
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_command


def _cache():
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("HVDKIT_CACHE", home / "hvdkit")) / "horovod"


@pytest.fixture
def environment(tmp_path):
    """A copy of this environment with NCCL's wheel in it, which goes when the test ends."""
    if not shutil.which("nvcc"):
        pytest.skip("nvcc, the CUDA compiler, is not on PATH")
    if not os.environ.get("HVDKIT_TEST_GPU_BUILD") and not list(_cache().glob("*+nccl-*/*.whl")):
        pytest.skip("compiling with nvcc takes five minutes and more; HVDKIT_TEST_GPU_BUILD=1 has it done, once")
    copy = tmp_path / "environment"
    shutil.copytree(sys.prefix, copy, symlinks=True, ignore=shutil.ignore_patterns(".hvdkit-bootstrap"))
    (nccl,) = (n for n in importlib.metadata.requires("tensorflow") if n.startswith("nvidia-nccl"))
    install = [copy / "bin" / "python", "-m", "pip", "install", "--no-deps", nccl.partition(";")[0]]
    installed = run_command(install, timeout=600)
    assert installed.code == 0, installed.output
    yield copy
    shutil.rmtree(copy)


@pytest.mark.slow
@pytest.mark.gpu_build
@pytest.mark.timeout(3000)
def test_horovod_with_nccl_compiles_links_and_loads(environment):
    ended = run_command([ROOT / "launch" / "bootstrap.sh", "--into", environment, "--gpu", "yes"], timeout=2700)
    assert ended.code == 0, ended.output
    assert re.search(r"Horovod with gloo(\+mpi)?\+nccl sums right on", ended.output), ended.output
    (library,) = environment.glob("lib/python3*/site-packages/horovod/tensorflow/mpi_lib.*.so")
    linked = run_command(["ldd", library], timeout=60).output
    nccl = re.search(r"libnccl\.so\.2 => (\S+)", linked)
    assert nccl, linked
    assert environment in Path(nccl[1]).resolve().parents, "NCCL is not the wheel's"
    program = "import horovod.tensorflow as hvd; print(hvd.nccl_built() > 0, hvd.cuda_built())"
    assert run_command([environment / "bin" / "python", "-c", program], timeout=120).output.split()[-2:] == [
        "True",
        "True",
    ]
