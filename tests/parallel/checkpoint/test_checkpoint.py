"""Real ranks that are killed, told to leave, and started again: nothing is lost, and nothing is seen twice."""

import csv
import itertools
import json
import sys

import numpy as np
import pytest
import tensorflow as tf

from hvdkit.data.sources import open_source
from tests import forked
from tests.conftest import run_command

MODELS = """
import os
import keras
import tensorflow as tf

def dropout(num_classes):
    return keras.Sequential([
        keras.layers.Input([8, 8, 1]), keras.layers.Rescaling(1 / 255), keras.layers.Flatten(),
        keras.layers.Dense(32, activation="relu"), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5),
        keras.layers.Dense(num_classes),
    ])

@keras.saving.register_keras_serializable()
class Audit(keras.layers.Layer):
    '''Writes down which examples a training step sees; an example is a text of one word that no other has.'''

    def call(self, tokens, training=False):
        if training:
            rank = os.environ.get("HOROVOD_RANK", "0")
            tf.print(tokens[:, 0], summarize=-1, output_stream=f"file://{os.environ['AUDIT']}.{rank}")
        return tokens

def audited(num_classes, vocabulary_size, sequence_length):
    return keras.Sequential([
        keras.layers.Input([sequence_length], dtype="int64"), Audit(), keras.layers.Embedding(vocabulary_size, 4),
        keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(num_classes),
    ])
"""


def verify_resume(tmp_path, *flags):
    command = forked.command("-m", "hvdkit.verify_resume", "-np", 2, f"--workdir={tmp_path}", "--kill_seed=3", *flags)
    ended = run_command(command, timeout=400, cwd=tmp_path)
    assert ended.code == 0, ended.output
    return ended, json.loads(ended.output.splitlines()[-1])


def write_digits(path):
    """Half of the embedded digits as an archive that is mapped into memory, and as records."""
    digits = open_source("digits")
    arrays = {}
    for split in digits.splits:
        images, labels = digits.read(split, 0, digits.size(split) // 2).batch(2000).get_single_element()
        arrays |= {f"x_{split}": images.numpy(), f"y_{split}": labels.numpy()}
        (path / "records").mkdir(exist_ok=True)
        with tf.io.TFRecordWriter(str(path / "records" / f"{split}.tfrecord")) as writer:
            for image, label in zip(images, labels, strict=True):
                png = tf.io.encode_png(image).numpy()
                feature = {
                    "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[png])),
                    "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[int(label)])),
                }
                writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())
    np.savez(path / "digits.npz", **arrays)


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["digits.npz", "records"])
def test_a_dense_model_goes_on_bit_for_bit_after_sigkill(tmp_path, dataset):
    """Of arrays and records that are read again in each epoch."""
    write_digits(tmp_path)
    flags = [f"--dataset={tmp_path}/{dataset}", "--cache_gb=0", "--kills=1", "--epochs=3", "--checkpoint_every=7"]
    ended, outcome = verify_resume(tmp_path, *flags)
    assert outcome["equal"]
    assert outcome["kills"] == 1
    assert outcome["runs"][-1]["went_on_from"] is not None, "a resumed run was compared, not two whole ones"
    assert "equal bit for bit after 1 kill(s)" in ended.output


@pytest.mark.slow
def test_dropout_and_batch_normalization_go_on_bit_for_bit_after_sigkill(tmp_path):
    """Seeds and moving statistics differ from rank to rank, and the velocity is momentum's."""
    (tmp_path / "mine.py").write_text(MODELS)
    _, outcome = verify_resume(
        tmp_path,
        "--kills=2",
        "--model=mine.py:dropout",
        "--epochs=2",
        "--checkpoint_every=4",
        "--warmup_epochs=1",
        "--optimizer=sgd:momentum=0.9",
        "--steps_per_execution=2",
        "--global_batch=64",
    )
    assert outcome["kills"] == 2
    assert outcome["compared"] == dict.fromkeys(outcome["compared"], True)


def train_until_told_to_leave(flags, step):
    """Rank 1, and no other, gets a SIGTERM in step `step`."""
    import os
    import signal

    import keras

    from hvdkit import world
    from hvdkit.train.__main__ import main as train

    class Told(keras.callbacks.Callback):
        checkpointed = False  # or it would go on counting where it was
        left = step

        def on_train_batch_begin(self, batch, logs=None):
            self.left -= 1
            if not self.left and world.rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    sys.exit(train(["hvdkit.train", *flags], [Told()]))


def seen(path):
    """Which examples every rank's steps saw, in order: [step] of lists."""
    files = sorted(path.parent.glob(f"{path.name}.*"))
    by_rank = [[[int(t) for t in line.strip("[]\n").split()] for line in f.read_text().splitlines()] for f in files]
    return [sum(step, []) for step in zip(*by_rank, strict=True)]


@pytest.mark.slow
def test_another_number_of_ranks_sees_each_example_once(ranks, train, tmp_path):
    """Three ranks begin and are told to leave, two go on and are told, and one process ends it."""
    (tmp_path / "mine.py").write_text(MODELS)
    with (tmp_path / "words.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((f"w{n}", n % 2) for n in range(200))])
    flags = [
        f"--model={tmp_path}/mine.py:audited",
        f"--dataset={tmp_path}/words.csv",
        f"--workdir={tmp_path}/w",
        "--global_batch=12",
        "--epochs=2",
        "--steps_per_execution=1",
        "--tensorboard=false",
    ]
    for number, step in ((3, 4), (2, 3)):
        told = {"flags": flags, "step": step, "env": {"AUDIT": str(tmp_path / f"{number}")}}
        ended = ranks(number, train_until_told_to_leave, fails=True, **told)
        assert ended.code == 85, ended.output
        assert "rank 1 (SIGTERM) was told to stop after step" in ended.output
        assert "Traceback" not in ended.output
    ended = train(0, "--strategy=single", *flags, env={"AUDIT": str(tmp_path / "1")})
    assert ended.code == 0, ended.output

    runs = [seen(tmp_path / str(number)) for number in (3, 2, 1)]
    steps = list(itertools.chain(*runs))
    per_epoch = 160 // 12
    assert [len(step) for step in steps] == [12] * (2 * per_epoch), "the global batch stays, and no step is redone"
    assert 4 <= len(runs[0]) <= 5
    assert 3 <= len(runs[1]) <= 4
    for epoch in (steps[:per_epoch], steps[per_epoch:]):
        assert len(set(itertools.chain(*epoch))) == per_epoch * 12, "no example twice in an epoch"
    result = json.loads((tmp_path / "w" / "result.json").read_text())
    history = list(csv.DictReader((tmp_path / "w" / "history.csv").open()))
    assert [int(row["epoch"]) for row in history] == [0, 1]
    assert len(result["train_loss"]) == 2
    assert np.isfinite(result["train_loss"]).all()


def whole_and_interrupted(folder):
    """One training undisturbed, and one that rank 1 alone is told to leave, twice: the states of each rank's."""
    import os
    import signal

    import keras

    import hvdkit as hvd
    from hvdkit import collectives

    hvd.init()

    class Told(keras.callbacks.Callback):
        checkpointed = False

        def __init__(self, step):
            super().__init__()
            self.left = step

        def on_train_batch_end(self, batch, logs=None):
            self.left -= 1
            if not self.left and hvd.rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    def train(name, told=()):
        keras.backend.clear_session()
        keras.utils.set_random_seed(3)
        generator = np.random.default_rng(0)
        data = generator.normal(size=[96, 8]).astype("float32"), generator.integers(3, size=96)
        layers = [
            keras.layers.Input([8]),
            keras.layers.Dense(16, "relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(3),
        ]
        model = keras.Sequential(layers)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(0.01)), loss=loss, metrics=["accuracy"])
        stopping = keras.callbacks.EarlyStopping("loss", patience=5)
        keeper = hvd.callbacks.CheckpointCallback(f"{folder}/{name}", every=3)
        callbacks = [*hvd.callbacks.standard(warmup_epochs=2), stopping, keeper, *map(Told, told)]
        x, y = hvd.data.shard(data)
        model.fit(x, y, batch_size=6, epochs=4, validation_data=(x, y), verbose=0, callbacks=callbacks)
        states = [collectives.digest(v) for v in (model.weights, model.variables, model.optimizer.variables)]
        return states, model.history.history, model.history.epoch, stopping.best, keeper.resumed

    whole = train("whole")
    codes = []
    for step in (3, 9):
        try:
            train("broken", [step])
        except SystemExit as left:
            codes.append((left.code, str(left)))
    resumed = train("broken")
    return whole[:4], resumed[:4], codes, resumed[4].state["step"]


@pytest.mark.slow
def test_every_ranks_own_state_goes_on(ranks, tmp_path):
    """Random seeds and BatchNormalization's statistics, which differ from rank to rank in the middle of an epoch."""
    everyone = ranks(2, whole_and_interrupted, fresh=True, folder=str(tmp_path))
    for whole, resumed, codes, step in everyone:
        assert resumed == whole
        # The signal comes after a step; the next step's exchange tells the other rank.
        said = [(85, f"rank 1 (SIGTERM) was told to stop after step {n}; it is saved") for n in (4, 14)]
        assert [(code, text[: len(said[0][1]) + (n > 0)]) for n, (code, text) in enumerate(codes)] == said
        assert step == 14, "the interrupted training was not begun anew"
    assert everyone[0][0][0][0] == everyone[1][0][0][0], "one model"
    assert everyone[0][0][0][1] != everyone[1][0][0][1], "with seeds of each rank's own"


def told_in_a_long_execution(folder):
    """Rank 1 is told to leave in the first of four steps of an execution: exit code, steps taken, message."""
    import os
    import signal
    import time

    import keras
    import tensorflow as tf

    import hvdkit as hvd

    hvd.init()
    told = []

    class Slow(keras.layers.Layer):
        def call(self, x):
            y = tf.py_function(self.wait, [x], x.dtype)
            y.set_shape(x.shape)
            return x + 0 * tf.stop_gradient(y)

        def wait(self, x):
            if hvd.rank() == 1 and not told:
                told.append(os.kill(os.getpid(), signal.SIGTERM))
            time.sleep(0.3)
            return x

    model = keras.Sequential([keras.layers.Input([3]), Slow(), keras.layers.Dense(1)])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    model.compile(optimizer, loss="mse", steps_per_execution=4, jit_compile=False)
    try:
        keeper = hvd.callbacks.CheckpointCallback(folder)
        model.fit(np.zeros([64, 3]), np.zeros([64, 1]), batch_size=4, verbose=0, callbacks=[keeper])
    except SystemExit as left:
        return left.code, int(optimizer.iterations), str(left)


def test_a_signal_during_an_execution_of_many_steps_ends_with_it(ranks, tmp_path):
    for code, steps, said in ranks(2, told_in_a_long_execution, folder=str(tmp_path)):
        assert (code, steps) == (85, 4), said
        assert said.startswith("rank 1 (SIGTERM) was told to stop after step 4; it is saved")


def told_between_synchronizations(folder):
    """Rank 1 is told to leave in the second epoch, long before an exchange: exit code, steps taken, message."""
    import os
    import signal
    import time

    import keras

    import hvdkit as hvd

    hvd.init()

    class Told(keras.callbacks.Callback):
        checkpointed = False

        def on_epoch_begin(self, epoch, logs=None):
            self.epoch = epoch

        def on_train_batch_begin(self, batch, logs=None):
            time.sleep(0.02 * self.epoch * (1 + hvd.rank()))
            if (self.epoch, batch, hvd.rank()) == (1, 5, 1):
                os.kill(os.getpid(), signal.SIGTERM)

    model = keras.Sequential([keras.layers.Input([3]), keras.layers.Dense(1)])
    optimizer = hvd.LocalSGD(keras.optimizers.SGD(0.1), steps=1000)
    model.compile(optimizer, loss="mse", jit_compile=False)
    try:
        keeper = hvd.callbacks.CheckpointCallback(folder)
        x, y = np.zeros([48, 3]), np.zeros([48, 1])
        model.fit(x, y, batch_size=1, epochs=2, verbose=0, callbacks=[Told(), keeper])
    except SystemExit as left:
        return left.code, int(optimizer.iterations), str(left)


def test_a_signal_between_two_synchronizations_is_heard_by_all_at_once(ranks, tmp_path):
    one, other = ranks(2, told_between_synchronizations, folder=str(tmp_path))
    assert one == other
    code, steps, said = one
    assert code == 85
    assert 48 + 6 <= steps < 48 + 40, "not after an exchange, which comes at the end of the epoch"
    assert said.startswith(f"rank 1 (SIGTERM) was told to stop after step {steps}; it is saved")


def _with_states_of_their_own(rank):
    """A layer and a callback that keep states in many ways."""
    import time

    import keras
    import tensorflow as tf

    class Counting(keras.layers.Layer):
        def __init__(self):
            super().__init__(name="counting")
            self.calls, self.epochs_seen = tf.Variable(0, trainable=False), [0]

        def call(self, x, training=False):
            if training:
                self.calls.assign_add(1 + rank)
            return x

    class Noting(keras.callbacks.Callback):
        """Changes arrays in place, others on each rank, and those of layers."""

        def __init__(self, stop):
            super().__init__()
            self.array, self.scalar, self.common = np.zeros(200_000), np.float64(0), np.zeros(2)
            self.numbers = iter(range(9))
            self._stop = stop

        def on_epoch_begin(self, epoch, logs=None):
            self.model.layers[0].epochs_seen = [*self.model.layers[0].epochs_seen, epoch + rank]
            self.model.layers[1].reset_state()

        def on_train_batch_end(self, batch, logs=None):
            self.array += 1 + rank
            self.common += 1
            self.scalar = np.float64(self.scalar + rank)
            time.sleep(0.1)  # the previous checkpoint is written
            if self._stop and batch == 2 and len(self.model.layers[0].epochs_seen) == 3:
                raise InterruptedError

    return Counting, Noting


def _wait_for_writers():
    import threading

    for thread in threading.enumerate():
        if thread.name == "hvdkit-checkpoint":
            thread.join()


def states_outside_of_tracked_variables(folder):
    """One training undisturbed, and one that is interrupted in an epoch: what each rank's objects hold in the end."""
    import logging

    import keras

    import hvdkit as hvd
    from hvdkit import collectives

    rank = hvd.init().rank
    layer, callback = _with_states_of_their_own(rank)
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())

    def train(name, stop=False):
        keras.utils.set_random_seed(3)
        generator = np.random.default_rng(rank)
        x, y = generator.normal(size=[8, 5, 3]).astype("float32"), generator.normal(size=[8, 1]).astype("float32")
        memory = keras.layers.LSTM(4, stateful=True)
        model = keras.Sequential([keras.layers.Input(batch_shape=[2, 5, 3]), layer(), memory, keras.layers.Dense(1)])
        model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.2)), loss="mse", jit_compile=False)
        keeper = hvd.callbacks.CheckpointCallback(f"{folder}/{name}", every=2, signals=())
        noting = callback(stop)
        callbacks = [*hvd.callbacks.standard(), noting, keeper]
        model.fit(x, y, batch_size=2, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
        return {
            "weights": collectives.digest(model.weights),
            "states of the RNN": collectives.digest(memory.states),
            "variable": int(model.layers[0].calls),
            "attribute": list(model.layers[0].epochs_seen),
            "array": (noting.array[0], noting.array[-1]),
            "array like rank 0's": list(noting.common),
            "scalar": (noting.scalar, type(noting.scalar).__name__),
        }, keeper.resumed

    logging.getLogger("hvdkit.checkpoint").addHandler(handler)
    whole, _ = train("whole")
    try:
        train("broken", stop=True)
    except InterruptedError:
        _wait_for_writers()
    hvd.barrier(name="interrupted")
    resumed, found = train("broken")
    logging.getLogger("hvdkit.checkpoint").removeHandler(handler)
    return whole, resumed, found.state["step_in_epoch"], said


def test_states_that_keras_does_not_save_go_on_on_every_rank(ranks, tmp_path):
    everyone = ranks(2, states_outside_of_tracked_variables, folder=str(tmp_path))
    for whole, resumed, step, _ in everyone:
        assert step == 2
        assert resumed == whole
    first, second = everyone[0][0], everyone[1][0]
    differing = {"states of the RNN", "variable", "attribute", "array", "scalar"}
    assert {name for name in first if first[name] != second[name]} == differing
    assert sum("numbers of Noting (an iterator)" in text for text in everyone[0][3]) == 3, "once for each fit"
    assert not any("numbers of Noting" in text for text in everyone[1][3])


def short_epochs(folder):
    """Which steps are saved of four epochs, of which all but the first and the last are too short."""
    import keras

    import hvdkit as hvd
    from hvdkit.checkpoint import store

    hvd.init()
    model = keras.Sequential([keras.layers.Input([2]), keras.layers.Dense(1)])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD()), loss="mse", jit_compile=False)
    # A rank that judges by itself would leave the others waiting: rank 1 has no checkpoint to wait for.
    keeper = hvd.callbacks.CheckpointCallback(folder, keep=9, max_overhead=1e-6)
    model.fit(np.ones([8, 2]), np.ones([8, 1]), batch_size=4, epochs=4, callbacks=[keeper], verbose=0)
    hvd.barrier()  # until rank 0 has written the last one
    return [int(path.name.rpartition("-")[2]) for path in store.folders(keeper.directory)]


def test_rank_0_decides_which_epochs_are_too_short_to_be_saved(ranks, tmp_path):
    assert ranks(2, short_epochs, folder=str(tmp_path)) == [[2, 8], [2, 8]]


def fit_where_rank_1_lacks_the_callback(folder):
    import keras

    import hvdkit as hvd

    hvd.init()
    model = keras.Sequential([keras.layers.Input([2]), keras.layers.Dense(1)])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD()), loss="mse")
    callbacks = [hvd.callbacks.CheckpointCallback(folder)] if hvd.rank() == 0 else []
    try:
        model.fit(np.ones([8, 2]), np.ones([8, 1]), callbacks=callbacks, verbose=0)
    except hvd.UsageError as error:
        return str(error)


def test_a_callback_on_one_rank_alone_is_refused(ranks, tmp_path):
    for message in ranks(2, fit_where_rank_1_lacks_the_callback, folder=str(tmp_path)):
        assert message.startswith("CheckpointCallback is not among the callbacks of rank(s) 1")
