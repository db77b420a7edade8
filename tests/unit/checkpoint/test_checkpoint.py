"""Checkpoints in one process: what is on the disk, what callbacks remember, and fit that goes on anywhere."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import types

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

from hvdkit import collectives
from hvdkit.callbacks import CheckpointCallback, LearningRateScheduleCallback, StepLossCallback
from hvdkit.checkpoint import lock, overhead, plain, rates, store, variables
from hvdkit.checkpoint.preemption import _EarlyNotice
from hvdkit.errors import UsageError
from hvdkit.optimizers.state import COMMON, Kept
from hvdkit.signals import Preempted

# ---- On disk ----------------------------------------------------------------------------------------------------

WRITE_FOR_EVER = """
import sys
from pathlib import Path
import numpy as np
from hvdkit.checkpoint import store
step = int(sys.argv[2])
while True:
    step += 1
    store.write(Path(sys.argv[1]), step, {"step": step}, {"a": np.full(200_000, step)}, {})
    store.retain(Path(sys.argv[1]), 2, 0, "loss", "min")
    print(step, flush=True)
"""


def write(directory, step, loss=0.0):
    array = np.arange(step + 3, dtype=np.float32)
    return store.write(directory, step, {"step": step}, {"a": array}, {"loss": loss})


def steps_in(directory):
    return [int(path.name.rpartition("-")[2]) for path in store.folders(directory)]


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_is_written_is_read_again(tmp_path):
    arrays = {
        "a/b": np.float64([[1.5, np.nan]]),
        "half": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
        "seeds": np.array([2**32 - 1, 7], np.uint32),
        "none": np.zeros([0, 3], np.int8),
        "flag": np.array(True),
    }
    path = store.write(tmp_path / "new", 12, {"step": 12, "text": "ü"}, arrays, {})
    assert path.name == "000001-step-12"
    read = store.newest(tmp_path / "new")
    assert read.state["text"] == "ü"
    for name, array in arrays.items():
        assert read.arrays[name].dtype == array.dtype
        assert read.arrays[name].tobytes() == array.tobytes()
        assert read.arrays[name].shape == array.shape


def test_values_come_back_with_their_types():
    value = {"a": [1, 2.5, None, True, "x"], 3: (float("inf"), {"b": np.float32(2)}), "e": np.eye(2)}
    arrays = {}
    packed = json.loads(json.dumps(plain.pack(value, arrays, "v")))
    back = plain.unpack(packed, arrays)
    assert back["a"] == value["a"]
    assert back[3][0] == float("inf")
    assert type(back[3]) is tuple
    assert type(back[3][1]["b"]) is np.float32
    np.testing.assert_array_equal(back["e"], np.eye(2))
    with pytest.raises(plain.NotPlain, match="object"):
        plain.pack({"a": object()}, {}, "v")


@pytest.mark.parametrize("file", ["arrays.npz", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["a flipped bit", "cut off", "missing"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog, file, harm):
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    if harm == "a flipped bit":
        damage(newest / file)
    elif harm == "cut off":
        os.truncate(newest / file, (newest / file).stat().st_size // 2)
    else:
        (newest / file).unlink()
    assert store.newest(tmp_path).state["step"] == 1
    assert f"{newest} is damaged" in caplog.text
    with pytest.raises(UsageError, match="no intact checkpoint|is damaged"):
        store.find(newest)


def test_what_stays(tmp_path):
    for step, loss in enumerate([0.5, 0.1, 0.2, 0.3, 0.4], start=1):
        write(tmp_path, step, loss)
    store.retain(tmp_path, 2, 1, "loss", "min")
    assert steps_in(tmp_path) == [2, 4, 5]
    store.retain(tmp_path, 1, 1, "loss", "max")
    assert steps_in(tmp_path) == [5], "the best by the largest value is the newest itself"


def test_the_only_good_one_stays(tmp_path, caplog):
    write(tmp_path, 1)
    damage(write(tmp_path, 2) / "arrays.npz")
    assert store.retain(tmp_path, 1, 0, "loss", "min") == []
    assert steps_in(tmp_path) == [1, 2]
    assert "No checkpoint is removed" in caplog.text


def test_a_full_disk_harms_nothing(tmp_path):
    write(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            store.write(tmp_path, 2, {"step": 2}, {"a": np.zeros(1 << 20)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["000001-step-1"]
    assert store.newest(tmp_path).state["step"] == 1


def test_a_kill_at_any_instant_of_a_save_loses_nothing_that_was_saved(tmp_path):
    generator = np.random.default_rng()
    saved = 0
    for _ in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITE_FOR_EVER, str(tmp_path), str(saved)], stdout=subprocess.PIPE, text=True
        )
        first = process.stdout.readline()
        time.sleep(generator.uniform(0, 0.05))
        process.kill()
        said = [int(line) for line in [first, *process.communicate()[0].splitlines(keepends=True)] if line[-1:] == "\n"]
        newest = store.newest(tmp_path)
        assert newest.state["step"] >= said[-1] > saved
        assert (newest.arrays["a"] == newest.state["step"]).all()
        saved = newest.state["step"]
        store.sweep(tmp_path)
    assert all(not path.name.startswith(".") for path in tmp_path.iterdir())


# ---- In fit -----------------------------------------------------------------------------------------------------

EPOCHS, BATCH = 5, 10
GENERATOR = np.random.default_rng(0)
INPUTS = GENERATOR.normal(size=[60, 8]).astype("float32")
LABELS = GENERATOR.integers(3, size=60)


class Interrupt(keras.callbacks.Callback):
    """Ends fit after so many steps, by an exception or a signal."""

    checkpointed = False

    def __init__(self, step, number=None):
        super().__init__()
        self._left, self._signal = step, number

    def on_train_batch_end(self, batch, logs=None):
        self._left -= 1
        if self._left == 0 and self._signal:
            os.kill(os.getpid(), self._signal)
        elif self._left == 0:
            raise InterruptedError


def data(kind):
    dataset = tf.data.Dataset.from_tensor_slices((INPUTS, LABELS)).shuffle(60, seed=4)
    if kind == "arrays":
        return {"x": INPUTS, "y": LABELS, "batch_size": BATCH}
    if kind == "endless":
        return {"x": dataset.repeat().batch(BATCH), "steps_per_epoch": 4}  # an epoch is not a pass
    dataset = dataset.batch(BATCH)
    if kind == "of unknown length":
        dataset = dataset.filter(lambda x, _: tf.shape(x)[0] > 0)
    return {"x": dataset}


def model(units=16, policy="float32"):
    keras.backend.clear_session()  # and the policy
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(3)
    layers = keras.layers
    built = keras.Sequential(
        [
            layers.Input([8]),
            layers.Dense(units, "relu"),
            layers.BatchNormalization(),
            layers.Dropout(0.5),
            layers.Dense(3),
        ]
    )
    built.compile(
        keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,  # the ranks of tests/parallel/checkpoint train with XLA
    )
    return built


def train(folder, kind, interrupt=None, **arguments):
    """Trains on from what `folder` has; returns the model and its callback."""
    trained = model()
    keeper = CheckpointCallback(folder / "checkpoints", every=1, **arguments)
    callbacks = [
        keeper,  # anywhere in the list
        keras.callbacks.EarlyStopping("val_loss", min_delta=0.01, patience=9, restore_best_weights=True),
        keras.callbacks.ReduceLROnPlateau("loss", min_delta=0.5, patience=1),
        keras.callbacks.CSVLogger(folder / "history.csv"),
        StepLossCallback(folder / "loss.csv", 6),
        *([interrupt] if interrupt else []),
    ]
    validation = (INPUTS[:20], LABELS[:20])
    trained.fit(**data(kind), epochs=EPOCHS, verbose=0, validation_data=validation, callbacks=callbacks)
    return trained, keeper


def wait_for_writers():
    """A process that is killed has no threads left; this one has."""
    for thread in threading.enumerate():
        if thread.name == "hvdkit-checkpoint":
            thread.join()


@pytest.mark.parametrize(
    "kind",
    [
        "shuffled anew each epoch",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("of unknown length", "arrays", "endless")),
    ],
)
def test_fit_goes_on_bit_for_bit(tmp_path, kind):
    """Interrupted in the first epoch, at an epoch's last step, and in the middle of a later one."""
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole, _ = train(tmp_path / "whole", kind)
    went_on_from = []
    for step in (2, 10 if kind != "endless" else 6, 3):
        with pytest.raises(InterruptedError):
            train(tmp_path / "broken", kind, Interrupt(step))
        wait_for_writers()
        went_on_from.append(store.newest(tmp_path / "broken" / "checkpoints").state["step"])
    assert went_on_from[0] == 1 < went_on_from[1] <= went_on_from[2]
    broken, _ = train(tmp_path / "broken", kind)
    assert collectives.digest(broken.variables) == collectives.digest(whole.variables)
    assert collectives.digest(broken.optimizer.variables) == collectives.digest(whole.optimizer.variables)
    assert broken.history.history == whole.history.history
    assert broken.history.epoch == whole.history.epoch == list(range(EPOCHS))
    for file in ("history.csv", "loss.csv"):
        assert (tmp_path / "broken" / file).read_text() == (tmp_path / "whole" / file).read_text()


def test_a_finished_training_is_not_trained_further(tmp_path):
    whole, _ = train(tmp_path, "arrays")
    losses = (tmp_path / "loss.csv").read_text()
    (tmp_path / "loss.csv").unlink()  # as the main job does before it resumes
    again, keeper = train(tmp_path, "arrays")
    assert keeper.resumed.state["epoch"] == EPOCHS
    assert collectives.digest(again.weights) == collectives.digest(whole.weights), "the best epoch's, restored"
    assert again.history.history == whole.history.history
    assert (tmp_path / "loss.csv").read_text() == losses


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_leaves(tmp_path, number):
    before = signal.getsignal(number)
    with pytest.raises(Preempted, match=f"{number.name}.* after step 8; it is saved") as left:
        train(tmp_path, "arrays", Interrupt(8, number), keep=1)
    assert left.value.code == 85
    assert signal.getsignal(number) == before
    assert store.newest(tmp_path / "checkpoints").state["step"] == 8


def test_a_thread_learns_of_a_signal_whatever_the_main_thread_does():
    """As while TensorFlow runs many steps: Python's own handlers wait for the main thread."""
    heard, number = threading.Event(), signal.SIGUSR2
    before = signal.signal(number, lambda *_: None), signal.set_wakeup_fd(-1)
    notice = _EarlyNotice([number], heard.set)
    try:
        os.kill(os.getpid(), signal.SIGCHLD)  # another one
        assert not heard.wait(0.1)
        signal.pthread_kill(threading.get_ident(), number)
        assert heard.wait(10)
    finally:
        notice.close()
        signal.signal(number, before[0])
    assert signal.set_wakeup_fd(before[1]) == -1, "it is taken back"


HOLD = """
import sys, time
from pathlib import Path
from hvdkit.checkpoint import lock
lock.take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_a_directory_has_one_job_at_a_time(tmp_path, monkeypatch, caplog):
    directory = tmp_path / "checkpoints"
    other = subprocess.Popen([sys.executable, "-c", HOLD, directory], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        (directory / ".partial-000001-step-4").mkdir()
        with pytest.raises(
            UsageError, match=rf"process {other.pid} on host \S+\) writes checkpoints in .*Give each job"
        ):
            train(tmp_path, "arrays")
        assert (directory / ".partial-000001-step-4").is_dir(), "the other is writing it"
        monkeypatch.setenv("HVDKIT_ELASTIC", str(tmp_path))
        lock.take(directory)
        assert "This job goes on, because the holder may be its own rank on a host that was lost." in caplog.text
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    monkeypatch.delenv("HVDKIT_ELASTIC")
    with pytest.raises(InterruptedError):
        train(tmp_path, "arrays", Interrupt(3))
    train(tmp_path, "arrays")  # the kernel has freed it, and a fit that ended with an exception is of this job
    assert not (directory / ".partial-000001-step-4").exists()
    assert directory.resolve() / ".lock" not in lock._held, "it is freed at the end"


def test_after_fit_signals_go_where_they_went_before(tmp_path):
    heard = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: heard.append(number))
    try:
        with pytest.raises(InterruptedError):
            train(tmp_path, "arrays", Interrupt(3), signals=[signal.SIGUSR2])
        os.kill(os.getpid(), signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert heard == [signal.SIGUSR2]


def test_a_raised_patience_stays_raised(tmp_path):
    def fit(patience, epochs):
        trained = model()
        stopping = keras.callbacks.EarlyStopping("loss", mode="min", min_delta=9, patience=patience)
        trained.fit(**data("arrays"), epochs=epochs, verbose=0, callbacks=[stopping, CheckpointCallback(tmp_path)])
        return stopping

    first = fit(7, 2)
    second = fit(8, 3)
    assert second.patience == 8
    assert second.wait == first.wait + 1
    assert second.min_delta == first.min_delta


def test_what_is_foreign_is_refused(tmp_path):
    model().fit(**data("arrays"), verbose=0, callbacks=[CheckpointCallback(tmp_path, job={"seed": 1})])
    with pytest.raises(UsageError, match="is of another job: seed 1 there, and seed 2 here"):
        model().fit(**data("arrays"), verbose=0, callbacks=[CheckpointCallback(tmp_path, job={"seed": 2})])
    with pytest.raises(UsageError, match=r"of another model.*kernel is \(8, 16\) float32 there, and .* \(8, 17\)"):
        model(units=17).fit(**data("arrays"), verbose=0, callbacks=[CheckpointCallback(tmp_path)])
    other = CheckpointCallback(tmp_path / "other", resume=tmp_path / "nothing")
    with pytest.raises(UsageError, match="is not there, so there is no intact checkpoint"):
        model().fit(**data("arrays"), verbose=0, callbacks=[other])


def of_two_layers(optimizer, *names):
    keras.utils.set_random_seed(3)
    layers = [keras.layers.Dense(8, use_bias=False, name=name) for name in names]
    built = keras.Sequential([keras.layers.Input([8]), *layers], name=f"run_{len(names[0])}")
    built.compile(optimizer, loss="mse", jit_compile=False)
    return built


def test_another_optimizer_and_layers_in_another_order_are_refused_though_their_shapes_are_the_same(tmp_path):
    def fit(optimizer, *names):
        keeper = CheckpointCallback(tmp_path)
        of_two_layers(optimizer, *names).fit(INPUTS, INPUTS, epochs=1, verbose=0, callbacks=[keeper])
        return keeper

    fit(keras.optimizers.RMSprop(0.01), "encoder", "decoder")
    with pytest.raises(UsageError, match=r"another model or optimizer: the place of rm.*prop/.* is that of adagrad/"):
        fit(keras.optimizers.Adagrad(0.01), "encoder", "decoder")
    with pytest.raises(UsageError, match=r"the place of .*encoder/kernel there is that of .*decoder/kernel here"):
        fit(keras.optimizers.RMSprop(0.01), "decoder", "encoder")
    keras.optimizers.RMSprop(0.01)  # takes a number of Keras' names
    assert fit(keras.optimizers.RMSprop(0.01), "encoder", "decoder").resumed


@pytest.mark.parametrize(
    ("ours", "theirs", "are_one"),
    [
        ("sequential_3/dense_7/kernel", "dense_1/kernel", True),
        ("sequential/encoder/kernel", "sequential/decoder/kernel", False),
        ("dense/kernel", "dense/bias", False),
        ("gru_cell/recurrent_kernel", "gru_cell/kernel", False),
        ("loss_scale_optimizer/sgd/sequential_dense_kernel_momentum", "sgd/dense_4_kernel_momentum", True),
        ("adam/dense_kernel_momentum", "adam/dense_kernel_velocity", False),
        ("rm_sprop/iteration", "adagrad/iteration", False),
        ("rm_sprop/iteration", "rm_sprop_1/iteration", True),
        ("count", "count", True),
    ],
)
def test_paths_of_one_variable_in_two_processes(ours, theirs, are_one):
    def difference(path, other):
        variable = types.SimpleNamespace(path=path, shape=[2], dtype="float32")
        return variables.difference([Kept(variable, COMMON)], [[other, [2], "float32", COMMON]])

    assert (difference(ours, theirs) is None) is are_one
    assert (difference(theirs, ours) is None) is are_one


def test_numbers_that_keras_gives_do_not_matter(tmp_path):
    def fit():
        keeper = CheckpointCallback(tmp_path)
        layers = [keras.layers.Dense(8), keras.layers.BatchNormalization(), keras.layers.Dense(8)]
        built = keras.Sequential([keras.layers.Input([8]), *layers])
        built.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss="mse", jit_compile=False)
        built.fit(INPUTS, INPUTS, epochs=1, verbose=0, callbacks=[keeper])
        return keeper, built

    _, first = fit()
    keeper, second = fit()
    assert first.layers[0].name != second.layers[0].name
    assert keeper.resumed


def test_another_vocabulary_is_refused_and_normalization_goes_on_with_what_is_saved(tmp_path):
    texts = tf.data.Dataset.from_tensor_slices((np.array([["a b"], ["b c"]]), np.ones([2, 1]))).batch(2)

    def fit_texts(*words):
        layers = keras.layers
        vectorize = layers.TextVectorization(output_sequence_length=2)
        vectorize.adapt(np.array(words))
        model_of_texts = [layers.Input([1], dtype="string"), vectorize, layers.Embedding(9, 2), layers.Flatten()]
        built = keras.Sequential([*model_of_texts, layers.Dense(1)])
        built.compile("sgd", "mse", jit_compile=False)
        built.fit(texts, verbose=0, callbacks=[CheckpointCallback(tmp_path / "texts")])

    fit_texts("a b", "b c")
    fit_texts("a b", "b c")
    with pytest.raises(UsageError, match=r"layer text_vectorization.* has learnt another vocabulary there than here"):
        fit_texts("a b", "b d")

    def fit_numbers(mean):
        normalize = keras.layers.Normalization()
        normalize.adapt(INPUTS + mean)
        built = keras.Sequential([keras.layers.Input([8]), normalize, keras.layers.Dense(8)])
        built.compile("sgd", "mse", jit_compile=False)
        built.fit(INPUTS, INPUTS, epochs=1, verbose=0, callbacks=[CheckpointCallback(tmp_path / "numbers")])
        return np.asarray(normalize.mean)

    np.testing.assert_array_equal(fit_numbers(5.0), fit_numbers(7.0))


class Said(keras.callbacks.Callback):
    """Puts numbers into the logs of epochs, as a callback for validation does."""

    checkpointed = False

    def __init__(self, **values):
        super().__init__()
        self._values = values

    def on_epoch_end(self, epoch, logs=None):
        logs.update({name: values[epoch] for name, values in self._values.items()})


def test_the_best_epoch_is_kept_also_where_no_checkpoint_is_due(tmp_path):
    trained = of_two_layers(keras.optimizers.SGD(0.01), "a", "b")
    keeper = CheckpointCallback(tmp_path, every=13, keep=1, keep_best=1, monitor="score", mode="max")
    scores = [0.1, 0.9, 0.3, 0.5, 0.2]
    trained.fit(INPUTS, INPUTS, batch_size=10, epochs=5, verbose=0, callbacks=[Said(score=scores), keeper])
    assert steps_in(tmp_path) == [12, 30], "of the second epoch, and the last"


@pytest.mark.parametrize(("mode", "kept"), [("auto", 12), ("min", 6), ("max", 12)])
def test_keras_says_whether_more_is_better(tmp_path, mode, kept):
    trained = of_two_layers(keras.optimizers.SGD(0.01), "a", "b")
    trained.compile("sgd", "mse", metrics=[keras.metrics.CosineSimilarity(name="similar")], jit_compile=False)
    keeper = CheckpointCallback(tmp_path, keep=1, keep_best=1, monitor="val_similar", mode=mode)
    said = Said(val_similar=[0.1, 0.9, 0.3])
    trained.fit(INPUTS, INPUTS, batch_size=10, epochs=3, verbose=0, callbacks=[said, keeper])
    assert steps_in(tmp_path) == [kept, 18]


def test_a_rate_is_scaled_to_another_number_of_ranks(caplog):
    trained = of_two_layers(keras.optimizers.SGD(0.4, momentum=0.9), "a", "b")
    trained.optimizer.build(trained.trainable_variables)
    trained.optimizer.learning_rate = 0.05  # restored, of two ranks, where a callback has lowered it
    for velocity in trained.optimizer.momentums:
        velocity.assign(np.ones(velocity.shape))
    rates.rescale(trained, [0.4], [0.2])
    rates.tell(trained, [0.4], [0.2], 2)
    assert float(trained.optimizer.learning_rate) == pytest.approx(0.1)
    assert np.asarray(trained.optimizer.momentums[0])[0, 0] == pytest.approx(2)
    assert "The saved learning rate, of 2 ranks, is scaled by 2," in caplog.text
    trained.compile(keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 100)), "mse")
    assert rates.rates_of(trained) == ["CosineDecay"]
    rates.rescale(trained, ["CosineDecay"], ["CosineDecay"])
    rates.tell(trained, ["CosineDecay"], ["CosineDecay"], 2)
    assert "CosineDecay counts steps, and those that are done were of 2 ranks" in caplog.text


def test_a_write_error_does_not_end_training_unless_asked(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    model().fit(**data("arrays"), verbose=0, callbacks=[CheckpointCallback(tmp_path / "file" / "x")])
    assert "The checkpoint of step 6 could not be written (NotADirectoryError" in caplog.text
    stopping = CheckpointCallback(tmp_path / "file" / "x", on_error="stop")
    with pytest.raises(RuntimeError, match="on_error='stop' ends training"):
        model().fit(**data("arrays"), verbose=0, callbacks=[stopping])


def test_the_learning_rate_and_mixed_precision_go_on(tmp_path):
    def fit(folder, interrupt=()):
        try:
            trained = model(policy="mixed_float16")
            schedule = LearningRateScheduleCallback(None, lambda epoch: 1 / (1 + epoch), staircase=False)
            keeper = CheckpointCallback(folder, every=4)
            trained.fit(**data("arrays"), epochs=3, verbose=0, callbacks=[schedule, keeper, *interrupt])
        finally:
            keras.config.set_dtype_policy("float32")
        return trained

    whole = fit(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        fit(tmp_path / "broken", [Interrupt(9)])
    wait_for_writers()
    broken = fit(tmp_path / "broken")
    assert any("dynamic_scale" in v.path for v in whole.optimizer.variables)
    assert collectives.digest(broken.optimizer.variables) == collectives.digest(whole.optimizer.variables)
    assert collectives.digest(broken.variables) == collectives.digest(whole.variables)


def test_checkpoints_take_no_more_than_their_share_of_the_time(monkeypatch):
    now = types.SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(overhead.time, "perf_counter", lambda: now.seconds)
    limited = overhead.Overhead(0.05)
    assert limited.allows(0.0), "the first one, of which nobody knows what it costs"
    limited.add(100.0, 0.25)
    for seconds, is_allowed in ((119.9, False), (120.1, True)):
        now.seconds = seconds
        assert limited.allows(0.75) is is_allowed, "(0.25 s + 0.75 s) / 0.05 = 20 s"
    unlimited = overhead.Overhead(None)
    unlimited.add(100.0, 1e9)
    assert unlimited.allows(1e9)


@pytest.mark.parametrize(
    ("limit", "kept"),
    [({}, [6, 12, 18, 24, 30]), ({"max_overhead": 1e-6}, [6, 18, 30])],
)
def test_short_epochs_are_passed_over_but_for_the_first_the_best_and_the_last(tmp_path, limit, kept):
    trained = of_two_layers(keras.optimizers.SGD(0.01), "a", "b")
    keeper = CheckpointCallback(tmp_path, keep=9, keep_best=1, monitor="score", mode="max", **limit)
    said = Said(score=[0.5, 0.1, 0.9, 0.3, 0.2])
    trained.fit(INPUTS, INPUTS, batch_size=10, epochs=5, verbose=0, callbacks=[said, keeper])
    assert steps_in(tmp_path) == kept


def test_wrong_arguments():
    for arguments, message in (
        ({"every": 0}, "every must be 'epoch' or a number of steps"),
        ({"max_overhead": 0}, "max_overhead must be a share of the time, over 0 and at most 1"),
        ({"max_overhead": 0.1, "every": 5}, "and every 'epoch' with it, but they are 0.1 and 5"),
        ({"keep": 0}, "keep must be 1 or more"),
        ({"mode": "best"}, "mode must be one of auto, min, max"),
    ):
        with pytest.raises(UsageError, match=message):
            CheckpointCallback("x", **arguments)
    keeper = CheckpointCallback("x")
    keeper._used = True
    with pytest.raises(UsageError, match="has served a fit already"):
        keeper.on_train_begin()
