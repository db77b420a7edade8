"""What the measured rounds amount to."""

import pytest

from hvdkit.bench.peers import rounds, table


def one(rate, median=1.0, slow=1.0, joined=1):
    times = {"median": median, "percentile_95": slow, "steps_per_execution": joined, "steps": 100}
    return {"samples_per_second": rate, "windows": [rate], "step_seconds": times}


MEASURED = {
    ("mlp", "hvdkit_script"): [one(200, 2, 2.2, 16), one(100, 2, 3, 16), one(210, 1, 1.2, 16)],
    ("mlp", "hvdkit"): [one(300), one(290), one(310)],
    ("mlp", "one_core"): [one(100), one(50), one(140)],
    ("mlp", "torch_ddp"): [one(80), one(80), one(70)],
    ("mlp", "horovod_tape"): [one(100), one(50), one(84)],
    ("lenet", "hvdkit_script"): [one(20), one(20), one(20)],
}
BEST = {key: {} for key in MEASURED} | {
    ("mlp", "torch_ddp"): {"HVDKIT_BENCH_THREADS": "1", "HVDKIT_BENCH_PIN": "1"},
    ("mlp", "horovod_tape"): {"HVDKIT_BENCH_THREADS": "2", "HVDKIT_BENCH_PIN": "0"},
}


@pytest.fixture
def found():
    made = table.rows(MEASURED, BEST)
    missing = {"mirrored": "its replicas are in one process"}
    return {"rows": made, "verdicts": table.verdicts(made), "missing": missing}


def test_a_row_has_the_median_and_the_spread_of_its_rounds(found):
    script, *_ = found["rows"]
    assert (script["samples_per_second"], script["lowest"], script["highest"]) == (200, 100, 210)
    assert script["slowest_round"] == 0.5
    assert script["slow_steps"] == pytest.approx(1.2), "the median of 1.1, 1.5 and 1.2"
    assert [round_["samples_per_second"] for round_ in script["rounds"]] == [200, 100, 210]


def test_ratios_are_of_pairs_in_a_round(found):
    rows = {(row["workload"], row["peer"]): row for row in found["rows"]}
    ratio = rows["mlp", "one_core"]["ratio"]
    assert (ratio["median"], ratio["lowest"], ratio["highest"]) == (2.0, 1.5, 2.0)
    assert rows["mlp", "hvdkit_script"]["ratio"]["median"] == 1.0
    assert rows["mlp", "hvdkit"]["ratio"]["lowest"] == pytest.approx(100 / 290)


def test_the_best_peer_is_the_one_with_the_highest_median(found):
    """Here horovod_tape, 84 to torch_ddp's 80: neither hvdkit nor one core, though they are faster."""
    mlp, lenet = found["verdicts"]
    assert (mlp["workload"], mlp["best_peer"]) == ("mlp", "horovod_tape")
    assert (mlp["ratio"]["median"], mlp["ratio"]["lowest"], mlp["ratio"]["highest"]) == (2.0, 2.0, 2.5)
    assert mlp["one_core"]["median"] == 2.0
    assert lenet == {"workload": "lenet", "best_peer": None, "ratio": None, "one_core": None}


def test_the_report_tells_all_of_it(found):
    text = table.report(found)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "mlp hvdkit_script 200 100 to 210 0.50 1.20 16 1.00 1.00 to 1.00 its own" in lines
    assert "mlp torch_ddp 80 70 to 80 0.88 1.00 1 2.50 (noisy) 1.25 to 3.00 1, bound" in lines
    assert "mlp horovod_tape 84 50 to 100 0.60 1.00 1 2.00 2.00 to 2.50 2" in lines
    assert "mlp horovod_tape 2.00 2.00 to 2.50 2.00 1.50 to 2.00" in lines
    assert "lenet none" in lines
    assert text.splitlines()[-1] == "mirrored was left out: its replicas are in one process"


def test_results_are_found_behind_what_a_launcher_writes():
    times = '{"median": 1, "percentile_95": 2, "steps_per_execution": 1, "steps": 9}'
    line = f'BENCH {{"workload": "mlp", "samples_per_second": [3, 1, 2], "weights": 1, "step_seconds": {times}}}'
    found = rounds.results(["noise", f"[1,0]<stdout>:{line}", "BENCH is a word", ""])
    assert set(found) == {"mlp"}
    assert found["mlp"]["samples_per_second"] == 2
    assert found["mlp"]["windows"] == [3, 1, 2]
    assert found["mlp"]["step_seconds"]["percentile_95"] == 2
