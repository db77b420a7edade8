"""A finished run of `hvdkit train`: its model, and its test split to measure models on."""

import dataclasses
import statistics
import time
import zlib
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdkit import reporting, strategies
from hvdkit.data.sources import open_source
from hvdkit.data.vocabulary import Vocabulary
from hvdkit.errors import UsageError
from hvdkit.train import data as job_data
from hvdkit.train.settings import Settings

_WARM_UP, _CALLS, _SECONDS = 3, 5, 1.0  # calls before the measurement; at least so many calls, and so long


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
        file: its model, a `.keras` file.
        batches: the batches of its test split.
        main_metric: the metric that its tables show.
    """

    file: Path
    batches: tf.data.Dataset
    main_metric: str

    def load(self) -> keras.Model:
        """Opens the model, with its loss and metrics, and without the state of its optimizer."""
        config = keras.saving.load_model(self.file).get_compile_config()
        model = keras.saving.load_model(self.file, compile=False)
        judged_by = ("loss", "loss_weights", "metrics", "weighted_metrics")
        given = {name: keras.saving.deserialize_keras_object(config.get(name)) for name in judged_by}
        model.compile("sgd", **given)
        return model

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
    return Trained(folder / "model.keras", batches, result["main_metric"])


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
