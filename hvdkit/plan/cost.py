"""What a step takes on N ranks: the model on paper.

A step of data parallel training is the computation on the local batch, then an exchange of the gradients:

    step(N) = slowest of N (t0 + t1 · local batch) + compression + (1 - overlap) · exchange(N, bytes)

- **Computation** grows with the batch, by a straight line that is fitted to three batch sizes. Ranks that share cores
  share them evenly: N ranks of c threads on a machine of C cores take max(1, N c / C) times as long; what was measured
  with several ranks side by side is that much slower already.
- **Stragglers.** N ranks wait for the slowest. If step times are normal with deviation σ, the largest of N is on
  average σ · √(2 ln N) above the mean (H. Cramér, "Mathematical methods of statistics", 1946, section 28.6, to first
  order), capped at 3 σ.
- **Ring allreduce** of n bytes: 2 (N - 1) α + 2 (N - 1)/N n β (P. Patarasuk and X. Yuan, "Bandwidth optimal all-reduce
  algorithms for clusters of workstations", 2009). α is a message's latency in seconds, β a byte's time.
- **Tree allreduce** (recursive doubling): ⌈log2 N⌉ (α + n β) (R. Thakur et al., 2005), better for small messages. The
  faster of both is taken.
- **Agreeing.** Before it moves data Horovod lets all ranks agree on what is ready, every cycle (A. Sergeev and M. Del
  Balso, 2018, section 4): γ seconds for two ranks, by the depth of a tree for N: γ ⌈log2 N⌉.
- **Hosts with several ranks**: first inside, over links of their own (shared memory, NVLink), then one ring between
  hosts of a rank's 1/L part each (X. Jia et al., "Highly scalable deep learning training system", 2018, section 4.2).
- **Allgather** (top-k) of n bytes from each: (N - 1) (α + n β') (Thakur et al.), where β' is a byte's time as measured
  of an allgather. Few-bit compression scatters 1/N of its bytes to each and gathers as much: two of these of n/N.

- **A divided model** has no gradients to exchange, and one batch for all its ranks. By tensors: the share of the
  weights that is divided computes N times as fast, and each pair of layers is two allreduces of activations (M. Shoeybi
  et al., 2019, section 3). In a pipeline of N stages and M micro-batches, M + N - 1 turns of a stage's computation and
  two transfers (Y. Huang et al., 2018, section 2.3).

Every exchange's bytes are those that `Compression` itself counts. Accumulation over k steps and local SGD over H steps
divide the exchange by k or H. Independent tasks exchange nothing.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Link:
    """What an exchange between two ranks takes.

    Attributes:
        latency: α, seconds a message.
        byte_seconds: β, seconds a byte: one over the bandwidth.
        agreeing: γ, seconds until two ranks have agreed that a tensor is ready.
        gather_byte_seconds: β of an allgather, where it is another; 0 for the same. Gloo sends each rank's rows whole,
            which takes up to twice as long over a slow link as the small pieces of its allreduce.
    """

    latency: float
    byte_seconds: float
    agreeing: float = 0.0
    gather_byte_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Compute:
    """What a rank computes, and what it needs for it.

    Attributes:
        fixed: t0, seconds a step.
        sample: t1, seconds a sample.
        deviation: of a step's seconds, as a share of them.
        threads: cores that a rank uses.
        beside: ranks that ran at the same time on one machine when this was measured.
        gradient_bytes: of all trainable weights, in float32.
        state_bytes: weights and optimizer slots.
        activation_bytes: of one sample.
        base_bytes: of a process that has loaded TensorFlow.
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
        """Of a step on one rank."""
        return self.fixed + self.sample * local_batch

    def memory(self, local_batch: float, exchanges: bool) -> float:
        """Bytes that a rank needs; an exchange holds the gradients once more."""
        return (
            self.base_bytes
            + self.state_bytes
            + self.gradient_bytes * (2 if exchanges else 1)
            + self.activation_bytes * local_batch
        )


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where ranks run.

    Attributes:
        between: the link between hosts.
        inside: the link between ranks of one host.
        ranks_per_host: at most.
        cores: of one host; 0 if each rank has a device of its own.
        shared_machine: all "hosts" are parts of one machine, whose cores they share.
    """

    between: Link
    inside: Link
    ranks_per_host: int = 1
    cores: int = 0
    shared_machine: bool = False


@dataclasses.dataclass(frozen=True)
class Division:
    """How ranks hold a model between them.

    Attributes:
        stages: whether they are the stages of a pipeline; otherwise they divide tensors.
        share: of the weights that is divided.
        bytes: of activations that a sample sends in all: over a border between stages, or in allreduces.
        exchanges: allreduces of a step, forwards and backwards.
        micro_batches: of a pipeline.
    """

    stages: bool
    share: float
    bytes: float
    exchanges: int = 0
    micro_batches: int = 4


@dataclasses.dataclass(frozen=True)
class Mode:
    """A way to train.

    Attributes:
        name: as shown.
        flags: of hvdkit.train.
        share: of the gradients' bytes that an exchange moves.
        every: steps from one exchange to the next.
        extra: seconds a step that compression computes.
        gathers: whether the exchange is an allgather, whose `share` each rank sends to all others.
        scatters: whether it is an alltoall and an allgather, of a rank's part of the `share`.
        exact: whether it trains the model that dense data parallelism does.
        exchanges: exchanges one after the other.
        one_host: whether it works on one host only.
        division: of the model, if it is not whole on each rank.
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
    """Of one mode on so many ranks; seconds, samples a second over all ranks, bytes a rank."""

    step_seconds: float
    samples_per_second: float
    efficiency: float
    memory_bytes: float
    wire_bytes: float


def ring(ranks: int, size: float, link: Link) -> float:
    """Seconds of a ring allreduce of `size` bytes."""
    return 2 * (ranks - 1) * link.latency + 2 * (ranks - 1) / ranks * size * link.byte_seconds


def tree(ranks: int, size: float, link: Link) -> float:
    """Seconds of an allreduce by recursive doubling."""
    return math.ceil(math.log2(ranks)) * (link.latency + size * link.byte_seconds) if ranks > 1 else 0.0


def agreeing(ranks: int, link: Link) -> float:
    """Seconds until all ranks know that all have the tensors."""
    return link.agreeing * math.ceil(math.log2(ranks)) if ranks > 1 else 0.0


def allreduce(ranks: int, size: float, cluster: Cluster) -> float:
    """Seconds of an allreduce over ranks of one or several hosts."""
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
    """Seconds of all that a step exchanges."""
    if ranks == 1:
        return 0.0
    if mode.gathers or mode.scatters:
        link = cluster.between if ranks > cluster.ranks_per_host else cluster.inside
        byte, part = link.gather_byte_seconds or link.byte_seconds, size / ranks if mode.scatters else size
        one = agreeing(ranks, link) + (ranks - 1) * (link.latency + mode.share * part * byte)
        return mode.exchanges * one / mode.every
    one = allreduce(ranks, mode.share * size, cluster)
    again = allreduce(ranks, 0.0, cluster)  # what further exchanges of the same bytes add
    return (one + (mode.exchanges - 1) * again) / mode.every


def computation(ranks: int, local_batch: float, compute: Compute, mode: Mode, cluster: Cluster) -> float:
    """Seconds that the slowest of all ranks computes, compression included."""
    beside = ranks if cluster.shared_machine else min(ranks, cluster.ranks_per_host)
    crowd = 1.0
    if cluster.cores:
        crowd, measured = (max(1.0, n * compute.threads / cluster.cores) for n in (beside, compute.beside))
        crowd /= measured
    slowest = 1 + compute.deviation * min(3.0, math.sqrt(2 * math.log(ranks)))
    return (compute.seconds(local_batch) + (mode.extra if ranks > 1 else 0.0)) * crowd * slowest


def wire_bytes(ranks: int, size: float, mode: Mode) -> float:
    """Bytes that a rank sends a step."""
    factor = (ranks - 1) if mode.gathers else 2 * (ranks - 1) / ranks
    return factor * mode.share * size / mode.every


def predict(
    ranks: int, local_batch: float, compute: Compute, mode: Mode, cluster: Cluster, overlap: float = 0.0
) -> Prediction:
    """What N ranks make of a training.

    Args:
        ranks: N.
        local_batch: samples a step of each.
        compute: of one rank.
        mode: how they train.
        cluster: where.
        overlap: share of the exchange that runs while gradients are still computed: 0 for gradients that travel as one
            group, which is hvdkit's default.
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
    """What N ranks make of a batch that they take between them."""
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
