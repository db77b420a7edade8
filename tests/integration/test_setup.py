"""What a newcomer meets first: bootstrap, installation, and the launch script."""

import shutil
import sys

import pytest

from tests.conftest import ROOT, run_command

BOOTSTRAP = ROOT / "launch" / "bootstrap.sh"


@pytest.mark.timeout(1300)
def test_bootstrap_has_nothing_to_do_twice():
    assert run_command([BOOTSTRAP], timeout=1200).code == 0
    ended = run_command([BOOTSTRAP], timeout=60)
    assert ended.code == 0
    assert "is ready: nothing has changed" in ended.output
    assert len(ended.output.splitlines()) == 1


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
    assert sorted(p.name for p in installed.iterdir() if p.is_dir() and "dist-info" not in p.name) == [
        "hvdkit",
        "hvdkit_models",
    ]
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
    assert "--global_batch" in ended.output
