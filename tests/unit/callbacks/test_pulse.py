"""`PulseCallback` touches its file in every kind of step, but not too often."""

import pytest

from hvdkit import callbacks


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_test_batch_end"])
def test_every_kind_of_step_touches_the_file(tmp_path, hook):
    path = tmp_path / "pulse"
    pulse = callbacks.PulseCallback(path, every=0)
    pulse.on_train_begin()
    assert path.exists()
    path.unlink()
    getattr(pulse, hook)(0)
    assert path.exists()


def test_the_file_is_touched_no_more_often_than_asked(tmp_path):
    path = tmp_path / "pulse"
    pulse = callbacks.PulseCallback(path, every=600)
    pulse.on_train_begin()
    path.unlink()
    pulse.on_train_batch_end(0)
    assert not path.exists()
