"""Shares, verdicts and traces of times that are known."""

import gzip
import json

import numpy as np
import pytest

from hvdkit.profiling import shares, trace


def _times(own, steps=10, clocks=(0.0, 0.0), exchange=0.3, update=0.1):
    """Marks of ranks that need `own` = (input, computation) seconds by themselves, each on a clock of its own."""
    times = np.zeros([len(own), steps, 4])
    end = np.zeros(len(own))
    for step in range(steps):
        batch = end + [i for i, _ in own]
        ready = batch + [c for _, c in own]
        reduced = np.full(len(own), ready.max() + exchange)
        end = reduced + update
        times[:, step] = np.stack([batch, ready, reduced, end], axis=1)
    return [t + clock for t, clock in zip(times, clocks, strict=True)]


def test_parts_are_told_apart_on_clocks_that_differ():
    profile = shares.analyse(_times([(0.1, 1.0), (0.6, 1.0)], clocks=(1000.0, 1234.5)))
    assert profile.seconds[0] == pytest.approx([0.1, 1.1, 0.5, 0.3])
    assert profile.seconds[1] == pytest.approx([0.6, 1.1, 0.0, 0.3])
    assert profile.step == pytest.approx(2.0)
    assert profile.clock_error == pytest.approx(0.0, abs=1e-6)
    names = ["rank 0 on h1", "rank 1 on h2"]
    assert shares.verdict(profile, names) == "rank 1 on h2 is 42% slower than the others: input bound."


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ([(0.1, 1.0)] * 3, "No rank is slower than the others by 5% or more."),
        ([(0.1, 1.0), (0.1, 1.0), (0.1, 1.32)], "c is 27% slower than the others: compute bound."),
        ([(0.1, 1.0)], "There is one rank, and nobody to wait for."),
    ],
)
def test_the_verdict_names_who_and_why(own, said):
    profile = shares.analyse(_times(own, clocks=[0.0] * len(own)))
    assert shares.verdict(profile, ["a", "b", "c"][: len(own)]) == said


def test_advice_comes_with_its_share():
    assert shares.advice(shares.analyse(_times([(0.1, 1.0), (0.1, 1.0)], exchange=1.2)))[0].startswith(
        "exchange takes 50% of a step: send less (--compression=bf16"
    )
    assert shares.advice(shares.analyse(_times([(0.0, 1.0), (0.0, 1.0)], exchange=0.1))) == [
        "Computation takes 92% of a step: there is little to win besides it."
    ]


def test_a_step_without_an_exchange_is_computation():
    times = _times([(0.2, 0.8)], clocks=[0.0], exchange=0.0)
    times[0][:, 1:3] = 0
    assert shares.analyse(times).seconds[0] == pytest.approx([0.2, 0.9, 0.0, 0.0])


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match="2 steps are too few for a profile"):
        shares.analyse(_times([(0.1, 1.0)], steps=2, clocks=[0.0]))


def test_the_trace_is_one_that_perfetto_reads(tmp_path):
    profile = shares.analyse(_times([(0.1, 1.0), (0.6, 1.0)], clocks=(50.0, 70.0)))
    timeline = tmp_path / "timeline.json"
    timeline.write_text('[\n{"name": "ALLREDUCE", "ph": "B", "pid": 1, "ts": 100},\n{"name": "ALLRED')
    events = trace.of_marks(profile, ["a", "b"]) + trace.of_timeline(timeline, 51.0)
    trace.write(tmp_path / "t.json.gz", events)
    with gzip.open(tmp_path / "t.json.gz", "rt") as file:
        read = json.load(file)["traceEvents"]
    spans = [e for e in read if e["ph"] == "X"]
    assert min(e["ts"] for e in read if "ts" in e) == 0
    exchanges = [[e["ts"] + e["dur"] for e in spans if e["pid"] == rank and e["name"] == "exchange"] for rank in (0, 1)]
    np.testing.assert_allclose(exchanges[0], exchanges[1], atol=1)  # on one clock, in microseconds
    assert {e["name"] for e in spans if e["pid"] == 1} == {"input", "compute", "exchange", "update"}
    assert [e["ts"] for e in read if e["name"] == "ALLREDUCE"] == [pytest.approx(0.9e6 + 100)]
