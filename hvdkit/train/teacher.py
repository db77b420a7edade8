"""Knowledge distillation: a model also learns from the outputs of a trained one, by Keras' `Distiller`.

Each rank has a copy of the teacher, which only computes its outputs for the rank's own examples. So nothing of it
travels between ranks.

G. Hinton, O. Vinyals, J. Dean, "Distilling the knowledge in a neural network", 2015, https://arxiv.org/abs/1503.02531.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras

from hvdkit.command.functions import first_line
from hvdkit.data.sources import CLASSIFICATION, Source
from hvdkit.data.vocabulary import Vocabulary
from hvdkit.errors import UsageError
from hvdkit.train import objectives
from hvdkit.train.build import ends_in
from hvdkit.train.settings import Settings
from hvdkit.train.teacher_run import file_of


def teach(
    student: keras.Model, name: str, source: Source, vocabulary: Vocabulary | None, settings: Settings
) -> keras.Model:
    """Loads the teacher of a student, and returns the `Distiller` that trains the student.

    Args:
        student: the model to train, not compiled.
        name: its name, for messages.
        source: the data set.
        vocabulary: the words that token numbers stand for; None if the data are no texts.
        settings: `teacher`, `temperature` and `student_loss_weight` are used.

    Raises:
        UsageError: the student cannot learn from this teacher, or not by distillation.
    """
    file = file_of(str(settings.teacher))
    _check_student(student, name, source)
    if vocabulary:
        _check_vocabulary(file, vocabulary)
    try:
        teacher = keras.saving.load_model(file, compile=False)
    except Exception as error:  # whatever Keras or a layer of the user's own raises
        raise UsageError(f"The teacher {file} cannot be opened ({first_line(error)}). Give another file.") from error
    if ends_in(teacher, keras.activations.softmax):  # logarithms of probabilities are logits, too
        (outputs,) = teacher.outputs
        inputs = teacher.inputs if len(teacher.inputs) > 1 else teacher.inputs[0]
        teacher = keras.Model(inputs, keras.ops.log(outputs + keras.config.epsilon()))
    # Keras' default, the name of the divergence, becomes a function, which Keras 3.15 calls with logits.
    divergence = keras.losses.KLDivergence()
    try:
        return keras.distillation.Distiller(
            teacher,
            student,
            keras.distillation.LogitsDistillation(settings.temperature, loss=divergence),
            student_loss_weight=settings.student_loss_weight,
        )
    except ValueError as error:  # of the shapes of inputs and outputs
        raise UsageError(f"The model {name} cannot learn from the teacher {file}: {first_line(error)}.") from error


def part(distiller: keras.Model, task: str, settings: Settings) -> tuple[keras.Model, keras.Model]:
    """Returns the student, which keeps the optimizer, and the teacher, compiled with the task's loss and metrics."""
    student, teacher = distiller.student, distiller.teacher
    for model, optimizer in ((student, distiller.optimizer), (teacher, "sgd")):
        loss = objectives.loss_for(task, model, one_hot=settings.one_hot_labels, focal=settings.focal)
        metrics = objectives.metrics_for(task, model, one_hot=settings.one_hot_labels)
        model.compile(optimizer, loss=loss, metrics=metrics, jit_compile=False)
    return student, teacher


def results(student: keras.Model, teacher: keras.Model, evaluated: Mapping[str, float]) -> dict[str, Any]:
    """Returns what `result.json` says of both models; `evaluated` has the teacher's metrics on the test split."""
    metrics = {f"test_{name}": float(value) for name, value in evaluated.items()}
    of_teacher = {"parameters": teacher.count_params(), **metrics}
    return {"parameters": student.count_params(), "teacher": of_teacher}


def _check_student(student: keras.Model, name: str, source: Source) -> None:
    """Raises a `UsageError` if this version of Keras, the task or the student does not allow distillation."""
    if not hasattr(keras, "distillation"):
        raise UsageError(f"--teacher needs keras.distillation, which Keras {keras.__version__} has not. Update Keras.")
    if source.task != CLASSIFICATION:
        raise UsageError(
            f"--teacher distills probabilities of classes, and {source.name} is data for {source.task}. Leave it out."
        )
    if student.compiled:
        raise UsageError(
            f"--teacher adds a loss of its own, and the model {name} is compiled by its function. Return it uncompiled."
        )
    if ends_in(student, keras.activations.softmax):
        raise UsageError(
            f"--teacher compares logits, and the model {name} ends in a softmax. Return it without the softmax."
        )


def _check_vocabulary(file: Path, vocabulary: Vocabulary) -> None:
    """Raises a `UsageError` if token numbers mean other words to the teacher, or nobody knows which."""
    words = file.with_name("vocabulary.txt")
    if not words.is_file():
        raise UsageError(
            f"The teacher {file} takes token numbers, and there is no vocabulary.txt beside it that says which words "
            f"they stand for. Give the --workdir in which hvdkit train wrote it."
        )
    if words.read_text(encoding="utf-8").splitlines() != vocabulary.tokens:
        raise UsageError(
            f"The teacher {file} was trained with another vocabulary, so that token numbers mean other words to it. "
            f"Train the student on the teacher's data set, with a recipe of as many words."
        )
