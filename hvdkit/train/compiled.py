"""Compiles the model of a run, with its optimizer distributed over the ranks."""

import dataclasses
import gc
import inspect
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from hvdkit.compression import by_name
from hvdkit.data import pipeline
from hvdkit.data.sources import AS_COMPILED, Source, TokenSource
from hvdkit.data.sources.structure import example_shape
from hvdkit.data.vocabulary import Vocabulary
from hvdkit.errors import UsageError
from hvdkit.optimizers.local_sgd import LocalSGD
from hvdkit.train import objectives
from hvdkit.train.build import (
    accepted,
    build_model,
    check_batch,
    check_loss,
    check_output,
    check_savable,
    make_optimizer,
)
from hvdkit.train.data import TrainingData
from hvdkit.train.job import Job
from hvdkit.train.settings import Settings, leave_optimizer_to_model
from hvdkit.train.teacher import teach

_log = logging.getLogger("hvdkit.train")  # the job's logger
_LARGE = 10.0  # measured values, in multiples of what a new model gives


def compile_model(
    job: Job, vocabulary: Vocabulary | None, data: TrainingData, standardization: Mapping[str, tuple[float, ...]]
) -> tuple[keras.Model, Settings]:
    """Builds and compiles the model. Returns it with the settings that it really uses."""
    settings, strategy, model_source, task = job.settings, job.strategy, job.model_source, job.source.task
    given = {**_given_by_data(job.source, vocabulary, data.spec), **standardization}
    model = build_model(model_source, given, settings.model_arguments)
    _warn_of_units(job, standardization)
    _check_model(job, model, data, given)
    options: dict[str, Any] = {} if settings.compression == "none" else {"compression": by_name(settings.compression)}
    if settings.shard_optimizer:
        options["shard"] = True
    if settings.local_steps:
        names = ("local_steps", "fragments", "outer_learning_rate", "outer_momentum")
        options |= {name: getattr(settings, name) for name in names}
    if model_source.loss:
        loss, metrics = model_source.loss(**accepted(model_source.loss, given)), []
    else:
        of_labels = {name: values for name, values in standardization.items() if name.startswith("label_")}
        loss = objectives.loss_for(task, model, one_hot=settings.one_hot_labels, focal=settings.focal)
        metrics = objectives.metrics_for(task, model, **of_labels, one_hot=settings.one_hot_labels)
    if settings.monitor and not tf.distribute.has_strategy():  # where metrics are built in replicas only
        mode = objectives.check_monitor(model, settings.monitor, settings.monitor_mode, metrics, _evaluated(job))
        settings = dataclasses.replace(settings, monitor_mode=mode)
    if settings.teacher:
        model = teach(model, model_source.name, job.source, vocabulary, settings)
    whole, compiled = model, model.compiled
    model = strategy.divide(whole)
    if compiled and model is not whole:
        model.compile_from_config(whole.get_compile_config())
    del whole  # under model parallelism, frees the weights that other ranks hold
    gc.collect()
    if compiled:
        rate = float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))
        settings = leave_optimizer_to_model(job.config, settings, model_source.name, rate)
        model.optimizer = strategy.distribute(model.optimizer, **options)
    else:
        model.compile(
            strategy.distribute(make_optimizer(settings.optimizer, settings.learning_rate), **options),
            loss=loss,
            metrics=metrics,
            jit_compile=False,  # XLA cannot compile the collectives of Horovod and tf.distribute
        )
    # Build it before the first step is traced: slots that start from the weights' values (ScheduleFreeAdamW's) would
    # otherwise start from 0.
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    if isinstance(model.optimizer, LocalSGD) and strategy.world.is_root and strategy.size > 1:
        _log.info("the ranks train alone, and synchronize %s", model.optimizer.schedule())
    return model, settings


def _evaluated(job: Job) -> Sequence[str]:
    evaluator = job.model_source.make_evaluator()
    return evaluator.metrics if evaluator else ()


def _check_model(job: Job, model: keras.Model, data: TrainingData, given: Mapping[str, Any]) -> None:
    """Raises a `UsageError` if the model does not fit the data, or could not be saved."""
    source, name = job.source, job.model_source.name
    if source.task != AS_COMPILED:
        each_token = isinstance(source, TokenSource)
        labels, outputs = given["vocabulary_size" if each_token else "num_classes"], objectives.OUTPUTS[source.task]
        check_output(model, data.spec, labels, name, each_token=each_token, outputs=outputs)
        if model.compiled:
            check_loss(model, data.spec, name, data.label_spec, objectives.LABELS[source.task])
    elif not job.model_source.loss:
        check_batch(model, pipeline.first_batch(data.shares[0]), name, source.name)
    _check_one_hot(model, name, job.settings)
    check_savable(model, name)


def _check_one_hot(model: keras.Model, name: str, settings: Settings) -> None:
    """Raises a `UsageError` if labels become probabilities, and the user has chosen the loss."""
    if model.compiled and settings.one_hot_labels:
        flag = f"--augment={settings.augment}" if settings.focal is None else f"--focal={settings.focal:g}"
        raise UsageError(
            f"{flag} needs a loss that takes probabilities of classes, and the model {name} is compiled by its "
            f"function. Leave the flag out, or return the model uncompiled."
        )


def _warn_of_units(job: Job, standardization: Mapping[str, tuple[float, ...]]) -> None:
    """Warns of measured values far from the first outputs of a model that does not take their mean."""
    values = zip(standardization.get("label_mean", ()), standardization.get("label_variance", ()), strict=True)
    largest = max((max(abs(mean), math.sqrt(variance)) for mean, variance in values), default=0.0)
    if largest > _LARGE and "label_mean" not in inspect.signature(job.model_source.build).parameters:
        _log.warning(
            "The model %s starts with values near 0, and those of %s are about %.3g, which it may take long to reach. "
            "Scale its outputs by its arguments label_mean and label_variance, or divide the values.",
            job.model_source.name,
            job.source.name,
            largest,
        )


def _given_by_data(source: Source, vocabulary: Vocabulary | None, spec: Any) -> dict[str, Any]:
    """The arguments that a build function may use, by name."""
    if source.task == AS_COMPILED:
        shapes = tf.nest.map_structure(lambda leaf: tuple(example_shape(leaf)), spec)
        return {"input_shape": shapes} | ({"num_classes": len(source.label_names)} if source.label_names else {})
    given: dict[str, Any] = {"input_shape": tuple(spec.shape)}
    if isinstance(source, TokenSource):
        return given | {"vocabulary_size": source.vocabulary_size, "sequence_length": source.sequence_length}
    given["num_classes"] = len(source.label_names)
    if vocabulary:
        given |= {"vocabulary_size": vocabulary.size, "sequence_length": vocabulary.sequence_length}
    return given
