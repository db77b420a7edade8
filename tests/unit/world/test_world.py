import os
import subprocess
import sys

import pytest

import hvdkit as hvd
from hvdkit import world
from hvdkit.world import devices, ranks
from tests import forked


def test_a_rank_must_lie_below_its_size():
    with pytest.raises(ValueError, match=r"rank/size = 2/2, cross_rank/cross_size = -1/1 in World\(rank=2"):
        world.World(2, 2, 0, 1, -1, 1, "h1")


def test_the_single_world_is_the_root_of_itself():
    alone = world.World.single()
    assert (alone.rank, alone.size, alone.is_root) == (0, 1, True)
    assert not world.World(1, 2, 1, 2, 0, 1, "h1").is_root


def test_without_init_there_is_no_world():
    ranks._world = None
    for kind in (ValueError, RuntimeError):  # Horovod's, and what it was here before
        with pytest.raises(kind, match=r"call hvdkit\.init\(\)"):
            hvd.rank()
    assert not hvd.is_initialized()


def test_the_launcher_says_how_many_processes_there_are(monkeypatch):
    assert (world.launched_rank(), world.launched_size()) == (0, 1)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    assert (world.launched_rank(), world.launched_size()) == (3, 4)


def test_a_host_whose_own_name_does_not_resolve_is_told_so(monkeypatch):
    """Found with a real one: `unshare -u sh -c 'hostname nosuchhost; horovodrun -np 2 ...'` ends in exit code 139."""
    monkeypatch.setattr(ranks.socket, "gethostname", lambda: "nosuchhost.invalid")
    ranks._check_own_name()  # a process that runs alone does not mind
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    with pytest.raises(hvd.UsageError, match=r"own name, nosuchhost\.invalid, does not resolve"):
        ranks._check_own_name()


class FakeTensorFlow:
    """The calls that pin a GPU, for machines that have none."""

    def __init__(self):
        self.visible, self.growing = [], []
        self.config = self.experimental = self
        self.set_visible_devices = lambda device, kind: self.visible.append((device, kind))
        self.set_memory_growth = lambda device, on: self.growing.append((device, on))


@pytest.mark.parametrize(("gpus", "hidden", "expected"), [(["g0", "g1"], "", "g1"), (["g1"], "1", "g1")])
def test_a_rank_takes_the_gpu_of_its_local_rank(monkeypatch, gpus, hidden, expected):
    if hidden:  # the launcher has left one GPU visible
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    tensorflow = FakeTensorFlow()
    devices._pin_gpu(tensorflow, gpus, local_rank=1, local_size=2, host="h1")
    assert tensorflow.visible == [(expected, "GPU")]
    assert tensorflow.growing == [(gpu, True) for gpu in gpus]


def test_more_ranks_than_gpus_are_refused():
    with pytest.raises(hvd.UsageError, match=r"3 ranks were started on host h1, which has 2 visible GPU\(s\)"):
        devices._pin_gpu(FakeTensorFlow(), ["g0", "g1"], local_rank=2, local_size=3, host="h1")


@pytest.fixture
def run(tmp_path):
    """Runs a program in a process of its own, which has not asked anything of TensorFlow, and returns its words."""

    def start(program, **environment):
        (tmp_path / "program.py").write_text(program)
        ended = subprocess.run(
            forked.command(tmp_path / "program.py"),
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **environment},
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.split()

    return start


def test_init_shares_the_cores(run):
    program = """
import hvdkit as hvd, tensorflow as tf
print(hvd.init().size, hvd.init() is hvd.init(), tf.config.threading.get_intra_op_parallelism_threads())
hvd.shutdown(); print(hvd.is_initialized())
"""
    assert run(program) == ["1", "True", str(world.usable_cores()), "False"]


def test_a_rank_with_cores_of_its_own_takes_all_that_it_sees(run):
    program = """
import tensorflow as tf
from hvdkit.world.devices import take_devices
take_devices(local_rank=0, local_size=2, host="h1")
print(tf.config.threading.get_intra_op_parallelism_threads())
"""
    cores = world.usable_cores()
    assert run(program, CUDA_VISIBLE_DEVICES="") == [str(max(1, cores // 2))]
    assert run(program, CUDA_VISIBLE_DEVICES="", HVDKIT_OWN_CORES="1") == [str(cores)]


def test_a_user_who_sets_threads_keeps_them(run):
    program = """
import hvdkit as hvd, tensorflow as tf
hvd.init()
print(tf.config.threading.get_intra_op_parallelism_threads())
"""
    assert run(program, TF_NUM_INTRAOP_THREADS="7") == ["0"]  # 0: TensorFlow decides, by the variable


def test_init_after_tensorflows_start_warns(run):
    program = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(message)s")
import tensorflow as tf, hvdkit as hvd
tf.zeros(1)
hvd.init()
"""
    assert "call hvdkit.init() before the first tensor" in " ".join(run(program))


def test_without_horovod_the_error_says_how_to_get_it(run):
    program = """
import sys
sys.modules["horovod"] = None
import hvdkit as hvd
try:
    hvd.init()
except ImportError as error:
    print(error)
"""
    assert "launch/bootstrap.sh --into PREFIX" in " ".join(run(program))


def test_importing_hvdkit_does_not_load_tensorflow():
    program = "import sys, hvdkit, hvdkit.launch.__main__, hvdkit.train.flags; print('tensorflow' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["False"]


def test_every_public_name_exists():
    assert all(getattr(hvd, name) is not None for name in hvd.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = hvd.nonsense
