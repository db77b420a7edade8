"""The cost model: predict the time of a training step on N ranks.

A data-parallel step computes on the local batch, then allreduces the gradients:

    step(N) = slowest of N (t0 + t1 · local batch) + compression + (1 - overlap) · communication(N, bytes)

- **Computation** is linear in the batch size; the line is fitted to three batch sizes. Ranks divide shared cores
  evenly: N ranks of c threads on C cores take max(1, N c / C) times as long. A measurement with several processes in
  parallel already includes this slowdown.
- **Stragglers.** N ranks wait for the slowest. If step times are normal with standard deviation σ, the expected maximum
  is σ · √(2 ln N) above the mean (H. Cramér, "Mathematical methods of statistics", 1946, section 28.6, to first
  order). The model caps it at 3 σ.
- **Transport.** Which formulas hold for a collective depends on what moves it (`hvdkit.collectives.transports`). α is
  the latency in seconds, β the seconds per byte.
- **Sockets** (CPU ranks on several hosts): an allreduce of n bytes is a pairwise reduce-scatter and allgather (R.
  Thakur et al., "Optimization of collective communication operations in MPICH", 2005): 2 α + 2 (N - 1)/N n β. Two ranks
  send each other everything in one step, and so do more ranks with up to 32 KiB: α + (N - 1) n β. Nothing is
  negotiated. Ranks of one host sum in shared memory, each carries a part between the hosts, and they gather the parts
  in shared memory. So a host's link carries the bytes of a single rank.
- **Shared memory** (CPU ranks of one host): α for each barrier (one for up to four ranks, else two), and the bytes of a
  ring. Nothing is negotiated.
- **Horovod, ring allreduce** of n bytes: 2 (N - 1) α + 2 (N - 1)/N n β (P. Patarasuk and X. Yuan, "Bandwidth optimal
  all-reduce algorithms for clusters of workstations", 2009).
- **Horovod, tree allreduce** (recursive doubling): ⌈log2 N⌉ (α + n β) (Thakur et al.). It is faster for small messages.
  The model takes the faster of the two.
- **Horovod, negotiation.** In every cycle, before it moves data, Horovod negotiates which tensors are ready on all
  ranks (A. Sergeev and M. Del Balso, 2018, section 4). This takes γ seconds for two ranks, and γ ⌈log2 N⌉ for a tree of
  N.
- **Horovod, hosts with L ranks each** (GPUs): an allreduce inside each host over its own links (NVLink), then an
  allreduce between hosts in which each rank sends 1/L of the data over a link of its own (X. Jia et al., "Highly
  scalable deep learning training system", 2018, section 4.2).
- **Allgather** (top-k) of n bytes from each rank: (N - 1) n β' and one α over sockets and shared memory, N - 1 over
  Horovod (Thakur et al.). β' is the seconds per byte measured for an allgather. Few-bit compression is an alltoall of
  n/N bytes, always by Horovod, and an allgather of n/N bytes.
- **Shaped links.** A token bucket, as `tc tbf` and many clouds have it, saves up its rate while the link is idle, up to
  `burst` bytes, which then pass at once (A. Tanenbaum, "Computer Networks", section 5.4). The link is idle while ranks
  compute. So of n β seconds, burst · β are saved, or the idle time if it is shorter. If the bucket is large enough, the
  step takes the larger of computation and n β, not their sum.
- **Zeros.** Sockets send gradients without their zeros where that takes less time (`hvdkit/native/pack.h`): of n bytes,
  the share that is not zero, and a mask of 1/32. A word of two halves is zero if both are.
- **Buckets.** Between CPU ranks of several hosts, gradients are sent in buckets of at least 2 MiB, those of the last
  layers first, while the backward pass computes the others (S. Li et al., "PyTorch distributed", 2020, section 3.2.3).
  The backward pass is two thirds of the computation. The model divides it among layers by their weights, which is right
  for dense layers, and hides the buckets before the last one behind what is left of it then.
- **Model parallelism** has no gradient allreduce, and one batch for all ranks of the model. With tensor parallelism,
  the divided share of the weights computes N times as fast. Each pair of layers needs two allreduces of activations (M.
  Shoeybi et al., 2019, section 3). A pipeline of N stages and M micro-batches takes M + N - 1 turns. Each turn is the
  computation of one stage and two transfers (Y. Huang et al., 2018, section 2.3).

`Compression` itself counts the bytes of each operation. Gradient accumulation over k steps divides communication by k,
local SGD over H steps divides it by H. Streaming DiLoCo does so, too, and hides the allreduces of its P fragments
behind the computation of τ steps each, where ranks send in the background: between CPU ranks of several hosts.
Independent tasks do not communicate.
"""

import dataclasses
import math
from typing import NamedTuple

UNDIVIDED_BYTES = 32 << 10  # up to this size, sockets send all elements to all ranks (kUndividedBytes in sockets.cc)
BUCKET_BYTES = 2 << 20  # gradients over sockets are sent in buckets of at least this size (Sockets.bucket_bytes)
PACKING_BYTE_SECONDS = 0.5e-9  # seconds to leave the zeros out of a byte (kPackSecondsPerByte in pack.h)
MASK_SHARE = 1 / 32  # bytes that say which words are zero (kMask, kBlockWords and kWord in pack.h)
BACKWARD_SHARE = 2 / 3  # of the computation: a product of matrices forward, and two backward
UNDIVIDED_RANKS = 4  # up to this number, each rank of a host sums all elements (kDivideAbove in shared_memory.cc)


@dataclasses.dataclass(frozen=True)
class Link:
    """The communication cost between two ranks.

    Attributes:
        latency: α, seconds per message of Horovod, step of sockets, or barrier of shared memory.
        byte_seconds: β, seconds per byte: the inverse of the bandwidth. With sockets, of a host.
        agreeing: γ, seconds of Horovod's negotiation between two ranks. Without Horovod, only an alltoall pays it.
        gather_byte_seconds: β', seconds per byte of an allgather; 0 if it equals β. Gloo's allgather sends each rank's
            rows whole. Over a slow link this takes up to twice as long as the small chunks of its allreduce.
        burst: bytes that pass at once after the link was idle.
        transport: key of the transport that moves gradients over it (`Transport.key`).
    """

    latency: float
    byte_seconds: float
    agreeing: float = 0.0
    gather_byte_seconds: float = 0.0
    burst: float = 0.0
    transport: str = "horovod"


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
        zero_share: fraction of the gradients' elements that is zero.
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
    zero_share: float = 0.0

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
        hidden: compute steps that each of these collectives may overlap (between CPU ranks of several hosts).
        one_host: whether it works on one host only.
        division: how the model is divided; None if each rank holds the whole model.
        early: fraction of the gradients that is sent during the backward pass, where ranks send in buckets.
        word_elements: elements in a word of four bytes that may be left out if it is zero; 0 if nothing is left out.
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
    hidden: int = 0
    one_host: bool = False
    division: Division | None = None
    early: float = 0.0
    word_elements: int = 0


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
    return 2 * (ranks - 1) * link.latency + _ring_bytes(size, ranks) * link.byte_seconds


def tree(ranks: int, size: float, link: Link) -> float:
    """Return the seconds of an allreduce of `size` bytes by recursive doubling."""
    return math.ceil(math.log2(ranks)) * (link.latency + size * link.byte_seconds) if ranks > 1 else 0.0


def agreeing(ranks: int, link: Link) -> float:
    """Return the seconds of Horovod's negotiation, after which all ranks know which tensors are ready."""
    return link.agreeing * math.ceil(math.log2(ranks)) if ranks > 1 else 0.0


def is_divided(ranks: int, size: float) -> bool:
    """Return whether sockets divide a sum of `size` bytes among the ranks, which takes a second step."""
    return ranks > 2 and size > UNDIVIDED_BYTES


def barriers(ranks: int) -> int:
    """Return the barriers of a sum in shared memory: many ranks divide it, and then gather the parts."""
    return 1 if ranks <= UNDIVIDED_RANKS else 2


def allreduce(ranks: int, size: float, cluster: Cluster, idle: float = 0.0) -> float:
    """Return the seconds of an allreduce of `size` bytes over ranks of one or several hosts.

    Args:
        ranks: N.
        size: bytes.
        cluster: the hosts and links.
        idle: seconds before it in which nothing was sent.
    """
    return _shaped(_allreduce(ranks, size, cluster), _link(ranks, cluster), idle)


def exchange(ranks: int, size: float, mode: Mode, cluster: Cluster, idle: float = 0.0) -> float:
    """Return the communication seconds per step, for gradients of `size` bytes.

    Args:
        ranks: N.
        size: bytes of the gradients, uncompressed.
        mode: the training mode.
        cluster: the hosts and links.
        idle: seconds of computation per step, in which nothing is sent.
    """
    if ranks == 1:
        return 0.0
    sent = mode.share * size
    if mode.gathers:
        costs = [_allgather(ranks, sent, cluster)]
    elif mode.scatters:
        costs = [_alltoall(ranks, sent / ranks, cluster), _allgather(ranks, sent / ranks, cluster)]
    else:
        costs = [_allreduce(ranks, sent / mode.exchanges, cluster)] * mode.exchanges
    whole = _Cost(sum(one.start for one in costs), sum(one.moving for one in costs))
    return _shaped(whole, _link(ranks, cluster), idle * mode.every) / mode.every


def _ring_bytes(size: float, ranks: int) -> float:  # hvdkit.collectives.traffic would load TensorFlow
    return 2 * (ranks - 1) / ranks * size


class _Cost(NamedTuple):
    """The seconds of collectives: those before bytes move, and those in which a link between ranks moves bytes."""

    start: float
    moving: float


def _link(ranks: int, cluster: Cluster) -> Link:
    return cluster.between if ranks > cluster.ranks_per_host else cluster.inside


def _shaped(cost: _Cost, link: Link, idle: float) -> float:
    """Return the seconds over a link that has saved up its rate while idle, and does so while ranks wait, too."""
    saved = min(link.burst * link.byte_seconds, idle + cost.start)
    return cost.start + max(0.0, cost.moving - saved)


def _allreduce(ranks: int, size: float, cluster: Cluster) -> _Cost:
    inside = min(ranks, cluster.ranks_per_host)
    hosts = math.ceil(ranks / cluster.ranks_per_host)
    if hosts == 1:
        return _allreduce_on_one_host(ranks, size, cluster.inside)
    within = sum(_allreduce_on_one_host(inside, size, cluster.inside)) if inside > 1 else 0.0
    if cluster.between.transport != "sockets":
        between = _allreduce_by_horovod(hosts, size / inside, cluster.between)
        return _Cost(within + between.start, between.moving)
    carriers = ranks - (hosts - 1) * cluster.ranks_per_host  # as many as the smallest host has ranks
    between = _allreduce_by_sockets(hosts, size / carriers, cluster.between)
    spread = sum(_gather_in_memory(inside, size / carriers, cluster.inside)) if inside > 1 else 0.0
    return _Cost(within + between.start + spread, carriers * between.moving)


def _allreduce_on_one_host(ranks: int, size: float, link: Link) -> _Cost:
    if link.transport == "shared":
        return _Cost(barriers(ranks) * link.latency, _ring_bytes(size, ranks) * link.byte_seconds)
    return _allreduce_by_horovod(ranks, size, link)


def _allreduce_by_horovod(ranks: int, size: float, link: Link) -> _Cost:
    latencies, seconds = min(((f(ranks, 0.0, link), f(ranks, size, link)) for f in (ring, tree)), key=lambda c: c[1])
    return _Cost(agreeing(ranks, link) + latencies, seconds - latencies)


def _allreduce_by_sockets(ranks: int, size: float, link: Link) -> _Cost:
    if is_divided(ranks, size):
        return _Cost(2 * link.latency, _ring_bytes(size, ranks) * link.byte_seconds)
    return _Cost(link.latency, (ranks - 1) * size * link.byte_seconds)


def _gather_in_memory(ranks: int, size: float, link: Link) -> _Cost:
    return _Cost(link.latency, (ranks - 1) * size * (link.gather_byte_seconds or link.byte_seconds))


def _allgather(ranks: int, size: float, cluster: Cluster) -> _Cost:
    """Return the cost of an allgather of `size` bytes from each rank."""
    link = _link(ranks, cluster)
    byte = link.gather_byte_seconds or link.byte_seconds
    if link.transport == "shared":
        return _gather_in_memory(ranks, size, link)
    if link.transport == "sockets":  # what each rank of a host sends to the ranks of the other hosts
        inside = min(ranks, cluster.ranks_per_host)
        return _Cost(link.latency, inside * (ranks - inside) * size * byte)
    return _alltoall(ranks, size, cluster)


def _alltoall(ranks: int, size: float, cluster: Cluster) -> _Cost:
    """Return the cost of Horovod's alltoall, in which each rank sends `size` bytes to each other rank."""
    link = _link(ranks, cluster)
    messages = (ranks - 1) * link.latency if link.transport == "horovod" else 0.0  # otherwise α is not Horovod's
    byte = link.gather_byte_seconds or link.byte_seconds
    return _Cost(agreeing(ranks, link) + messages, (ranks - 1) * size * byte)


def computation(ranks: int, local_batch: float, compute: Compute, mode: Mode, cluster: Cluster) -> float:
    """Return the compute seconds of the slowest rank, compression included."""
    beside = ranks if cluster.shared_machine else min(ranks, cluster.ranks_per_host)
    crowd = 1.0
    if cluster.cores:
        crowd, measured = (max(1.0, n * compute.threads / cluster.cores) for n in (beside, compute.beside))
        crowd /= measured
    slowest = 1 + compute.deviation * min(3.0, math.sqrt(2 * math.log(ranks)))
    return (compute.seconds(local_batch) + (mode.extra if ranks > 1 else 0.0)) * crowd * slowest


def wire_bytes(ranks: int, size: float, mode: Mode, transport: str = "horovod") -> float:
    """Return the bytes that a rank sends per step."""
    sent = mode.share * size
    is_sum = not (mode.gathers or mode.scatters)
    to_all = mode.gathers or (transport == "sockets" and is_sum and not is_divided(ranks, sent / mode.exchanges))
    return ((ranks - 1) * sent if to_all else _ring_bytes(sent, ranks)) / mode.every


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
        overlap: fraction of communication that overlaps the backward pass, besides that of buckets between CPU ranks of
            several hosts.
    """
    if mode.division and ranks > 1:
        return _predict_divided(ranks, local_batch, compute, mode, mode.division, cluster)
    link = _link(ranks, cluster)
    size = compute.gradient_bytes * _share_without_zeros(ranks, compute, mode, link)
    seconds = computation(ranks, local_batch, compute, mode, cluster)
    communication = (1 - overlap) * exchange(ranks, size, mode, cluster, idle=seconds)
    if cluster.cores and ranks > cluster.ranks_per_host:
        communication = max(0.0, communication - _hidden(communication, seconds, mode, link))
    seconds += communication
    samples = ranks * local_batch / seconds
    alone = local_batch / computation(1, local_batch, compute, mode, cluster)
    return Prediction(
        step_seconds=seconds,
        samples_per_second=samples,
        efficiency=samples / (ranks * alone),
        memory_bytes=compute.memory(local_batch, exchanges=ranks > 1 and mode.share > 0),
        wire_bytes=wire_bytes(ranks, size, mode, link.transport),
    )


def _share_without_zeros(ranks: int, compute: Compute, mode: Mode, link: Link) -> float:
    """Return the fraction of the gradients' bytes that is sent."""
    saved = compute.zero_share**mode.word_elements - MASK_SHARE if mode.word_elements else 0.0
    is_packed = link.transport == "sockets" and saved * link.byte_seconds > PACKING_BYTE_SECONDS
    if is_packed and is_divided(ranks, mode.share * compute.gradient_bytes):
        saved /= 2  # half of what is sent are sums over the ranks, few of which are zero
    return 1 - saved if is_packed else 1.0


def _hidden(communication: float, seconds: float, mode: Mode, link: Link) -> float:
    """Return the seconds of a step's communication that pass while ranks compute, between CPU ranks of hosts."""
    if mode.hidden:
        return mode.exchanges * mode.hidden * seconds / mode.every
    early = mode.early if link.transport == "sockets" else 0.0
    return min(early * communication, (1 - early) * BACKWARD_SHARE * seconds)


def _predict_divided(
    ranks: int, batch: float, compute: Compute, mode: Mode, division: Division, cluster: Cluster
) -> Prediction:
    """Predict training with model parallelism, where N ranks process one batch together."""
    link = _link(ranks, cluster)
    sent = division.bytes * batch
    if division.stages:
        micro = batch / division.micro_batches
        negotiation = agreeing(2, link) if link.transport == "horovod" else 0.0
        transfer = negotiation + link.latency + division.bytes * micro * link.byte_seconds
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
