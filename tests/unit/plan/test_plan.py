"""The planner's model on paper: closed forms, fits, and what it advises."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvdkit import native
from hvdkit.collectives.transports.sockets import Sockets
from hvdkit.compression import by_name
from hvdkit.errors import UsageError
from hvdkit.optimizers import groups
from hvdkit.plan import __main__ as planner
from hvdkit.plan import advice, cost, facts, links, modes, published, report, score
from hvdkit.plan.cost import (
    Cluster,
    Compute,
    Division,
    Link,
    Mode,
    allreduce,
    computation,
    exchange,
    predict,
    ring,
    tree,
    wire_bytes,
)

LINK = Link(1e-4, 1e-8, 1e-3)
COMPUTE = Compute(fixed=1e-3, sample=1e-4, gradient_bytes=4e6)
CLUSTER = Cluster(LINK, Link(1e-6, 1e-10))
DENSE = Mode("data parallel")
NATIVE = Path(native.__file__).parent


def test_an_allreduce_costs_what_the_formulas_say():
    assert ring(4, 1e6, LINK) == pytest.approx(6 * 1e-4 + 1.5 * 1e6 * 1e-8)
    assert tree(8, 1e3, LINK) == pytest.approx(3 * (1e-4 + 1e3 * 1e-8))
    assert tree(5, 0, LINK) == pytest.approx(3e-4), "the depth is rounded up"
    assert ring(1, 1e6, LINK) == tree(1, 1e6, LINK) == 0
    assert ring(10_000, 1e9, Link(0, 1e-8)) == pytest.approx(2 * 1e9 * 1e-8, rel=1e-3), "twice the bytes, for many"


def test_hosts_of_several_ranks_exchange_inside_first():
    cluster = Cluster(LINK, Link(0.0, 1e-9), ranks_per_host=4)
    seconds = allreduce(8, 4e6, cluster)
    inside = 1.5 * 4e6 * 1e-9
    between = 1e-3 + min(2 * 1e-4 + 1e6 * 1e-8, 1e-4 + 1e6 * 1e-8)
    assert seconds == pytest.approx(inside + between)


SOCKETS = Link(1e-4, 1e-8, 1e-3, transport="sockets")
MEMORY = Link(2e-4, 1e-10, 1e-3, transport="shared")


def on_hosts(ranks_per_host=1, **changes):
    return Cluster(dataclasses.replace(SOCKETS, **changes), MEMORY, ranks_per_host)


@pytest.mark.parametrize(
    ("hosts", "size", "expected"),
    [
        (2, 4e6, 1e-4 + 4e6 * 1e-8),  # everything to the other, in one step
        (3, 4e6, 2e-4 + 4 / 3 * 4e6 * 1e-8),  # a third to each of two, and the sum of a third to each of two
        (4, 4e6, 2e-4 + 1.5 * 4e6 * 1e-8),
        (2, 8e3, 1e-4 + 8e3 * 1e-8),
        (3, 8e3, 1e-4 + 2 * 8e3 * 1e-8),  # few bytes: all to all, in one step
        (4, 8e3, 1e-4 + 3 * 8e3 * 1e-8),
        (4, 32 << 10, 1e-4 + 3 * (32 << 10) * 1e-8),
        (4, (32 << 10) + 4, 2e-4 + 1.5 * ((32 << 10) + 4) * 1e-8),
        (4, 0.0, 1e-4),
    ],
)
def test_sockets_take_one_or_two_steps_and_no_negotiation(hosts, size, expected):
    assert allreduce(hosts, size, on_hosts()) == pytest.approx(expected)


def test_a_host_s_link_carries_the_bytes_of_one_rank():
    inside = 2e-4 + 4e6 * 1e-10  # two ranks sum in memory: one barrier
    spread = 2e-4 + 2e6 * 1e-10  # each reads the other's half
    assert allreduce(4, 4e6, on_hosts(2)) == pytest.approx(inside + 1e-4 + 4e6 * 1e-8 + spread)
    of_three_hosts = 2e-4 + 4 / 3 * 4e6 * 1e-8
    assert allreduce(6, 4e6, on_hosts(2)) == pytest.approx(inside + of_three_hosts + spread)
    alone = 2e-4 + 4e6 * 1e-10  # the second host has one rank, which carries everything and so spreads it, too
    assert allreduce(3, 4e6, on_hosts(2)) == pytest.approx(inside + 1e-4 + 4e6 * 1e-8 + alone)


def test_parts_decide_whether_hosts_divide_the_sum():
    assert allreduce(6, 60e3, on_hosts(2)) == pytest.approx(
        (2e-4 + 60e3 * 1e-10) + (1e-4 + 2 * 60e3 * 1e-8) + (2e-4 + 30e3 * 1e-10)
    ), "each carries 30 kB, in one step"


def test_shared_memory_has_barriers_and_no_negotiation():
    assert allreduce(4, 4e6, on_hosts(8)) == pytest.approx(2e-4 + 1.5 * 4e6 * 1e-10)
    assert allreduce(8, 4e6, on_hosts(8)) == pytest.approx(4e-4 + 1.75 * 4e6 * 1e-10), "many ranks divide the sum"


def test_the_model_s_borders_are_those_of_the_compiled_transports():
    (sockets,) = re.findall(r"kUndividedBytes = (\d+) << 10;", (NATIVE / "sockets.cc").read_text())
    (memory,) = re.findall(r"kDivideAbove = (\d+);", (NATIVE / "shared_memory.cc").read_text())
    assert (int(sockets) << 10, int(memory)) == (cost.UNDIVIDED_BYTES, cost.UNDIVIDED_RANKS)
    pack = (NATIVE / "pack.h").read_text()
    (packing,) = re.findall(r"kPackSecondsPerByte = ([\d.e-]+);", pack)
    assert float(packing) == cost.PACKING_BYTE_SECONDS
    assert "kWord = sizeof(uint32_t), kMask = sizeof(uint64_t), kBlockWords = 64;" in pack
    assert cost.MASK_SHARE == 8 / (64 * 4)
    assert Sockets.bucket_bytes == cost.BUCKET_BYTES


def test_zeros_are_not_sent_where_that_takes_less_time():
    compute = dataclasses.replace(COMPUTE, zero_share=0.5)
    dense, halves = Mode("dense", word_elements=1), Mode("fp16", share=0.5, word_elements=2)
    slow, fast = on_hosts(), on_hosts(byte_seconds=1e-9)

    def sends(mode, cluster, ranks=2):
        found = predict(ranks, 64, compute, mode, cluster)
        assert found.step_seconds == pytest.approx(
            compute.seconds(64) + (ranks - 1) * 1e-4 + found.wire_bytes * cluster.between.byte_seconds
        )
        return found.wire_bytes

    assert sends(dense, slow) == pytest.approx((0.5 + 1 / 32) * 4e6)
    assert sends(dense, slow, 3) == pytest.approx((1 - (0.5 - 1 / 32) / 2) * 4 / 3 * 4e6), "the sums have few"
    assert sends(halves, slow) == pytest.approx((0.75 + 1 / 32) * 2e6), "both halves of a word must be zero"
    assert sends(dense, fast) == sends(Mode("no zeros"), slow) == pytest.approx(4e6), "packing would take longer"


def test_buckets_are_hidden_behind_the_rest_of_the_backward_pass():
    shapes = [(1 << 17,), (1 << 20,), (3 << 18,), (1,), (1 << 18,), (5,)]
    gradients = [tf.zeros(shape) for shape in shapes]
    *early, last = groups.buckets(list(range(len(shapes))), gradients, Sockets.bucket_bytes)
    sizes = [sum(4 * gradients[place].shape[0] for place in places) for places in (itertools.chain(*early), last)]
    mode = modes.all_modes(shapes, "sgd", {})["data parallel"]
    assert mode.early == pytest.approx(sizes[0] / sum(sizes))
    assert modes.all_modes(shapes[3:], "sgd", {})["data parallel"].early == 0, "one bucket"
    cluster = dataclasses.replace(on_hosts(), cores=2)

    def visible(sample):
        compute = dataclasses.replace(COMPUTE, sample=sample)
        return predict(2, 64, compute, mode, cluster).step_seconds - compute.seconds(64)

    whole = 1e-4 + 4e6 * 1e-8
    assert visible(1.0) == pytest.approx((1 - mode.early) * whole), "all but the last bucket"
    assert visible(1e-4) == pytest.approx(whole - 2 / 3 * (1 - mode.early) * 7.4e-3), "the rest is too short"


def test_sparse_and_few_bit_gradients_over_sockets():
    gather = Mode("topk", share=0.02, gathers=True)
    assert exchange(4, 4e6, gather, on_hosts()) == pytest.approx(1e-4 + 3 * 8e4 * 1e-8)
    assert exchange(4, 4e6, gather, on_hosts(2)) == pytest.approx(1e-4 + 2 * 2 * 8e4 * 1e-8), "two ranks, one link"
    bits = Mode("int8", share=0.25, scatters=True, exchanges=2)
    part = 0.25 * 4e6 / 4
    by_horovod, by_sockets = 2 * 1e-3 + 3 * part * 1e-8, 1e-4 + 3 * part * 1e-8
    assert exchange(4, 4e6, bits, on_hosts()) == pytest.approx(by_horovod + by_sockets), "an alltoall is Horovod's"
    twice = Mode("powersgd", share=0.01, exchanges=2)
    assert exchange(4, 4e6, twice, on_hosts()) == pytest.approx(2 * (1e-4 + 3 * 2e4 * 1e-8))
    assert wire_bytes(4, 4e6, twice, "sockets") == pytest.approx(3 * 4e4)
    assert wire_bytes(4, 4e6, twice) == pytest.approx(1.5 * 4e4)
    assert wire_bytes(4, 4e6, DENSE, "sockets") == wire_bytes(4, 4e6, DENSE) == pytest.approx(6e6)


def test_a_link_that_saves_up_its_rate_carries_small_messages_at_once():
    cluster = on_hosts(burst=1e5)
    assert allreduce(2, 5e4, cluster, idle=1.0) == pytest.approx(1e-4), "within the bucket: only the latency is left"
    assert allreduce(2, 3e5, cluster, idle=1.0) == pytest.approx(1e-4 + 2e5 * 1e-8)
    step = predict(2, 64, COMPUTE, Mode("x", share=0.5), on_hosts(burst=1e9)).step_seconds
    assert step == pytest.approx(2e6 * 1e-8), "it computes for 7 ms, but the link needs 20 ms for a step's bytes"
    step = predict(2, 64, COMPUTE, Mode("x", share=0.01), on_hosts(burst=1e9)).step_seconds
    assert step == pytest.approx(COMPUTE.seconds(64) + 1e-4), "the link needs less than the computation"
    seldom = Mode("local", every=10)
    assert exchange(2, 4e6, seldom, on_hosts(burst=1e9), idle=1e-3) == pytest.approx((4e6 * 1e-8 - 10e-3) / 10)


def test_one_rank_exchanges_nothing():
    one = predict(1, 64, COMPUTE, DENSE, CLUSTER)
    assert (one.efficiency, one.wire_bytes, one.step_seconds) == (1.0, 0.0, pytest.approx(7.4e-3))


def test_modes_divide_what_is_exchanged():
    whole = exchange(2, 4e6, DENSE, CLUSTER)
    assert exchange(2, 4e6, Mode("local", every=16), CLUSTER) == pytest.approx(whole / 16)
    assert wire_bytes(4, 4e6, Mode("x", share=0.25)) == pytest.approx(1.5e6)
    gathered = Mode("topk", share=0.02, gathers=True)
    assert exchange(4, 4e6, gathered, CLUSTER) == pytest.approx(2e-3 + 3 * (1e-4 + 8e4 * 1e-8))
    assert wire_bytes(4, 4e6, gathered) == pytest.approx(3 * 8e4)


def test_each_mode_sends_what_its_compressor_does():
    shapes = [(1000, 1000), (1000,)]
    dense = 4 * 1_001_000
    found = modes.all_modes(shapes, "adam", dict.fromkeys(modes.FEEDBACK, 0.25))
    assert wire_bytes(2, dense, found["data parallel"]) == 2 * wire_bytes(2, dense, found["fp16"]) == dense
    for name in modes.FEEDBACK:
        assert wire_bytes(2, dense, found[name]) == pytest.approx(by_name(name).wire_bytes(shapes, 2))
        assert (found[name].flags, found[name].extra) == (f"--compression={name}", 0.25)
    assert [name for name in modes.FEEDBACK if found[name].gathers] == ["topk"]
    assert [name for name in modes.FEEDBACK if found[name].scatters] == ["int8", "onebit"]
    assert wire_bytes(2, dense, found["independent"]) == 0


def test_fragments_hide_what_their_steps_can_hide():
    cluster = dataclasses.replace(CLUSTER, cores=1)
    compute = predict(1, 64, COMPUTE, DENSE, cluster).step_seconds

    def communication(mode, cluster):
        return predict(2, 64, COMPUTE, mode, cluster).step_seconds - compute

    whole, parts = Mode("x", every=100), Mode("x", every=100, exchanges=4)
    shown = communication(parts, cluster)
    assert communication(whole, cluster) < shown < communication(whole, cluster) * 1.2, "only the latency is added"
    one_step = communication(dataclasses.replace(parts, hidden=1), cluster)
    assert one_step == pytest.approx(shown - 4 * compute / 100)
    assert communication(dataclasses.replace(parts, hidden=5), cluster) == pytest.approx(0)
    on_gpus = dataclasses.replace(parts, hidden=5)
    assert communication(on_gpus, CLUSTER) == pytest.approx(shown), "Horovod and NCCL send only afterwards"


def test_streaming_diloco_needs_variables_to_divide():
    seconds = dict.fromkeys(modes.FEEDBACK, 0.0)
    assert "streaming DiLoCo" not in modes.all_modes([(2, 2)], "sgd", seconds)
    found = modes.all_modes([(2, 2)] * 9, "sgd", seconds)["streaming DiLoCo"]
    assert found.flags == "--local-steps=100 --fragments=4"
    assert (found.every, found.exchanges, found.hidden) == (100, 4, 5)


@pytest.mark.parametrize(("optimizer", "colon"), [("sgd", ":"), ("sgd:momentum=0.9", ",")])
def test_flags_of_modes_that_accumulate_or_divide(optimizer, colon):
    parts = {"tensor": {"stages": False, "share": 0.8, "bytes": 100, "exchanges": 4}}
    found = modes.all_modes([(2, 2)], optimizer, dict.fromkeys(modes.FEEDBACK, 0.0), parts)
    assert found["accumulation"].flags == f"--optimizer={optimizer}{colon}gradient_accumulation_steps=5"
    assert (found["accumulation"].every, found["local SGD"].every, found["DiLoCo"].every) == (5, 20, 100)
    assert found["tensor parallel"].flags == "--strategy=tensor"
    assert found["tensor parallel"].division == Division(False, 0.8, 100, exchanges=4)


def test_modes_are_known_by_name_before_a_model_is():
    divided = {name: {"stages": name == "pipeline", "share": 0.5, "bytes": 1} for name in ("tensor", "pipeline")}
    found = modes.all_modes([(2, 2), (2,)], "adam", dict.fromkeys(modes.FEEDBACK, 0.0), divided)
    assert tuple(found) == modes.NAMES


def measured(batch, fixed, sample):
    """A run whose step takes `fixed` seconds and `sample` more for each example."""
    return {
        "samples_per_second": [batch / (fixed + sample * batch)] * 3,
        "peak_bytes": [int(1e8 + 16e6 + 1e3 * batch), int(1e8)],
        "facts": {"gradient_bytes": 4e6, "state_bytes": 12e6},
    }


def test_time_and_memory_of_a_model_are_found_again():
    found = facts.from_runs({batch: measured(batch, 1e-3, 1e-4) for batch in (32, 64, 128)}, threads=2, beside=4)
    assert (found.fixed, found.sample, found.deviation) == pytest.approx((1e-3, 1e-4, 0.0))
    assert (found.activation_bytes, found.base_bytes) == pytest.approx((1e3, 1e8))
    assert (found.gradient_bytes, found.state_bytes, found.threads, found.beside) == (4e6, 12e6, 2, 4)


@pytest.mark.parametrize(("fixed", "sample", "expected"), [(-1e-3, 1e-4, (0, 1e-4)), (1e-2, -1e-5, (1e-2, 0))])
def test_noise_makes_no_time_negative(fixed, sample, expected):
    found = facts.from_runs({batch: measured(batch, fixed, sample) for batch in (100, 200)}, threads=1)
    assert (found.fixed, found.sample) == pytest.approx(expected, rel=0.2)


FREE = Cluster(Link(0.0, 0.0), Link(0.0, 0.0))


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 1), (2, 4), (4, 4), (4, 16)])
def test_a_pipeline_is_idle_for_its_bubble(stages, micro_batches):
    compute = Compute(
        fixed=0.0, sample=1e-4, gradient_bytes=4e6, state_bytes=12e6, activation_bytes=1e3, base_bytes=1e8
    )
    mode = Mode("pipeline parallel", division=Division(True, 1.0, 1e3, micro_batches=micro_batches))
    found = predict(stages, 64, compute, mode, FREE)
    assert found.efficiency == pytest.approx(micro_batches / (micro_batches + stages - 1))
    assert found.memory_bytes == pytest.approx(1e8 + (16e6 + 64e3) / stages)
    assert found.wire_bytes == 2 * 64 * 1e3, "forwards and backwards"
    assert predict(stages, 64, compute, mode, CLUSTER).step_seconds > found.step_seconds


def test_divided_tensors_save_their_share_and_cost_their_sums():
    compute = Compute(fixed=1e-3, sample=1e-4, gradient_bytes=4e6, state_bytes=12e6)
    mode = Mode("tensor parallel", division=Division(False, 0.8, 1e4, exchanges=4))
    found = predict(2, 64, compute, mode, FREE)
    assert found.step_seconds == pytest.approx(0.6 * compute.seconds(64))
    assert found.memory_bytes == pytest.approx(0.6 * 16e6)
    sums = 4 * allreduce(2, 64 * 1e4 / 4, CLUSTER)
    assert predict(2, 64, compute, mode, CLUSTER).step_seconds == pytest.approx(found.step_seconds + sums)


def test_ranks_are_compared_with_a_process_that_has_all_their_cores():
    doubts = {"compute": 0.05, "start": 0.1, "byte": 0.1}
    one, two = (
        report.rows([2], 64, COMPUTE, {"d": DENSE}, CLUSTER, doubts, one_process=rate)[0]["speedup"]
        for rate in (None, 2 * 64 / COMPUTE.seconds(64))
    )
    assert one == pytest.approx(2 * two)
    assert "Not at all" in advice.advise(
        report.rows([2], 64, COMPUTE, {"data parallel": DENSE}, CLUSTER, doubts, one_process=1e6),
        {"data parallel": DENSE},
        "--model=m",
        "",
        ranks_per_host=2,
    )


def test_ranks_that_share_cores_compute_slower():
    shared = Cluster(LINK, LINK, ranks_per_host=1, cores=2, shared_machine=True)
    assert computation(4, 64, COMPUTE, DENSE, shared) == pytest.approx(2 * COMPUTE.seconds(64))
    apart = dataclasses.replace(shared, shared_machine=False)
    assert computation(4, 64, COMPUTE, DENSE, apart) == pytest.approx(COMPUTE.seconds(64))
    slow = dataclasses.replace(COMPUTE, deviation=0.1)
    assert computation(8, 64, slow, DENSE, apart) == pytest.approx(
        COMPUTE.seconds(64) * (1 + 0.1 * np.sqrt(2 * np.log(8)))
    )


def test_more_bandwidth_is_never_slower():
    speeds = [
        predict(8, 64, COMPUTE, DENSE, Cluster(Link(1e-4, 1 / b), LINK)).samples_per_second
        for b in (1e6, 1e7, 1e8, 1e9)
    ]
    assert speeds == sorted(speeds)
    assert len(set(speeds)) == 4


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_link_is_found_again_in_noisy_timings(ranks):
    true = Link(0.0, 2e-9, 3e-3)
    cluster = Cluster(true, true)
    generator = np.random.default_rng(1)
    rows = []
    for size in (1e3, 1e4, 1e5, 1e6, 1e7, 1e8):
        seconds = (3e-3 * np.ceil(np.log2(ranks)) + ring(ranks, size, true)) * generator.normal(1, 0.03)
        rows.append(
            {"operation": "allreduce", "bytes": size, "seconds": seconds, "quartiles": [0.98 * seconds, 1.02 * seconds]}
        )
    found, deviations = links.fit(rows, ranks)
    assert found.byte_seconds == pytest.approx(true.byte_seconds, rel=0.1)
    assert allreduce(ranks, 0.0, Cluster(found, found)) == pytest.approx(allreduce(ranks, 0.0, cluster), rel=0.1)
    assert deviations["byte"] == pytest.approx(0.04 / 1.349)


def test_a_link_is_found_by_its_long_exchanges_and_gathers_have_a_byte_of_their_own():
    rows = [{"bytes": n, "seconds": 1e-3 + max(0.0, n - 50_000) * 8e-8, "quartiles": [0, 0]} for n in (4, 1e6, 4e6)]
    gathered = [{**row, "seconds": 2 * row["seconds"]} for row in rows]  # the first 50 kB pass at once
    link, _ = links.fit(rows, 2, gathered=gathered)
    assert link.byte_seconds == pytest.approx(8e-8)
    assert link.gather_byte_seconds == pytest.approx(16e-8)
    assert allreduce(2, 0.0, Cluster(link, link)) == pytest.approx(1e-3, rel=0.01)


def test_few_bits_are_scattered_and_gathered():
    link = Link(1e-3, 1e-8, 5e-3, gather_byte_seconds=3e-8)
    mode = Mode("int8", share=0.25, scatters=True, exchanges=2)
    once = 2 * 5e-3 + 3 * (1e-3 + 0.25 * 1e6 / 4 * 3e-8)
    assert exchange(4, 1e6, mode, Cluster(link, link)) == pytest.approx(2 * once)
    gather = Mode("topk", share=0.02, gathers=True)
    assert exchange(4, 1e6, gather, Cluster(link, link)) == pytest.approx(2 * 5e-3 + 3 * (1e-3 + 2e4 * 3e-8))


@pytest.mark.parametrize("hosts", [2, 3, 4])
def test_sockets_are_found_again_in_what_they_take(hosts):
    true = Cluster(Link(3e-4, 8e-8, transport="sockets", burst=131_072), MEMORY)
    sizes = [4, *(1 << bits for bits in range(14, 21, 2))]
    long = dataclasses.replace(true, between=dataclasses.replace(true.between, burst=0.0))

    def rows(name, seconds):
        return [
            {"operation": name, "bytes": n, "seconds": seconds(n), "quartiles": [0.98 * seconds(n), 1.02 * seconds(n)]}
            for n in sizes
        ]

    content = {
        "ranks": hosts,
        "hosts": hosts,
        "local_size": 1,
        "rows": [
            *rows("sockets_allreduce", lambda n: allreduce(hosts, n, long)),
            *rows("sockets_allreduce_after_pause", lambda n: allreduce(hosts, n, true, idle=9.0)),
            *rows("sockets_allgather", lambda n: 3e-4 + (hosts - 1) * n * 1e-7),
            *rows("allreduce", lambda n: 5e-3),
        ],
    }
    found, deviations = links.from_measurement(content)
    assert (found.transport, deviations["start"]) == ("sockets", pytest.approx(0.04 / 1.349))
    assert (found.latency, found.byte_seconds) == pytest.approx((3e-4, 8e-8), rel=0.01)
    assert found.gather_byte_seconds == pytest.approx(1e-7)
    assert found.burst == pytest.approx(131_072, rel=0.01)
    assert found.agreeing == pytest.approx(5e-3 / np.ceil(np.log2(hosts)))


def test_one_size_that_was_disturbed_does_not_spoil_the_link():
    def row(n, times=1.0):
        return {"bytes": n, "seconds": times * (1e-4 + n * 8e-8), "quartiles": [0, 0]}

    rows = [row(4), row(1 << 16), row(1 << 18), row(1 << 20), row(1 << 22, 1.2)]
    assert links.fit(rows, 2, transport="sockets")[0].byte_seconds == pytest.approx(8e-8, rel=0.01)
    assert links.fit(rows, 2)[0].byte_seconds > 9e-8, "of Horovod's, the longest count alone"


def test_a_link_that_saves_nothing_has_no_burst():
    def row(n, seconds):
        return {"bytes": n, "seconds": seconds, "quartiles": [0, 0]}

    rows = [row(n, 1e-4 + n * 1e-9) for n in (4, 1 << 18, 1 << 20)]
    paused = [row(1 << 20, 1e-4 + (1 << 20) * 0.9e-9)]  # noise
    assert links.fit(rows, 2, transport="sockets", paused=paused)[0].burst == 0


def test_a_link_of_horovod_or_of_memory_is_known_by_its_rows(tmp_path):
    def rows(name):
        return [{"operation": name, "bytes": n, "seconds": 1e-3 + n * 1e-9, "quartiles": [0, 0]} for n in (4, 1e6, 4e6)]

    horovod = {"ranks": 2, "hosts": 2, "local_size": 1, "rows": rows("allreduce")}
    memory = {"ranks": 2, "hosts": 1, "local_size": 2, "rows": [*rows("allreduce"), *rows("shared_allreduce")]}
    path = tmp_path / "links.json"
    path.write_text(json.dumps({"links": {"between": horovod, "inside": memory}}))
    assert links.read(str(path))[0].transport == "horovod"
    inside, _ = links.read(str(path), "inside")
    assert (inside.transport, inside.latency) == ("shared", pytest.approx(1e-3))
    path.write_text(json.dumps({**memory, "hosts": 2, "ranks": 4}))
    with pytest.raises(UsageError, match="one rank on each host, as in -H h1:1,h2:1"):
        links.read(str(path))


def test_the_transport_of_a_job_follows_its_environment(monkeypatch):
    monkeypatch.delenv("HVDKIT_SOCKETS", raising=False)
    assert links.expected_transport() == ("horovod" if tf.config.list_physical_devices("GPU") else "sockets")
    monkeypatch.setenv("HVDKIT_SOCKETS", "0")
    assert links.expected_transport() == "horovod"
    assert links.given("50us", "10Gbit/s", "1ms", "sockets").transport == "sockets"


def test_intervals_keep_all_that_is_known_of_a_link():
    gather = {"topk": Mode("topk", share=0.02, gathers=True)}
    cluster = on_hosts(gather_byte_seconds=1e-6, burst=1e4)
    (row,) = report.rows([4], 64, COMPUTE, gather, cluster, {"compute": 0.01, "start": 0.01, "byte": 0.01})
    assert row["interval"][0] < row["samples_per_second"] < row["interval"][1]


@pytest.mark.parametrize(("seconds", "steps"), [(0.01, 10), (0.5, 1)])
def test_short_steps_run_together(seconds, steps):
    assert facts.together(seconds) == steps


def test_the_flags_of_a_link_are_understood():
    assert links.given("50us", "10Gbit/s", "1ms") == Link(pytest.approx(5e-5), 1 / 1.25e9, 1e-3)
    for latency, bandwidth in (("50", "1Gbit/s"), ("1ms", "fast"), ("1ms", "0Gbit/s")):
        with pytest.raises(UsageError, match=r"The form is a number and"):
            links.given(latency, bandwidth, "1ms")


def _advice(link, modes, hosts="h1:1,h2:1", ranks_per_host=1):
    cluster = Cluster(link, link)
    found = report.rows([1, 2, 4], 64, COMPUTE, modes, cluster, {"compute": 0.05, "start": 0.1, "byte": 0.1})
    return advice.advise(found, modes, "--model=m", hosts, ranks_per_host)


def test_the_advice_changes_with_the_link():
    modes = {m.name: m for m in (DENSE, Mode("DiLoCo", "--local-steps=100", every=100, exact=False))}
    fast = _advice(Link(1e-6, 1e-10), modes)
    assert fast.startswith("Use data parallel on 4 ranks, 3.")
    assert fast.endswith("launch/hosts.sh -H h1:1,h2:1 -np 4 --model=m")
    slow = _advice(Link(1e-2, 1e-7), modes)
    assert slow.startswith("Dense data parallelism does not pay here; DiLoCo on 4 ranks")
    assert slow.endswith("--model=m --local-steps=100")
    none = _advice(Link(1e-2, 1e-6), {"data parallel": DENSE})
    assert none.startswith("Not at all: train in one process (the best, data parallel on 4 ranks, reaches 0.0")


def test_the_advice_names_hosts_only_where_one_is_not_enough():
    modes, link = {"data parallel": DENSE}, Link(1e-6, 1e-10)
    assert ": launch/local.sh -np 4 --model=m" in _advice(link, modes, "", 4)
    assert ": launch/hosts.sh -H HOST1:2,HOST2:2 -np 4 --model=m" in _advice(link, modes, "", 2)


def _options(*given):
    arguments = planner.parser().parse_args([*given])
    planner._lay_out(arguments)
    return arguments.ranks, arguments.ranks_per_host


def test_ranks_that_nobody_names_are_those_of_this_host_or_of_the_hosts(monkeypatch):
    monkeypatch.setattr(planner, "usable_cores", lambda: 6)
    assert _options() == ("1,2,4,6", 6)
    assert _options("-H", "h1:2,h2:3") == ("1,2,4,5", 3)
    assert _options("--bandwidth=1Gbit/s") == ("1,2,4,8", 1)
    assert _options("--ranks=1,16", "--ranks-per-host=8") == ("1,16", 8)


def test_the_report_shows_each_mode_once_and_the_plot_a_few():
    ways = modes.all_modes([[1000, 100], [100]], "adam", dict.fromkeys(modes.FEEDBACK, 1e-4))
    found = report.rows([1, 2, 4, 8], 64, COMPUTE, ways, CLUSTER, {"compute": 0.05, "start": 0.1, "byte": 0.1})
    shown = report.table(found, ways)
    for name in {row["mode"] for row in found}:
        assert len(re.findall(rf"^{name}  .*(yes|no)$", shown, re.MULTILINE)) == 1, shown
    drawn = report.lines(found, ways)
    assert list(drawn)[:2] == ["ideal", "data parallel"]
    assert len(drawn) <= 5
    assert drawn["ideal"][-1] == (8, pytest.approx(8))


def test_intervals_hold_the_prediction_and_grow_with_doubt():
    widths = []
    for doubt in (0.02, 0.2):
        (row,) = report.rows([4], 64, COMPUTE, {"d": DENSE}, CLUSTER, {"compute": doubt, "start": doubt, "byte": doubt})
        low, high = row["interval"]
        assert low < row["samples_per_second"] < high
        widths.append(high - low)
    assert widths[1] > 5 * widths[0]


def test_the_score_is_the_median_error(tmp_path):
    pairs = [{"predicted": p, "measured": 100} for p in (110, 95, 130)]
    assert score.score(pairs) == pytest.approx(0.10)
    file = tmp_path / "pairs.json"
    file.write_text('{"rows": [{"case": "a", "predicted": 1, "measured": 0}]}')
    with pytest.raises(UsageError, match="does not hold predictions and measurements"):
        score.read(str(file))


def test_nvidia_s_figures_are_those_of_its_page():
    """Images per second, and the page's own column of weak scaling."""
    page = {"TF32": {1: 165, 8: 1308, 32: 4782, 64: 9473}, "AMP": {1: 470, 8: 3550, 32: 12908, 64: 25455}}
    scaling = {"TF32": {8: 7.93, 32: 28.98, 64: 57.41}, "AMP": {8: 7.55, 32: 27.46, 64: 54.16}}
    assert {one.precision: one.images for one in published.ALL} == page
    assert {one.precision: one.local_batch for one in published.ALL} == {"TF32": 80, "AMP": 160}
    for one in published.ALL:
        for gpus, times in scaling[one.precision].items():
            assert one.efficiency(gpus) * gpus == pytest.approx(times, abs=0.01)


def test_the_published_model_has_the_weights_of_keras():
    model = keras.applications.EfficientNetB4(weights=None)
    assert sum(int(np.prod(w.shape)) for w in model.trainable_weights) == published.WEIGHTS


def test_one_gpu_calibrates_the_prediction_of_the_others():
    for one in published.ALL:
        assert published.error(one, 1) == pytest.approx(0)
        errors = [published.error(one, gpus) for gpus in (8, 32, 64)]
        assert max(map(abs, errors)) < 0.15, "no worse than the README says"
        assert all(published.error(one, gpus, overlap=1.0) > published.error(one, gpus) for gpus in (8, 32, 64))


def test_nvidia_s_eight_gpus_by_hand():
    step = 80 / 165 * (1 + 0.01 * np.sqrt(2 * np.log(8)))
    sent = 2 * 19_341_616  # float16
    by_ring = 14 * 10e-6 + 1.75 * sent / 232e9
    seconds = step + 3 * 1e-3 + min(by_ring, 3 * (10e-6 + sent / 232e9))
    assert published.predicted(published.TF32, 8).samples_per_second == pytest.approx(8 * 80 / seconds)
