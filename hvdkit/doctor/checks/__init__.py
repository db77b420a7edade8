"""What the doctor judges: each check is one function over the findings; the order here is that of the table.

To add one, write a function that yields what `registry.py` offers (`fine`, `failed`, `warned`, `not_run`), give it its
name with `@check`, and list it here; what it needs to know of a host is a method `answer_*` of the probe.
"""

import dataclasses
from collections.abc import Collection

from hvdkit.doctor.checks import hosts, job, machine, network, software
from hvdkit.doctor.checks.registry import Check, Result, not_run, results_of
from hvdkit.doctor.findings import Findings

# What stands first is often the cause of what follows.
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
    """Applies the checks; of each there is at least one result."""
    results: list[Result] = []
    for check in CHECKS:
        if check.name in skip:
            results.append(dataclasses.replace(not_run("left out with --skip"), check=check.name))
        else:
            results += results_of(check, found)
    return results
