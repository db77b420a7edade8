"""gpt on two ranks: the model of one process, an exact resume, and a text from what was trained."""

import json

import numpy as np
import pytest

from tests import forked
from tests.conftest import run_command

STEPS = 4
SIZES = {"width": 32, "depth": 2, "heads": 4}


def two_ranks_and_one_process():
    """The largest difference between a weight of the two after a step and its name, and that of a rank alone."""
    import hvdkit_models
    import keras

    import hvdkit as hvd

    world = hvd.init()
    data = np.random.default_rng(0).integers(256, size=[STEPS, 4 * world.size, 17])
    mine = slice(4 * world.rank, 4 * (world.rank + 1))

    def train(batches, wrap=lambda optimizer: optimizer):
        keras.utils.set_random_seed(1)
        model = hvdkit_models.load("gpt").build(16, **SIZES)
        optimizer = wrap(keras.optimizers.AdamW(1e-3, weight_decay=0.1, global_clipnorm=1.0))
        model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
        path = []
        for lines in batches:
            model.train_on_batch(lines[:, :-1], lines[:, 1:])
            path.append({w.path: np.array(w) for w in model.weights})
        return path

    def difference(path, expected):
        return max(
            (float(np.linalg.norm(ours[name] - theirs[name]) / max(np.linalg.norm(theirs[name]), 0.05)), name)
            for ours, theirs in zip(path, expected, strict=True)
            for name in theirs
        )

    reference = train(data)
    ours, alone = train(data[:, mine], hvd.DistributedOptimizer), train(data[:, mine])
    return difference(ours, reference), difference(alone, reference)


@pytest.mark.slow
def test_two_ranks_train_the_model_of_one_process(ranks):
    for ours, alone in ranks(2, two_ranks_and_one_process):
        assert ours[0] < 1e-5 * STEPS, ours
        assert alone[0] > 1e-3, "training on the own share alone should differ, or this test proves nothing"


@pytest.mark.slow
def test_a_text_is_trained_on_killed_gone_on_with_and_written(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(2):
        (tmp_path / "text" / f"{number}.txt").write_text("to be or not to be, that is the question\n" * 60)
    sizes = ",".join(f"{name}={value}" for name, value in SIZES.items())
    flags = [
        "--model=gpt",
        "--dataset=text:text",
        f"--model_args={sizes}",
        "--sequence_length=16",
        "--global_batch=16",
        "--learning_rate=0.01",
        "--epochs=3",
        "--checkpoint_every=5",
        "--eval_every=1",
        "--notensorboard",
    ]
    ended = run_command(
        forked.command("-m", "hvdkit.verify_resume", "-np", 2, "--kills=1", "--kill_seed=1", "--workdir=w", *flags),
        timeout=400,
        cwd=tmp_path,
    )
    assert ended.code == 0, ended.output
    assert json.loads(ended.output.splitlines()[-1])["equal"], "killed and gone on with, bit for bit"
    result = json.loads((tmp_path / "w" / "killed" / "result.json").read_text())
    assert result["test_bits_per_byte"] == result["test_loss"] / np.log(2) < 1.5
    assert result["test_accuracy"] > 0.7

    prompt = "or not to be"
    program = forked.command("-m", "hvdkit.generate", "w/killed")
    command = [*program, f"--prompt={prompt}", "--length=80", "--temperature=0.1"]
    ended = [run_command([*command, "--seed=3"], timeout=120, cwd=tmp_path) for _ in range(2)]
    assert ended[0].code == 0, ended[0].output
    texts = [run.output[run.output.index(prompt) :] for run in ended]  # behind TensorFlow's own notices
    assert texts[0] == texts[1]
    assert len(texts[0]) == len(prompt) + 80 + 1
    assert "the question" in texts[0]
    assert run_command([*command, "--top_k=0"], timeout=120, cwd=tmp_path).code == 2


def losses_by_mesh(meshes):
    """By mesh, the losses of a few steps on the same batches, and what of the weights a rank holds."""
    import hvdkit_models
    import keras
    import tensorflow as tf

    import hvdkit as hvd

    data = np.random.default_rng(0).integers(256, size=[STEPS, 8, 17])
    found = {}
    for how, columns in meshes:
        mesh = hvd.Mesh(model=columns)
        hvd.init(mesh=mesh)
        keras.utils.set_random_seed(1)
        model = hvdkit_models.load("gpt").build(16, width=32, depth=4, heads=4)
        whole = model.count_params()
        if how == "tensors":
            model = hvd.parallel.split_tensors(model, mesh)
        elif how == "pipeline":
            model = hvd.parallel.pipeline(model, mesh, micro_batches=2)
        optimizer = keras.optimizers.AdamW(3e-3, weight_decay=0.1, global_clipnorm=1.0)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(hvd.DistributedOptimizer(optimizer), loss, jit_compile=False)
        batch = 8 // mesh.data
        mine = data[:, mesh.data_index * batch : (mesh.data_index + 1) * batch]
        dataset = tf.data.Dataset.from_tensor_slices((mine[..., :-1], mine[..., 1:]))
        dataset = dataset.map(lambda x, y, batch=batch: (tf.ensure_shape(x, [batch, 16]), y))
        history = model.fit(dataset, epochs=STEPS, steps_per_epoch=1, callbacks=hvd.callbacks.standard(), verbose=0)
        found[f"{how} {mesh.data} x {mesh.model}"] = history.history["loss"], model.count_params() / whole
        hvd.shutdown()
    return found


@pytest.mark.slow
def test_meshes_have_the_losses_of_one_process(ranks):
    (alone,) = ranks(1, losses_by_mesh, meshes=[("data", 1)])
    expected, _ = alone["data 1 x 1"]
    assert np.ptp(expected) > 0.01, "training changes the loss, or this test proves nothing"
    found = ranks(4, losses_by_mesh, meshes=[("tensors", 2), ("pipeline", 4)])
    for rank in found:
        for mesh, (losses, _) in rank.items():
            np.testing.assert_allclose(losses, expected, rtol=1e-5, err_msg=mesh)
    for mesh, most in {"tensors 2 x 2": 0.7, "pipeline 1 x 4": 0.5}.items():
        assert all(rank[mesh][1] < most for rank in found), (mesh, found)
