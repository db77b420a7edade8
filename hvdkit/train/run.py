"""The main job: trains a Keras model on real data, on any number of ranks.

    python -m hvdkit.train --strategy=single --model=mnist_mlp --dataset=digits
    launch/local.sh -np 2 --model=cifar_cnn --dataset=cifar10 --data-dir=DIR --workdir=DIR

`--help` lists all flags. The training code is the same for every parallelism strategy; `strategies` has the
differences.
"""

import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from hvdkit_models.recipe import Recipe

from hvdkit import callbacks, collectives, reporting, strategies, versions, world
from hvdkit.checkpoint import resuming
from hvdkit.checkpoint.store import Checkpoint
from hvdkit.collectives.agreement import check_equal, together
from hvdkit.collectives.mesh import shard_of
from hvdkit.data.sources import Source, TokenSource, open_source
from hvdkit.errors import UsageError
from hvdkit.optimizers.distributed import DistributedOptimizer
from hvdkit.optimizers.sharded import ShardedOptimizer
from hvdkit.train import artifacts, flags
from hvdkit.train import data as job_data
from hvdkit.train.build import (
    ModelSource,
    compile_model,
    find_model,
)
from hvdkit.train.callbacks import checkpoint_callback, steps_per_execution, training_callbacks
from hvdkit.train.flags import Config, Settings

_log = logging.getLogger("hvdkit.train")  # the job's logger


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
    # ---- Ranks and strategy ---------------------------------------------------------------------------------------
    if config.threads:
        os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = str(config.threads)
    with together():
        strategy = strategies.create(config.strategy, config.replicas, _division(config))

    # ---- Model, data set and settings -----------------------------------------------------------------------------
    with together():
        model_source = find_model(config.model)
        dataset = config.dataset or model_source.recipes[0].dataset
        if config.download and strategy.world.local_rank == 0:  # one rank a host; the others wait at the block's end
            open_source(dataset, config.data_dir, download=True, image_size=config.image_size)
    with together():
        source = open_source(dataset, config.data_dir, image_size=config.image_size)
        recipe = model_source.recipe_for(source.name)
        settings = flags.resolve(config, recipe, strategy.size)
        source = job_data.prepared(source, settings)
    keras.utils.set_random_seed(settings.seed)
    keras.config.set_dtype_policy(settings.precision)

    # ---- Workdir and checkpoint -----------------------------------------------------------------------------------
    workdir, found = _make_workdir(settings, model_source, source)
    artifacts.log_to(workdir, strategy.world, append=found is not None)
    identity = {"model": model_source.name, "dataset": source.name}
    if found:
        settings = _go_on(config, settings, recipe, found, identity)
    identity |= _identity(settings)

    # ---- Data -----------------------------------------------------------------------------------------------------
    vocabulary = job_data.make_vocabulary(source, settings, recipe, workdir) if source.kind == "text" else None
    data = job_data.read_training_data(settings, strategy, source, vocabulary, found)
    steps_per_epoch = data.steps_per_epoch
    steps = settings.steps or settings.epochs * steps_per_epoch
    test_batches = job_data.read_test_data(settings, strategy, source, vocabulary)

    # ---- Model ----------------------------------------------------------------------------------------------------
    with together(), strategy.scope():
        model, settings = compile_model(config, settings, strategy, model_source, source, vocabulary, data.spec)
        model.steps_per_execution = steps_per_execution(settings.steps_per_execution, steps, steps_per_epoch, found)
    if strategy.world.is_root:
        reporting.write_json(workdir / "config.json", {**vars(settings), "versions": versions.installed()})

    # ---- Training -------------------------------------------------------------------------------------------------
    progress = callbacks.ProgressCallback(steps, steps_per_epoch, settings.global_batch, show=strategy.world.is_root)
    chosen = [
        *training_callbacks(settings, strategy, steps, steps_per_epoch, workdir, found),
        progress,
        *more_callbacks,
    ]
    if settings.checkpoint_steps != "never":
        chosen.append(checkpoint_callback(settings, strategy, workdir, identity, found, data))
    first_step = found.state["step"] if found else 0
    history = model.fit(
        tap(data.batches, first_step) if tap else data.batches,
        epochs=math.ceil(steps / steps_per_epoch),
        steps_per_epoch=min(steps, steps_per_epoch),
        validation_data=test_batches if settings.eval_every else None,
        validation_freq=settings.eval_every or 1,
        callbacks=[*strategy.callbacks(), *chosen],
        shuffle=False,  # the batches are shuffled already
        verbose=0,
    )

    # ---- Results --------------------------------------------------------------------------------------------------
    test = strategy.evaluate(model, test_batches)
    common = [w for w in model.weights if shard_of(w) is None]
    check_equal([w.path for w in common], [collectives.digest([w]) for w in common])
    whole = strategy.whole(model)
    result = {
        "model": model_source.name,
        "dataset": source.name,
        "strategy": strategy.name,
        "size": strategy.size,
        "global_batch": settings.global_batch,
        "epochs": math.ceil(steps / steps_per_epoch),
        "steps": steps,
        **_speed(progress, steps * settings.global_batch),
        **_wire_bytes(model),
        **_measured(whole, history.history, test),
    }
    if isinstance(source, TokenSource) and isinstance(model.loss, keras.losses.SparseCategoricalCrossentropy):
        result["test_bits_per_byte"] = test["loss"] / math.log(2)
    if isinstance(model.optimizer, ShardedOptimizer):
        model.optimizer.gather()
    if whole is not None and strategy.world.is_root:
        _write_artifacts(workdir, whole, history.history, steps_per_epoch, settings.eval_every, result)
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


def _measured(whole: keras.Model | None, history: dict[str, Any], test: dict[str, float]) -> dict[str, Any]:
    digest = collectives.broadcast_object(whole and collectives.digest(whole.weights), name="digest")
    return {
        "test_accuracy": test.get("accuracy"),
        "test_loss": test["loss"],
        "train_loss": [float(v) for v in history["loss"]],
        "weights_sha256": digest,
        "versions": versions.installed(),
    }


def _make_workdir(settings: Settings, model: ModelSource, source: Source) -> tuple[Path, Checkpoint | None]:
    """Creates the run's folder, and opens the checkpoint to resume from, if there is one."""
    name = f"{model.name}-{source.name.split(':')[0]}-{time.strftime('%Y%m%d-%H%M%S')}"
    workdir = Path(collectives.broadcast_object(settings.workdir or f"runs/{name}", name="workdir")).expanduser()
    with together():
        artifacts.make_workdir(workdir, overwrite=settings.overwrite, begin_anew=settings.resume == "never")
    finished = collectives.broadcast_object((workdir / "result.json").exists(), name="finished")
    resume = "never" if finished and settings.resume == "auto" else settings.resume  # --overwrite was given
    found = resuming.open_checkpoint(workdir / "checkpoints", resume)
    if world.rank() == 0:
        keep = ["tensorboard", "checkpoints"] if found else ["checkpoints"] if resume == "auto" else []
        artifacts.clear(workdir, keep=keep)
    return workdir, found


def _go_on(config: Config, settings: Settings, recipe: Recipe, found: Checkpoint, identity: dict[str, Any]) -> Settings:
    """The settings of the resumed run, for the current number of replicas.

    Raises:
        UsageError: the checkpoint has another model, data set or training setting.
    """
    if not isinstance(found.state["extra"], dict) or "stretches" not in found.state["extra"]:
        raise UsageError(
            f"The checkpoint {found.path} was written by a script, not by hvdkit.train: resume it with that script."
        )
    resuming.refuse_another_job(found, identity)
    before = found.state["job"]
    if config.local_batch and settings.global_batch != before["global_batch"]:
        _log.info("the global batch stays %d, so --local-batch is left out", before["global_batch"])
        kept = dataclasses.replace(config, local_batch=None, global_batch=before["global_batch"])
        settings = flags.resolve(kept, recipe, settings.replicas)
    resuming.refuse_another_job(found, _identity(settings))
    return dataclasses.replace(settings, warmup_epochs=found.state["extra"]["warmup_epochs"])


def _identity(settings: Settings) -> dict[str, Any]:
    """The settings that must not change when a run resumes, besides model and data."""
    data = ("image_size", "fold", "seed", "global_batch", "sampling", "class_weights", "sequence_length")
    training = ("optimizer", "learning_rate", "lr_schedule", "precision", "model_args")
    return {name: getattr(settings, name) for name in (*data, *training)}


def _division(config: Config) -> strategies.Division:
    patterns = tuple(config.branches.split(",")) if config.branches else None
    return strategies.Division(config.model_ranks, config.micro_batches, config.schedule, patterns)


def _write_artifacts(
    workdir: Path,
    model: keras.Model,
    history: dict[str, Any],
    steps_per_epoch: int,
    eval_every: int,
    result: dict[str, Any],
) -> None:
    artifacts.save_model(model, workdir / "model.keras")
    title = f"{result['model']} on {result['dataset']}, {result['strategy']}, {result['size']} replica(s)"
    artifacts.plot_curves(workdir, history, steps_per_epoch, eval_every, title)
    reporting.write_json(workdir / "result.json", result)
    accuracy = result["test_accuracy"]
    bits = f" ({result['test_bits_per_byte']:.3f} bits a byte)" if "test_bits_per_byte" in result else ""
    reached = "unknown" if accuracy is None else f"{accuracy:.2%}"
    _log.info(
        f"{title}: test accuracy {reached}, test loss {result['test_loss']:.4f}{bits}; "
        f"{result['steps']} steps in {result['train_seconds']:.1f} s, {result['samples_per_second']:,.0f} samples/s; "
        f"weights {result['weights_sha256'][:12]} on all {result['size']} replica(s)"
    )
    _log.info("written to %s: %s", workdir, ", ".join(sorted(p.name for p in workdir.iterdir())))
