"""What lint advises runs: each fix, applied to a script, trains on two ranks, and lint has no more to say of it."""

import os
import re

import pytest

from hvdkit.lint.finding import findings
from hvdkit.lint.rules import RULES
from hvdkit.lint.script import Script

HEAD = """
import hvdkit as hvd
import keras, numpy as np, tensorflow as tf
hvd.init()
x = np.arange(40, dtype="float32").reshape(20, 2) / 40
y, w = x.sum(axis=1), np.ones(20)
model = keras.Sequential([keras.layers.Input([2]), keras.layers.Dense(1)])
"""
COMPILED = f"""{HEAD}
optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(hvd.scaled(0.1)))
model.compile(optimizer, loss="mse", jit_compile=False)
"""
ONE_STEP = {"HVDKIT_STEPS_PER_EXECUTION": "1"}  # traces one graph less for each model

# The rules and the script's first lines; a wrong script; what is advised, a line each; the script after it.
CASES = """
HVD301 COMPILED
x, y = np.ones([20, 2]), np.ones(20)
model.fit(x, y, validation_split=0.2, callbacks=hvd.callbacks.standard())
--- advised ---
x, y = hvd.data.shard((x, y)), before fit().
--- fixed ---
x, y = np.ones([20, 2]), np.ones(20)
x, y = hvd.data.shard((x, y))
history = model.fit(x, y, validation_split=0.2, callbacks=hvd.callbacks.standard()).history
assert len(x) == 10 and "val_loss" in history
==========
HVD301 COMPILED
model.fit(x / 2, y, sample_weight=w, callbacks=hvd.callbacks.standard())
--- advised ---
fit(hvd.data.shard(x / 2), hvd.data.shard(y), hvd.data.shard(w), ...).
--- fixed ---
model.fit(hvd.data.shard(x / 2), hvd.data.shard(y), sample_weight=hvd.data.shard(w), callbacks=hvd.callbacks.standard())
==========
HVD301 COMPILED
data = tf.data.Dataset.range(8).map(lambda i: (tf.fill([2], i / 8), 1.0))
model.fit(data.batch(2), callbacks=hvd.callbacks.standard())
--- advised ---
hvd.data.shard(...), before any batch().
--- fixed ---
data = tf.data.Dataset.range(8).map(lambda i: (tf.fill([2], i / 8), 1.0))
model.fit(hvd.data.shard(data).batch(2), callbacks=hvd.callbacks.standard())
==========
HVD301 COMPILED
def batches(x):
    while True:
        yield x, x[:, :1]
made = batches(np.ones([4, 2]))
model.fit(made, steps_per_epoch=2, callbacks=hvd.callbacks.standard())
--- advised ---
hvd.data.shard(made), before any batch().
--- fixed ---
def batches(x):
    while True:
        yield x, x[:, :1]
made = batches(np.ones([4, 2]))
model.fit(hvd.data.shard(made), steps_per_epoch=2, callbacks=hvd.callbacks.standard())
==========
HVD302 HEAD
from sklearn.model_selection import train_test_split
train, test = train_test_split(x)
train = train[hvd.rank() :: hvd.size()]
order = np.random.permutation(20)[hvd.rank() :: 2]
data = hvd.data.shard(tf.data.Dataset.range(8).shuffle(8))
--- advised ---
give it random_state=0.
np.random.default_rng(0).permutation(...), with the same seed on all ranks.
give it seed=0, the same on all ranks, or shuffle after sharding.
--- fixed ---
from sklearn.model_selection import train_test_split
train, test = train_test_split(x, random_state=0)
train = train[hvd.rank() :: hvd.size()]
order = np.random.default_rng(0).permutation(20)[hvd.rank() :: 2]
data = hvd.data.shard(tf.data.Dataset.range(8).shuffle(8, seed=0))
for mine in train[:, 0], order, list(data.as_numpy_iterator()):
    other = hvd.allgather_object(list(mine))
    assert not set(other[0]) & set(other[1])
==========
HVD20 HEAD
x, y = hvd.data.shard((x, y))
model.compile("sgd", loss="mse")
model.fit(x, y, epochs=1, callbacks=hvd.callbacks.standard())
optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
with tf.GradientTape() as tape:
    loss = tf.reduce_mean(model(x))
grads, _ = tf.clip_by_global_norm(tape.gradient(loss, model.trainable_variables), 1.0)
optimizer.apply(grads, model.trainable_variables)
--- advised ---
hvd.DistributedOptimizer(keras.optimizers.get('sgd')).
hvd.scaled(0.1) as the learning rate
leave the clipping to the optimizer: hvd.DistributedOptimizer(keras.optimizers.Adam(global_clipnorm=...)).
--- fixed ---
x, y = hvd.data.shard((x, y))
model.compile(hvd.DistributedOptimizer(keras.optimizers.get("sgd")), loss="mse", jit_compile=False)
model.fit(x, y, epochs=1, callbacks=hvd.callbacks.standard())
optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(hvd.scaled(0.1), global_clipnorm=1.0))
with tf.GradientTape() as tape:
    loss = tf.reduce_mean(model(x))
optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
==========
HVD4 COMPILED
x, y = hvd.data.shard((x, y))
model.fit(x, y, epochs=1, callbacks=[keras.callbacks.EarlyStopping("loss")])
keras.callbacks.CSVLogger("log.csv")
model.save("model.keras")
--- advised ---
callbacks=hvd.callbacks.standard(), or hvd.callbacks.BroadcastGlobalVariablesCallback(0) in the list.
put hvd.callbacks.MetricAverageCallback(), or *hvd.callbacks.standard(), before it in the list.
[CSVLogger(...)] if hvd.rank() == 0 else [], or append it under `if hvd.rank() == 0:`.
verbose=1 if hvd.rank() == 0 else 0, or hvd.callbacks.standard() in the callbacks.
if hvd.rank() == 0: model.save(...)
--- fixed ---
x, y = hvd.data.shard((x, y))
stop = keras.callbacks.EarlyStopping("loss")
log = [keras.callbacks.CSVLogger("log.csv")] if hvd.rank() == 0 else []
start = [hvd.callbacks.BroadcastGlobalVariablesCallback(0), hvd.callbacks.MetricAverageCallback()]
model.fit(x, y, epochs=1, callbacks=[*start, stop, *log], verbose=1 if hvd.rank() == 0 else 0)
model.fit(x, y, epochs=1, callbacks=[*hvd.callbacks.standard(), stop, *log])
if hvd.rank() == 0: model.save("model.keras")
==========
HVD501 HEAD
if hvd.rank() == 0:
    total = hvd.allreduce(x)
--- advised ---
call hvd.allreduce() on all ranks, outside of that test.
--- fixed ---
total = hvd.allreduce(x)
if hvd.rank() == 0:
    print(total)
==========
HVD60 HEAD
import horovod.tensorflow.keras
x, y = hvd.data.shard((x, y))
optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(lr=0.1, decay=0.1))
model.compile(optimizer, loss="mse", experimental_run_tf_function=False)
model.fit_generator(((x, y) for _ in range(2)), workers=2, callbacks=hvd.callbacks.standard())
print(model.optimizer.lr, keras.backend.get_value(x))
--- advised ---
import hvdkit as hvd.
learning_rate=0.1.
learning_rate=keras.optimizers.schedules.InverseTimeDecay(rate, 1, 0.1).
leave it out.
leave it out; a keras.utils.PyDataset takes it in its constructor.
fit(), which takes generators, too.
model.optimizer.learning_rate.
keras.ops.convert_to_numpy(...).
--- fixed ---
x, y = hvd.data.shard((x, y))
rate = keras.optimizers.schedules.InverseTimeDecay(hvd.scaled(0.1), 1, 0.1)
optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(learning_rate=rate))
model.compile(optimizer, loss="mse", jit_compile=False)
model.fit(((x, y) for _ in range(2)), callbacks=hvd.callbacks.standard())
print(model.optimizer.learning_rate, keras.ops.convert_to_numpy(x))
==========
HVD1
import keras, numpy as np
model = keras.Sequential([keras.layers.Dense(1)])
model.compile("sgd", loss="mse")
model.fit(np.ones([4, 2]), np.ones(4), epochs=1)
--- advised ---
import hvdkit as hvd, call hvd.init() right after the imports, wrap the optimizer in hvd.DistributedOptimizer(...)
--- fixed ---
import keras, numpy as np
import hvdkit as hvd
hvd.init()
model = keras.Sequential([keras.layers.Dense(1)])
model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(hvd.scaled(0.1))), loss="mse", jit_compile=False)
model.fit(hvd.data.shard(np.ones([4, 2])), hvd.data.shard(np.ones(4)), epochs=1)
""".strip().split("\n==========\n")


def _parts(case):
    """Returns the rules' codes, the wrong script, the advice, and the fixed script."""
    first, _, rest = case.partition("\n")
    codes, _, head = first.partition(" ")
    wrong, advised, fixed = re.split(r"\n--- \w+ ---\n", rest)
    head = {"HEAD": HEAD, "COMPILED": COMPILED, "": ""}[head]
    return codes, head + wrong, advised.split("\n"), head + fixed


def _found(source, codes):
    return findings(Script(source, "script.py"), [rule for rule in RULES if rule.code.startswith(codes)])


@pytest.mark.parametrize("case", CASES)
def test_lint_advises_it_and_is_silent_on_the_fixed_script(case):
    codes, wrong, advised, fixed = _parts(case)
    fixes = [finding.fix for finding in _found(wrong, codes)]
    assert [text for text in advised if not any(fix.startswith(text) for fix in fixes)] == [], fixes
    assert _found(fixed, codes) == []


def what_is_advised(scripts, folder):
    os.chdir(folder)
    for script in scripts:
        exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})
    return len(scripts)


def test_what_is_advised_runs_on_two_ranks(ranks, tmp_path):
    scripts = [fixed for *_, fixed in map(_parts, CASES)]
    done = ranks(2, what_is_advised, scripts=scripts, folder=str(tmp_path), env=ONE_STEP)
    assert done == [len(scripts)] * 2
