"""The flags of the main job: how they are parsed, and their help."""

import dataclasses

import pytest

from hvdkit.errors import UsageError
from hvdkit.train import flags as train_flags
from hvdkit.train import settings as train_settings


def parse(*flags):
    return train_flags.parse(["train", *flags])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--modle=mnist_mlp"], "Unknown command line flag 'modle'"),
        (["mnist_mlp"], "'mnist_mlp' is not a flag"),
        (["--epochs=0"], "flag --epochs=0: 0 is not"),
        (["--strategy=magic"], "single|horovod|mirrored|multiworker|tpu"),
        (["--epochs=1", "--steps=3"], "--epochs and --steps exclude each other"),
        (["--global_batch=8", "--local_batch=3"], "--global-batch and --local-batch exclude each other"),
        (["--shard_optimizer", "--compression=fp16"], "--shard-optimizer and --compression exclude each other"),
        (["--text-column=a", "--feature-columns=b"], "--text-column and --feature-columns exclude each other"),
        (["--task=ranking"], "auto|classification|regression|multilabel"),
        (["--fragments=4"], "--fragments=4 divides the synchronization of --local-steps, which was not given"),
        (["--fragments=4", "--local_steps=3"], "--fragments=4 is more than --local-steps=3"),
        (["--fragments=2", "--local_steps=8", "--compression=int8"], "--fragments and --compression=int8 exclude"),
    ],
)
def test_wrong_flags(flags, message):
    from absl import flags as absl_flags

    try:
        with pytest.raises(UsageError, match=message.replace("|", r".*")):
            parse(*flags)
    finally:
        absl_flags.FLAGS.unparse_flags()
        for name in (
            "epochs",
            "steps",
            "global_batch",
            "local_batch",
            "shard_optimizer",
            "compression",
            "fragments",
            "local_steps",
            "text_column",
            "feature_columns",
        ):
            absl_flags.FLAGS[name].unparse()


def test_the_help_groups_all_flags():
    text = train_flags.help_text()
    assert [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")] == [
        "What to train:",
        "How to train it:",
        "On which machine:",
        "What to write:",
        "Checkpoints:",
    ]
    assert all(
        f"--{name}" in text or f"--[no-]{name}" in text
        for name in (field.name.replace("_", "-") for field in dataclasses.fields(train_settings.Config))
    )
