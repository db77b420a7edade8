"""The benchmark workloads: named models with synthetic data of the right shape."""

import dataclasses
from pathlib import Path

from hvdkit.errors import UsageError

_EXAMPLES = 8192  # in memory: a benchmark measures training, not the disk


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model, data set and batch size to benchmark.

    Attributes:
        name: name on the command line and in tables.
        model: value of the flag `--model` of hvdkit.train.
        dataset: value of the flag `--dataset`.
        local_batch: examples per step of each rank.
        optimizer: value of the flag `--optimizer`.
        flags: additional flags of hvdkit.train.
    """

    name: str
    model: str
    dataset: str
    local_batch: int
    optimizer: str = "adam"
    flags: tuple[str, ...] = ()

    def train_flags(self) -> list[str]:
        """Return the flags of hvdkit.train."""
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
    """Return the workloads of a comma-separated list.

    Raises:
        UsageError: a name is unknown.
    """
    for name in names.split(","):
        if name not in WORKLOADS:
            raise UsageError(f"There is no workload {name!r}. Choose from {', '.join(WORKLOADS)}.")
    return [WORKLOADS[name] for name in names.split(",")]
