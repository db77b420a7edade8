"""The doctor's checks: each is a function over the findings. The order here is the order of the table.

To add a check, write a function that yields results of `registry.py` (`fine`, `failed`, `warned`, `not_run`), name it
with `@check`, and list it here. If it needs a new fact about a host, add a method `answer_*` to the probe.
"""

import dataclasses
from collections.abc import Collection

from hvdkit.doctor.checks import hosts, job, machine, network, software
from hvdkit.doctor.checks.registry import Check, Result, not_run, results_of
from hvdkit.doctor.findings import Findings

# A failure of an earlier check is often the cause of later ones.
CHECKS: tuple[Check, ...] = (
    hosts.connect,
    hosts.ssh,
    network.names,
    network.interface,
    network.ports,
    network.clock,
    software.versions,
    software.build,
    software.gpus,
    software.nccl,
    machine.shared_memory,
    machine.disk,
    machine.workdir,
    machine.open_files,
    job.dataset,
    network.latency,
    network.bandwidth,
    job.allreduce,
)


def judge(found: Findings, skip: Collection[str] = ()) -> list[Result]:
    """Applies the checks. Each has at least one result."""
    results: list[Result] = []
    for check in CHECKS:
        if check.name in skip:
            results.append(dataclasses.replace(not_run("left out with --skip"), check=check.name))
        else:
            results += results_of(check, found)
    return results
