"""The flags of the main job: their groups and their help, and how they are parsed. settings.py has their values."""

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from hvdkit import outcome
from hvdkit.command.arguments import Parser, as_absl_has_them, dashed
from hvdkit.errors import UsageError
from hvdkit.train import flag_checks
from hvdkit.train.settings import STRATEGIES, TASKS, Config

_WHAT, _HOW, _MACHINE, _OUTPUT = "What to train", "How to train it", "On which machine", "What to write"
_RESUME = "Checkpoints"
_GROUPS = (_WHAT, _HOW, _MACHINE, _OUTPUT, _RESUME)
_HELP = {  # brackets: what applies without the flag, if its default is not a fixed value
    "model": (
        "a model of the folder models/, or your own, path/to/file.py:function; images are float32 from 0 to 255, "
        "features are float32 as they are in the data"
    ),
    "model_args": "arguments of the model's function, such as width=256,depth=6 [its defaults]",
    "dataset": (
        "digits, digit_scenes or breast_cancer (embedded), a TFDS name, or a path: a prepared TFDS directory, a folder "
        "train/CLASS/*.png or CLASS/*.png, a folder in COCO's format, a table (.csv, .jsonl, .parquet, .arrow, or a "
        "folder of the last two) with a column label and either a column text, or numbers and categories in all other "
        "columns, arrays (.npz, .npy) named x_train, y_train, x_test, y_test or x, y, or records (.tfrecord, "
        ".array_record) of tf.train.Example. Made-up data: "
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
        "devices: mirrored, or tpu (tf.distribute). Model parallelism: tensor, branches, or pipeline (by layers)"
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
    "long_tail": (
        "RATIO, such as 100: train on fewer examples of each class than of the one before, exponentially, RATIO times "
        "as many of the first as of the last (Cui et al. 2019); the validation and test splits stay as they are"
    ),
    "sampling": "draw small classes more often (over), or large ones less often (under)",
    "class_weights": "weight examples so that every class counts the same",
    "effective_number": (
        "BETA: weight classes by the effective number of their examples (Cui et al. 2019), such as 0.999; weaker than "
        "--class-weights"
    ),
    "focal": "GAMMA: focal loss, such as 2: examples that the model is sure of count less (Lin et al. 2017)",
    "augment": (
        "NAME,NAME of flip, crop, rand (RandAugment), mixup, cutmix: change images at random, another way in each "
        "epoch; the same on any number of ranks, but for the partners that are mixed, which are of one local batch"
    ),
    "teacher": (
        "a .keras file, or the workdir of a finished run: learn from the outputs of this trained model, too (knowledge "
        "distillation, Hinton et al. 2015, by keras.distillation); each rank has a copy of it"
    ),
    "temperature": "with --teacher: divisor of the logits of both models; higher ones tell more of unlikely classes",
    "student_loss_weight": "with --teacher: weight of the labels' loss, from 0 to 1; the rest is the teacher's",
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
    "evaluator": (
        "a class of yours, path/to/file.py:Class, for metrics that need all examples at once: measure(inputs, targets, "
        "outputs) returns what to keep of each example of a batch, summarize(kept) the metrics of all by name, and "
        "metrics are these names [the model's]"
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
    "checkpoint_every": (
        "a number of steps, epoch, or never; epochs so short that checkpoints would take more than 5% of the time are "
        "passed over, but for the last, the best (--keep-best), and where a signal stops the job"
    ),
    "keep": "how many of the newest checkpoints to keep",
    "keep_best": (
        "how many of the best to keep in addition, by --monitor on the validation split (--eval-every), or else in "
        "training"
    ),
    "checkpoint_error": "when a checkpoint cannot be written: warn and continue training, or stop",
}


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
    add(number, _HOW, "long_tail", None, lower_bound=1.0)
    add(enum, _HOW, "sampling", "none", ("none", "over", "under"))
    add(boolean, _HOW, "class_weights", False)
    add(number, _HOW, "effective_number", None, lower_bound=0.0, upper_bound=1 - 1e-9)
    add(number, _HOW, "focal", None, lower_bound=0.0)
    add(string, _HOW, "augment", None)
    add(string, _HOW, "teacher", None)
    add(number, _HOW, "temperature", 3.0, lower_bound=1e-3)
    add(number, _HOW, "student_loss_weight", 0.5, lower_bound=0.0, upper_bound=1.0)
    add(integer, _HOW, "seed", 0, lower_bound=0, upper_bound=2**31)

    add(integer, _MACHINE, "threads", None, lower_bound=1)
    add(number, _MACHINE, "cache_gb", 2.0, lower_bound=0.0)
    add(integer, _MACHINE, "steps_per_execution", None, lower_bound=1)

    add(string, _OUTPUT, "workdir", None)
    add(boolean, _OUTPUT, "overwrite", False)
    add(integer, _OUTPUT, "eval_every", 0, lower_bound=0)
    add(string, _OUTPUT, "monitor", None)
    add(string, _OUTPUT, "evaluator", None)
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
    flag_checks.check(config)
    return config


def parse_for_one_strategy(argv: list[str]) -> Config:
    """Parses the command line of a training, whose strategy must have a use for each flag.

    Jobs that train by several strategies, such as `compare`, take flags for each of them: they use `parse`.

    Raises:
        UsageError: see `parse`; or a flag belongs to another strategy or option.
    """
    config = parse(argv)
    flag_checks.check_strategy(config)
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
