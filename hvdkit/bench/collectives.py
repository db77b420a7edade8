"""`collectives`: latency and bus bandwidth of allreduce by size, compared with this machine's network and memory.

Bus bandwidth is the minimum number of bytes that a rank must move, divided by the time. This minimum is 2 (N - 1) / N
times the size for an allreduce, (N - 1) times each rank's size for an allgather, and the size for a broadcast (NVIDIA's
nccl-tests, PERFORMANCE.md).
"""

import argparse
import json
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from hvdkit import reporting
from hvdkit.bench import jobs

_LIMIT_BYTES = 64 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    sizes = "bytes per rank, separated by commas; or training: only what hvdkit plan needs, in a few seconds"
    parser.add_argument("--sizes", default="4,1024,65536,1048576,16777216", help=sizes)
    how = "launcher options of a case, such as '-np 2 --mpi' or '-H h1:1,h2:1'; may be repeated [-np 2]"
    parser.add_argument("--case", action="append", default=[], metavar="'LAUNCHER ARGS'", help=how)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the machine's limits, then each case."""
    found: dict[str, Any] = {"limits": {"loopback": loopback_bandwidth(), "memory_copy": copy_bandwidth()}, "cases": []}
    for case in arguments.case or ["-np 2"]:
        print(f"measuring {case}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder, "result.json")
            program = [
                sys.executable,
                "-m",
                "hvdkit.bench.collectives_rank",
                str(result),
                arguments.sizes,
                str(arguments.seconds),
            ]
            jobs.run([sys.executable, "-m", "hvdkit.launch", *case.split(), "--", *program])
            one = json.loads(result.read_text())
        controller = "mpi" if "--mpi" in case.split() else "gloo"
        found["cases"].append({"case": case, "controller": controller, **one})
    return {**found, **found["cases"][0]}  # hvdkit.plan reads the first case's rows at the top level


def bus_bytes(operation: str, size: int, ranks: int) -> float:
    """Return the minimum bytes that a rank must move if each rank contributes `size` bytes."""
    if "allreduce" in operation:
        return 2 * (ranks - 1) / ranks * size
    return (ranks - 1) * size if operation.endswith("allgather") and not operation.startswith("send") else size


def loopback_bandwidth() -> float:
    """Measure the bytes per second from one socket of this machine to another."""
    server = socket.create_server(("127.0.0.1", 0))
    block = bytes(1 << 20)

    def send() -> None:
        with socket.create_connection(server.getsockname()) as out:
            for _ in range(_LIMIT_BYTES >> 20):
                out.sendall(block)

    thread = threading.Thread(target=send)
    thread.start()
    with server, server.accept()[0] as incoming:
        began, buffer = time.perf_counter(), bytearray(1 << 20)
        while incoming.recv_into(buffer):
            continue
        seconds = time.perf_counter() - began
    thread.join()
    return _LIMIT_BYTES / seconds


def copy_bandwidth() -> float:
    """Measure the bytes per second that one core copies in memory; the block is larger than the caches."""
    source, target = np.ones(_LIMIT_BYTES, np.uint8), np.zeros(_LIMIT_BYTES, np.uint8)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - began)
    return _LIMIT_BYTES / min(seconds)


def report(found: dict[str, Any]) -> str:
    """Format the results as a table."""
    rows = [
        [
            case["case"],
            row["operation"].replace("_", " "),
            f"{row['bytes']:,}",
            f"{row['seconds'] * 1e6:,.0f}",
            f"{row['quartiles'][0] * 1e6:,.0f} to {row['quartiles'][1] * 1e6:,.0f}",
            f"{bus_bytes(row['operation'], row['bytes'], case['ranks']) / row['seconds'] / 1e9:.3f}",
        ]
        for case in found["cases"]
        for row in case["rows"]
    ]
    limits = ", ".join(f"{name.replace('_', ' ')} {value / 1e9:.2f} GB/s" for name, value in found["limits"].items())
    drawn = reporting.table(["case", "operation", "bytes", "µs", "quartiles, µs", "bus GB/s"], rows)
    return f"{drawn}\n\nLimits: {limits}"


def lines(found: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Return the points to plot: microseconds by bytes, for each case and operation."""
    drawn: dict[str, list[tuple[float, float]]] = {}
    for case in found["cases"]:
        for row in case["rows"]:
            drawn.setdefault(f"{case['case']}: {row['operation']}", []).append((row["bytes"], row["seconds"] * 1e6))
    return drawn


AXES = ("bytes", "µs")
