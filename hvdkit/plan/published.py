"""What others have measured with ResNet-50 and its like on many GPUs, to hold predictions against."""

import dataclasses

from hvdkit.plan.cost import Cluster, Compute, Link, Mode, predict


@dataclasses.dataclass(frozen=True)
class Published:
    """Weak scaling as it was published: GPUs, and the share of N times one GPU that they reach."""

    name: str
    source: str
    points: tuple[tuple[int, float], ...]


HOROVOD = Published(
    "Horovod, 128 servers of 4 Pascal GPUs, 25 Gbit/s RoCE, ResNet-101",
    "Horovod's documentation, benchmarks.rst: 90 % at 512 GPUs",
    ((512, 0.90),),
)
GOYAL = Published(
    "Goyal et al. 2017, 32 servers of 8 P100, 50 Gbit/s",
    "https://arxiv.org/abs/1706.02677: about 90 % from 8 to 256 GPUs",
    ((256, 0.90),),
)
ALL = (HOROVOD, GOYAL)

# A V100 with float32 and a batch of 96 trains 385 images/s (NVIDIA DeepLearningExamples, RN50v1.5). NVLink inside (300
# GB/s a GPU, half of it used), 25 Gbit/s between hosts of eight, 50 µs a message and as much to agree. ResNet-50 has
# 25.6 million weights.
RESNET_50 = Compute(fixed=0.0, sample=1 / 385, deviation=0.01, gradient_bytes=4 * 25.6e6)
BATCH = 96
CLUSTER = Cluster(Link(50e-6, 8 / 25e9, 50e-6), Link(10e-6, 1 / 150e9, 20e-6), ranks_per_host=8)
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def predicted(overlap: float) -> list[tuple[float, float]]:
    """Efficiency of ResNet-50 by the number of GPUs, with a share of the exchange hidden behind the backward pass."""
    mode = Mode("data parallel")
    return [(n, predict(n, BATCH, RESNET_50, mode, CLUSTER, overlap).efficiency) for n in RANKS]
