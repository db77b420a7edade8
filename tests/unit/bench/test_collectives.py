"""What the bench of collectives makes of sizes, and the limits that it measures."""

import time

import pytest

from hvdkit.bench import collectives


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("allreduce", 1500),
        ("shared_allreduce", 1500),
        ("sockets_allreduce_after_pause", 1500),
        ("allgather", 3000),
        ("sockets_allgather", 3000),
        ("broadcast", 1000),
        ("send_by_allgather", 1000),
    ],
)
def test_the_bytes_that_a_rank_must_move(operation, expected):
    assert collectives.bus_bytes(operation, 1000, ranks=4) == expected


def test_limits_are_at_least_what_the_whole_measurement_needed(monkeypatch):
    monkeypatch.setattr(collectives, "_LIMIT_BYTES", size := 1 << 24)
    for measure, copies in ((collectives.loopback_bandwidth, 1), (collectives.copy_bandwidth, 5)):
        began = time.perf_counter()
        bandwidth = measure()
        assert copies * size / (time.perf_counter() - began) <= bandwidth < 1e13
