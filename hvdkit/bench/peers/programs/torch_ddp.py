"""Benchmark PyTorch DistributedDataParallel over Gloo.

    python -m hvdkit.launch -np 2 -- torch_ddp.py mlp,lenet

The launcher only starts the processes, which find each other as torch.distributed prescribes.
"""

import itertools
import os

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import models
import setting
import timing

_DENSE = {"mlp": (128, 64), "large_mlp": (2048, 2048)}


class Scale(nn.Module):
    """Scale pixels as the Keras models do."""

    def __init__(self, factor, offset=0.0):
        super().__init__()
        self.factor, self.offset = factor, offset

    def forward(self, x):
        return x * self.factor + self.offset


class Block(nn.Module):
    """A residual block: two convolutions and a shortcut."""

    def __init__(self, before, filters, strides):
        super().__init__()
        self.first, self.second = convolution(before, filters, 3, strides), convolution(filters, filters, 3, 1)
        self.shortcut = nn.Identity() if strides == 1 else convolution(before, filters, 1, strides)

    def forward(self, x):
        y = self.second(torch.relu(self.first(x)))
        return torch.relu(y + self.shortcut(x))


def convolution(before, filters, size, strides):
    return nn.Sequential(
        nn.Conv2d(before, filters, size, strides, padding=size // 2, bias=False), nn.BatchNorm2d(filters)
    )


def build(name):
    if name in _DENSE:
        sizes = [784, *_DENSE[name]]
        hidden = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(Scale(1 / 255), nn.Flatten(), *hidden, nn.Linear(sizes[-1], 10))
    if name == "lenet":
        return nn.Sequential(
            Scale(1 / 64, -1.875),
            *(nn.Conv2d(3, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(1024, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
        )
    blocks, before = [], 16
    for stage, filters in enumerate((16, 32, 64)):
        for block in range(3):
            blocks.append(Block(before, filters, 2 if stage and not block else 1))
            before = filters
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(Scale(1 / 64, -1.875), convolution(3, 16, 3, 1), nn.ReLU(), *blocks, *head)


def measure(name, rank, size):
    torch.manual_seed(0)
    model = build(name)
    weights = sum(p.numel() for p in model.parameters())
    model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if name == "resnet20":
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    else:
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    images, labels = map(torch.from_numpy, models.examples(name, rank))
    images = images.permute(0, 3, 1, 2).contiguous()
    loss_of, batch = nn.CrossEntropyLoss(), models.BATCHES[name]

    def run(steps, windows, clock):
        for _ in range(windows):
            clock.begin()
            order = torch.randperm(models.EXAMPLES)
            for step in range(steps):
                start = step * batch % models.EXAMPLES
                rows = order[start : start + batch]
                optimizer.zero_grad(set_to_none=True)
                loss_of(model(images[rows]), labels[rows]).backward()
                optimizer.step()
                clock.end_execution(1)
            clock.end()

    timing.measure(run, mean, workload=name, rank=rank, global_batch=batch * size, weights=weights)


def mean(value):
    total = torch.tensor(value, dtype=torch.float64)
    torch.distributed.all_reduce(total)
    return float(total) / torch.distributed.get_world_size()


def main():
    rank, size, local_rank = setting.rank_and_size()
    setting.pin(local_rank)
    torch.set_num_threads(setting.threads())
    if "HOROVOD_GLOO_IFACE" in os.environ:  # the launcher has found the interface that leads to the other hosts
        os.environ.setdefault("GLOO_SOCKET_IFNAME", os.environ["HOROVOD_GLOO_IFACE"])
    torch.distributed.init_process_group("gloo", f"tcp://{setting.addresses()[0]}", rank=rank, world_size=size)
    for name in setting.chosen():
        measure(name, rank, size)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
