"""Published scaling results of ResNets on many GPUs, to compare predictions with."""

import dataclasses

from hvdkit.plan.cost import Cluster, Compute, Link, Mode, predict


@dataclasses.dataclass(frozen=True)
class Published:
    """A published weak-scaling result.

    Attributes:
        name: the hardware and model.
        source: where it was published.
        points: pairs of the number of GPUs and the efficiency, relative to N times one GPU.
    """

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

# A V100 with float32 and a batch size of 96 trains 385 images/s (NVIDIA DeepLearningExamples, RN50v1.5). Hosts have
# eight GPUs. NVLink connects them inside (300 GB/s per GPU, half of it used); 25 Gbit/s connects hosts. A message takes
# 50 µs, and a negotiation the same. ResNet-50 has 25.6 million weights.
RESNET_50 = Compute(fixed=0.0, sample=1 / 385, deviation=0.01, gradient_bytes=4 * 25.6e6)
BATCH = 96
CLUSTER = Cluster(Link(50e-6, 8 / 25e9, 50e-6), Link(10e-6, 1 / 150e9, 20e-6), ranks_per_host=8)
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def predicted(overlap: float) -> list[tuple[float, float]]:
    """Predict the efficiency of ResNet-50 for each number of GPUs.

    Args:
        overlap: fraction of the gradient allreduce that overlaps the backward pass.
    """
    mode = Mode("data parallel")
    return [(n, predict(n, BATCH, RESNET_50, mode, CLUSTER, overlap).efficiency) for n in RANKS]
