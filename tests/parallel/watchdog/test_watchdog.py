"""Ranks that stand still, fail, die and freeze: one report or sentence, the right exit code, nothing left behind."""

import re
import signal
import sys
from pathlib import Path

import pytest

from tests import forked
from tests.conftest import run_command

PROGRAM = Path(__file__).parents[1] / "watchdog_program.py"


def run(number, *arguments, limit=15, action="abort", **environment):
    """The limit leaves time for the first step's tracing on a machine that does much else."""
    return run_command(
        [sys.executable, "-m", "hvdkit.launch", "-np", number, "--", *forked.command(PROGRAM, *arguments)],
        timeout=300,
        env={
            "HVDKIT_STALL_SECONDS": str(limit),
            "HVDKIT_STALL_ACTION": action,
            "TF_CPP_MIN_LOG_LEVEL": "2",
            **environment,
        },
    )


def test_a_collective_that_only_rank_0_calls_ends_the_job_with_one_report():
    ended = run(3, "only_rank_0")
    assert ended.code == 75, ended.output
    assert ended.output.count("hvdkit: the job has made no progress for 15 s; all ranks exit with code 75.") == 1
    assert (
        "Likely cause: code that not all ranks run: only rank 0 entered the collective 'hvdkit.best_loss', at "
        in ended.output
    )
    assert 'in best: allreduce("best_loss")' in ended.output.replace("'", '"')
    assert re.search(r"^ranks 1 and 2 on \S+: training, step 2 of epoch 1, .*here for \d+ s$", ended.output, re.M)
    assert "Traceback" not in ended.output


@pytest.mark.slow
def test_stalls_that_end_again_are_reported_one_by_one():
    ended = run(2, "many_stalls", limit=3, action="warn")
    assert ended.code == 0, ended.output
    causes = "\n".join(re.findall(r"^Likely cause: (.*)$", ended.output, re.M))
    assert "the ranks call collectives in different order: rank 0 is in 'loss', at " in causes, causes
    assert "uneven data: rank 0 is done after step 3 of epoch 1 and has left the training loop" in causes, causes
    assert "while rank 1 is in step 4 of epoch 1" in causes, causes
    assert re.search(r"slow input: rank 1 is reading its data, in .* in examples: time.sleep\(9\)", causes), causes
    sentence = (
        "the ranks have different tensors in the collective 'hvdkit.validation': rank 0 has float64[2], and rank 1 "
        "has float64[3]."
    )
    assert ended.output.count(f"explained: {sentence}") == 2


@pytest.mark.slow
@pytest.mark.parametrize("then", ["ends", "validates"])
def test_generators_of_different_length_end_fit_with_one_report(then):
    ended = run(2, "uneven_generators", then)
    assert ended.code == 75, ended.output
    assert ended.output.count("the job has made no progress") == 1, ended.output
    assert re.search(
        r"^Likely cause: uneven data: rank 0 is done after step 3 of epoch 1 and .*, while rank 1 is in step 4",
        ended.output,
        re.M,
    ), ended.output


def test_an_exception_on_one_rank_is_the_common_reason():
    ended = run(2, "raise_in_fit", 1, limit=60)
    assert ended.code == 1, ended.output
    sentence = r"^hvdkit: rank 1 on host \S+ failed in step 4 of epoch 1: ValueError: no such label: 17\. All ranks"
    assert len(re.findall(sentence, ended.output, re.M)) == 1, ended.output
    assert "[1] ValueError: no such label: 17" in ended.output
    assert not re.search(r"^Traceback", ended.output, re.M), "rank 0 has no traceback of its own"
    assert re.search(
        r"\nhvdkit\.launch: rank 1 on host \S+ was the first to fail, with exit code 1\.\n\Z", ended.output
    )


@pytest.mark.parametrize(
    ("rank", "memory"),
    [(0, "0"), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, "1"), (1, "0"), (1, "1")))],
)
def test_a_rank_that_is_killed_is_named(rank, memory):
    """Ranks without shared memory exchange through sockets."""
    ended = run(3, "die_in_fit", rank, "SIGKILL", limit=60, HVDKIT_SHARED_MEMORY=memory, **forked.NOT_FORKED)
    assert ended.code == 128 + signal.SIGKILL, ended.output
    said = rf"^(?:\[1\] )?hvdkit: rank {rank} on host \S+ died \(training, step \d of epoch 1\)"
    assert len(re.findall(said, ended.output, re.M)) == 1, ended.output
    assert "Traceback" not in ended.output
    assert re.search(
        rf"\nhvdkit\.launch: rank {rank} on host \S+ was the first to fail, killed by SIGKILL .*exit code 137\.\n\Z",
        ended.output,
    ), ended.output


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_frozen_is_named(rank):
    ended = run(3, "die_in_fit", rank, "SIGSTOP")
    assert ended.code == 75, ended.output
    assert ended.output.count("the job has made no progress") == 1, ended.output
    assert re.search(rf"Likely cause: rank {rank} on host \S+ does not answer: its process is stopped", ended.output)
    assert re.search(rf"rank {rank} on \S+: frozen; when last heard of: training, step 4 of epoch 1", ended.output)


def test_eager_collectives_in_another_order_end_the_job_long_before_the_limit():
    ended = run(2, "other_order", limit=100_000)
    assert ended.code == 1, ended.output
    assert re.search(
        r"hvdkit: the ranks are in different collectives, and would wait for each other forever: rank 0 is in "
        r"'hvdkit\.loss', at .* in allreduce: .*, rank 1 in 'hvdkit\.weight', at ",
        ended.output,
    ), ended.output


def test_models_that_differ_are_found_when_they_are_traced():
    """Horovod's grouped exchange gives no error, but uninitialised memory."""
    ended = run(2, "other_models", limit=60)
    assert ended.code == 1, ended.output
    assert (
        "hvdkit: the ranks' models differ: in the collective 'DistributedSGD' head/kernel is float32[4, 3] on rank 0 "
        "and float32[4, 4] on rank 1." in ended.output
    )


def test_a_rank_that_can_open_no_port_leaves_all_without_a_watchdog():
    ended = run(2, "no_door", limit=60)
    assert ended.code == 0, ended.output
    assert ended.output.count("There is no watchdog: host ") == 1, ended.output
    assert "Cannot assign requested address" in ended.output, ended.output
    assert ended.output.count("went on None") == 2, ended.output


@pytest.mark.parametrize(
    "end", ["again", "hub", *(pytest.param(e, marks=pytest.mark.slow) for e in ("sys.exit", "os._exit"))]
)
def test_a_healthy_job_is_silent(end):
    ended = run(2, "healthy", end, limit=60)
    assert ended.code == 0, ended.output
    if end in ("sys.exit", "again"):
        assert ended.output == ""
    assert "hvdkit" not in ended.output.replace("hvdkit-bootstrap", "")  # where Horovod was compiled
