"""The main job: trains a Keras model on real data, on any number of ranks.

    python -m hvdkit.train --strategy=single --model=mnist_mlp --dataset=digits
    launch/local.sh -np 2 --model=cifar_cnn --dataset=cifar10 --data-dir=DIR --workdir=DIR

`--help` lists all flags. The training code is the same for every strategy: what differs is behind `strategies`.
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

_log = logging.getLogger("hvdkit.train")  # not __name__: the job runs as __main__


Tap = Callable[[tf.data.Dataset, int], tf.data.Dataset]


def run(
    config: Config, more_callbacks: Sequence[keras.callbacks.Callback] = (), tap: Tap | None = None
) -> dict[str, Any]:
    """Trains, evaluates and writes the artefacts; returns the content of `result.json`.

    Args:
        config: the flags.
        more_callbacks: for `fit`, before the one that saves.
        tap: is given this process's training batches and the step that the first of them is for, counted from 0, and
            returns batches to train on: for audits of what was trained.

    Raises:
        Preempted: a signal asked the job to leave; it is saved.
        UsageError: on all ranks, before training starts, if anything that the user gave is wrong.
        ReplicasDiverged: at the end, if the ranks' weights differ.
    """
    # ---- Who am I -------------------------------------------------------------------------------------------------
    if config.threads:
        os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = str(config.threads)
    with together():
        strategy = strategies.create(config.strategy, config.replicas, _division(config))

    # ---- What to train, on what -----------------------------------------------------------------------------------
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

    # ---- Where to write, and what to go on from -------------------------------------------------------------------
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
    collectives.barrier()  # nobody leaves before the artefacts are there: a launcher ends the job with the first to go
    return result


def _speed(progress: callbacks.ProgressCallback, examples: int) -> dict[str, float]:
    """Too few steps for a rate without the first execution: then with all that it takes to begin."""
    return {
        "train_seconds": round(progress.seconds, 3),
        "samples_per_second": round(progress.samples_per_second or examples / progress.seconds, 1),
    }


def _wire_bytes(model: keras.Model) -> dict[str, Any]:
    """What a rank sends a step for its dense gradients, and what it would send of them whole."""
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
    """Makes the run's folder, and finds what it goes on from."""
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
    """The settings of the run that is gone on with, on as many replicas as there are now.

    Raises:
        UsageError: it is another model, other data, or another training.
    """
    if not isinstance(found.state["extra"], dict) or "stretches" not in found.state["extra"]:
        raise UsageError(
            f"The checkpoint {found.path} was written by a script, not by hvdkit.train: go on with it there."
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
    """What must not change when a run goes on, besides model and data."""
    names = (
        "image_size", "fold", "seed", "global_batch", "optimizer", "learning_rate", "lr_schedule", "precision",
        "sampling", "class_weights", "sequence_length", "model_args",
    )  # fmt: skip
    return {name: getattr(settings, name) for name in names}


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
    _log.info(
        "%s: test accuracy %s, test loss %.4f%s; %d steps in %.1f s, %s samples/s; weights %s on all %d replica(s)",
        title, "unknown" if accuracy is None else f"{accuracy:.2%}", result["test_loss"], bits, result["steps"],
        result["train_seconds"], f"{result['samples_per_second']:,.0f}", result["weights_sha256"][:12], result["size"],
    )  # fmt: skip
    _log.info("written to %s: %s", workdir, ", ".join(sorted(p.name for p in workdir.iterdir())))
