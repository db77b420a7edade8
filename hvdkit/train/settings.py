"""What a training is told: the flags' values as they were given, and those with all that was left open filled in."""

import ast
import dataclasses
import re
from typing import Any

from hvdkit_models.recipe import Recipe

from hvdkit.command.arguments import dashed
from hvdkit.errors import UnfitSizeError, UsageError

STRATEGIES = ("single", "horovod", "mirrored", "multiworker", "tpu", "tensor", "branches", "pipeline")
TASKS = ("auto", "classification", "regression", "multilabel")
AUGMENTATIONS = ("flip", "crop", "rand", "mixup", "cutmix")
COMPRESSIONS = ("none", "fp16", "bf16", "int8", "onebit", "topk", "powersgd")


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags' values; None if the recipe or the job decides. `config.json` has the values that were used."""

    model: str
    model_args: str | None
    dataset: str | None
    task: str
    label_column: str | None
    text_column: str | None
    feature_columns: str | None
    encoding: str | None
    data_dir: str | None
    download: bool
    image_size: int | None
    sequence_length: int | None
    fold: str | None
    validation: str
    strategy: str
    replicas: int | None
    model_ranks: int | None
    micro_batches: int
    schedule: str
    branches: str | None
    epochs: int | None
    steps: int | None
    global_batch: int | None
    local_batch: int | None
    optimizer: str | None
    learning_rate: float | None
    lr_schedule: str | None
    warmup_epochs: float | None
    compression: str
    compression_guard: int
    local_steps: int | None
    fragments: int
    outer_learning_rate: float
    outer_momentum: float
    shard_optimizer: bool
    precision: str
    long_tail: float | None
    sampling: str
    class_weights: bool
    effective_number: float | None
    focal: float | None
    augment: str | None
    teacher: str | None
    temperature: float
    student_loss_weight: float
    seed: int
    threads: int | None
    cache_gb: float
    steps_per_execution: int | None
    workdir: str | None
    overwrite: bool
    eval_every: int
    monitor: str | None
    evaluator: str | None
    monitor_mode: str
    early_stopping: int | None
    tensorboard: bool
    profile: str | None
    resume: str
    checkpoint_every: str
    keep: int
    keep_best: int
    checkpoint_error: str

    @property
    def checkpoint_steps(self) -> int | str:
        """Steps between checkpoints, or "epoch", or "never"."""
        return int(self.checkpoint_every) if self.checkpoint_every.isdigit() else self.checkpoint_every

    @property
    def model_arguments(self) -> dict[str, Any]:
        """Arguments for the function that builds the model, as the user gave them."""
        return parse_model_arguments(self.model_args or "")

    @property
    def folding(self) -> tuple[int, int] | None:
        """The fold to test on, and the number of folds; None without --fold, or if its value is not valid."""
        match = re.fullmatch(r"(\d+)/(\d+)", self.fold or "")
        fold, folds = (int(match[1]), int(match[2])) if match else (0, 0)
        return (fold, folds) if folds >= 2 and fold < folds else None

    @property
    def augmentations(self) -> tuple[str, ...]:
        """The names in --augment."""
        return tuple(name.strip() for name in (self.augment or "").split(",") if name.strip())

    @property
    def one_hot_labels(self) -> bool:
        """Whether labels become probabilities of classes, which mixing and the focal loss need."""
        return self.focal is not None or bool({"mixup", "cutmix"} & set(self.augmentations))

    @property
    def validates(self) -> bool:
        """Whether models are compared on a validation split. With --fold, the fold serves as one."""
        is_chosen = bool(self.eval_every or self.keep_best) if self.validation == "auto" else self.validation != "no"
        return is_chosen and not self.fold

    @property
    def validation_share(self) -> float | None:
        """The share of the training examples to validate on; None if it was not given."""
        return None if self.validation in ("auto", "yes", "no") else float(self.validation)


@dataclasses.dataclass(frozen=True)
class Settings(Config):
    """A `Config` in which every value that training needs is set."""

    dataset: str
    sequence_length: int
    replicas: int
    epochs: int
    global_batch: int
    local_batch: int
    optimizer: str
    learning_rate: float
    lr_schedule: str
    warmup_epochs: float


def resolve(config: Config, recipe: Recipe, replicas: int) -> Settings:
    """Sets what the flags leave open, from the recipe and the number of replicas.

    Raises:
        UnfitSizeError: the global batch cannot be divided over the replicas.
    """
    global_batch = config.local_batch * replicas if config.local_batch else config.global_batch or recipe.global_batch
    if global_batch % replicas:
        below = global_batch - global_batch % replicas
        raise UnfitSizeError(
            f"A global batch of {global_batch} cannot be divided evenly over {replicas} replicas. Use --global-batch="
            f"{below or replicas} or {below + replicas}, or give --local-batch instead."
        )
    scale = 1.0 if config.learning_rate is not None else global_batch / recipe.global_batch
    rate = recipe.learning_rate * scale if config.learning_rate is None else config.learning_rate
    epochs = config.epochs or recipe.epochs
    warmup = config.warmup_epochs
    if replicas == 1:
        warmup = 0.0  # warm-up starts at 1/replicas of the rate, which is the rate itself
    elif warmup is None:
        warmup = recipe.warmup_epochs or (min(5.0, epochs / 10) if scale > 1 else 0.0)
    decided = {
        "dataset": config.dataset or recipe.dataset,
        "sequence_length": config.sequence_length or recipe.sequence_length,
        "optimizer": config.optimizer or recipe.optimizer,
        "lr_schedule": config.lr_schedule or recipe.lr_schedule,
        "learning_rate": rate,
        "warmup_epochs": warmup,
        "epochs": epochs,
        "replicas": replicas,
        "global_batch": global_batch,
        "local_batch": global_batch // replicas,
    }
    return Settings(**{**vars(config), **decided})


def leave_optimizer_to_model(config: Config, settings: Settings, model: str, rate: float) -> Settings:
    """The settings for a model that its function has compiled, with its own optimizer and learning rate.

    Raises:
        UsageError: a flag that would change them was given.
    """
    names = ("optimizer", "learning_rate", "lr_schedule", "warmup_epochs")
    given = [name for name in names if getattr(config, name) is not None]
    if given:
        raise UsageError(
            f"--{dashed(given[0])} was given, but the model {model} is compiled by its function, with an optimizer of "
            f"its own. Leave the flag out, or return the model uncompiled."
        )
    return dataclasses.replace(
        settings, optimizer="the model's", learning_rate=rate, lr_schedule="constant", warmup_epochs=0.0
    )


def parse_model_arguments(text: str) -> dict[str, Any]:
    """Parses `width=256,depth=6` like the arguments of a Python call; a bare name is a string, as in `norm=layer`."""
    try:
        call = ast.parse(f"build({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(word.arg is None for word in call.keywords):
            raise ValueError("an argument has no name")
        if len({word.arg for word in call.keywords}) < len(call.keywords):
            raise ValueError("an argument is given twice")
        return {
            str(word.arg): word.value.id if isinstance(word.value, ast.Name) else ast.literal_eval(word.value)
            for word in call.keywords
        }
    except (SyntaxError, ValueError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error).partition(":")[0]
        raise UsageError(
            f"--model-args={text} cannot be read ({reason}). The form is name=value,name=value, as in "
            f"width=256,depth=6, with numbers, names, or Python's tuples, as in hidden=(128,64)."
        ) from None
