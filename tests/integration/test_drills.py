"""Faults on real hosts: the training job is killed, cut off, and told to leave, and each example is still seen once.

A short set; `python -m hvdkit.drill --help` lists all faults.
"""

import json
import os

import pytest

from tests import forked

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def drill(cluster, tmp_path):
    """Runs a drill from h1, and returns its report."""

    def run(*arguments, timeout=600):
        report = tmp_path / "report.json"
        command = forked.command("-m", "hvdkit.drill", *arguments, "--json", report)
        ended = cluster.run("h1", *command, timeout=timeout)
        assert ended.code == 0, ended.output
        return json.loads(report.read_text())

    return run


def nothing_is_lost(report):
    assert (report["samples_lost"], report["samples_twice"], report["samples"]) == (0, 0, 220 * 32)
    assert report["test_accuracy"] >= 0.95, "what the recipe claims without a fault"
    assert report["starts"] == 2


@pytest.mark.slow
def test_a_remote_rank_is_killed(drill):
    report = drill("kill", "--rank", "1", "-H", "h1:1,h2:1")
    nothing_is_lost(report)
    assert report["ranks_at_the_end"] == 2
    assert 0 < report["steps_redone"] <= 44, "those since the last checkpoint"


@pytest.mark.slow
def test_a_host_is_cut_off(drill):
    report = drill("partition", "--rank", "1", "-H", "h1:1,h2:1")
    nothing_is_lost(report)
    assert (report["host"], report["ranks_at_the_end"]) == ("h2", 1)


@pytest.mark.slow
def test_a_remote_rank_is_told_to_leave(drill):
    report = drill("term", "--rank", "1", "-H", "h1:1,h2:1")
    nothing_is_lost(report)
    assert report["steps_redone"] == 0, "it had time to save"


@pytest.mark.slow
def test_a_rank_is_killed_under_mpi(drill):
    report = drill("kill", "--rank", "1", "-H", "h1:1,h2:1", "--mpi")
    nothing_is_lost(report)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="root is needed to mount a small disk")
def test_the_disk_of_the_checkpoints_is_full_for_a_while(drill):
    report = drill("disk-full", "-H", "h1:1,h2:1", "--step", "30")
    assert (report["samples_lost"], report["samples_twice"], report["starts"]) == (0, 0, 1)
    assert report["warnings"] >= 1, "training went on without a checkpoint, and said so"
