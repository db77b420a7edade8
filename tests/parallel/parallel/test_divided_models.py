"""Models divided over ranks, by tensors, branches and stages, train what one process trains with the whole model."""

import json
import shutil

import numpy as np
import pytest

from tests.conftest import run_command, sys

STEPS = 4
BATCH = 8  # of a copy of the model


def _small_transformer():
    """Embeddings, attention, and two Dense layers in a row, between normalisations: what `split_tensors` is for."""
    import keras
    from keras import layers

    tokens = layers.Input([6], dtype="int32")
    x = layers.Embedding(24, 8, name="tokens")(tokens)
    for block in range(2):
        attended = layers.MultiHeadAttention(4, 2, name=f"attention{block}")
        normal = layers.LayerNormalization(name=f"before_attention{block}")(x)
        x = layers.Add()([x, attended(normal, normal, use_causal_mask=True)])
        hidden = layers.LayerNormalization(name=f"before_mlp{block}")(x)
        hidden = layers.Dense(16, activation="gelu", name=f"up{block}")(hidden)
        x = layers.Add(name=f"block{block}")([x, layers.Dense(8, name=f"down{block}")(hidden)])
    x = layers.EinsumDense("abc,cd->abd", [None, 12], activation="tanh", bias_axes="d", name="einsum_up")(x)
    x = layers.EinsumDense("abc,cd->abd", [None, 8], bias_axes="d", name="einsum_down")(x)
    x = layers.GlobalAveragePooling1D()(x)
    x = layers.LayerNormalization(gamma_regularizer=keras.regularizers.L2(0.1), name="last_norm")(x)
    return keras.Model(tokens, layers.Dense(4, name="head")(x), name="transformer")


def _small_branches():
    import keras
    from keras import layers

    tokens = layers.Input([6], dtype="int32")
    x = layers.Flatten()(layers.Embedding(24, 4, name="tokens")(tokens))
    ways = []
    for number, width in enumerate((5, 7, 9)):
        hidden = layers.Dense(width, activation="tanh", name=f"way{number}_in")(x)
        hidden = layers.Reshape([width])(layers.Reshape([width, 1])(hidden))
        ways.append(layers.Dense(width + 1, name=f"way{number}_out")(hidden))
    return keras.Model(tokens, layers.Dense(4, name="head")(layers.Concatenate()(ways)), name="branches")


LAYOUT = {
    "^tokens/embeddings": (None, "model"),
    "attention0/query/kernel": (None, "model", None),
    "up0/kernel": (None, "model"),
    "down0/kernel": ("model", None),
    "einsum_up/kernel": (None, "model"),
    "einsum_down/kernel": ("model", None),
    "head/kernel": ("model", None),
}


def _divide(how, mesh):
    import hvdkit as hvd

    if how == "branches":
        return hvd.parallel.split_branches(_small_branches(), mesh, ["way0_", "way1_", "way2_"])
    model = _small_transformer()
    if how == "tensors":
        return hvd.parallel.split_tensors(model, mesh)
    if how == "layout":
        return hvd.parallel.split_tensors(model, mesh, LAYOUT)
    return hvd.parallel.pipeline(model, mesh, micro_batches=4, schedule=how)


def _optimizers():
    import keras

    return {
        # Above rounding: an attention's key has a bias of no gradient at all, of which Adam would make whole steps.
        "clipped Adam": lambda: keras.optimizers.Adam(1e-2, epsilon=1e-3, global_clipnorm=0.05),
        "SGD by variable": lambda: keras.optimizers.SGD(0.5, momentum=0.9, clipnorm=0.05),
        "accumulating": lambda: keras.optimizers.SGD(0.5, gradient_accumulation_steps=2),
    }


def _gradients(model, optimizer, loss, dataset, weights):
    """By how much a step of SGD with a learning rate of 1 lowers each weight."""
    model.compile(optimizer, loss=loss, jit_compile=False)
    before = weights(model)
    model.fit(dataset, verbose=0)
    after = weights(model)
    return before and [a - b for a, b in zip(before, after, strict=True)]


def gradients(model_ranks, ways):
    """For each way, how far the divided model's gradients are from the whole one's, in parts of their largest entry."""
    import keras
    import tensorflow as tf

    import hvdkit as hvd

    mesh = hvd.Mesh(model=model_ranks)
    hvd.init(mesh=mesh)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    generator = np.random.default_rng(5)
    x = generator.integers(24, size=[mesh.data * BATCH, 6]).astype("int32")
    y = generator.integers(4, size=[mesh.data * BATCH])
    mine = slice(mesh.data_index * BATCH, (mesh.data_index + 1) * BATCH)
    dataset = tf.data.Dataset.from_tensors((x[mine], y[mine]))
    found = {}
    for how in ways:
        keras.utils.set_random_seed(1)
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))
        divided = _gradients(_divide(how, mesh), optimizer, loss, dataset, _gathered)
        if divided:
            keras.utils.set_random_seed(1)
            whole = _small_branches() if how == "branches" else _small_transformer()
            everything = tf.data.Dataset.from_tensors((x, y))
            expected = _gradients(whole, keras.optimizers.SGD(1.0), loss, everything, lambda m: m.get_weights())
            largest = max(float(np.max(np.abs(g))) for g in expected)
            pairs = zip(divided, expected, strict=True)
            found[how] = max(float(np.max(np.abs(a - b))) for a, b in pairs) / largest, largest
    hvd.barrier()
    return found


def _gathered(model):
    import hvdkit as hvd

    whole = hvd.parallel.gather(model)
    return whole and whole.get_weights()


@pytest.mark.parametrize(
    "ways", [["gpipe"], pytest.param(["layout", "branches", "1f1b"], marks=pytest.mark.slow)], ids="+".join
)
def test_gradients_are_those_of_one_process(ranks, ways):
    found = ranks(2, gradients, model_ranks=2, ways=ways)[0]
    assert list(found) == ways
    for how, (difference, largest) in found.items():
        assert difference < 1e-5, (how, difference)
        assert largest > 1e-3, "there is something to differ"


def _trained_whole(build, optimizer, loss, x, y):
    """The weights of the whole model, trained by one process without any exchange, and what it says of itself."""
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(1)
    model = build()
    model.compile(optimizer, loss=loss, metrics=["accuracy"], jit_compile=False)
    history = model.fit(tf.data.Dataset.from_tensor_slices((x, y)), verbose=0).history
    return model.get_weights(), {
        "logs": {key: value[-1] for key, value in history.items()},
        "evaluated": model.evaluate(x[0], y[0], batch_size=BATCH, verbose=0, return_dict=True),
        "held": sum(int(np.prod(w.shape)) for w in model.weights),
    }


def trained(model_ranks, ways):
    """For each way and optimizer, the weights of the divided model and those of the whole one, both trained."""
    import keras
    import tensorflow as tf

    import hvdkit as hvd

    mesh = hvd.Mesh(model=model_ranks)
    hvd.init(mesh=mesh)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    generator = np.random.default_rng(3)
    x = generator.integers(24, size=[STEPS, mesh.data * BATCH, 6]).astype("int32")
    y = generator.integers(4, size=[STEPS, mesh.data * BATCH])
    mine = slice(mesh.data_index * BATCH, (mesh.data_index + 1) * BATCH)
    dataset = tf.data.Dataset.from_tensor_slices((x[:, mine], y[:, mine]))
    dataset = dataset.map(lambda a, b: (tf.ensure_shape(a, [BATCH, 6]), b))
    found, references = {}, {}
    for how in ways:
        for name, optimizer in list(_optimizers().items())[: 3 if how == ways[0] and mesh.data == 1 else 1]:
            build = _small_branches if how == "branches" else _small_transformer
            if hvd.rank() == 0 and (build, name) not in references:
                references[build, name] = _trained_whole(build, optimizer(), loss, x, y)
            whole, expected = references.get((build, name), (None, None))
            keras.utils.set_random_seed(1)
            divided = _divide(how, mesh)
            divided.compile(hvd.DistributedOptimizer(optimizer()), loss=loss, metrics=["accuracy"], jit_compile=False)
            guards = [*hvd.callbacks.standard(), hvd.callbacks.ReplicaGuardCallback(every=1)]
            history = divided.fit(dataset, callbacks=guards, verbose=0).history
            gathered = hvd.parallel.gather(divided)
            result = {
                "expected": hvd.broadcast_object(expected),
                "logs": {key: value[-1] for key, value in history.items()},
                "held": sum(int(np.prod(w.shape)) for w in divided.weights),
                "evaluated": hvd.evaluate(divided, x[0], y[0], batch_size=BATCH, return_dict=True),
            }
            if gathered is not None:
                result["difference"] = max(
                    float(np.max(np.abs(a - b)) / (np.linalg.norm(b) / np.sqrt(b.size) + 1e-3))
                    for a, b in zip(gathered.get_weights(), whole, strict=True)
                )
            found[f"{how}, {name}"] = result
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "model_ranks", "ways", "memory"),
    [
        (2, 2, ["tensors", "layout", "branches", "gpipe", "1f1b"], "1"),
        (4, 2, ["1f1b", "tensors"], "0"),  # by sockets, as between hosts
        (3, 3, ["branches", "gpipe", "1f1b"], "1"),
    ],
)
def test_divided_models_train_what_one_process_trains(ranks, number, model_ranks, ways, memory):
    found = ranks(number, trained, model_ranks=model_ranks, ways=ways, env={"HVDKIT_SHARED_MEMORY": memory})
    for case, result in found[0].items():
        assert result["difference"] < 1e-4, (case, result)
    for rank, results in enumerate(found):
        for case, result in results.items():
            expected = result["expected"]
            for what in ("logs", "evaluated"):
                for key, value in expected[what].items():
                    assert result[what][key] == pytest.approx(value, rel=1e-4), (case, rank, what, key)
            assert result["held"] < expected["held"], (case, rank)


def losses_in_a_pipeline(model_ranks):
    """How far weights and the shown loss are from one process, by losses that count or sum what a batch has."""
    import keras
    import tensorflow as tf

    import hvdkit as hvd

    mesh = hvd.Mesh(model=model_ranks)
    hvd.init(mesh=mesh)
    generator = np.random.default_rng(3)
    x = generator.normal(size=[mesh.data * BATCH, 6, 3]).astype("float32")
    y = generator.integers(3, size=[mesh.data * BATCH, 6])
    weights = generator.uniform(0.1, 1, y.shape).astype("float32") * np.arange(1, len(y) + 1)[:, None]
    ignored = np.where(np.arange(6) > np.arange(len(y))[:, None] % 7, 255, y)  # so that micro-batches differ
    mine = slice(mesh.data_index * BATCH, (mesh.data_index + 1) * BATCH)

    def trained(parts, divided, **options):
        keras.utils.set_random_seed(1)
        layers = [keras.layers.Dense(4, "tanh", name="first"), keras.layers.Dense(3, name="second")]
        model = keras.Sequential([keras.Input([6, 3]), *layers], name="small")
        optimizer = keras.optimizers.SGD(0.01 if options.get("reduction") == "sum" else 1.0)
        if divided:
            model, optimizer = hvd.parallel.pipeline(model, mesh, micro_batches=4), hvd.DistributedOptimizer(optimizer)
        model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True, **options))
        callbacks = hvd.callbacks.standard() if divided else []
        history = model.fit(tf.data.Dataset.from_tensors(parts), verbose=0, callbacks=callbacks).history
        whole = hvd.parallel.gather(model) if divided else model
        return [] if whole is None else whole.get_weights(), history["loss"][0]

    found = {}
    for name, parts, options in (
        ("mean", (x, y), {}),
        ("weights", (x, y, weights), {}),
        ("mean by weights", (x, y, weights), {"reduction": "mean_with_sample_weight"}),
        ("labels to ignore", (x, ignored), {"ignore_class": 255}),
        ("sum", (x, y), {"reduction": "sum"}),
    ):
        ours, shown = trained(tuple(part[mine] for part in parts), True, **options)
        if ours:
            expected, loss = trained(parts, False, **options)
            far = max(float(np.max(np.abs(a - b))) for a, b in zip(ours, expected, strict=True))
            found[name] = far, abs(shown - loss) / loss
    hvd.barrier()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("number", "model_ranks"), [(2, 2), (4, 2)])
def test_losses_in_a_pipeline_are_those_of_one_process(ranks, number, model_ranks):
    found = ranks(number, losses_in_a_pipeline, model_ranks=model_ranks)[0]
    assert len(found) == 5
    assert {name: far for name, far in found.items() if not max(far) < 1e-5} == {}


def stages_that_differ():
    """A dropout, a loss, and then an overflow of float16, on one of two stages alone; and a step that is no graph."""
    import keras
    from keras import layers

    import hvdkit as hvd

    mesh = hvd.Mesh(model=2)
    hvd.init(mesh=mesh)
    keras.utils.set_random_seed(1)
    x = np.random.default_rng(1).normal(scale=3e4, size=[64, 4]).astype("float32").clip(-6e4, 6e4)
    y = np.random.default_rng(2).integers(3, size=64)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def divided(policy, optimizer, **more):
        keras.config.set_dtype_policy(policy)
        small = keras.initializers.RandomNormal(stddev=1e-4)
        body = [layers.Dense(8, kernel_initializer=small), layers.Activation("relu"), layers.Dropout(0.3)]
        model = keras.Sequential([layers.Input([4]), *body, layers.Dense(3, kernel_regularizer="l2")])
        model = hvd.parallel.pipeline(model, mesh, cuts=[model.layers[1].name], micro_batches=2)
        model.compile(hvd.DistributedOptimizer(optimizer), loss=loss, **more)
        return model

    def fit(model):
        callbacks = [*hvd.callbacks.standard(), hvd.callbacks.ReplicaGuardCallback(every=1)]
        return model.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0, callbacks=callbacks).history["loss"]

    model = divided("float32", keras.optimizers.Adam(1e-3))
    hvd.evaluate(model, x, y, batch_size=8)  # before a step of training is traced
    first = fit(model)
    inner = keras.optimizers.Adam(1e-3, global_clipnorm=1.0)
    scaled = keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0**10)
    second = fit(divided("mixed_float16", scaled))
    steps, scale = (float(keras.ops.convert_to_numpy(v)) for v in (inner.iterations, scaled.dynamic_scale))
    try:
        fit(divided("float32", keras.optimizers.Adam(1e-3), run_eagerly=True))
    except hvd.UsageError as error:
        return first, second, steps, scale, str(error)


@pytest.mark.slow
def test_stages_of_a_pipeline_that_differ_train_together(ranks):
    one, other = ranks(2, stages_that_differ)
    assert one == other, "losses, steps that were taken, and loss scales"
    first, second, steps, scale, refusal = one
    assert np.all(np.isfinite([*first, *second]))
    assert scale < 2.0**10, "the first stage overflowed, or this test proves nothing"
    assert 0 < steps < 24
    assert "leave out run_eagerly" in refusal


def matched_by_place():
    """What is gathered where the layers have other names on rank 0; and a normalization in one stage."""
    import keras
    from keras import layers

    import hvdkit as hvd

    mesh = hvd.Mesh(model=2)
    hvd.init(mesh=mesh)
    if hvd.rank() == 0:
        layers.Dense(1)  # from here on, Keras numbers the layers otherwise

    def build(units=6):
        keras.utils.set_random_seed(1)
        return keras.Sequential([layers.Input([4]), layers.Dense(units, "relu"), layers.Dense(3)])

    def normalized(synchronized):
        keras.utils.set_random_seed(1)
        normalization = layers.BatchNormalization(synchronized=synchronized)
        body = [layers.Dense(4), normalization, layers.Dense(4), layers.Dense(1)]
        whole = keras.Sequential([layers.Input([4]), *body])
        model = hvd.parallel.pipeline(whole, mesh, cuts=[normalization.name], micro_batches=2)
        model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), loss="mse", jit_compile=False)
        x = np.random.default_rng(0).normal(size=[8, 4]).astype("float32")
        model.fit(x, x[:, :1], batch_size=8, verbose=0)
        return _gathered(model)

    gathered = []
    for divide in (hvd.parallel.pipeline, hvd.parallel.split_tensors):
        model = build()
        gathered.append((model.get_weights(), _gathered(divide(model, mesh))))
    try:
        hvd.parallel.gather(hvd.parallel.pipeline(build(6 + 2 * hvd.rank()), mesh))
    except hvd.UsageError as error:
        refusal = str(error)
    whole, divided = build(), hvd.parallel.split_tensors(build(), mesh)
    whole.compile(keras.optimizers.Adam(), loss="mse")
    divided.compile_from_config(whole.get_compile_config())  # builds the optimizer
    divided.optimizer = hvd.DistributedOptimizer(divided.optimizer)
    assert len(divided.optimizer.variables) > 8
    assert all(map(divided.optimizer.keeps_local, divided.optimizer.variables)), "slots of parts differ between ranks"
    return gathered, refusal, [normalized(synchronized) for synchronized in (False, True)]


def test_parts_are_matched_by_place_and_a_stage_normalizes_with_the_ranks_that_have_it(ranks):
    (gathered, refusal, (alone, synchronized)), (_, same, _) = ranks(2, matched_by_place)
    for expected, weights in gathered:
        assert len(weights) == 4
        assert all(np.array_equal(a, b) for a, b in zip(weights, expected, strict=True))
    assert refusal == same
    assert "make no whole: weight 0 is " in refusal
    assert "[4, 6] on rank 0 and " in refusal
    for one, other in zip(synchronized, alone, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6, err_msg="each stage has one rank")


def _result(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "model", "precision", "close"),
    [
        ("tensor", "mnist_mlp", "float32", 1e-3),
        ("pipeline", "mnist_mlp", "mixed_float16", 1e-2),
        ("branches --branches=branch0_,branch1_,branch2_,branch3_", "branch_cnn", "float32", 1e-3),
    ],
)
def test_the_main_job_trains_a_divided_model_as_one_process_does(train, tmp_path, strategy, model, precision, close):
    """And what it writes is the whole model, in plain Keras, with the accuracy that it says."""
    flags = [f"--model={model}", "--dataset=digits", "--steps=44", "--notensorboard", f"--precision={precision}"]
    one = train(0, "--strategy=single", *flags, "--workdir=single")
    many = train(2, *f"--strategy={strategy}".split(), *flags, "--workdir=many", "--checkpoint_every=22")
    assert (one.code, many.code) == (0, 0), one.output + many.output
    expected, result = _result(tmp_path / "single"), _result(tmp_path / "many")
    assert result["test_loss"] == pytest.approx(expected["test_loss"], rel=close)
    assert result["train_loss"] == pytest.approx(expected["train_loss"], rel=close)
    program = """
import sys, keras
sys.modules["hvdkit"] = None
whole, plain = (keras.saving.load_model(f"{f}/model.keras") for f in ("many", "single"))
print([w.path for w in whole.weights] == [w.path for w in plain.weights])
print(max(float(abs(a.numpy() - b.numpy()).max()) for a, b in zip(whole.weights, plain.weights)) < CLOSE)
""".replace("CLOSE", "1e-3" if precision == "float32" else "0.1")  # Adam makes whole steps of float16's rounding
    opened = run_command([sys.executable, "-c", program], timeout=120, cwd=tmp_path)
    assert opened.output.split()[-2:] == ["True", "True"], opened.output


@pytest.mark.slow
def test_a_divided_training_goes_on_where_it_was_left(train, tmp_path):
    flags = ["--model=mnist_mlp", "--dataset=digits", "--notensorboard", "--checkpoint_every=22", "--strategy=pipeline"]
    whole = train(2, *flags, "--steps=88", "--workdir=whole")
    half = train(2, *flags, "--steps=88", "--workdir=half")
    assert (whole.code, half.code) == (0, 0), half.output
    newest = sorted((tmp_path / "half" / "checkpoints").glob("0*"))
    for later in newest[1:]:
        shutil.rmtree(later)
    (tmp_path / "half" / "result.json").unlink()
    for name in ("copies", "otherwise"):
        shutil.copytree(tmp_path / "half", tmp_path / name)
    again = train(2, *flags, "--steps=88", "--workdir=half")
    assert again.code == 0, again.output
    assert _result(tmp_path / "half")["weights_sha256"] == _result(tmp_path / "whole")["weights_sha256"]

    copies = train(4, *flags, "--steps=88", "--model_ranks=2", "--workdir=copies")
    assert copies.code == 0, copies.output
    result, expected = _result(tmp_path / "copies"), _result(tmp_path / "whole")
    assert (result["size"], result["steps"]) == (2, 88)
    assert result["test_loss"] == pytest.approx(expected["test_loss"], rel=0.2), "in another order of the data"

    otherwise = train(2, *flags, "--steps=88", "--strategy=tensor", "--workdir=otherwise")
    assert (otherwise.code, "Traceback" in otherwise.output) == (2, False), otherwise.output
    assert "is of another model or optimizer: dense/kernel is (64, 128) float32 there" in otherwise.output


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--strategy=tensor", "--model_ranks=3"], "needs a multiple of 3 ranks, but 2 were started"),
        (["--strategy=branches", "--branches=left_,right_"], "matches no layer"),
        (["--strategy=pipeline", "--micro_batches=5"], "cannot be divided into 5 micro-batches"),
    ],
)
def test_what_cannot_be_divided_is_said_before_training(train, flags, sentence):
    ended = train(2, "--model=mnist_mlp", "--dataset=digits", "--steps=2", "--workdir=run", *flags)
    assert ended.code == 2, ended.output
    assert sentence in ended.output
    assert "Traceback" not in ended.output
