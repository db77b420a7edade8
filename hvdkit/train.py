"""The main job: trains a Keras model on real data, on any number of ranks.

    python -m hvdkit.train --strategy=single --model=mnist_mlp --dataset=digits
    launch/local.sh -np 2 --model=cifar_cnn --dataset=cifar10 --data_dir=DIR --workdir=DIR

`--help` lists all flags. The training code is the same for every strategy: what differs is behind `strategies`.
"""

import dataclasses
import gc
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# TensorFlow's start-up notices, once a rank, would bury what the job says.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as in hvdkit.launch.plan: a run without a launcher is the same

import keras
import tensorflow as tf
from hvdkit_models.recipe import Recipe

from hvdkit import artifacts, callbacks, collectives, job, strategies, train_data, train_flags, watchdog, world
from hvdkit.agreement import check_equal, together
from hvdkit.checkpoint import preemption, resuming
from hvdkit.checkpoint.store import Checkpoint
from hvdkit.compression import by_name
from hvdkit.data.sources import Source, TokenSource, open_source
from hvdkit.data.vocabulary import Vocabulary
from hvdkit.errors import ReplicasDiverged, UnfitSizeError, UsageError
from hvdkit.mesh import shard_of
from hvdkit.model import (
    ModelSource,
    build_model,
    check_output,
    ends_in_probabilities,
    find_model,
    make_optimizer,
)
from hvdkit.optimizer import DistributedOptimizer
from hvdkit.parallel.sharded import ShardedOptimizer
from hvdkit.strategies import Strategy
from hvdkit.train_flags import Config, Settings

_SIZE_UNFIT = 86  # as in hvdkit.launch.failures: an elastic launcher starts fewer ranks
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
        settings = train_flags.resolve(config, recipe, strategy.size)
        source = train_data.prepared(source, settings)
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
    vocabulary = train_data.make_vocabulary(source, settings, recipe, workdir) if source.kind == "text" else None
    data = train_data.read_training_data(settings, strategy, source, vocabulary, found)
    steps_per_epoch = data.steps_per_epoch
    steps = settings.steps or settings.epochs * steps_per_epoch
    test_batches = train_data.read_test_data(settings, strategy, source, vocabulary)

    # ---- Model ----------------------------------------------------------------------------------------------------
    with together(), strategy.scope():
        model, settings = _compile(config, settings, strategy, model_source, source, vocabulary, data.spec)
        model.steps_per_execution = _steps_per_execution(settings.steps_per_execution, steps, steps_per_epoch, found)
    if strategy.world.is_root:
        artifacts.write_json(workdir / "config.json", {**vars(settings), "versions": artifacts.versions()})

    # ---- Training -------------------------------------------------------------------------------------------------
    progress = callbacks.ProgressCallback(steps, steps_per_epoch, settings.global_batch, show=strategy.world.is_root)
    chosen = [*_callbacks(settings, strategy, steps, steps_per_epoch, workdir, found), progress, *more_callbacks]
    if settings.checkpoint_steps != "never":
        chosen.append(_checkpoints(settings, strategy, workdir, identity, found, data))
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
        "versions": artifacts.versions(),
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
        _log.info("the global batch stays %d, so --local_batch is left out", before["global_batch"])
        kept = dataclasses.replace(config, local_batch=None, global_batch=before["global_batch"])
        settings = train_flags.resolve(kept, recipe, settings.replicas)
    resuming.refuse_another_job(found, _identity(settings))
    return dataclasses.replace(settings, warmup_epochs=found.state["extra"]["warmup_epochs"])


def _identity(settings: Settings) -> dict[str, Any]:
    """What must not change when a run goes on, besides model and data."""
    names = (
        "image_size", "fold", "seed", "global_batch", "optimizer", "learning_rate", "lr_schedule", "precision",
        "sampling", "class_weights", "sequence_length", "model_args",
    )  # fmt: skip
    return {name: getattr(settings, name) for name in names}


def _checkpoints(
    settings: Settings,
    strategy: Strategy,
    workdir: Path,
    identity: dict[str, Any],
    found: Checkpoint | None,
    data: train_data.TrainingData,
) -> callbacks.CheckpointCallback:
    warmup = {"warmup_epochs": settings.warmup_epochs, "warmup_replicas": _warmup_replicas(strategy, found)}
    return callbacks.CheckpointCallback(
        workdir / "checkpoints",
        every=settings.checkpoint_steps,
        resume="never",  # what there is has been opened already
        resumed=found,
        keep=settings.keep,
        keep_best=settings.keep_best,
        monitor="val_loss" if settings.eval_every else "loss",
        on_error=settings.checkpoint_error,
        job=identity,
        extra=lambda epoch, step: {"stretches": data.stretches(epoch, step), **warmup},
    )


def _warmup_replicas(strategy: Strategy, found: Checkpoint | None) -> int:
    """How many replicas the warm-up counts with: those with which training began."""
    return found.state["extra"]["warmup_replicas"] if found else strategy.size


def _division(config: Config) -> strategies.Division:
    patterns = tuple(config.branches.split(",")) if config.branches else None
    return strategies.Division(config.model_ranks, config.micro_batches, config.schedule, patterns)


def _compile(
    config: Config,
    settings: Settings,
    strategy: Strategy,
    model_source: ModelSource,
    source: Source,
    vocabulary: Vocabulary | None,
    spec: tf.TensorSpec,
) -> tuple[keras.Model, Settings]:
    """Builds and compiles the model; the settings are then those that it really has."""
    given = _given_by_data(source, vocabulary, spec)
    model = build_model(model_source, given, settings.model_arguments)
    each_token = isinstance(source, TokenSource)
    labels = given["vocabulary_size" if each_token else "num_classes"]
    check_output(model, spec, labels, model_source.name, each_token=each_token)
    options: dict[str, Any] = {} if settings.compression == "none" else {"compression": by_name(settings.compression)}
    if settings.shard_optimizer:
        options["shard"] = True
    if settings.local_steps:
        options |= {n: getattr(settings, n) for n in ("local_steps", "outer_learning_rate", "outer_momentum")}
    from_logits, whole, compiled = not ends_in_probabilities(model), model, model.compiled
    model = strategy.divide(whole)
    if compiled and model is not whole:
        model.compile_from_config(whole.get_compile_config())
    del whole  # and with it, from a divided model, the other ranks' weights
    gc.collect()
    if compiled:
        rate = float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))
        settings = train_flags.leave_optimizer_to_model(config, settings, model_source.name, rate)
        model.optimizer = strategy.distribute(model.optimizer, **options)
    else:
        model.compile(
            strategy.distribute(make_optimizer(settings.optimizer, settings.learning_rate), **options),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits),
            metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
            jit_compile=False,  # XLA compiles neither Horovod's exchange nor tf.distribute's
        )
    # Keras would build it while it traces the first step, and slots that start from the weights' values
    # (ScheduleFreeAdamW's) would start from 0.
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    return model, settings


def _given_by_data(source: Source, vocabulary: Vocabulary | None, spec: tf.TensorSpec) -> dict[str, Any]:
    """By name, what a function that builds a model may ask for."""
    given: dict[str, Any] = {"input_shape": tuple(spec.shape)}
    if isinstance(source, TokenSource):
        return given | {"vocabulary_size": source.vocabulary_size, "sequence_length": source.sequence_length}
    given["num_classes"] = len(source.label_names)
    if vocabulary:
        given |= {"vocabulary_size": vocabulary.size, "sequence_length": vocabulary.sequence_length}
    return given


def _callbacks(
    settings: Settings, strategy: Strategy, steps: int, steps_per_epoch: int, workdir: Path, found: Checkpoint | None
) -> list[keras.callbacks.Callback]:
    chosen: list[keras.callbacks.Callback] = []
    epochs = steps / steps_per_epoch
    warmup = min(settings.warmup_epochs, epochs / 2)
    if warmup < settings.warmup_epochs:
        _log.info("the warm-up is cut to %.3g epochs, half of the training", warmup)
    if warmup:
        chosen.append(callbacks.LearningRateWarmupCallback(None, warmup, size=_warmup_replicas(strategy, found)))
    if settings.lr_schedule == "cosine":
        multiplier = _cosine(warmup, epochs)
        chosen.append(callbacks.LearningRateScheduleCallback(None, multiplier, start_epoch=warmup, staircase=False))
    if settings.profile:
        start, _, stop = ("32:96" if settings.profile == "auto" else settings.profile).partition(":")
        chosen.append(callbacks.ProfileCallback(workdir / "profile", int(start), int(stop)))
    if settings.compression_guard and strategy.size > 1:
        chosen.append(callbacks.CompressionGuard(settings.compression_guard))
    if steps % steps_per_epoch and steps > steps_per_epoch:
        chosen.append(callbacks.StopAtStepCallback(steps, steps_per_epoch))
    if strategy.world.is_root:
        chosen.append(keras.callbacks.CSVLogger(workdir / "history.csv"))
        chosen.append(callbacks.StepLossCallback(workdir / "loss.csv", steps_per_epoch))
        chosen.append(callbacks.PulseCallback(workdir / "logs" / "pulse"))
        if settings.tensorboard:
            chosen.append(keras.callbacks.TensorBoard(workdir / "tensorboard", write_graph=False))
    return chosen


def _cosine(start: float, end: float) -> Callable[[float], float]:
    """From 1 at epoch `start` to 0 at epoch `end` (I. Loshchilov and F. Hutter, "SGDR", 2017, without restarts)."""
    return lambda epoch: 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, epoch - start) / (end - start))))


def _steps_per_execution(
    wanted: int | None, steps: int, steps_per_epoch: int, found: Checkpoint | None, most: int = 16
) -> int:
    """Steps that run in one call of the graph: they must divide an epoch, and the last, shorter one, evenly.

    Keras would run whole executions beyond an epoch's end otherwise. A step at which training goes on must be reached,
    too.
    """
    common = math.gcd(min(steps, steps_per_epoch), steps % steps_per_epoch)
    if found:
        common = math.gcd(common, found.state["step_in_epoch"])
    chosen = wanted or max(n for n in range(1, most + 1) if common % n == 0)
    if common % chosen:
        fitting = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise UsageError(
            f"--steps_per_execution={wanted} does not divide an epoch of {steps_per_epoch} steps in a training of "
            f"{steps}. Use one of {fitting}, or leave it out."
        )
    return chosen


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
    artifacts.write_json(workdir / "result.json", result)
    accuracy = result["test_accuracy"]
    bits = f" ({result['test_bits_per_byte']:.3f} bits a byte)" if "test_bits_per_byte" in result else ""
    _log.info(
        "%s: test accuracy %s, test loss %.4f%s; %d steps in %.1f s, %s samples/s; weights %s on all %d replica(s)",
        title, "unknown" if accuracy is None else f"{accuracy:.2%}", result["test_loss"], bits, result["steps"],
        result["train_seconds"], f"{result['samples_per_second']:,.0f}", result["weights_sha256"][:12], result["size"],
    )  # fmt: skip
    _log.info("written to %s: %s", workdir, ", ".join(sorted(p.name for p in workdir.iterdir())))


def main(argv: list[str], more_callbacks: Sequence[keras.callbacks.Callback] = (), tap: Tap | None = None) -> int:
    """Runs the job; `more_callbacks` and `tap` as for `run`.

    Returns:
        0 if it trained, 2 if the user can mend what went wrong, 1 if the replicas diverged, 85 if a signal asked it to
        leave: then the same command goes on; in an elastic job 86 if it needs another number of ranks.
    """
    try:
        with preemption.leaving_at_once():
            run(train_flags.parse(argv), more_callbacks, tap)
    except preemption.Preempted as left:
        if not left.agreed:
            watchdog.fail(left, preemption.EXIT_CODE)
        return preemption.EXIT_CODE
    except (UsageError, ReplicasDiverged) as error:
        logging.getLogger("hvdkit").debug("left with", exc_info=True)
        if world.launched_rank() == 0:  # all ranks leave with the same sentence; one is enough
            print(f"hvdkit.train: {error}", file=sys.stderr, flush=True)
        if isinstance(error, UnfitSizeError) and os.environ.get("HVDKIT_ELASTIC"):
            return _SIZE_UNFIT
        return 2 if isinstance(error, UsageError) else 1
    finally:
        job.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
