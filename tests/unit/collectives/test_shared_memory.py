"""What ranks leave in a host's shared memory."""

import os
import subprocess
import time
from pathlib import Path

from hvdkit import watchdog
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


def test_segments_of_processes_that_have_ended_are_removed_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_memory, "_FOLDER", tmp_path)
    ended = subprocess.Popen(["true"])
    ended.wait()
    ids = Path("/proc/self/ns/pid").stat().st_ino
    here, there, alive = f"hvdkit-{ids}.{ended.pid}.f-1", f"hvdkit-1.{ended.pid}.f-1", f"hvdkit-{ids}.{os.getpid()}.f-1"
    for name in (here, there, alive):
        (tmp_path / name).touch()
    shared_memory.remove_stale()
    assert {path.name for path in tmp_path.iterdir()} == {there, alive}, "another container's ids mean nothing here"


def test_when_the_job_fails_its_own_segments_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_memory, "_FOLDER", tmp_path)
    monkeypatch.setattr(os, "_exit", lambda code: None)
    shared_memory.SharedMemory(0, 2, "1.2.f", own_core=False)
    for name in ("hvdkit-1.2.f-1", "hvdkit-1.2.f-2", "hvdkit-1.2.e-1"):
        (tmp_path / name).touch()
    try:
        watchdog._end_process(75)
    finally:
        watchdog.stop()
    assert [path.name for path in tmp_path.iterdir()] == ["hvdkit-1.2.e-1"]
