"""Profiles of real ranks: a slow one is named, with the reason, and what is trained does not change."""

import gzip
import json

import numpy as np
import pytest


def profiled(folder, slow, profile=True):
    import time

    import keras
    import tensorflow as tf

    import hvdkit as hvd

    me = hvd.init()
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Input([64]), keras.layers.Dense(256, "relu")]
    if slow == "compute":  # rank 1 alone does more, without changing what comes out
        extra = keras.layers.Lambda(lambda x: x + 0.0 * tf.reduce_sum(tf.py_function(_late, [x], tf.float32)))
        layers.append(extra if me.rank == 1 else keras.layers.Lambda(lambda x: x + 0.0))
    model = keras.Sequential([*layers, keras.layers.Dense(4)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), loss=loss, steps_per_execution=4)
    generator = np.random.default_rng(me.rank)
    data = tf.data.Dataset.from_tensor_slices(
        (generator.normal(size=[640, 64]).astype("float32"), generator.integers(4, size=640))
    ).batch(16)
    if slow == "input" and me.rank == 1:

        def late(x, y):
            time.sleep(0.02)
            return x, y

        def again(x, y):
            x, y = tf.numpy_function(late, [x, y], [tf.float32, tf.int64])
            return tf.ensure_shape(x, [16, 64]), tf.ensure_shape(y, [16])

        data = data.map(again)
    callbacks = hvd.callbacks.standard(guard_every=0)
    if profile:
        callbacks.append(hvd.callbacks.ProfileCallback(folder, start=8, stop=28))
    model.fit(data, epochs=1, verbose=0, callbacks=callbacks)
    return b"".join(w.tobytes() for w in model.get_weights())


def _late(x):
    import time

    time.sleep(0.02)
    return x


@pytest.mark.parametrize("slow", ["compute", pytest.param("input", marks=pytest.mark.slow)])
def test_a_slow_rank_is_named_with_the_reason(ranks, tmp_path, slow):
    weights = ranks(2, profiled, folder=str(tmp_path / "p"), slow=slow)
    found = json.loads((tmp_path / "p" / "summary.json").read_text())
    assert found["verdict"].startswith("rank 1 on ")
    assert found["verdict"].endswith(f"% slower than the others: {slow} bound.")
    assert found["seconds"][0]["waiting"] > 0.01, "rank 0 waits for the one that sleeps for 20 ms"
    assert found["seconds"][1][slow] > 0.02
    assert f"{slow} bound" in (tmp_path / "p" / "summary.md").read_text()
    assert weights[0] == weights[1] == ranks(2, profiled, folder="", slow=slow, profile=False)[0]


BY_HOROVOD = {"HVDKIT_SHARED_MEMORY": "0", "HVDKIT_SOCKETS": "0"}


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["shared memory", "horovod"])
def test_the_main_job_writes_one_trace_of_all_ranks(train, tmp_path, exchange):
    env = {} if exchange == "shared memory" else dict(BY_HOROVOD, HOROVOD_TIMELINE="DYNAMIC")
    ended = train(2, f"--workdir={tmp_path}/run", "--profile=20:60", env=env)
    assert ended.code == 0, ended.output
    folder = tmp_path / "run" / "profile"
    assert {f.name for f in folder.iterdir()} == {"summary.json", "summary.md", "trace.json.gz"}
    with gzip.open(folder / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    steps = [e for e in events if e.get("args", {}).get("step") is not None]
    assert {e["pid"] for e in steps} == {0, 1}
    begin, end = min(e["ts"] for e in steps), max(e["ts"] + e["dur"] for e in steps)
    operations = [e for e in events if e["ph"] == "X" and e["pid"] in (0, 1) and e not in steps]
    within = [e for e in operations if begin <= e["ts"] <= end]
    assert len(within) > len(operations) / 2 > 10, "operations are on another clock than steps"
    assert any("MatMul" in e["name"] for e in within)
    horovods = [e for e in events if str(e["pid"]).startswith("Horovod") and "ts" in e]
    if exchange == "horovod":
        assert any(begin - 1e4 <= e["ts"] <= end + 1e4 for e in horovods)


@pytest.mark.parametrize(
    ("window", "strategy", "message"),
    [
        ("5", "single", "--profile=5 is not a range of steps. The form is START:STOP"),
        ("5:a", "single", "--profile=5:a is not a range of steps."),
        ("7:8", "single", "A profile needs a window of three steps or more, but was given 7 to 8."),
        ("auto", "mirrored", "--profile does not see inside tf.distribute."),
    ],
)
def test_a_wrong_window_is_told(train, window, strategy, message):
    ended = train(0, f"--strategy={strategy}", f"--profile={window}", "--steps=20")
    assert ended.code == 2
    assert message in ended.output
    assert "Traceback" not in ended.output
