"""A model that does not fit the memory that a rank may use trains when it is divided over ranks.

The limits are the kernel's (memory cgroups): each rank runs in a group of its own, and one that takes more is killed.
"""

import os
import sys
from pathlib import Path

import pytest

from tests.conftest import run_command
from tests.integration.test_launcher import wait_until

GROUPS = Path("/sys/fs/cgroup")
# Bytes a rank. Of its own (TensorFlow's files, some 450 MiB, are charged to whoever loads them first) one process takes
# 2.1 GiB, and a rank of two 1.4.
LIMIT = 1_800 << 20
FLAGS = [
    "--model=gpt",
    "--dataset=text:text",
    "--model_args=width=1088,depth=4",
    "--sequence_length=32",
    "--steps=3",
    "--global_batch=4",
    "--steps_per_execution=1",
    "--checkpoint_every=never",
    "--notensorboard",
    "--workdir=run",
]


@pytest.fixture
def limited(tmp_path):
    """Runs `hvdkit.train` on ranks of which each may use so many bytes."""
    first_version = (GROUPS / "memory").is_dir()
    parent, file = (GROUPS / "memory", "memory.limit_in_bytes") if first_version else (GROUPS, "memory.max")
    group = parent / f"hvdkit-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / file).read_text()
        if not first_version:
            (group / "cgroup.subtree_control").write_text("+memory")
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        # Where the variable is set, as CI does, there must be limits: a skip would pass for a success.
        refuse = pytest.fail if os.environ.get("HVDKIT_TEST_HOSTS") else pytest.skip
        refuse(f"memory cannot be limited here: {error}")

    def run(number, *flags):
        for rank in range(number):
            (group / str(rank)).mkdir(exist_ok=True)
            (group / str(rank) / file).write_text(str(LIMIT))
        enter = f'echo $$ >{group}/$HOROVOD_RANK/cgroup.procs && exec "$@"'
        program = ["sh", "-c", enter, "-", sys.executable, "-m", "hvdkit.train", *FLAGS, *flags]
        launcher = [sys.executable, "-m", "hvdkit.launch", "-np", number, "--"]
        return run_command([*launcher, *program], timeout=400, cwd=tmp_path)

    yield run
    for place in [*group.iterdir(), group]:
        if place.is_dir():
            wait_until(lambda place=place: not (place / "cgroup.procs").read_text(), "a rank is left", 30)
            place.rmdir()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_model_that_one_rank_cannot_hold_trains_when_divided(limited, tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(2):
        (tmp_path / "text" / f"{number}.txt").write_text("to be or not to be, that is the question\n" * 40)
    alone = limited(1, "--strategy=single")
    assert (alone.code, "killed by SIGKILL" in alone.output) == (137, True), alone.output
    for strategy in ("tensor", "pipeline"):
        divided = limited(2, f"--strategy={strategy}", "--resume=never", "--overwrite")
        assert divided.code == 0, divided.output
        assert (tmp_path / "run" / "model.keras").exists()
