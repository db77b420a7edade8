"""The main job: trains a Keras model on real data, on any number of ranks.

    python -m hvdkit.train --strategy=single --model=mnist_mlp --dataset=digits
    launch/local.sh -np 2 --model=cifar_cnn --dataset=cifar10 --data_dir=DIR --workdir=DIR

`--help` lists all flags. The training code is the same for every strategy: what differs is behind `strategies`.
"""

import dataclasses
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
import numpy as np
import tensorflow as tf
from hvdkit_models.recipe import Recipe

from hvdkit import artifacts, callbacks, collectives, job, strategies, train_flags, watchdog, world
from hvdkit.agreement import check_equal, together
from hvdkit.checkpoint import preemption, resuming
from hvdkit.checkpoint.store import Checkpoint
from hvdkit.compression import by_name
from hvdkit.data import balance, checks, pipeline
from hvdkit.data.epoch_order import Stretch
from hvdkit.data.sources import Source, open_source
from hvdkit.data.vocabulary import Vocabulary, learn_tokens
from hvdkit.errors import ReplicasDiverged, UnfitSizeError, UsageError
from hvdkit.model import (
    ModelSource,
    build_model,
    check_output,
    ends_in_probabilities,
    find_model,
    make_optimizer,
)
from hvdkit.optimizer import DistributedOptimizer
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
        strategy = strategies.create(config.strategy, config.replicas)

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
    vocabulary = _make_vocabulary(source, recipe, workdir) if source.kind == "text" else None
    data = _read_training_data(settings, strategy, source, vocabulary, found)
    steps_per_epoch = data.steps_per_epoch
    steps = settings.steps or settings.epochs * steps_per_epoch
    test_batches = _read_test_data(settings, strategy, source, vocabulary)

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
    check_equal([w.path for w in model.weights], [collectives.digest([w]) for w in model.weights])
    result = {
        "model": model_source.name,
        "dataset": source.name,
        "strategy": strategy.name,
        "size": strategy.size,
        "global_batch": settings.global_batch,
        "epochs": math.ceil(steps / steps_per_epoch),
        "steps": steps,
        "train_seconds": round(progress.seconds, 3),
        # Too few steps for a rate without the first execution: then with all that it takes to begin.
        "samples_per_second": round(progress.samples_per_second or steps * settings.global_batch / progress.seconds, 1),
        **_wire_bytes(model),
        **_measured(model, history.history, test),
    }
    if strategy.world.is_root:
        _write_artifacts(workdir, model, history.history, steps_per_epoch, settings.eval_every, result)
    collectives.barrier()  # nobody leaves before the artefacts are there: a launcher ends the job with the first to go
    return result


def _wire_bytes(model: keras.Model) -> dict[str, Any]:
    """What a rank sends a step for its dense gradients, and what it would send of them whole."""
    if not isinstance(model.optimizer, DistributedOptimizer) or world.size() == 1:
        return {}
    sent, whole = model.optimizer.wire_bytes(model.trainable_variables)
    return {"wire_bytes_per_step": round(sent), "dense_wire_bytes_per_step": round(whole)}


def _measured(model: keras.Model, history: dict[str, Any], test: dict[str, float]) -> dict[str, Any]:
    return {
        "test_accuracy": test.get("accuracy"),
        "test_loss": test["loss"],
        "train_loss": [float(v) for v in history["loss"]],
        "weights_sha256": collectives.digest(model.weights),
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
        "image_size", "seed", "global_batch", "optimizer", "learning_rate", "lr_schedule", "precision", "sampling",
        "class_weights",
    )  # fmt: skip
    return {name: getattr(settings, name) for name in names}


def _checkpoints(
    settings: Settings,
    strategy: Strategy,
    workdir: Path,
    identity: dict[str, Any],
    found: Checkpoint | None,
    data: "TrainingData",
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


def _make_vocabulary(source: Source, recipe: Recipe, workdir: Path) -> Vocabulary:
    """The root learns the vocabulary, all take it."""
    tokens = learn_tokens(source, recipe.max_tokens) if world.rank() == 0 else None
    vocabulary = Vocabulary(collectives.broadcast_object(tokens, name="vocabulary"), recipe.sequence_length)
    if world.rank() == 0:
        vocabulary.save(workdir / "vocabulary.txt")
        _log.info("vocabulary: %d tokens, texts of %d tokens", vocabulary.size, vocabulary.sequence_length)
    return vocabulary


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """This process's training batches.

    Attributes:
        batches: from the step on at which training begins.
        steps_per_epoch: of all processes.
        spec: of an input.
        epoch: the first epoch.
        handed_over: what other shares have taken of that epoch.
        now: the shares there are now, with no step taken.
        now_rest: the same of the first epoch's rest, if it was handed over.
    """

    batches: tf.data.Dataset
    steps_per_epoch: int
    spec: tf.TensorSpec
    epoch: int
    handed_over: Sequence[Stretch]
    now: Stretch
    now_rest: Stretch

    def stretches(self, epoch: int, step: int) -> list[dict[str, Any]]:
        """Who will have taken the steps of an epoch up to one of them, for a checkpoint."""
        before = list(self.handed_over) if epoch == self.epoch else []
        steps = step - sum(stretch.steps for stretch in before)
        last = dataclasses.replace(self.now_rest if before else self.now, steps=steps)
        return [stretch.to_json() for stretch in ([*before, last] if step else [])]


def _read_training_data(
    settings: Settings,
    strategy: Strategy,
    source: Source,
    vocabulary: Vocabulary | None,
    found: Checkpoint | None,
) -> TrainingData:
    """Reads and checks this process's shares, and finds the step to begin at."""
    with together():
        examples = source.size("train")
        if examples < strategy.size:
            raise UsageError(
                f"{source.name} has {examples} training examples, fewer than {strategy.size} replicas. Start fewer."
            )
        encode = vocabulary.encode if vocabulary else None
        cache = settings.cache_gb * 1e9
        shares = [
            pipeline.read_share(source, "train", share, strategy.size, encode=encode, cache_bytes=cache)
            for share in strategy.shares
        ]
        by_share = [checks.check_share(share, "train", len(source.label_names)) for share in shares]
    everyone = [c for process in collectives.allgather_object(by_share, name="counts") for c in process]
    counts = np.sum(everyone, axis=0)
    sampling = balance.Sampling(settings.sampling, counts)
    with together():
        smallest = min(sampling.size(c) for c in everyone)
        steps_per_epoch = smallest // settings.local_batch
        if not steps_per_epoch:
            raise UsageError(
                f"A local batch of {settings.local_batch} is larger than a share of {smallest} training examples "
                f"({source.name} divided over {strategy.size}). Use a smaller batch, or fewer replicas."
            )
    _describe_data(settings, source, counts, sum(map(sampling.size, everyone)), steps_per_epoch)
    start = pipeline.Start()
    handed_over: list[Stretch] = []
    buffers = _buffers(shares)
    encode = vocabulary.encode if vocabulary else None
    if found:
        start, handed_over = _start(settings, source, shares, buffers, found, steps_per_epoch, encode)
    batches = pipeline.training_batches(
        shares,
        local_batch=settings.local_batch,
        steps_per_epoch=steps_per_epoch,
        seed=settings.seed,
        sampling=sampling,
        class_weights=balance.class_weights(counts) if settings.class_weights else None,
        start=start,
    )
    now = Stretch(strategy.size, 0, buffers)
    now_rest = Stretch(strategy.size, 0, _buffers(start.rest)) if handed_over else now
    spec = checks.input_spec(shares[0])
    return TrainingData(batches, steps_per_epoch, spec, start.epoch, handed_over, now, now_rest)


def _buffers(shares: Sequence[pipeline.Share]) -> tuple[int, ...] | None:
    """The shuffle buffers of all processes' shares, in order; None if they are in memory. A collective call."""
    mine = [share.buffer() for share in shares]
    everyone = [b for process in collectives.allgather_object(mine, name="buffers") for b in process]
    return None if None in everyone else tuple(everyone)


def _start(
    settings: Settings,
    source: Source,
    shares: Sequence[pipeline.Share],
    buffers: Sequence[int] | None,
    found: Checkpoint,
    steps_per_epoch: int,
    encode: pipeline.Encode | None,
) -> tuple[pipeline.Start, list[Stretch]]:
    """Where the data goes on, and who took the steps of that epoch before."""
    epoch, step = found.state["epoch"], found.state["step_in_epoch"]
    stretches = [Stretch.from_json(s) for s in found.state["extra"]["stretches"]]
    if settings.sampling != "none":
        if any(not s.goes_on(shares[0].shares, buffers) for s in stretches):
            _log.warning("With --sampling, another number of replicas goes on in an order of its own.")
        return pipeline.Start(epoch, step), []
    start, handed_over = pipeline.start_of(
        epoch, stretches, source, shares, buffers,
        seed=settings.seed,
        global_batch=settings.global_batch,
        steps_per_epoch=steps_per_epoch,
        encode=encode,
    )  # fmt: skip
    if handed_over:
        _log.info("epoch %d is finished on the examples that it has not seen", epoch + 1)
    return start, handed_over


def _describe_data(settings: Settings, source: Source, counts: np.ndarray, examples: int, steps_per_epoch: int) -> None:
    _log.info("%s: %d training examples: %s", source.name, counts.sum(), balance.describe(counts, source.label_names))
    empty = checks.empty_classes(counts, source.label_names)
    if empty:
        _log.warning("No training example in %d class(es): %s", len(empty), ", ".join(empty[:10]))
    if settings.class_weights:
        weights = ", ".join(f"{w:.3g}" for w in balance.class_weights(counts)[:12])
        _log.info("class weights: %s%s", weights, ", ..." if len(counts) > 12 else "")
    left = examples - steps_per_epoch * settings.global_batch
    _log.info(
        "%d steps an epoch, of %d examples each over %d replica(s)%s",
        steps_per_epoch, settings.global_batch, settings.replicas,
        f"; {left} examples, others each epoch, do not fill a batch" if left else "",
    )  # fmt: skip


def _read_test_data(
    settings: Settings, strategy: Strategy, source: Source, vocabulary: Vocabulary | None
) -> tf.data.Dataset:
    """This process's part of the test split: every example once, over all processes."""
    me = strategy.world
    with together():
        if source.size("test") < me.size:
            raise UsageError(
                f"{source.name} has {source.size('test')} test examples, fewer than {me.size} ranks. Start fewer."
            )
        share = pipeline.read_share(
            source, "test", me.rank, me.size,
            encode=vocabulary.encode if vocabulary else None,
            cache_bytes=settings.cache_gb * 1e9,
        )  # fmt: skip
        checks.check_share(share, "test", len(source.label_names))
        batch = strategy.evaluation_batch(share.size, settings.global_batch)
    return pipeline.evaluation_batches(share, batch)


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
    given: dict[str, Any] = {"input_shape": tuple(spec.shape), "num_classes": len(source.label_names)}
    if vocabulary:
        given |= {"vocabulary_size": vocabulary.size, "sequence_length": vocabulary.sequence_length}
    model = build_model(model_source, given)
    check_output(model, spec, given["num_classes"], model_source.name)
    options: dict[str, Any] = {} if settings.compression == "none" else {"compression": by_name(settings.compression)}
    if settings.local_steps:
        options |= {n: getattr(settings, n) for n in ("local_steps", "outer_learning_rate", "outer_momentum")}
    if model.compiled:
        rate = float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))
        settings = train_flags.leave_optimizer_to_model(config, settings, model_source.name, rate)
        model.optimizer = strategy.distribute(model.optimizer, **options)
    else:
        model.compile(
            strategy.distribute(make_optimizer(settings.optimizer, settings.learning_rate), **options),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=not ends_in_probabilities(model)),
            metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
            jit_compile=False,  # XLA compiles neither Horovod's exchange nor tf.distribute's
        )
    # Keras would build it while it traces the first step, and slots that start from the weights' values
    # (ScheduleFreeAdamW's) would start from 0.
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    return model, settings


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
    _log.info(
        "%s: test accuracy %s, test loss %.4f; %d steps in %.1f s, %s samples/s; weights %s on all %d replica(s)",
        title, "unknown" if accuracy is None else f"{accuracy:.2%}", result["test_loss"], result["steps"],
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
