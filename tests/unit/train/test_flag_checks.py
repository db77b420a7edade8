"""Flags that exclude each other, or that the strategy has no use for."""

import pytest

from hvdkit.errors import UsageError
from hvdkit.train import flags as train_flags


def parse(*flags):
    return train_flags.parse(["train", *flags])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--strategy=single --compression=int8", "--compression has no use with --strategy=single: it belongs to"),
        ("--strategy=mirrored --shard_optimizer", "--shard-optimizer has no use with --strategy=mirrored"),
        ("--strategy=multiworker --local_steps=8", "--local-steps has no use with --strategy=multiworker"),
        ("--strategy=multiworker --compression=fp16", "--compression has no use with --strategy=multiworker"),
        ("--strategy=tensor --local_steps=8", "--local-steps has no use with --strategy=tensor"),
        ("--strategy=pipeline --shard_optimizer", "--shard-optimizer has no use with --strategy=pipeline"),
        ("--strategy=branches --compression=topk", "--compression=topk exclude each other: of the compressions, fp16"),
        ("--strategy=tensor --compression_guard=9 --compression=int8", "--compression-guard has no use with"),
        ("--strategy=tensor --micro_batches=2", "it belongs to --strategy=pipeline"),
        ("--strategy=tensor --schedule=gpipe", "--schedule has no use with --strategy=tensor"),
        ("--branches=left,right", "--branches has no use with --strategy=horovod"),
        ("--model_ranks=2", "it belongs to --strategy=tensor and --strategy=branches and --strategy=pipeline"),
        ("--outer_momentum=0", "--outer-momentum changes the synchronization of --local-steps, which was not given"),
        ("--outer_learning_rate=1", "--outer-learning-rate changes the synchronization of --local-steps"),
        ("--local_steps=4 --optimizer=sgd:gradient_accumulation_steps=2", "exclude each other: a rank that trains"),
    ],
)
def test_flags_that_the_strategy_has_no_use_for_are_refused(flags, sentence, capsys):
    assert train_flags.main(["train", *flags.split()]) == 2
    assert sentence in capsys.readouterr().err
    parse(*flags.split())  # which jobs that train by several strategies call


@pytest.mark.parametrize(
    "flags",
    [
        "--local_steps=8 --compression=int8 --outer_momentum=0",
        "--local_steps=8 --fragments=2 --compression=fp16",
        "--compression=powersgd:rank=2 --compression_guard=9",
        "--strategy=pipeline --micro_batches=2 --schedule=gpipe --model_ranks=2 --compression=bf16",
        "--strategy=branches --branches=left,right",
        "--shard_optimizer --optimizer=sgd:gradient_accumulation_steps=2",
    ],
)
def test_flags_that_the_strategy_uses_are_taken(flags):
    assert train_flags.main(["train", *flags.split()]) == 0


@pytest.mark.parametrize("given", ["0", "0.7", "1", "-0.1", "maybe"])
def test_a_wrong_share_to_validate_on_is_refused(given):
    with pytest.raises(UsageError, match=f"--validation={given} is none of auto, yes and no, and no share"):
        train_flags.parse(["hvdkit.train", f"--validation={given}"])
    with pytest.raises(UsageError, match="--fold=0/5 and --validation=0.1 exclude each other"):
        train_flags.parse(["hvdkit.train", "--fold=0/5", "--validation=0.1"])
