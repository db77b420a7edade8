"""The first steps of a job: reading its data, and an allreduce over all ranks."""

import shlex
from collections.abc import Iterator

from hvdkit.doctor.checks.registry import Fix, Result, check, failed, fine, not_run, summary
from hvdkit.doctor.findings import Findings


@check("dataset")
def dataset(found: Findings) -> Iterator[Result]:
    """Every host reads the data set, and it has the same size on all hosts."""
    wanted = found.settings["dataset"]
    if not wanted:
        yield not_run("no --dataset was given")
        return
    there = found.answered("dataset")
    reference = next(iter(there), None)
    for name in found.reached:
        problem = found.hosts[name].problems.get("dataset")
        if problem:
            yield failed(name, f"{wanted} cannot be read: {problem.partition(': ')[2]}", _fetch(found, name, reference))
        elif reference and there.get(name, there[reference]) != there[reference]:
            text = f"{_sizes(there[name]['sizes'])}, and {reference} has {_sizes(there[reference]['sizes'])}"
            yield failed(name, text, _fetch(found, name, reference))
    if there:
        yield fine(f"{wanted}: {summary({name: _sizes(answer['sizes']) for name, answer in there.items()})}")
    else:
        yield not_run("TensorFlow was not loaded")


def _fetch(found: Findings, name: str, reference: str | None) -> Fix:
    """The command that copies the data set from a host that has it, or downloads it with TFDS."""
    wanted, data_dir = found.settings["dataset"], found.settings["data_dir"]
    if reference and (data_dir or wanted.startswith("/")):
        path = shlex.quote(data_dir.rstrip("/") if data_dir else wanted.rstrip("/"))
        # tar creates missing folders, and also works if the data set is a single file.
        return Fix(f"tar -C / -cf - {path.lstrip('/')} | ssh {name} tar -C / -xf -", reference)
    place = f" --data-dir={shlex.quote(data_dir)}" if data_dir else ""
    python = shlex.quote(found.settings["python"])
    return Fix(f"{python} -m hvdkit.train --dataset={shlex.quote(wanted)}{place} --download --steps=1", name)


def _sizes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{size:,} {split}" for split, size in sizes.items())


@check("allreduce")
def allreduce(found: Findings) -> Iterator[Result]:
    """All ranks sum numbers with Horovod's allreduce and get the correct result."""
    if "ranks" not in found.exchange:
        yield not_run(found.exchange.get("skipped", "the examination was interrupted"))
        return
    ranks = found.exchange["ranks"]
    again = Fix("fix what failed above, then run the doctor again")
    for one in ranks:
        if "problem" in one:
            yield failed(one["host"], f"a rank failed: {one['problem']}", again)
        elif not one["right"]:
            text = f"rank {one['rank']} got a wrong sum: the memory or the network corrupts data"
            yield failed(one["host"], text, Fix("dmesg --level=err,crit | grep -iE 'ecc|mce|edac|xid'", one["host"]))
    good = [one for one in ranks if "problem" not in one]
    if len(good) == len(ranks) == sum(host.slots for host in found.hosts.values()):
        yield fine(_measured(good))
    else:
        yield failed("all", f"{len(good)} of {sum(h.slots for h in found.hosts.values())} ranks answered", again)


def _measured(ranks: list[dict[str, float]]) -> str:
    """Bus bandwidth as in nccl-tests: each rank's link carries 2 (n - 1) / n of the buffer."""
    size, count = ranks[0]["bytes"], len(ranks)
    seconds = max(one["seconds"] for one in ranks)
    text = f"{count} rank(s) on {ranks[0]['device']}s, all sums correct"
    if count == 1:
        return text
    bus = 2 * (count - 1) / count * size / seconds
    return f"{text}; {size / 1e6:.1f} MB in {seconds * 1000:.0f} ms, {bus / 1e9:.2f} GB/s bus bandwidth"
