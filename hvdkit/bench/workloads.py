"""What is trained when speed is measured: named models with made-up data of the right shape."""

import dataclasses
from pathlib import Path

from hvdkit.errors import UsageError

_EXAMPLES = 8192  # in memory, so that what is measured is training


@dataclasses.dataclass(frozen=True)
class Workload:
    """A training whose speed is measured.

    Attributes:
        name: as it is asked for and shown.
        model: as the flag `--model` of hvdkit.train has it.
        dataset: as the flag `--dataset` has it.
        local_batch: examples a step of each rank.
        optimizer: as the flag `--optimizer` has it.
        flags: further flags of hvdkit.train.
    """

    name: str
    model: str
    dataset: str
    local_batch: int
    optimizer: str = "adam"
    flags: tuple[str, ...] = ()

    def train_flags(self) -> list[str]:
        """The flags of hvdkit.train."""
        return [
            f"--model={self.model}",
            f"--dataset={self.dataset}",
            f"--local_batch={self.local_batch}",
            f"--optimizer={self.optimizer}",
            *self.flags,
        ]


_LARGE = f"{Path(__file__).with_name('large_mlp.py')}:build"
WORKLOADS = {
    w.name: w
    for w in (
        Workload("mlp", "mnist_mlp", f"synthetic:28x28x1:10:{_EXAMPLES}", 64),
        Workload("lenet", "cifar_cnn", f"synthetic:32x32x3:10:{_EXAMPLES}", 64),
        Workload("large_mlp", _LARGE, f"synthetic:28x28x1:10:{_EXAMPLES}", 64),
        Workload("resnet20", "resnet", f"synthetic:32x32x3:10:{_EXAMPLES}", 32, "sgd:momentum=0.9"),
    )
}


def named(names: str) -> list[Workload]:
    """The workloads of a list separated by commas.

    Raises:
        UsageError: there is none of that name.
    """
    for name in names.split(","):
        if name not in WORKLOADS:
            raise UsageError(f"There is no workload {name!r}. Choose from {', '.join(WORKLOADS)}.")
    return [WORKLOADS[name] for name in names.split(",")]
