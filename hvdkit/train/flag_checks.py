"""Which flags exclude each other, and which strategy has a use for which: checks beyond absl's, without TensorFlow."""

import re

from absl import flags

from hvdkit.command.arguments import dashed
from hvdkit.errors import UsageError
from hvdkit.train.settings import AUGMENTATIONS, COMPRESSIONS, Config, parse_model_arguments

_DIVIDING = ("tensor", "branches", "pipeline")
_BELONGS_TO = {  # flags that the other strategies have no use for
    "compression": ("horovod", *_DIVIDING),
    "compression_guard": ("horovod",),
    "local_steps": ("horovod",),
    "shard_optimizer": ("horovod",),
    "model_ranks": _DIVIDING,
    "micro_batches": ("pipeline",),
    "schedule": ("pipeline",),
    "branches": ("branches",),
    "teacher": ("horovod", "single"),
}
_LARGEST_VALIDATION = 0.5  # share of the training examples


def check(config: Config) -> None:
    """Raises a `UsageError` if flags exclude each other, or if a value is wrong in a way that absl does not check."""
    for one, other in (
        ("epochs", "steps"),
        ("global_batch", "local_batch"),
        ("text_column", "feature_columns"),
        ("effective_number", "class_weights"),
        ("teacher", "effective_number"),  # Keras' Distiller does not weigh examples
        ("teacher", "class_weights"),
    ):
        if not any(getattr(config, name) is None or getattr(config, name) is False for name in (one, other)):
            raise UsageError(f"--{dashed(one)} and --{dashed(other)} exclude each other: give one of them.")
    parse_model_arguments(config.model_args or "")
    name, _, arguments = config.compression.partition(":")
    if name not in COMPRESSIONS or (arguments and not re.fullmatch(r"\w+=[\d.e-]+", arguments)):
        raise UsageError(
            f"--compression={config.compression} is unknown. Use one of {', '.join(COMPRESSIONS)}, where topk may have "
            f"a fraction and powersgd a rank: topk:fraction=0.01, powersgd:rank=4."
        )
    if config.compression_guard and name in COMPRESSIONS[:3]:
        raise UsageError(f"--compression-guard has nothing to switch off with --compression={config.compression}.")
    if config.shard_optimizer and (name != "none" or config.local_steps):
        other = "--local-steps" if config.local_steps else "--compression"
        raise UsageError(f"--shard-optimizer and {other} exclude each other: give one of them.")
    _check_fragments(config.fragments, config.local_steps, config.compression)
    if config.fold is not None and not config.folding:
        raise UsageError(
            f"--fold={config.fold} is not FOLD/FOLDS with two folds or more, numbered from 0: the first of five is "
            f"0/5, and the last 4/5."
        )
    _check_validation(config.validation, config.fold)
    _check_monitor(config.monitor or "")
    _check_augment(config)
    if config.profile not in (None, "auto") and not re.fullmatch(r"\d+:\d+", config.profile or ""):
        raise UsageError(
            f"--profile={config.profile} is not a range of steps. The form is START:STOP, as in 32:96, or auto."
        )
    if config.profile and config.strategy in ("mirrored", "multiworker", "tpu"):
        raise UsageError(
            f"--profile does not see inside tf.distribute. Use --strategy=horovod or single, or leave it out with "
            f"--strategy={config.strategy}."
        )
    if config.checkpoint_steps not in ("epoch", "never") and not (
        isinstance(config.checkpoint_steps, int) and config.checkpoint_steps
    ):
        raise UsageError(
            f"--checkpoint-every={config.checkpoint_every} is neither a number of steps, 1 or more, nor epoch or never."
        )


def check_strategy(config: Config) -> None:
    """Raises a `UsageError` if the strategy has no use for a flag, or what the flag changes was not asked for."""
    for name, strategies in _BELONGS_TO.items():
        if getattr(config, name) != flags.FLAGS[name].default and config.strategy not in strategies:
            raise UsageError(
                f"--{dashed(name)} has no use with --strategy={config.strategy}: it belongs to "
                f"{' and '.join(f'--strategy={s}' for s in strategies)}. Leave it out, or choose another strategy."
            )
    for name in ("outer_learning_rate", "outer_momentum"):
        if getattr(config, name) != flags.FLAGS[name].default and not config.local_steps:
            raise UsageError(
                f"--{dashed(name)} changes the synchronization of --local-steps, which was not given. Give "
                f"--local-steps, too, or leave it out."
            )
    for name in ("temperature", "student_loss_weight"):
        if getattr(config, name) != flags.FLAGS[name].default and not config.teacher:
            raise UsageError(
                f"--{dashed(name)} is for learning from a --teacher, which was not given. Give one, or leave it out."
            )
    if config.strategy in _DIVIDING and config.compression.partition(":")[0] not in COMPRESSIONS[:3]:
        raise UsageError(
            f"--strategy={config.strategy} and --compression={config.compression} exclude each other: of the "
            f"compressions, fp16 and bf16 work with a divided model."
        )
    if config.local_steps and "gradient_accumulation_steps" in (config.optimizer or ""):
        raise UsageError(
            f"--local-steps={config.local_steps} and --optimizer={config.optimizer} exclude each other: a rank that "
            f"trains alone accumulates nothing for others. Leave gradient_accumulation_steps out, and give more "
            f"--local-steps."
        )


def _check_validation(validation: str, fold: str | None) -> None:
    """Raises a `UsageError` if models cannot be compared on such a validation split."""
    is_share = re.fullmatch(r"0?\.\d+", validation) and 0 < float(validation) <= _LARGEST_VALIDATION
    if validation not in ("auto", "yes", "no") and not is_share:
        raise UsageError(
            f"--validation={validation} is none of auto, yes and no, and no share of the training examples from 0 to "
            f"{_LARGEST_VALIDATION:g}, such as 0.1."
        )
    if fold and validation not in ("auto", "no"):
        raise UsageError(
            f"--fold={fold} and --validation={validation} exclude each other: the fold is what models are compared on."
        )


def _check_monitor(monitor: str) -> None:
    """Raises a `UsageError` if the metric to monitor is named with its split."""
    if monitor.startswith("val_"):
        raise UsageError(
            f"--monitor={monitor} names the metric with its split, which follows from --eval-every. Write "
            f"--monitor={monitor.removeprefix('val_')}."
        )


def _check_augment(config: Config) -> None:
    """Raises a `UsageError` if there is no such augmentation."""
    unknown = sorted(set(config.augmentations) - set(AUGMENTATIONS))
    if unknown:
        raise UsageError(
            f"--augment={config.augment}: {unknown[0]!r} is unknown. Name some of {', '.join(AUGMENTATIONS)}."
        )


def _check_fragments(fragments: int, local_steps: int | None, compression: str) -> None:
    """Raises a `UsageError` if the model cannot be synchronized in so many fragments."""
    if fragments == 1:
        return
    if not local_steps:
        raise UsageError(
            f"--fragments={fragments} divides the synchronization of --local-steps, which was not given: give "
            f"--local-steps, too, for example --local-steps={25 * fragments}."
        )
    if fragments > local_steps:
        raise UsageError(
            f"--fragments={fragments} is more than --local-steps={local_steps}: a step synchronizes one fragment at "
            f"most. Use at most --fragments={local_steps}."
        )
    if compression not in COMPRESSIONS[:3]:
        raise UsageError(
            f"--fragments and --compression={compression} exclude each other: of the compressions, fp16 and bf16 work "
            f"with fragments."
        )
