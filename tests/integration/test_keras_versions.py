"""The private names that hvdkit uses, on the oldest Keras for this TensorFlow; `tests/versions.py` tests the rest."""

import sys
from importlib import metadata

import pytest

from hvdkit.versions import OLDEST_KERAS
from tests.conftest import ROOT, run_command


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_private_names_mean_the_same_on_the_oldest_keras(tmp_path):
    minor = tuple(map(int, metadata.version("tensorflow").split(".")[:2]))
    oldest = ".".join(map(str, OLDEST_KERAS[minor]))
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path, f"keras=={oldest}"]
    installed = run_command(install, timeout=300)
    assert installed.code == 0, installed.output
    suite = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "tests/unit/compat"]
    ended = run_command(suite, timeout=600, cwd=ROOT, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert ended.code == 0, ended.output
    assert " passed" in ended.output
