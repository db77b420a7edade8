"""What ranks leave in a host's shared memory."""

import os
import time

from hvdkit.collectives.transports import shared_memory


def test_segments_of_jobs_that_were_killed_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_memory, "_FOLDER", tmp_path)
    for name in ("hvdkit-0a-1b", "hvdkit-0a-2c", "another", "hvdkit-notes"):
        (tmp_path / name).touch()
        long_ago = time.time() - 2 * shared_memory._STALE
        if name != "hvdkit-0a-2c":
            os.utime(tmp_path / name, (long_ago, long_ago))
    shared_memory.remove_stale()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another", "hvdkit-0a-2c", "hvdkit-notes"]
