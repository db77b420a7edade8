"""The cost model: predict the time of a training step on N ranks.

A data-parallel step computes on the local batch, then allreduces the gradients:

    step(N) = slowest of N (t0 + t1 · local batch) + compression + (1 - overlap) · communication(N, bytes)

- **Computation** is linear in the batch size; the line is fitted to three batch sizes. Ranks divide shared cores
  evenly: N ranks of c threads on C cores take max(1, N c / C) times as long. A measurement with several processes in
  parallel already includes this slowdown.
- **Stragglers.** N ranks wait for the slowest. If step times are normal with standard deviation σ, the expected maximum
  is σ · √(2 ln N) above the mean (H. Cramér, "Mathematical methods of statistics", 1946, section 28.6, to first
  order). The model caps it at 3 σ.
- **Ring allreduce** of n bytes: 2 (N - 1) α + 2 (N - 1)/N n β (P. Patarasuk and X. Yuan, "Bandwidth optimal all-reduce
  algorithms for clusters of workstations", 2009). α is the latency of a message in seconds, β the seconds per byte.
- **Tree allreduce** (recursive doubling): ⌈log2 N⌉ (α + n β) (R. Thakur et al., 2005). It is faster for small messages.
  The model takes the faster of the two.
- **Negotiation.** In every cycle, before it moves data, Horovod negotiates which tensors are ready on all ranks (A.
  Sergeev and M. Del Balso, 2018, section 4). This takes γ seconds for two ranks, and γ ⌈log2 N⌉ for a tree of N.
- **Hosts with L ranks each**: an allreduce inside each host over its own links (shared memory, NVLink), then an
  allreduce between hosts in which each rank handles 1/L of the data (X. Jia et al., "Highly scalable deep learning
  training system", 2018, section 4.2).
- **Allgather** (top-k) of n bytes from each rank: (N - 1) (α + n β') (Thakur et al.). β' is the seconds per byte
  measured for an allgather. Few-bit compression is an alltoall and an allgather: two such operations of n/N bytes.
- **Model parallelism** has no gradient allreduce, and one batch for all ranks of the model. With tensor parallelism,
  the divided share of the weights computes N times as fast. Each pair of layers needs two allreduces of activations (M.
  Shoeybi et al., 2019, section 3). A pipeline of N stages and M micro-batches takes M + N - 1 turns. Each turn is the
  computation of one stage and two transfers (Y. Huang et al., 2018, section 2.3).

`Compression` itself counts the bytes of each operation. Gradient accumulation over k steps divides communication by k,
local SGD over H steps divides it by H. Independent tasks do not communicate.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Link:
    """The communication cost between two ranks.

    Attributes:
        latency: α, seconds per message.
        byte_seconds: β, seconds per byte: the inverse of the bandwidth.
        agreeing: γ, seconds of Horovod's negotiation between two ranks.
        gather_byte_seconds: β', seconds per byte of an allgather; 0 if it equals β. Gloo's allgather sends each rank's
            rows whole. Over a slow link this takes up to twice as long as the small chunks of its allreduce.
    """

    latency: float
    byte_seconds: float
    agreeing: float = 0.0
    gather_byte_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Compute:
    """The compute time and the memory of one rank.

    Attributes:
        fixed: t0, seconds per step.
        sample: t1, seconds per sample.
        deviation: standard deviation of the step time, relative to it.
        threads: cores that a rank uses.
        beside: ranks that ran in parallel on one machine during the measurement.
        gradient_bytes: bytes of the gradients of all trainable weights, in float32.
        state_bytes: bytes of the weights and optimizer slots.
        activation_bytes: bytes of the activations of one sample.
        base_bytes: bytes of a process that has loaded TensorFlow.
    """

    fixed: float
    sample: float
    deviation: float = 0.0
    threads: int = 1
    beside: int = 1
    gradient_bytes: float = 0.0
    state_bytes: float = 0.0
    activation_bytes: float = 0.0
    base_bytes: float = 0.0

    def seconds(self, local_batch: float) -> float:
        """Return the seconds of a step on one rank."""
        return self.fixed + self.sample * local_batch

    def memory(self, local_batch: float, exchanges: bool) -> float:
        """Return the bytes that a rank needs; an allreduce needs a second copy of the gradients."""
        return (
            self.base_bytes
            + self.state_bytes
            + self.gradient_bytes * (2 if exchanges else 1)
            + self.activation_bytes * local_batch
        )


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The hosts and links that ranks run on.

    Attributes:
        between: the link between hosts.
        inside: the link between ranks of one host.
        ranks_per_host: maximum number of ranks on one host.
        cores: cores of one host; 0 if each rank has its own accelerator.
        shared_machine: whether all "hosts" are parts of one machine and share its cores.
    """

    between: Link
    inside: Link
    ranks_per_host: int = 1
    cores: int = 0
    shared_machine: bool = False


@dataclasses.dataclass(frozen=True)
class Division:
    """How model parallelism divides a model over ranks.

    Attributes:
        stages: True for pipeline parallelism, False for tensor parallelism.
        share: fraction of the weights that is divided.
        bytes: bytes of activations sent for each sample: between two pipeline stages, or in all allreduces.
        exchanges: allreduces per step, in the forward and backward pass.
        micro_batches: number of micro-batches of a pipeline.
    """

    stages: bool
    share: float
    bytes: float
    exchanges: int = 0
    micro_batches: int = 4


@dataclasses.dataclass(frozen=True)
class Mode:
    """A training mode.

    Attributes:
        name: name to show.
        flags: flags of hvdkit.train that select it.
        share: bytes communicated, as a fraction of the gradients' bytes.
        every: steps between two synchronizations.
        extra: seconds per step that compression computes.
        gathers: whether gradients are allgathered; each rank sends its `share` to all others.
        scatters: whether gradients go through an alltoall and an allgather; each moves 1/N of the `share`.
        exact: whether the result equals that of dense data parallelism.
        exchanges: number of collectives that run one after the other.
        one_host: whether it works on one host only.
        division: how the model is divided; None if each rank holds the whole model.
    """

    name: str
    flags: str = ""
    share: float = 1.0
    every: int = 1
    extra: float = 0.0
    gathers: bool = False
    scatters: bool = False
    exact: bool = True
    exchanges: int = 1
    one_host: bool = False
    division: Division | None = None


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The prediction for one mode and number of ranks: seconds, samples per second of all ranks, bytes per rank."""

    step_seconds: float
    samples_per_second: float
    efficiency: float
    memory_bytes: float
    wire_bytes: float


def ring(ranks: int, size: float, link: Link) -> float:
    """Return the seconds of a ring allreduce of `size` bytes."""
    return 2 * (ranks - 1) * link.latency + 2 * (ranks - 1) / ranks * size * link.byte_seconds


def tree(ranks: int, size: float, link: Link) -> float:
    """Return the seconds of an allreduce of `size` bytes by recursive doubling."""
    return math.ceil(math.log2(ranks)) * (link.latency + size * link.byte_seconds) if ranks > 1 else 0.0


def agreeing(ranks: int, link: Link) -> float:
    """Return the seconds of Horovod's negotiation, after which all ranks know which tensors are ready."""
    return link.agreeing * math.ceil(math.log2(ranks)) if ranks > 1 else 0.0


def allreduce(ranks: int, size: float, cluster: Cluster) -> float:
    """Return the seconds of an allreduce of `size` bytes over ranks of one or several hosts."""
    inside = min(ranks, cluster.ranks_per_host)
    hosts = math.ceil(ranks / cluster.ranks_per_host)
    seconds = 0.0
    if inside > 1:
        seconds += agreeing(inside, cluster.inside) + min(f(inside, size, cluster.inside) for f in (ring, tree))
    if hosts > 1:
        part = size / inside
        seconds += agreeing(hosts, cluster.between) + min(f(hosts, part, cluster.between) for f in (ring, tree))
    return seconds


def exchange(ranks: int, size: float, mode: Mode, cluster: Cluster) -> float:
    """Return the communication seconds per step, for gradients of `size` bytes."""
    if ranks == 1:
        return 0.0
    if mode.gathers or mode.scatters:
        link = cluster.between if ranks > cluster.ranks_per_host else cluster.inside
        byte, part = link.gather_byte_seconds or link.byte_seconds, size / ranks if mode.scatters else size
        one = agreeing(ranks, link) + (ranks - 1) * (link.latency + mode.share * part * byte)
        return mode.exchanges * one / mode.every
    one = allreduce(ranks, mode.share * size, cluster)
    again = allreduce(ranks, 0.0, cluster)  # latency of each further collective; the bytes are counted once
    return (one + (mode.exchanges - 1) * again) / mode.every


def computation(ranks: int, local_batch: float, compute: Compute, mode: Mode, cluster: Cluster) -> float:
    """Return the compute seconds of the slowest rank, compression included."""
    beside = ranks if cluster.shared_machine else min(ranks, cluster.ranks_per_host)
    crowd = 1.0
    if cluster.cores:
        crowd, measured = (max(1.0, n * compute.threads / cluster.cores) for n in (beside, compute.beside))
        crowd /= measured
    slowest = 1 + compute.deviation * min(3.0, math.sqrt(2 * math.log(ranks)))
    return (compute.seconds(local_batch) + (mode.extra if ranks > 1 else 0.0)) * crowd * slowest


def wire_bytes(ranks: int, size: float, mode: Mode) -> float:
    """Return the bytes that a rank sends per step."""
    factor = (ranks - 1) if mode.gathers else 2 * (ranks - 1) / ranks
    return factor * mode.share * size / mode.every


def predict(
    ranks: int, local_batch: float, compute: Compute, mode: Mode, cluster: Cluster, overlap: float = 0.0
) -> Prediction:
    """Predict step time, throughput, efficiency and memory of training on N ranks.

    Args:
        ranks: N.
        local_batch: samples per step of each rank.
        compute: compute time and memory of one rank.
        mode: the training mode.
        cluster: the hosts and links.
        overlap: fraction of communication that overlaps the backward pass. It is 0 for hvdkit's default, which
            allreduces all gradients as one group.
    """
    if mode.division and ranks > 1:
        return _predict_divided(ranks, local_batch, compute, mode, mode.division, cluster)
    size = compute.gradient_bytes
    seconds = computation(ranks, local_batch, compute, mode, cluster)
    seconds += (1 - overlap) * exchange(ranks, size, mode, cluster)
    samples = ranks * local_batch / seconds
    alone = local_batch / computation(1, local_batch, compute, mode, cluster)
    return Prediction(
        step_seconds=seconds,
        samples_per_second=samples,
        efficiency=samples / (ranks * alone),
        memory_bytes=compute.memory(local_batch, exchanges=ranks > 1 and mode.share > 0),
        wire_bytes=wire_bytes(ranks, size, mode),
    )


def _predict_divided(
    ranks: int, batch: float, compute: Compute, mode: Mode, division: Division, cluster: Cluster
) -> Prediction:
    """Predict training with model parallelism, where N ranks process one batch together."""
    link = cluster.between if ranks > cluster.ranks_per_host else cluster.inside
    sent = division.bytes * batch
    if division.stages:
        micro = batch / division.micro_batches
        transfer = agreeing(2, link) + link.latency + division.bytes * micro * link.byte_seconds
        turns = division.micro_batches + ranks - 1
        seconds = turns * (computation(ranks, micro, compute, mode, cluster) / ranks + 2 * transfer)
        wire = 2 * sent
    else:
        whole = computation(ranks, batch, compute, mode, cluster)
        seconds = whole * (1 - division.share + division.share / ranks)
        seconds += division.exchanges * allreduce(ranks, sent / max(1, division.exchanges), cluster)
        wire = 2 * (ranks - 1) / ranks * sent
    alone = batch / computation(1, batch, compute, mode, cluster)
    part = 1 - division.share + division.share / ranks
    return Prediction(
        step_seconds=seconds,
        samples_per_second=batch / seconds,
        efficiency=batch / seconds / (ranks * alone),
        memory_bytes=compute.base_bytes
        + part * (compute.state_bytes + compute.gradient_bytes + compute.activation_bytes * batch),
        wire_bytes=wire,
    )
