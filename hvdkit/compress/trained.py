"""A finished run of `hvdkit train`: its model, and its test split to measure models on."""

import contextlib
import dataclasses
import statistics
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdkit import reporting, strategies
from hvdkit.command.functions import first_line
from hvdkit.data.sources import Source, TokenSource, open_source
from hvdkit.data.sources.selection import spread
from hvdkit.data.vocabulary import Vocabulary
from hvdkit.errors import UsageError
from hvdkit.train import data as job_data
from hvdkit.train.settings import Settings

MATRIX = 2  # axes of a weight that is pruned, at least: not biases and scales
_SLOWER = 10  # learning rate of a run, in multiples of that for training after pruning
_WINDOWS = 128  # for calibration, as in the paper on GPTQ
_LEAST_EQUAL = 1e-3  # difference of outputs that rounding explains, as a share of the largest one
_WARM_UP, _CALLS, _SECONDS = 3, 5, 1.0  # calls before the measurement; at least so many calls, and so long


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
        file: its model, a `.keras` file.
        batches: the batches of its test split.
        main_metric: the metric that its tables show.
        settings: its settings, for one process.
        source: its data set.
        vocabulary: its vocabulary, for texts.
    """

    file: Path
    batches: tf.data.Dataset
    main_metric: str
    settings: Settings
    source: Source
    vocabulary: Vocabulary | None

    def load(self) -> keras.Model:
        """Opens the model, with its loss and metrics, and without the state of its optimizer."""
        config = keras.saving.load_model(self.file).get_compile_config()
        model = keras.saving.load_model(self.file, compile=False)
        judged_by = ("loss", "loss_weights", "metrics", "weighted_metrics")
        given = {name: keras.saving.deserialize_keras_object(config.get(name)) for name in judged_by}
        model.compile("sgd", **given)
        return model

    def finetune(self, model: keras.Model, epochs: int) -> keras.Model:
        """Trains a model on the training split, and returns it: zeros in matrices and kernels stay zeros.

        It uses the run's optimizer, at a constant tenth of the rate: S. Han et al., "Learning both weights and
        connections for efficient neural networks", 2015.

        Args:
            model: a model of `load`; it is changed.
            epochs: passes over the training examples.
        """
        source = job_data.with_long_tail(self.source, self.settings)
        strategy = strategies.create("single", 1)
        data = job_data.read_training_data(self.settings, strategy, source, self.vocabulary, None)
        optimizer = keras.saving.load_model(self.file).optimizer
        rate = self.settings.learning_rate / _SLOWER
        model.optimizer = type(optimizer).from_config({**optimizer.get_config(), "learning_rate": rate})
        with keeping_zeros(model):
            model.fit(data.batches, epochs=epochs, steps_per_epoch=data.steps_per_epoch, verbose=0)
        model.optimizer = keras.optimizers.SGD()  # whose file has no state of the other one
        return model

    def windows(self) -> np.ndarray:
        """Returns tokens of the training split to calibrate GPTQ on, int32 [samples, sequence_length].

        Raises:
            UsageError: the run's data are no tokens.
        """
        if not isinstance(self.source, TokenSource):
            raise UsageError(
                f"gptq: Keras calibrates on windows of tokens, and {self.source.name} has none. Use int8 or int4, or "
                f"a run with --model=gpt."
            )
        places = spread(self.source.size("train"), min(_WINDOWS, self.source.size("train")))
        read = (self.source.read("train", place, place + 1) for place in places)
        return np.concatenate([next(iter(one.batch(1)))[0].numpy() for one in read])

    def judge(self, model: keras.Model) -> dict[str, float]:
        """Returns loss and metrics on the test split."""
        return model.evaluate(self.batches, verbose=0, return_dict=True)

    def first_inputs(self) -> Any:
        """Returns the inputs of the first test batch."""
        return next(iter(self.batches))[0]


def open_run(folder: Path) -> Trained:
    """Opens a run.

    Args:
        folder: the `--workdir` of `hvdkit train`, finished.

    Raises:
        UsageError: another version of hvdkit wrote it, or its data are not there any more.
    """
    config, result = (reporting.read_json(folder / name) for name in ("config.json", "result.json"))
    fields = {field.name for field in dataclasses.fields(Settings)}
    if not fields <= set(config):
        raise UsageError(
            f"{folder} was written by another version of hvdkit, which knew no {min(fields - set(config))}. Train it "
            f"again."
        )
    settings = Settings(**{name: config[name] for name in fields})
    settings = dataclasses.replace(settings, strategy="single", replicas=1, local_batch=settings.global_batch)
    schema = job_data.schema_of(settings)
    source = open_source(
        settings.dataset, settings.data_dir, image_size=settings.image_size, schema=schema, seed=settings.seed
    )
    source = job_data.prepared(source, settings)
    vocabulary = None
    if source.kind == "text":
        tokens = (folder / "vocabulary.txt").read_text().splitlines()
        vocabulary = Vocabulary(tokens, settings.sequence_length)
    batches, _ = job_data.read_evaluation_data(settings, strategies.create("single", 1), source, vocabulary, "test")
    return Trained(folder / "model.keras", batches, result["main_metric"], settings, source, vocabulary)


@contextlib.contextmanager
def keeping_zeros(model: keras.Model) -> Iterator[None]:
    """Makes zeros in matrices and kernels of a model stay zeros, whatever optimizer updates them."""
    kernels = [weight for weight in model.trainable_weights if len(weight.shape) >= MATRIX]
    before = [kernel.constraint for kernel in kernels]
    for kernel in kernels:
        kernel.constraint = _zeros_of(kernel)
    try:
        yield
    finally:
        for kernel, constraint in zip(kernels, before, strict=True):
            kernel.constraint = constraint


def _zeros_of(variable: keras.Variable) -> Callable[[Any], Any]:
    """Returns a constraint that keeps zeros of a variable zeros."""
    kept = keras.ops.cast(keras.ops.not_equal(variable, 0), variable.dtype)
    return lambda value: value * kept


def samples_per_second(predict: Any, inputs: Any) -> float:
    """Returns the median speed of a function from a batch of inputs to outputs."""
    examples = len(keras.tree.flatten(inputs)[0])
    taken: list[float] = []
    for _ in range(_WARM_UP):
        predict(inputs)
    while len(taken) < _CALLS or sum(taken) < _SECONDS:
        began = time.perf_counter()
        predict(inputs)
        taken.append(time.perf_counter() - began)
    return examples / statistics.median(taken)


def check_opens(file: Path, model: keras.Model, inputs: Any, name: str) -> None:
    """Raises a `UsageError` if Keras cannot open the file of a variant, or if it computes something else."""
    try:
        again = keras.saving.load_model(file, compile=False)
    except Exception as error:  # whatever a layer raises
        file.unlink()
        raise UsageError(f"{name}: Keras cannot open the file that it wrote ({first_line(error)}).") from error
    expected, found = (outputs_of(one.predict_on_batch, inputs) for one in (model, again))
    if not np.allclose(found, expected, rtol=_LEAST_EQUAL, atol=_LEAST_EQUAL * np.abs(expected).max()):
        file.unlink()
        raise UsageError(f"{name}: the file that Keras wrote computes something else than the model.")


def bytes_of(path: Path) -> int:
    """Returns the size of a file, or of all files of a folder, in bytes."""
    return sum(file.stat().st_size for file in _files(path))


def zipped_bytes_of(path: Path) -> int:
    """Returns the size that gzip makes of a file, or of all files of a folder: what is transferred or stored."""
    return sum(len(zlib.compress(file.read_bytes())) for file in _files(path))


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def outputs_of(predict: Any, inputs: Any) -> np.ndarray:
    """Returns the outputs of a model with one output, for one batch."""
    return np.asarray(keras.tree.flatten(predict(inputs))[0])
