"""What is computed from the times of windows and steps."""

import json

import keras
import numpy as np
import pytest

from hvdkit.bench.peers.programs import bound, timing


def test_the_steps_of_an_execution_count_as_equally_long():
    """96 steps of 1 s, 16 by 16, and 4 single ones of 3 s: fewer than 5 in 100 are slow."""
    executions = [(16.0, 16)] * 6 + [(3.0, 1)] * 4
    found = timing.step_times(executions)
    assert found == {"median": 1.0, "percentile_95": 1.0, "steps_per_execution": 16, "steps": 100}
    assert timing.step_times([*executions, (6.0, 2)])["percentile_95"] == 3.0
    assert timing.step_times([(2.0, 1)])["percentile_95"] == 2.0


def test_a_window_is_as_long_as_was_asked_for():
    """A call takes 2 s by itself and a step 0.01 s: short windows look slow, so longer ones are tried."""
    asked = []

    def time_of(steps):
        asked.append(steps)
        return 2 + 0.01 * steps

    assert timing._windows_in(100.0, time_of) == (16 * round(512 * 20 / 7.12 / 16), 5)
    assert asked == [16, 32, 64, 128, 256, 512]


def test_slow_steps_have_fewer_windows():
    """The shortest window has 16 steps: of 0.1 s each, three take about as long as the 5 s that were asked for."""
    assert timing._windows_in(5.0, lambda steps: 0.1 * steps) == (16, 3)
    assert timing._windows_in(1e-6, lambda steps: 0.1 * steps) == (16, 1)


@pytest.mark.parametrize(("joined", "expected"), [(1, [1] * 8), (4, [4, 4])])
def test_keras_epochs_are_windows(joined, expected):
    model = keras.Sequential([keras.layers.Input([2]), keras.layers.Dense(1)])
    model.compile("sgd", loss="mse", steps_per_execution=joined, jit_compile=False)
    data = np.ones([16, 2]), np.ones([16, 1])
    for sees_steps in (True, False):
        clock = timing.Clock(sees_steps)
        model.fit(*data, batch_size=2, epochs=2, verbose=0, callbacks=[timing.callback(keras, clock)])
        assert [steps for _, steps in clock.executions] == (expected * 2 if sees_steps else [])
        assert len(clock.windows) == 2
        assert sum(clock.windows) > sum(seconds for seconds, _ in clock.executions)


def test_rank_0_prints_what_was_measured(monkeypatch, capsys):
    monkeypatch.setenv("HVDKIT_BENCH_SECONDS", "5")

    def run(steps, windows, clock):  # a step of 0.1 s
        clock.windows += [0.1 * steps] * windows
        clock.executions += [(0.2, 2)] * (steps // 2 * windows if clock.sees_steps else 0)

    how = {"workload": "mlp", "global_batch": 8, "weights": 3}
    timing.measure(run, float, rank=1, **how)
    assert capsys.readouterr().out == ""
    timing.measure(run, float, rank=0, **how)
    found = json.loads(capsys.readouterr().out.removeprefix("BENCH "))
    assert found["samples_per_second"] == [pytest.approx(80)] * 3
    assert found["step_seconds"] == {
        "median": pytest.approx(0.1),
        "percentile_95": pytest.approx(0.1),
        "steps_per_execution": 2,
        "steps": 48,
    }
    assert (found["workload"], found["weights"]) == ("mlp", 3)


def test_each_rank_has_its_part_of_the_cores():
    assert [bound.share([4, 5, 0, 1], rank, 2) for rank in (0, 1)] == [[4, 5], [0, 1]]
    assert bound.share([4, 5], 0, 1) == [4, 5]
