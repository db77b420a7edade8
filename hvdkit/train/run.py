"""The main job: trains a Keras model on real data, on any number of ranks.

    python -m hvdkit.train --strategy=single --model=mnist_mlp --dataset=digits
    launch/local.sh -np 2 --model=cifar_cnn --dataset=cifar10 --data-dir=DIR --workdir=DIR

`--help` lists all flags. The training code is the same for every parallelism strategy; `strategies` has the
differences.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from hvdkit import callbacks, collectives, reporting, versions, world
from hvdkit.callbacks.evaluation import judge
from hvdkit.collectives.agreement import check_equal, together
from hvdkit.collectives.mesh import shard_of
from hvdkit.data.pipeline import naming_unreadable
from hvdkit.data.sources import CLASSIFICATION, TokenSource
from hvdkit.optimizers.distributed import DistributedOptimizer
from hvdkit.optimizers.sharded import ShardedOptimizer
from hvdkit.train import artifacts, objectives, teacher
from hvdkit.train import data as job_data
from hvdkit.train.callbacks import checkpoint_callback, steps_per_execution, training_callbacks
from hvdkit.train.compiled import compile_model
from hvdkit.train.data import TrainingData
from hvdkit.train.job import Job, open_job
from hvdkit.train.settings import Config

_log = logging.getLogger("hvdkit.train")  # the job's logger
_COUNTING = ("horovod", "single")  # strategies under which each class is counted
_LARGE_LOSS = 1000.0  # as of measured values; shown without decimals


Tap = Callable[[tf.data.Dataset, int], tf.data.Dataset]


def run(
    config: Config, more_callbacks: Sequence[keras.callbacks.Callback] = (), tap: Tap | None = None
) -> dict[str, Any]:
    """Trains, evaluates and writes the artefacts; returns the content of `result.json`.

    Args:
        config: the flags.
        more_callbacks: further callbacks for `fit`; they come before the one that saves checkpoints.
        tap: for audits of the training data: called with this process's training batches and the step of the first
            batch, counted from 0; returns the batches to train on.

    Raises:
        Preempted: a signal preempted the job, and its state is saved.
        UsageError: an input of the user's is wrong; raised on all ranks before training starts.
        ReplicasDiverged: the ranks' weights differ at the end.
    """
    job = open_job(config)
    settings, strategy, source = job.settings, job.strategy, job.source

    # ---- Data -----------------------------------------------------------------------------------------------------
    vocabulary = None
    if source.kind == "text":
        vocabulary = job_data.make_vocabulary(source, settings, job.recipe, job.workdir)
    data = job_data.read_training_data(settings, strategy, source, vocabulary, job.found)
    evaluated, shares = {}, list(data.shares)
    for split in ("validation", "test") if settings.validates else ("test",):
        evaluated[split], share = job_data.read_evaluation_data(settings, strategy, source, vocabulary, split)
        shares.append(share)
    steps = settings.steps or settings.epochs * data.steps_per_epoch

    # ---- Model ----------------------------------------------------------------------------------------------------
    evaluator, part = job.model_source.make_evaluator(), strategy.evaluation_share()[0]
    standardization = job_data.make_standardization(source)
    with together(), strategy.scope():
        model, settings = compile_model(job, vocabulary, data, standardization)
        model.steps_per_execution = steps_per_execution(
            settings.steps_per_execution, steps, data.steps_per_epoch, job.found
        )
    job = dataclasses.replace(job, settings=settings)
    if strategy.world.is_root:
        reporting.write_json(job.workdir / "config.json", {**vars(settings), "versions": versions.installed()})
        if source.feature_names:  # the order in which the model takes them
            names = {"features": source.feature_names, "labels": source.label_names}
            reporting.write_json(job.workdir / "features.json", names)

    # ---- Training -------------------------------------------------------------------------------------------------
    validation = evaluated.get("validation", evaluated["test"]) if settings.eval_every else None
    progress = callbacks.ProgressCallback(
        steps, data.steps_per_epoch, settings.global_batch, show=strategy.world.is_root
    )
    first_step = job.found.state["step"] if job.found else 0
    with naming_unreadable(shares):
        history = model.fit(
            tap(data.batches, first_step) if tap else data.batches,
            epochs=math.ceil(steps / data.steps_per_epoch),
            steps_per_epoch=min(steps, data.steps_per_epoch),
            validation_data=validation,
            validation_freq=settings.eval_every or 1,
            callbacks=[
                *strategy.callbacks(),
                *([callbacks.EvaluationCallback(evaluator, validation, part)] if evaluator and validation else []),
                *_callbacks(job, data, steps, progress, more_callbacks),
            ],
            shuffle=False,  # the batches are shuffled already
            verbose=0,
        )

    # ---- Results --------------------------------------------------------------------------------------------------
    taught: dict[str, Any] = {}
    with naming_unreadable(shares):
        if settings.teacher:
            model, master = teacher.part(model, source.task, settings)
            taught = teacher.results(model, master, strategy.evaluate(master, evaluated["test"]))
        found = {split: strategy.evaluate(model, batches) for split, batches in evaluated.items()}
        if evaluator:
            found = {split: found[split] | judge(model, evaluator, evaluated[split], part) for split in found}
        by_class = _by_class(job, model, evaluated["test"])
    if settings.early_stopping:
        steps = min(steps, len(history.history["loss"]) * data.steps_per_epoch)
    trained = _Trained(history.history, found, {**by_class, **taught}, progress, steps, data.steps_per_epoch)
    return _finish(job, model, trained)


def _callbacks(
    job: Job,
    data: TrainingData,
    steps: int,
    progress: callbacks.ProgressCallback,
    more: Sequence[keras.callbacks.Callback],
) -> list[keras.callbacks.Callback]:
    """The callbacks after the strategy's own. The one that saves checkpoints comes last."""
    settings, strategy, found = job.settings, job.strategy, job.found
    chosen = training_callbacks(settings, strategy, steps, data.steps_per_epoch, job.workdir, found)
    saving: list[keras.callbacks.Callback] = []
    if settings.checkpoint_steps != "never":
        saving = [checkpoint_callback(settings, strategy, job.workdir, job.identity, found, data)]
    return [*chosen, progress, *more, *saving]


@dataclasses.dataclass(frozen=True)
class _Trained:
    """What `fit` and the evaluation returned.

    Attributes:
        history: values of each metric by epoch.
        evaluated: metrics on the test split, and on the validation split if there is one.
        more: what `result.json` says of each class, and of the teacher; empty without them.
        progress: the callback that measured the speed.
        steps: total steps, including those before the run was resumed.
        steps_per_epoch: steps per epoch.
    """

    history: dict[str, Any]
    evaluated: dict[str, dict[str, float]]
    more: dict[str, Any]
    progress: callbacks.ProgressCallback
    steps: int
    steps_per_epoch: int


def _by_class(job: Job, model: keras.Model, test: tf.data.Dataset) -> dict[str, Any]:
    """Counts the test examples of each class that are recognized, over all ranks. A collective call.

    Only for whole models whose batches this process evaluates itself: not under tf.distribute, nor for divided models.
    """
    names = job.source.label_names
    if job.source.task != CLASSIFICATION or not names or job.strategy.name not in _COUNTING:
        return {}
    mine = objectives.confusion(model, test, len(names))
    everyone = collectives.allgather_object(mine, name="confusion")
    return {} if any(counts is None for counts in everyone) else objectives.results_by_class(sum(everyone), names)


def _finish(job: Job, model: keras.Model, trained: _Trained) -> dict[str, Any]:
    """Checks that the ranks' weights are equal, and writes the artifacts; returns the content of `result.json`."""
    settings, strategy, steps = job.settings, job.strategy, trained.steps
    common = [w for w in model.weights if shard_of(w) is None]
    check_equal([w.path for w in common], [collectives.digest([w]) for w in common])
    whole = strategy.whole(model)
    result = {
        "model": job.model_source.name,
        "dataset": job.source.name,
        "strategy": strategy.name,
        "size": strategy.size,
        "global_batch": settings.global_batch,
        "epochs": math.ceil(steps / trained.steps_per_epoch),
        "steps": steps,
        **_speed(trained.progress, steps * settings.global_batch),
        **_wire_bytes(model),
        **_measured(job, whole, trained),
    }
    if isinstance(job.source, TokenSource) and isinstance(model.loss, keras.losses.SparseCategoricalCrossentropy):
        result["test_bits_per_byte"] = trained.evaluated["test"]["loss"] / math.log(2)
    if isinstance(model.optimizer, ShardedOptimizer):
        model.optimizer.gather()
    if whole is not None and strategy.world.is_root:
        _write_artifacts(job, whole, trained, result)
    collectives.barrier()  # until the artefacts are written: a launcher ends the job when the first rank exits
    return result


def _speed(progress: callbacks.ProgressCallback, examples: int) -> dict[str, float]:
    """Seconds and samples per second. With too few steps for a steady rate, the rate includes the start-up."""
    return {
        "train_seconds": round(progress.seconds, 3),
        "samples_per_second": round(progress.samples_per_second or examples / progress.seconds, 1),
    }


def _wire_bytes(model: keras.Model) -> dict[str, Any]:
    """Bytes that a rank sends per step for its dense gradients, and how many it would send without compression."""
    if not isinstance(model.optimizer, DistributedOptimizer) or world.size() == 1:
        return {}
    sent, whole = model.optimizer.wire_bytes(model.trainable_variables)
    return {"wire_bytes_per_step": round(sent), "dense_wire_bytes_per_step": round(whole)}


def _measured(job: Job, whole: keras.Model | None, trained: _Trained) -> dict[str, Any]:
    digest = collectives.broadcast_object(whole and collectives.digest(whole.weights), name="digest")
    task, names = job.source.task, list(trained.evaluated["test"])
    found: dict[str, Any] = {"main_metric": objectives.main_metric(task, job.settings.monitor, names)}
    for split, metrics in trained.evaluated.items():
        found |= objectives.results_of(task, split, metrics)
    return {
        **found,
        **trained.more,
        "train_loss": [float(v) for v in trained.history["loss"]],
        "weights_sha256": digest,
        "versions": versions.installed(),
    }


def _times(result: dict[str, Any]) -> float:
    """How many times as many parameters the teacher has as the model."""
    return float(result["teacher"]["parameters"] / result["parameters"])


def _write_artifacts(job: Job, model: keras.Model, trained: _Trained, result: dict[str, Any]) -> None:
    workdir = job.workdir
    artifacts.save_model(model, workdir / "model.keras")
    title = f"{result['model']} on {result['dataset']}, {result['strategy']}, {result['size']} replica(s)"
    try:
        artifacts.plot_curves(workdir, trained.history, trained.steps_per_epoch, job.settings, title)
    except OSError as error:  # the results matter more
        _log.warning("%s cannot be written (%s).", workdir / "curves.png", error)
    reporting.write_json(workdir / "result.json", result)
    bits = f" ({result['test_bits_per_byte']:.3f} bits a byte)" if "test_bits_per_byte" in result else ""
    main = result["main_metric"]
    reached = "" if main == "loss" else f"{objectives.describe(main, result.get(f'test_{main}'))}, "
    loss = f"{result['test_loss']:{'.4f' if result['test_loss'] < _LARGE_LOSS else '.5g'}}"
    _log.info(
        f"{title}: {reached}test loss {loss}{bits}; "
        f"{result['steps']} steps in {result['train_seconds']:.1f} s, {result['samples_per_second']:,.0f} samples/s; "
        f"weights {result['weights_sha256'][:12]} on all {result['size']} replica(s)"
    )
    if "teacher" in result:
        told = objectives.describe(main, result["teacher"].get(f"test_{main}"))
        _log.info("its teacher, %.3g times as large: %s", _times(result), told)
    _log.info("written to %s: %s", workdir, ", ".join(sorted(p.name for p in workdir.iterdir())))
