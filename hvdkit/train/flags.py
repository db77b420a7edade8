"""The flags of the main job: their groups, their help, and what can be checked without loading TensorFlow."""

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
COMPRESSIONS = ("none", "fp16", "bf16", "int8", "onebit", "topk", "powersgd")
_WHAT, _HOW, _MACHINE, _OUTPUT = "What to train", "How to train it", "On which machine", "What to write"
_RESUME = "Checkpoints"
_GROUPS = (_WHAT, _HOW, _MACHINE, _OUTPUT, _RESUME)


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags' values; None where the recipe or the job decides. `config.json` holds them as they were used."""

    model: str
    model_args: str | None
    dataset: str | None
    data_dir: str | None
    download: bool
    image_size: int | None
    sequence_length: int | None
    fold: str | None
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
    tensorboard: bool
    profile: str | None
    resume: str
    checkpoint_every: str
    keep: int
    keep_best: int
    checkpoint_error: str

    @property
    def checkpoint_steps(self) -> int | str:
        """Steps from one checkpoint to the next, or "epoch"."""
        return int(self.checkpoint_every) if self.checkpoint_every.isdigit() else self.checkpoint_every

    @property
    def model_arguments(self) -> dict[str, Any]:
        """Arguments for the function that builds the model, as the user gave them."""
        return _model_arguments(self.model_args or "")

    @property
    def folding(self) -> tuple[int, int] | None:
        """The fold to test on, and how many there are; None without, and where what was given has another form."""
        match = re.fullmatch(r"(\d+)/(\d+)", self.fold or "")
        fold, folds = (int(match[1]), int(match[2])) if match else (0, 0)
        return (fold, folds) if folds >= 2 and fold < folds else None


def define() -> None:
    """Defines the flags, in groups."""

    def add(define_flag: Any, group: str, name: str, default: Any, text: str, *choices: Any, **limits: Any) -> None:
        define_flag(name, default, *choices, text, module_name=group, **limits)

    string, integer, number, boolean, enum = (
        flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float, flags.DEFINE_boolean, flags.DEFINE_enum,
    )  # fmt: skip
    add(string, _WHAT, "model", "mnist_mlp", "a model of the folder models/, or your own: path/to/file.py:function; "
        "images reach it as float32, 0 to 255")  # fmt: skip
    add(string, _WHAT, "model_args", None, "arguments of the model's function, its sizes for example: "
        "width=256,depth=6 [its defaults]")  # fmt: skip
    add(string, _WHAT, "dataset", None, "digits (embedded), a TFDS name, the path of a prepared TFDS directory, of a "
        "folder train/CLASS/*.png, or of a .csv/.tsv with columns text and label; synthetic:HxWxC:CLASSES:EXAMPLES; to "
        "predict the next byte: pydoc (embedded), or text:PATH of a file or folder [the recipe's]")  # fmt: skip
    add(string, _WHAT, "data_dir", None, "where TFDS data sets lie [~/tensorflow_datasets]")
    add(boolean, _WHAT, "download", False, "let TFDS download a data set that is not there")
    add(integer, _WHAT, "image_size", None, "resize images to this height and width", lower_bound=1)
    add(integer, _WHAT, "sequence_length", None, "tokens of a text, or of a window of it [the recipe's]", lower_bound=2)
    add(string, _WHAT, "fold", None, "I/K: cut the training split into K folds, train on all but fold I, from 0, and "
        "test on that one; the test split stays unseen")  # fmt: skip

    add(enum, _HOW, "strategy", "horovod", "how gradients meet: between processes, one a replica, by Horovod or by "
        "tf.distribute (multiworker); or in one process for this host's devices (mirrored). Or how ranks hold a model "
        "between them: by tensor, by branches, or by layers in a pipeline", STRATEGIES)  # fmt: skip
    add(integer, _HOW, "replicas", None, "mirrored: devices to use [all GPUs, or 2 logical CPUs]; single: ranks to "
        "imitate in the order of the data", lower_bound=1)  # fmt: skip
    add(integer, _HOW, "model_ranks", None, "tensor, branches, pipeline: ranks that hold a model between them; the "
        "others hold copies of it [all]", lower_bound=1)  # fmt: skip
    add(integer, _HOW, "micro_batches", 4, "pipeline: parts of a batch that are under way at a time", lower_bound=1)
    add(enum, _HOW, "schedule", "1f1b", "pipeline: of forwards and backwards", ("1f1b", "gpipe"))
    add(string, _HOW, "branches", None, "branches: for each one a pattern of its layers' names, as in left_,right_ "
        "[those that meet in one layer]")  # fmt: skip
    add(integer, _HOW, "epochs", None, "passes over the training split [the recipe's]", lower_bound=1)
    add(integer, _HOW, "steps", None, "steps in all, instead of epochs", lower_bound=1)
    add(integer, _HOW, "global_batch", None, "examples a step over all replicas [the recipe's]", lower_bound=1)
    add(integer, _HOW, "local_batch", None, "examples a step of each replica, instead of global_batch", lower_bound=1)
    add(string, _HOW, "optimizer", None, "a Keras optimizer: adam, or sgd:momentum=0.9,nesterov=True [the recipe's]")
    add(number, _HOW, "learning_rate", None, "for the global batch as it is; without this flag the recipe's rate times "
        "global_batch over the recipe's (linear scaling)", lower_bound=0.0)  # fmt: skip
    add(enum, _HOW, "lr_schedule", None, "constant, or cosine to zero [the recipe's]", ("constant", "cosine"))
    add(number, _HOW, "warmup_epochs", None, "epochs in which the rate rises from 1/replicas of it [the recipe's; a "
        "tenth of all, 5 at most, where the rate was scaled up]", lower_bound=0.0)  # fmt: skip
    add(string, _HOW, "compression", "none", "gradients on the wire (horovod): none, fp16, bf16, int8, onebit, "
        "topk:fraction=0.01, powersgd:rank=4")  # fmt: skip
    add(integer, _HOW, "compression_guard", 0, "dense steps at the beginning; if the loss rises after them, "
        "compression ends [0: compress from the first step to the last]", lower_bound=0)  # fmt: skip
    add(integer, _HOW, "local_steps", None, "each rank trains alone for so many steps, then all agree on one model "
        "(horovod; for slow links)", lower_bound=1)  # fmt: skip
    add(number, _HOW, "outer_learning_rate", 0.7, "of what local steps have moved; 1, with a momentum of 0, is their "
        "mean", lower_bound=1e-9)  # fmt: skip
    add(number, _HOW, "outer_momentum", 0.9, "Nesterov's, of the same", lower_bound=0.0, upper_bound=0.999)
    add(boolean, _HOW, "shard_optimizer", False, "each rank keeps its part of the optimizer's state alone (horovod)")
    add(enum, _HOW, "precision", "float32", "Keras' dtype policy", ("float32", "mixed_float16", "mixed_bfloat16"))
    add(enum, _HOW, "sampling", "none", "draw small classes more often (over), or large ones less (under)",
        ("none", "over", "under"))  # fmt: skip
    add(boolean, _HOW, "class_weights", False, "weigh examples so that every class counts alike")
    add(integer, _HOW, "seed", 0, "of weights, order and dropout", lower_bound=0, upper_bound=2**31)

    add(integer, _MACHINE, "threads", None, "TensorFlow threads of each rank [its share of the cores]", lower_bound=1)
    add(number, _MACHINE, "cache_gb", 2.0, "a rank's decoded examples stay in memory up to this size; a larger share "
        "is read again each epoch", lower_bound=0.0)  # fmt: skip
    add(integer, _MACHINE, "steps_per_execution", None, "steps that run without returning to Python [the largest "
        "divisor of an epoch's steps up to 16]", lower_bound=1)  # fmt: skip

    add(string, _OUTPUT, "workdir", None, "where this run writes [runs/MODEL-DATASET-TIME]")
    add(boolean, _OUTPUT, "overwrite", False, "write into a workdir that has a finished run")
    add(integer, _OUTPUT, "eval_every", 0, "evaluate on the test split every N epochs too, not only at the end",
        lower_bound=0)  # fmt: skip
    add(boolean, _OUTPUT, "tensorboard", True, "write TensorBoard logs")
    add(string, _OUTPUT, "profile", None, "START:STOP, steps of which workdir/profile then tells where the time went, "
        "on all ranks; auto is 32:96")  # fmt: skip

    add(string, _RESUME, "resume", "auto", "auto goes on from the newest intact checkpoint of the workdir, if it has "
        "one; never begins anew; or the path of a checkpoint, or of another run's workdir")  # fmt: skip
    add(string, _RESUME, "checkpoint_every", "epoch", "a number of steps, epoch, or never")
    add(integer, _RESUME, "keep", 3, "how many of the newest checkpoints stay", lower_bound=1)
    add(integer, _RESUME, "keep_best", 0, "how many of the best stay besides, by the test loss (--eval-every) or else "
        "the training loss", lower_bound=0)  # fmt: skip
    add(enum, _RESUME, "checkpoint_error", "warn", "when a checkpoint cannot be written: train on, or stop",
        ("warn", "stop"))  # fmt: skip


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
    """Parses the command line. Prints the help and leaves with 0 for `--help`.

    Raises:
        UsageError: a flag or a value is wrong, or two exclude each other.
    """
    _define_once()
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()  # nothing stays of a command line before this one
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


def _check(config: Config) -> None:
    """Raises a `UsageError` if flags exclude each other, or have a form that their kind does not refuse."""
    for one, other in (("epochs", "steps"), ("global_batch", "local_batch")):
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
    if config.fold is not None and not config.folding:
        raise UsageError(
            f"--fold={config.fold} is not FOLD/FOLDS with two folds or more, numbered from 0: the first of five is "
            f"0/5, and the last 4/5."
        )
    if config.profile not in (None, "auto") and not re.fullmatch(r"\d+:\d+", config.profile or ""):
        raise UsageError(
            f"--profile={config.profile} is no window of steps. The form is START:STOP, as in 32:96, or auto."
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


def _model_arguments(text: str) -> dict[str, Any]:
    """Reads `width=256,depth=6` as Python reads the arguments of a call; a name alone is a text, as in `norm=layer`."""
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
    """A `Config` in which nothing is left open that training needs."""

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
    """Fills in what the flags left open, from the recipe and the number of replicas.

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
        warmup = 0.0  # there is nothing to rise to
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
    """The settings for a model that its function has compiled: its optimizer and learning rate are its own.

    Raises:
        UsageError: a flag was given that would change them.
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
    """Checks flags before any rank has started: `python -m hvdkit.train.flags [flags]`, exit code 2 if one is wrong."""
    try:
        parse(argv)
    except UsageError as error:
        print(f"hvdkit.train: {error}", file=sys.stderr)
        return outcome.USAGE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
