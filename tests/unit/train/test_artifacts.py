"""A run's folder."""

import pytest

from hvdkit.errors import UsageError
from hvdkit.train import artifacts
from hvdkit.train import flags as train_flags


def parse(*flags):
    return train_flags.parse(["train", *flags])


def test_an_old_run_is_cleared_away(tmp_path):
    for name in ("result.json", "model.keras", "logs"):
        (tmp_path / name).touch()
    (tmp_path / "tensorboard" / "train").mkdir(parents=True)
    artifacts.clear(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["logs"]


def test_a_workdir_with_a_run_is_not_overwritten(tmp_path):
    artifacts.make_workdir(tmp_path, overwrite=False, begin_anew=False)
    (tmp_path / "result.json").touch()
    with pytest.raises(UsageError, match="has a finished run"):
        artifacts.make_workdir(tmp_path, overwrite=False, begin_anew=False)
    artifacts.make_workdir(tmp_path, overwrite=True, begin_anew=False)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot be written to \(Not a directory\)"):
        artifacts.make_workdir(tmp_path / "file", overwrite=True, begin_anew=False)


def test_an_interrupted_run_is_not_begun_anew_by_accident(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    artifacts.make_workdir(tmp_path, overwrite=False, begin_anew=False)
    with pytest.raises(UsageError, match="has the checkpoints of an interrupted run, and --resume=never would lose"):
        artifacts.make_workdir(tmp_path, overwrite=False, begin_anew=True)
    artifacts.make_workdir(tmp_path, overwrite=True, begin_anew=True)


def test_curves_of_a_run_that_took_no_step(tmp_path):
    """It went on from where another one had ended, so that there is a history, and no loss by step."""
    artifacts.plot_curves(tmp_path, {"loss": [1.0], "accuracy": [0.5]}, 44, parse(), "title")
    assert (tmp_path / "curves.png").read_bytes()[1:4] == b"PNG"
