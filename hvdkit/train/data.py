"""The data of `hvdkit.train`: reads, checks, describes and batches this process's shards of a source.

A resumed run continues at its position in the data, also with another number of ranks (see `hvdkit.data.epoch_order`).
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from hvdkit_models.recipe import Recipe

from hvdkit import collectives, world
from hvdkit.checkpoint.store import Checkpoint
from hvdkit.collectives.agreement import together
from hvdkit.data import balance, checks, pipeline
from hvdkit.data.augmentation import Augmentation
from hvdkit.data.epoch_order import Stretch
from hvdkit.data.moments import Moments, standardization
from hvdkit.data.shard import even_share
from hvdkit.data.sources import (
    AS_COMPILED,
    CLASSIFICATION,
    REGRESSION,
    FoldSource,
    FunctionSource,
    Schema,
    Source,
    TokenSource,
    long_tailed,
    with_validation,
)
from hvdkit.data.sources.structure import describe
from hvdkit.data.vocabulary import Vocabulary, learn_tokens
from hvdkit.errors import UsageError
from hvdkit.model.adapting import adapt
from hvdkit.strategies import Strategy
from hvdkit.train.settings import Config, Settings

_log = logging.getLogger("hvdkit.train")  # the job's logger
_STANDARDIZED_AT_ONCE = 8192  # examples
_READ_AT_ONCE = 1024  # labels
_COLORS = 3  # channels of an image


def schema_of(config: Config) -> Schema:
    """Returns what the flags say about the data set's columns and labels."""
    features = tuple(name for name in (config.feature_columns or "").split(",") if name)
    return Schema(config.task, config.label_column, config.text_column, features, config.encoding)


def prepared(source: Source, settings: Settings) -> Source:
    """Returns the source with its folds or its validation split, and cut into windows, as the settings require.

    Raises:
        UsageError: a text is too short, or the settings are for classes, which the source does not have.
    """
    flag = _flag_for_classes(settings)
    if flag and _num_classes(source) == 0:
        what = f"{source.name}, for {source.task},"
        if source.kind == "tokens":
            what = f"the windows of {source.name}"
        elif source.task == AS_COMPILED:
            what = f"the examples of {source.name}, a function,"
        changes = "makes classes rare" if flag.startswith("--long-tail") else "balances classes"
        raise UsageError(f"{flag} {changes}, and {what} have none. Leave it out.")
    _check_augmentation(source, settings)
    if settings.folding:
        source = FoldSource(source, *settings.folding)
    elif settings.validates:
        source = with_validation(source, settings.validation_share)
    return source.cut(settings.sequence_length) if isinstance(source, TokenSource) else source


def with_long_tail(source: Source, settings: Settings) -> Source:
    """Returns the source with the training examples that --long-tail leaves. A collective call.

    Each rank reads the labels of a share.

    Raises:
        UsageError: on all ranks, if the last class would have no example.
    """
    if settings.long_tail is None:
        return source
    with together():
        share = even_share(source.size("train"), world.rank(), world.size())
        labels = source.read("train", *share).map(lambda _, label: label).batch(_READ_AT_ONCE)
        mine = [*labels.as_numpy_iterator()]
    everyone = collectives.allgather_object(mine, name="labels")
    with together():
        return long_tailed(source, np.concatenate([part for rank in everyone for part in rank]), settings.long_tail)


def _flag_for_classes(settings: Settings) -> str | None:
    """Returns a flag that only data with classes have a use for, if one was given."""
    given = {
        f"--long-tail={settings.long_tail}": settings.long_tail is not None,
        "--class-weights": settings.class_weights,
        f"--effective-number={settings.effective_number}": settings.effective_number is not None,
        f"--focal={settings.focal}": settings.focal is not None,
        f"--sampling={settings.sampling}": settings.sampling != "none",
    }
    return next((flag for flag, is_given in given.items() if is_given), None)


def _check_augmentation(source: Source, settings: Settings) -> None:
    """Raises a `UsageError` if what is to be augmented are no images, or not such as are needed."""
    names = settings.augmentations
    if not names:
        return
    if source.kind != "image" or source.shape is None:
        raise UsageError(f"--augment={settings.augment} changes images, and {source.name} has none. Leave it out.")
    if settings.one_hot_labels and source.task != CLASSIFICATION:
        raise UsageError(
            f"--augment={settings.augment} mixes classes, and {source.name}, for {source.task}, has none. Leave mixup "
            f"and cutmix out."
        )
    if "rand" in names and source.shape[-1] != _COLORS:
        raise UsageError(
            f"--augment=rand changes colors, and the images of {source.name} have {source.shape[-1]} channel(s). Use "
            f"flip and crop, or images with {_COLORS} channels."
        )


def _augmentation(source: Source, settings: Settings) -> Augmentation | None:
    if not settings.augmentations or source.shape is None:
        return None
    return Augmentation(settings.augmentations, source.shape, settings.seed)


def _weights(counts: np.ndarray, settings: Settings) -> np.ndarray | None:
    """Returns the weights of the classes; None if they weigh alike."""
    if settings.effective_number is not None:
        return balance.effective_weights(counts, settings.effective_number)
    return balance.class_weights(counts) if settings.class_weights else None


def check_equal_data(source: Source) -> None:
    """Compares what the function of `--dataset` returned over all ranks. A collective call.

    Raises:
        UsageError: on all ranks, if it returned other data on one of them: then their shards overlap.
    """
    mine = source.fingerprint() if isinstance(source, FunctionSource) else None
    everyone = collectives.allgather_object(mine, name="fingerprints")
    others = [rank for rank, other in enumerate(everyone) if other != everyone[0]]
    if others:
        raise UsageError(
            f"{source.name} returned other data on rank {others[0]} than on rank 0, and each rank takes its shard of "
            f"what it has. Return the same data in the same order on all ranks: give random numbers and shuffle(n, "
            f"seed=0, reshuffle_each_iteration=False) a fixed seed, or leave the shuffling to hvdkit."
        )


def _num_classes(source: Source) -> int:
    """Returns the number of classes; 0 if the source has none."""
    return len(source.label_names) if source.task == CLASSIFICATION else 0


def make_vocabulary(source: Source, settings: Settings, recipe: Recipe, workdir: Path) -> Vocabulary:
    """Learns the vocabulary of the training split: each rank counts the words of its share. A collective call."""
    tokens = learn_tokens(source, recipe.max_tokens, world.rank(), world.size(), adapt)
    vocabulary = Vocabulary(tokens, settings.sequence_length)
    if world.rank() == 0:
        vocabulary.save(workdir / "vocabulary.txt")
        _log.info("vocabulary: %d tokens, texts of %d tokens", vocabulary.size, vocabulary.sequence_length)
    return vocabulary


def make_standardization(source: Source) -> dict[str, tuple[float, ...]]:
    """Computes means and variances of features and measured values over the training split. A collective call.

    Each rank reads a share. What they find in blocks of examples is added up in the order of the blocks, so that the
    result is the same, bit for bit, on any number of ranks.

    Returns:
        Arguments for the function that builds the model: `feature_mean` and `feature_variance` for features,
        `label_mean` and `label_variance` for measured values.
    """
    values_of: dict[str, Callable[[Any, Any], Any]] = {}
    if source.kind == "features":
        values_of["feature"] = lambda x, _: source.decode(x)
    if source.task == REGRESSION:
        values_of["label"] = lambda _, y: y
    if not values_of:
        return {}
    size, block = source.size("train"), _STANDARDIZED_AT_ONCE
    first, last = even_share(-(-size // block), world.rank(), world.size())
    examples = source.read("train", min(size, first * block), min(size, last * block))
    values = examples.map(lambda x, y: tuple(value(x, y) for value in values_of.values())).batch(block)
    mine = [[Moments.of(value, (0,)) for value in batch] for batch in values.as_numpy_iterator()]
    blocks = [block for rank in collectives.allgather_object(mine, name="standardization") for block in rank]
    found: dict[str, tuple[float, ...]] = {}
    for name, moments in zip(values_of, zip(*blocks, strict=True), strict=True):
        found[f"{name}_mean"], found[f"{name}_variance"] = standardization(moments)
    return found


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """This process's training batches.

    Attributes:
        batches: the batches, starting at the step at which training starts.
        steps_per_epoch: steps per epoch, the same for all processes.
        spec: shape and dtype of an input, or a structure of these.
        label_spec: the same for its label.
        epoch: the first epoch.
        handed_over: the steps of that epoch that were done with other shards.
        now: the current shards, before any step.
        now_rest: the same for the rest of the first epoch, if part of it was done with other shards.
        shares: the shards that the batches are of.
    """

    batches: tf.data.Dataset
    steps_per_epoch: int
    spec: Any
    label_spec: Any
    epoch: int
    handed_over: Sequence[Stretch]
    now: Stretch
    now_rest: Stretch
    shares: Sequence[pipeline.Share]

    def stretches(self, epoch: int, step: int) -> list[dict[str, Any]]:
        """With which shards the first `step` steps of an epoch are done, for a checkpoint."""
        before = list(self.handed_over) if epoch == self.epoch else []
        steps = step - sum(stretch.steps for stretch in before)
        last = dataclasses.replace(self.now_rest if before else self.now, steps=steps)
        return [stretch.to_json() for stretch in ([*before, last] if step else [])]


def read_training_data(
    settings: Settings,
    strategy: Strategy,
    source: Source,
    vocabulary: Vocabulary | None,
    found: Checkpoint | None,
) -> TrainingData:
    """Reads and checks this process's shards, and finds the step to start at."""
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
    everyone = _of_all_shares(strategy.shares, by_share, "counts")
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
        class_weights=_weights(counts, settings),
        start=start,
        augmentation=_augmentation(source, settings),
        one_hot=len(source.label_names) if settings.one_hot_labels else 0,
    )
    now = Stretch(strategy.size, 0, buffers)
    now_rest = Stretch(strategy.size, 0, _buffers(start.rest)) if handed_over else now
    spec, label_spec = checks.specs(shares[0])
    return TrainingData(batches, steps_per_epoch, spec, label_spec, start.epoch, handed_over, now, now_rest, shares)


def _of_all_shares(shares: Sequence[int], mine: Sequence[Any], name: str) -> list[Any]:
    """One value for each shard, in order, from all processes. Several may read the same shard. A collective call."""
    everyone = collectives.allgather_object(list(zip(shares, mine, strict=True)), name=name)
    by_share = {share: value for process in everyone for share, value in process}
    return [by_share[share] for share in sorted(by_share)]


def _buffers(shares: Sequence[pipeline.Share]) -> tuple[int, ...] | None:
    """The shuffle buffer sizes of all shards, in order; None if shards are in memory. A collective call."""
    everyone = _of_all_shares([share.share for share in shares], [share.buffer() for share in shares], "buffers")
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
    """Where the data continues, and with which shards earlier steps of that epoch were done."""
    epoch, step = found.state["epoch"], found.state["step_in_epoch"]
    stretches = [Stretch.from_json(s) for s in found.state["extra"]["stretches"]]
    if settings.sampling != "none":
        if any(not s.goes_on(shares[0].shares, buffers) for s in stretches):
            _log.warning("With --sampling, another number of replicas continues in another data order.")
        return pipeline.Start(epoch, step), []
    start, handed_over = pipeline.start_of(
        epoch,
        stretches,
        source,
        shares,
        buffers,
        seed=settings.seed,
        global_batch=settings.global_batch,
        steps_per_epoch=steps_per_epoch,
        encode=encode,
    )
    if handed_over:
        _log.info("epoch %d continues with the examples that it has not seen yet", epoch + 1)
    return start, handed_over


def _describe_data(settings: Settings, source: Source, counts: np.ndarray, examples: int, steps_per_epoch: int) -> None:
    if isinstance(source, TokenSource):
        train, test, windows = source.length("train"), source.length("test"), counts.sum()
        _log.info(
            f"{source.name}: {train:,} bytes of text to train on, in {windows:,} windows of {source.sequence_length}; "
            f"{test:,} to test on"
        )
    elif source.task == CLASSIFICATION:
        _describe_classes(settings, source, counts)
    elif source.task == AS_COMPILED:
        sizes = ", ".join(f"{source.size(split)} {split}" for split in source.splits)
        _log.info("%s: %s examples: %s", source.name, sizes, describe(source.read("train", 0, 1).element_spec))
    else:
        names = ", ".join(source.label_names[:12]) + (", ..." if len(source.label_names) > 12 else "")
        _log.info("%s: %d training examples for %s: %s", source.name, counts.sum(), source.task, names)
    left = examples - steps_per_epoch * settings.global_batch
    rest = f"; {left} examples, others each epoch, do not fill a batch" if left else ""
    _log.info(
        f"{steps_per_epoch} steps an epoch, of {settings.global_batch} examples each over {settings.replicas} "
        f"replica(s){rest}"
    )


def _describe_classes(settings: Settings, source: Source, counts: np.ndarray) -> None:
    _log.info("%s: %d training examples: %s", source.name, counts.sum(), balance.describe(counts, source.label_names))
    empty = checks.empty_classes(counts, source.label_names)
    if empty:
        _log.warning("No training example in %d class(es): %s", len(empty), ", ".join(empty[:10]))
    found = _weights(counts, settings)
    if found is not None:
        weights = ", ".join(f"{w:.3g}" for w in found[:12])
        _log.info("class weights: %s%s", weights, ", ..." if len(counts) > 12 else "")


def read_evaluation_data(
    settings: Settings, strategy: Strategy, source: Source, vocabulary: Vocabulary | None, split: str
) -> tuple[tf.data.Dataset, pipeline.Share]:
    """The batches of this process's shard of the validation or test split, and the shard itself.

    All shards together have every example once.
    """
    index, shares = strategy.evaluation_share()
    with together():
        if source.size(split) < shares:
            raise UsageError(
                f"{source.name} has {source.size(split)} {split} examples, fewer than {shares} ranks. Start fewer."
            )
        encode = vocabulary.encode if vocabulary else None
        cache = settings.cache_gb * 1e9
        share = pipeline.read_share(source, split, index, shares, encode=encode, cache_bytes=cache)
        checks.check_share(share, split, len(source.label_names))
        batch = strategy.evaluation_batch(share.size, settings.global_batch)
    one_hot = len(source.label_names) if settings.one_hot_labels else 0
    return pipeline.evaluation_batches(share, batch, one_hot), share
