"""NVIDIA's published throughput of EfficientNet-B4 on Keras, TensorFlow 2 and Horovod, to compare predictions with.

The only calibration is the published throughput of one GPU. All else is data sheets, NVIDIA's scripts, or assumed:

- from the scripts: the local batch sizes, float16 on the wire (`hvd_fp16_compression`), and Horovod's cycle of 1 ms;
- from the data sheet: a link of 200 Gbit/s between hosts for each GPU; measured by others: 232 GB/s inside a host;
- assumed: latencies, a deviation of 1 % between the step times of GPUs, and no waiting for data.

NVIDIA does not say with which batch size and options the rows of several hosts were measured. Its script for several
hosts (`run_B4_multinode.sub`) has a local batch of 64 and no XLA. Those for one host have 80 or 160, and XLA.
"""

import dataclasses

from hvdkit.plan.cost import Cluster, Compute, Link, Mode, Prediction, predict

SOURCE = (
    "NVIDIA DeepLearningExamples, TensorFlow2/Classification/ConvNets/efficientnet_v1/README.md, "
    '"Training performance: NVIDIA DGX A100 (8x A100 80GB)"'
)


@dataclasses.dataclass(frozen=True)
class Published:
    """A published weak-scaling result.

    Attributes:
        precision: "TF32" or "AMP" (mixed precision).
        local_batch: images per step of a GPU, in the benchmark scripts.
        images: images per second, by number of GPUs.
    """

    precision: str
    local_batch: int
    images: dict[int, int]

    def efficiency(self, gpus: int) -> float:
        """Return the efficiency relative to `gpus` times one GPU."""
        return self.images[gpus] / (gpus * self.images[1])

    def compute(self) -> Compute:
        """Return the compute time of a GPU, from the published throughput of one."""
        return Compute(fixed=0.0, sample=1 / self.images[1], deviation=_DEVIATION, gradient_bytes=4 * WEIGHTS)


TF32 = Published("TF32", 80, {1: 165, 8: 1_308, 32: 4_782, 64: 9_473})
AMP = Published("AMP", 160, {1: 470, 8: 3_550, 32: 12_908, 64: 25_455})
ALL = (TF32, AMP)

WEIGHTS = 19_341_616  # trainable weights of keras.applications.EfficientNetB4
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_DEVIATION = 0.01
_MODE = Mode("fp16 on the wire", share=0.5)
# A DGX A100 has eight GPUs on NVSwitch. An allreduce has a bus bandwidth of 232 GB/s there
# (https://github.com/NVIDIA/nccl/issues/1048), of 300 GB/s in the data sheet. Eight ConnectX-6 of 200 Gbit/s lead out.
_CLUSTER = Cluster(
    between=Link(20e-6, 8 / 200e9, agreeing=1e-3),
    inside=Link(10e-6, 1 / 232e9, agreeing=1e-3),
    ranks_per_host=8,
)


def predicted(one: Published, gpus: int, overlap: float = 0.0) -> Prediction:
    """Predict the throughput on a number of GPUs.

    Args:
        one: the published result, of which only the throughput of one GPU and the batch size are used.
        gpus: number of GPUs.
        overlap: fraction of the gradient allreduce that overlaps the backward pass.
    """
    return predict(gpus, one.local_batch, one.compute(), _MODE, _CLUSTER, overlap)


def error(one: Published, gpus: int, overlap: float = 0.0) -> float:
    """Return the relative error of a prediction: (predicted - published) / published."""
    return predicted(one, gpus, overlap).samples_per_second / one.images[gpus] - 1
