"""The clock of a benchmark: what it computes from the ends of steps, and when it ends training."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest

import hvdkit as hvd
from hvdkit.bench import rank


def model(optimizer):
    built = keras.Sequential([keras.layers.Input([2]), keras.layers.Dense(3), keras.layers.Dense(1)])
    built.compile(optimizer, loss="mse", jit_compile=False)
    return built


def test_steps_between_two_exchanges():
    assert rank.exchanges_every(keras.optimizers.SGD()) == 1
    assert rank.exchanges_every(keras.optimizers.SGD(gradient_accumulation_steps=4)) == 4
    assert rank.exchanges_every(hvd.LocalSGD(keras.optimizers.SGD(), steps=5)) == 5


def test_rates_leave_the_warm_up_out():
    clock = rank.Clock(10)
    clock.ends = [(0.0, 1, 0), (1.0, 2, 0), *((2.0 + second, 3 + 5 * second, 100 * second) for second in range(9))]
    assert clock.rates() == pytest.approx([5.0] * 8)
    assert clock.means() == pytest.approx((5.0, 20.0))


def test_step_times_leave_out_what_is_between_epochs():
    """Two steps per execution, an epoch of 4 steps, and a second between two epochs."""
    clock = rank.Clock(0)
    clock.set_params({"steps": 4})
    clock.ends = [(0.0, 2, 0), (1.0, 4, 0), (3.0, 6, 0), (4.2, 8, 0), (6.2, 10, 0), (7.2, 12, 0)]
    found = clock.step_times()
    assert found == {"median": 0.5, "percentile_95": pytest.approx(0.6), "steps_per_execution": 2, "steps": 6}


def test_means_are_over_whole_rounds():
    """A step takes a second, and the exchange after each fourth one two more."""
    clock = rank.Clock(0)
    clock.set_model(model(keras.optimizers.SGD(gradient_accumulation_steps=4)))
    clock.on_train_begin()
    clock.ends = [(step + 2.0 * (step // 4), step, 100 * (step // 4)) for step in range(1, 15)]
    assert clock.means() == pytest.approx((4 / 6, 25.0))


def test_training_ends_when_its_time_is_over():
    clock = rank.Clock(0.3)
    trained = model(keras.optimizers.SGD(momentum=0.9))
    data = np.ones([8, 2]), np.ones([8, 1])
    trained.fit(*data, batch_size=2, epochs=1_000_000, verbose=0, callbacks=[clock])
    seconds = [end[0] - clock.ends[0][0] for end in clock.ends]
    assert seconds[-1] > 0.3
    assert seconds[-2] <= 0.3 or len(clock._whole()) == 2, "not before there are two steps to measure"
    assert [end[1] for end in clock.ends] == list(range(1, len(clock.ends) + 1)), "steps count over all epochs"
    facts = clock.facts()
    assert facts["shapes"] == [[2, 3], [3], [3, 1], [1]]
    assert facts["gradient_bytes"] == 4 * 13
    assert facts["state_bytes"] == 4 * 13 + facts["optimizer_bytes"] > 2 * 4 * 13


@pytest.mark.slow
def test_programs_without_a_launcher_use_the_kernels_that_launched_ranks_use():
    programs = ("hvdkit.bench.rank", "hvdkit.plan.compressing")
    ask = "import os; " + "; ".join(
        f"import {name}; print(os.environ.pop('TF_ENABLE_ONEDNN_OPTS'))" for name in programs
    )
    environment = {name: value for name, value in os.environ.items() if name != "TF_ENABLE_ONEDNN_OPTS"}
    ended = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, env=environment, check=True)
    assert ended.stdout.split() == ["1", "1"]
