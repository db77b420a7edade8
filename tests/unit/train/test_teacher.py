"""Students and teachers that do not fit, and a teacher that gives probabilities."""

import json
import types

import keras
import numpy as np
import pytest

from hvdkit.data.vocabulary import Vocabulary
from hvdkit.errors import UsageError
from hvdkit.train import flags as train_flags
from hvdkit.train import teacher
from hvdkit.train.teacher_run import data_flags_of, file_of

SOURCE = types.SimpleNamespace(name="some", task="classification")


def dense(*widths, inputs=4, activation=None):
    layers = [keras.layers.Dense(width) for width in widths[:-1]]
    return keras.Sequential([keras.layers.Input([inputs]), *layers, keras.layers.Dense(widths[-1], activation)])


def settings(file):
    return types.SimpleNamespace(teacher=str(file), temperature=2.0, student_loss_weight=0.25)


def test_the_distiller_learns_the_student_alone_from_a_copy(tmp_path):
    trained = dense(8, 3, activation="softmax")
    trained.save(tmp_path / "model.keras")
    student = dense(3)
    distiller = teacher.teach(student, "mine", SOURCE, None, settings(tmp_path))
    assert [v.path for v in distiller.trainable_variables] == [v.path for v in student.trainable_variables]
    x = np.random.default_rng(0).normal(size=[5, 4]).astype("float32")
    logits = keras.ops.convert_to_numpy(distiller.teacher(x))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, trained.predict(x, verbose=0), rtol=1e-4)
    # The loss is that of Hinton et al.: here without labels, T^2 times the divergence of the softened outputs.
    distiller.compile("sgd", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    loss = float(distiller.compute_loss(x, None, distiller(x)))
    soft = [np.exp(z / 2) / np.exp(z / 2).sum(axis=1, keepdims=True) for z in (logits, student.predict(x, verbose=0))]
    divergence = (soft[0] * np.log(soft[0] / soft[1])).sum(axis=1).mean()
    assert loss == pytest.approx(0.75 * 4 * divergence, rel=1e-3)


def test_students_and_teachers_that_do_not_fit(tmp_path):
    dense(8, 3).save(tmp_path / "model.keras")
    (tmp_path / "broken.keras").write_text("no model")
    values = types.SimpleNamespace(name="some", task="regression")
    compiled = dense(3)
    compiled.compile("sgd", "mse")
    words = Vocabulary(["a", "b"], 4)
    here = tmp_path / "model.keras"
    for student, source, vocabulary, file, message in (
        (dense(3), values, None, here, "distills probabilities of classes, and some is data for regression"),
        (compiled, SOURCE, None, here, "the model mine is compiled by its function"),
        (dense(3, activation="softmax"), SOURCE, None, here, "the model mine ends in a softmax"),
        (dense(3, inputs=5), SOURCE, None, here, "cannot learn from the teacher .*: Teacher and student input shapes"),
        (dense(2), SOURCE, None, here, "cannot learn from the teacher .*: Teacher and student output shapes"),
        (dense(3), SOURCE, None, tmp_path / "broken.keras", r"The teacher .*broken.keras cannot be opened \("),
        (dense(3), SOURCE, None, tmp_path / "nowhere", "has no model: there is no file .*nowhere/model.keras"),
        (dense(3), SOURCE, words, here, r"there is no vocabulary\.txt beside it"),
    ):
        with pytest.raises(UsageError, match=message):
            teacher.teach(student, "mine", source, vocabulary, settings(file))
    (tmp_path / "vocabulary.txt").write_text("a\nc\n")
    with pytest.raises(UsageError, match="was trained with another vocabulary, so that"):
        teacher.teach(dense(3), "mine", SOURCE, words, settings(here))


def test_the_students_data_are_the_teachers_unless_they_are_given(tmp_path):
    (tmp_path / "model.keras").touch()
    file = file_of(str(tmp_path))
    assert data_flags_of(file, train_flags.parse([""])) == []
    (tmp_path / "config.json").write_text(json.dumps({"dataset": "mnist", "data_dir": "here", "image_size": None}))
    assert data_flags_of(file, train_flags.parse([""])) == ["--dataset=mnist", "--data_dir=here"]
    assert data_flags_of(file, train_flags.parse(["", "--dataset=digits"])) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--temperature=2", "--temperature is for learning from a --teacher, which was not given"),
        ("--teacher=x --class-weights", "--teacher and --class-weights exclude each other"),
        ("--teacher=x --strategy=tensor", "--teacher has no use with --strategy=tensor"),
    ],
)
def test_flags_that_do_not_go_together(given, message):
    with pytest.raises(UsageError, match=message):
        train_flags.parse_for_one_strategy(["", *given.split()])
