"""The flags of the main job: their groups, their help, and the checks that do not need TensorFlow."""

import argparse
import ast
import dataclasses
import re
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from hvdkit_models.recipe import Recipe

from hvdkit import outcome
from hvdkit.command.arguments import Parser, as_absl_has_them, dashed
from hvdkit.errors import UnfitSizeError, UsageError

STRATEGIES = ("single", "horovod", "mirrored", "multiworker", "tensor", "branches", "pipeline")
TASKS = ("auto", "classification", "regression", "multilabel")
COMPRESSIONS = ("none", "fp16", "bf16", "int8", "onebit", "topk", "powersgd")
_WHAT, _HOW, _MACHINE, _OUTPUT = "What to train", "How to train it", "On which machine", "What to write"
_RESUME = "Checkpoints"
_GROUPS = (_WHAT, _HOW, _MACHINE, _OUTPUT, _RESUME)
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
}
_LARGEST_VALIDATION = 0.5  # share of the training examples
_HELP = {  # brackets: what applies without the flag, if its default is not a fixed value
    "model": (
        "a model of the folder models/, or your own, path/to/file.py:function; images are float32 from 0 to 255, "
        "features are float32 as they are in the data"
    ),
    "model_args": "arguments of the model's function, such as width=256,depth=6 [its defaults]",
    "dataset": (
        "digits or breast_cancer (embedded), a TFDS name, or a path: a prepared TFDS directory, a folder "
        "train/CLASS/*.png or CLASS/*.png, a table (.csv, .jsonl, .parquet, .arrow) with a column label and either a "
        "column text, or numbers and categories in all other columns, arrays (.npz, .npy) named x_train, y_train, "
        "x_test, y_test or x, y, or records (.tfrecord, .array_record) of tf.train.Example. Made-up data: "
        "synthetic:HxWxC:CLASSES:EXAMPLES. Your own, path/to/file.py:function, which returns (train, test), (train, "
        "validation, test) or a dict with these names, each x, (x, y) or (x, y, sample_weight) with arrays in any "
        "tuples and dicts, a tf.data.Dataset, a PyDataset, a loader of Grain or PyTorch, or a generator's function, "
        "uncalled: all of it on each rank, in the same order, as hvdkit divides, shuffles and batches it; arrays stay "
        "in memory, the others are read again each epoch; it may take seed; --model must return a compiled model. "
        "To predict the next byte: pydoc (embedded), or text:PATH of a file or a folder [the recipe's]"
    ),
    "task": (
        "what to learn from labels: one of several classes, measured values (regression), or any number of labels of "
        "each example (multilabel); auto decides between classes and lists of labels"
    ),
    "label_column": "a table's column of labels [label, class, category, target, ...]",
    "text_column": "a table's column of texts [text, sentence, review, content, input]",
    "feature_columns": "NAME,NAME: a table's columns of numbers and categories [without texts, all but the label]",
    "encoding": "of a text file with a table, such as cp1252 [UTF-8, or UTF-16 with a byte order mark]",
    "data_dir": "where TFDS data sets are stored [~/tensorflow_datasets]",
    "download": "let TFDS download a missing data set",
    "image_size": "resize images to this height and width",
    "sequence_length": "tokens of a text, or of a window of it [the recipe's]",
    "fold": (
        "I/K: cut the training split into K folds, test on fold I, counted from 0, and train on the others; the test "
        "split is not used"
    ),
    "strategy": (
        "data parallelism in several processes: horovod, or multiworker (tf.distribute); in one process on this host's "
        "devices: mirrored (tf.distribute). Model parallelism: tensor, branches, or pipeline (by layers)"
    ),
    "replicas": (
        "mirrored: number of devices [all GPUs, or 2 logical CPUs]; single: number of ranks whose data order to imitate"
    ),
    "model_ranks": "tensor, branches, pipeline: ranks that together hold one copy of the model [all]",
    "micro_batches": "pipeline: micro-batches in each batch",
    "schedule": "pipeline: order of forward and backward passes",
    "branches": "branches: a pattern of layer names for each, such as left_,right_ [those that meet in one layer]",
    "epochs": "passes over the training split [the recipe's]",
    "steps": "total steps, instead of epochs",
    "global_batch": "examples per step over all replicas [the recipe's]",
    "local_batch": "examples per step of each replica, instead of --global-batch",
    "optimizer": "a Keras optimizer: adam, or sgd:momentum=0.9,nesterov=True [the recipe's]",
    "learning_rate": (
        "for the given global batch, without scaling [the recipe's rate times --global-batch divided by the recipe's "
        "(linear scaling)]"
    ),
    "lr_schedule": "constant, or cosine decay to zero [the recipe's]",
    "warmup_epochs": (
        "epochs in which the learning rate rises from 1/replicas of its value [the recipe's; otherwise, if the rate "
        "was scaled up, a tenth of all epochs, 5 at most]"
    ),
    "compression": (
        "gradient compression (horovod): none, fp16, bf16, int8, onebit, topk:fraction=0.01, powersgd:rank=4"
    ),
    "compression_guard": (
        "number of uncompressed steps at the start; if the loss rises after them, compression is switched off [0: "
        "compress all steps]"
    ),
    "local_steps": (
        "each rank trains alone for this many steps, then the models are synchronized (horovod; for slow links)"
    ),
    "fragments": (
        "with --local-steps: divide the weights into so many parts, which are synchronized at different steps while "
        "training continues (streaming DiLoCo)"
    ),
    "outer_learning_rate": (
        "with --local-steps: rate for the ranks' averaged change; 1 with --outer-momentum=0 averages the models"
    ),
    "outer_momentum": "with --local-steps: Nesterov momentum for the ranks' averaged change",
    "shard_optimizer": "each rank stores only its shard of the optimizer's state (horovod)",
    "precision": "Keras' dtype policy",
    "sampling": "draw small classes more often (over), or large ones less often (under)",
    "class_weights": "weight examples so that every class counts the same",
    "seed": "seed of weights, data order and dropout",
    "threads": "TensorFlow threads of each rank [its share of the cores]",
    "cache_gb": "cache a rank's decoded examples in memory up to this size; a larger shard is read again each epoch",
    "steps_per_execution": (
        "steps that run without returning to Python [the largest divisor of an epoch's steps, up to 16]"
    ),
    "workdir": "where this run writes [runs/MODEL-DATASET-TIME]",
    "overwrite": "write into a workdir that has a finished run",
    "eval_every": "evaluate on the validation split every N epochs",
    "validation": (
        "what models are compared on: yes, the data set's own validation split, or else a tenth of the training "
        "examples; a share of these, such as 0.2; no, the test split; auto, yes with --eval-every or --keep-best"
    ),
    "monitor": (
        "a metric of the model, without val_: decides what --keep-best keeps and when --early-stopping stops, and is "
        "shown in results and in tables [loss; the task's in results]"
    ),
    "monitor_mode": "whether less (min) or more (max) of --monitor is better; needed only if it cannot be known",
    "early_stopping": (
        "stop after so many evaluations (--eval-every), or else epochs, in which --monitor has not improved"
    ),
    "tensorboard": "write TensorBoard logs",
    "profile": "START:STOP, the steps to profile on all ranks into workdir/profile; auto is 32:96",
    "resume": (
        "auto resumes from the newest intact checkpoint of the workdir, if there is one; never starts from the "
        "beginning; or the path of a checkpoint, or of another run's workdir"
    ),
    "checkpoint_every": "a number of steps, epoch, or never",
    "keep": "how many of the newest checkpoints to keep",
    "keep_best": (
        "how many of the best to keep in addition, by --monitor on the validation split (--eval-every), or else in "
        "training"
    ),
    "checkpoint_error": "when a checkpoint cannot be written: warn and continue training, or stop",
}


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
    sampling: str
    class_weights: bool
    seed: int
    threads: int | None
    cache_gb: float
    steps_per_execution: int | None
    workdir: str | None
    overwrite: bool
    eval_every: int
    monitor: str | None
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
        return _model_arguments(self.model_args or "")

    @property
    def folding(self) -> tuple[int, int] | None:
        """The fold to test on, and the number of folds; None without --fold, or if its value is not valid."""
        match = re.fullmatch(r"(\d+)/(\d+)", self.fold or "")
        fold, folds = (int(match[1]), int(match[2])) if match else (0, 0)
        return (fold, folds) if folds >= 2 and fold < folds else None

    @property
    def validates(self) -> bool:
        """Whether models are compared on a validation split. With --fold, the fold serves as one."""
        is_chosen = bool(self.eval_every or self.keep_best) if self.validation == "auto" else self.validation != "no"
        return is_chosen and not self.fold

    @property
    def validation_share(self) -> float | None:
        """The share of the training examples to validate on; None if it was not given."""
        return None if self.validation in ("auto", "yes", "no") else float(self.validation)


def define() -> None:
    """Defines the flags, in groups."""

    def add(define_flag: Any, group: str, name: str, default: Any, *choices: Any, **limits: Any) -> None:
        define_flag(name, default, *choices, _HELP[name], module_name=group, **limits)

    string, integer, number = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    boolean, enum = flags.DEFINE_boolean, flags.DEFINE_enum
    add(string, _WHAT, "model", "mnist_mlp")
    add(string, _WHAT, "model_args", None)
    add(string, _WHAT, "dataset", None)
    add(enum, _WHAT, "task", "auto", TASKS)
    add(string, _WHAT, "label_column", None)
    add(string, _WHAT, "text_column", None)
    add(string, _WHAT, "feature_columns", None)
    add(string, _WHAT, "encoding", None)
    add(string, _WHAT, "data_dir", None)
    add(boolean, _WHAT, "download", False)
    add(integer, _WHAT, "image_size", None, lower_bound=1)
    add(integer, _WHAT, "sequence_length", None, lower_bound=2)
    add(string, _WHAT, "fold", None)
    add(string, _WHAT, "validation", "auto")

    add(enum, _HOW, "strategy", "horovod", STRATEGIES)
    add(integer, _HOW, "replicas", None, lower_bound=1)
    add(integer, _HOW, "model_ranks", None, lower_bound=1)
    add(integer, _HOW, "micro_batches", 4, lower_bound=1)
    add(enum, _HOW, "schedule", "1f1b", ("1f1b", "gpipe"))
    add(string, _HOW, "branches", None)
    add(integer, _HOW, "epochs", None, lower_bound=1)
    add(integer, _HOW, "steps", None, lower_bound=1)
    add(integer, _HOW, "global_batch", None, lower_bound=1)
    add(integer, _HOW, "local_batch", None, lower_bound=1)
    add(string, _HOW, "optimizer", None)
    add(number, _HOW, "learning_rate", None, lower_bound=0.0)
    add(enum, _HOW, "lr_schedule", None, ("constant", "cosine"))
    add(number, _HOW, "warmup_epochs", None, lower_bound=0.0)
    add(string, _HOW, "compression", "none")
    add(integer, _HOW, "compression_guard", 0, lower_bound=0)
    add(integer, _HOW, "local_steps", None, lower_bound=1)
    add(integer, _HOW, "fragments", 1, lower_bound=1)
    add(number, _HOW, "outer_learning_rate", 0.7, lower_bound=1e-9)
    add(number, _HOW, "outer_momentum", 0.9, lower_bound=0.0, upper_bound=0.999)
    add(boolean, _HOW, "shard_optimizer", False)
    add(enum, _HOW, "precision", "float32", ("float32", "mixed_float16", "mixed_bfloat16"))
    add(enum, _HOW, "sampling", "none", ("none", "over", "under"))
    add(boolean, _HOW, "class_weights", False)
    add(integer, _HOW, "seed", 0, lower_bound=0, upper_bound=2**31)

    add(integer, _MACHINE, "threads", None, lower_bound=1)
    add(number, _MACHINE, "cache_gb", 2.0, lower_bound=0.0)
    add(integer, _MACHINE, "steps_per_execution", None, lower_bound=1)

    add(string, _OUTPUT, "workdir", None)
    add(boolean, _OUTPUT, "overwrite", False)
    add(integer, _OUTPUT, "eval_every", 0, lower_bound=0)
    add(string, _OUTPUT, "monitor", None)
    add(enum, _OUTPUT, "monitor_mode", "auto", ("auto", "min", "max"))
    add(integer, _OUTPUT, "early_stopping", None, lower_bound=1)
    add(boolean, _OUTPUT, "tensorboard", True)
    add(string, _OUTPUT, "profile", None)

    add(string, _RESUME, "resume", "auto")
    add(string, _RESUME, "checkpoint_every", "epoch")
    add(integer, _RESUME, "keep", 3, lower_bound=1)
    add(integer, _RESUME, "keep_best", 0, lower_bound=0)
    add(enum, _RESUME, "checkpoint_error", "warn", ("warn", "stop"))


def _define_once() -> None:
    if not flags.FLAGS.find_module_defining_flag("model"):
        define()


def spelled(arguments: Sequence[str]) -> list[str]:
    """The same flags as absl spells them: with underscores, and nothing between `no` and a switch's name."""
    _define_once()
    return as_absl_has_them(arguments, _known)


def _known(name: str) -> tuple[str, bool] | None:
    if name in flags.FLAGS:
        return name, not flags.FLAGS[name].boolean
    positive = name.removeprefix("no").lstrip("_")
    if name.startswith("no") and positive in flags.FLAGS and flags.FLAGS[positive].boolean:
        return f"no{positive}", False
    return None


def _with_dashes(message: str) -> str:
    return re.sub(r"--\w+", lambda flag: dashed(flag[0]), message)


def parser() -> Parser:
    """The flags as argparse has them: for completion in shells."""
    _define_once()
    made = Parser("train")
    for title in _GROUPS:
        group = made.add_argument_group(title)
        for flag in flags.FLAGS.get_flags_for_module(title):
            # argparse reads % in a help text as a format.
            given: dict[str, Any] = {"help": flag.help.replace("%", "%%")}
            if flag.boolean:
                given["action"] = argparse.BooleanOptionalAction
            elif hasattr(flag.parser, "enum_values"):
                given["choices"] = flag.parser.enum_values
            elif flag.name in ("workdir", "data_dir"):
                given["metavar"] = "DIR"
            group.add_argument(f"--{dashed(flag.name)}", **given)
    return made


def parse(argv: list[str]) -> Config:
    """Parses the command line. For `--help` prints the help and exits with 0.

    Raises:
        UsageError: a flag or a value is wrong, or two exclude each other.
    """
    _define_once()
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()  # forgets an earlier command line
    if any(a in ("--help", "-h", "-help", "--helpfull") for a in argv[1:]):
        print(help_text())
        sys.exit(0)
    try:
        rest = flags.FLAGS([*argv[:1], *spelled(argv[1:])])[1:]
    except flags.Error as error:
        raise UsageError(f"{_with_dashes(str(error)).rstrip('.')}. `--help` lists all flags.") from None
    if rest:
        raise UsageError(f"{rest[0]!r} is not a flag; flags have the form --name=value. `--help` lists all.")
    config = Config(**{field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Config)})
    _check(config)
    return config


def parse_for_one_strategy(argv: list[str]) -> Config:
    """Parses the command line of a training, whose strategy must have a use for each flag.

    Jobs that train by several strategies, such as `compare`, take flags for each of them: they use `parse`.

    Raises:
        UsageError: see `parse`; or a flag belongs to another strategy or option.
    """
    config = parse(argv)
    _check_strategy(config)
    return config


def check(given: Sequence[str], one_strategy: bool = False) -> list[str]:
    """Checks flags of the training that another job passes on, before that job starts anything.

    Args:
        given: the flags, spelled in any way.
        one_strategy: whether the job trains by the strategy of these flags only.

    Returns:
        The flags as absl has them.

    Raises:
        UsageError: see `parse` and `parse_for_one_strategy`.
    """
    (parse_for_one_strategy if one_strategy else parse)(["hvdkit.train", *given])
    return spelled(list(given))


def _check(config: Config) -> None:
    """Raises a `UsageError` if flags exclude each other, or if a value is wrong in a way that absl does not check."""
    for one, other in (
        ("epochs", "steps"),
        ("global_batch", "local_batch"),
        ("text_column", "feature_columns"),
    ):
        if getattr(config, one) is not None and getattr(config, other) is not None:
            raise UsageError(f"--{dashed(one)} and --{dashed(other)} exclude each other: give one of them.")
    _model_arguments(config.model_args or "")
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
    if config.profile not in (None, "auto") and not re.fullmatch(r"\d+:\d+", config.profile or ""):
        raise UsageError(
            f"--profile={config.profile} is not a range of steps. The form is START:STOP, as in 32:96, or auto."
        )
    if config.profile and config.strategy in ("mirrored", "multiworker"):
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


def _check_strategy(config: Config) -> None:
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


def _model_arguments(text: str) -> dict[str, Any]:
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


def help_text() -> str:
    """All flags by group, with their defaults."""
    lines = [
        "Trains a Keras 3 model on real data: hvdkit train [flags], or on N ranks: launch/local.sh -np N [flags]",
        "",
    ]
    for group in _GROUPS:
        lines += [f"{group}:"]
        for flag in flags.FLAGS.get_flags_for_module(group):
            default = "" if flag.default is None else f" [{flag.default_as_str.strip(chr(39))}]"
            choices = f" ({'|'.join(flag.parser.enum_values)})" if hasattr(flag.parser, "enum_values") else ""
            switch = "[no-]" if flag.boolean else ""
            lines += [f"  --{switch}{dashed(flag.name)}{choices}", f"      {flag.help}{default}"]
        lines += [""]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Checks the flags before any rank starts: `python -m hvdkit.train.flags [flags]`; exit code 2 if one is wrong."""
    try:
        parse_for_one_strategy(argv)
    except UsageError as error:
        print(f"hvdkit.train: {error}", file=sys.stderr)
        return outcome.USAGE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
