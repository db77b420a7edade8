"""Whether all hosts have the same versions, and Horovod builds with the same options."""

import shlex
from collections.abc import Iterator
from typing import Any

from hvdkit.doctor.checks.registry import Fix, Result, check, failed, fine, not_run, summary, warned
from hvdkit.doctor.findings import Findings


@check("versions")
def versions(found: Findings) -> Iterator[Result]:
    """Python, TensorFlow, Keras, Horovod, NumPy and hvdkit are the same on all hosts."""
    yield from _without_python(found)
    there = found.answered("versions")
    if not there:
        yield not_run("the job's Python did not start on any host")
        return
    reference, known = next(iter(there.items()))
    for name, mine in there.items():
        if mine["python"] != known["python"]:
            yield _other_python(name, mine, reference, known)
        for package, version in mine["packages"].items():
            wanted = known["packages"][package]
            if version is None:
                yield failed(name, f"{package} is not installed", _install(found, name, mine, package, known))
            elif wanted is not None and version != wanted:
                text = f"{package} {version}, and {reference} has {wanted}"
                yield failed(name, text, _install(found, name, mine, package, known))
    yield fine(
        ", ".join(f"{name} {version}" for name, version in {"python": known["python"], **known["packages"]}.items())
    )


def _without_python(found: Findings) -> Iterator[Result]:
    python, directory = found.settings["python"], found.settings["directory"]
    for name in found.reached:
        problem = found.hosts[name].problems.get("versions")
        if problem is None:
            continue
        if "there is no directory" in problem:
            fix = Fix(f"mkdir -p {shlex.quote(directory)}", name)
            yield failed(name, f"there is no directory {directory}, where the job's commands run", fix)
        elif "FileNotFoundError" in problem or "PermissionError" in problem:
            fix = Fix(f"cd {shlex.quote(directory)} && launch/bootstrap.sh", name)
            yield failed(
                name, f"there is no Python at {python}, the job's path here (--python=PATH names another)", fix
            )
        else:
            yield failed(name, f"{python} does not start: {problem}", Fix(f"{shlex.quote(python)} -c ''", name))


def _other_python(name: str, mine: dict[str, Any], reference: str, known: dict[str, Any]) -> Result:
    minor = ".".join(known["python"].split(".")[:2])
    text = f"Python {mine['python']}, and {reference} has {known['python']}"
    fix = Fix(f"python{minor} -m venv --clear {shlex.quote(mine['prefix'])}", name)
    return warned(name, text, fix) if mine["python"].startswith(minor + ".") else failed(name, text, fix)


def _install(found: Findings, name: str, mine: dict[str, Any], package: str, known: dict[str, Any]) -> Fix:
    """The command that installs the version of the first host, or any version if the first host has none."""
    version = known["packages"][package]
    if package == "horovod":
        return rebuild(name, mine)
    if package == "hvdkit":
        at = known["hvdkit_at"] or mine["hvdkit_at"] or found.settings["directory"]
        source = next(iter(found.answered("versions")))
        return Fix(f"rsync -a --delete --exclude=__pycache__ {at}/ {name}:{mine['hvdkit_at'] or at}/", source)
    wanted = shlex.quote(f"{package}=={version}" if version else package)
    return Fix(f"{shlex.quote(mine['executable'])} -m pip install {wanted}", name)


def rebuild(name: str, mine: dict[str, Any], *options: str) -> Fix:
    """The command that rebuilds Horovod on a host, in a checkout of hvdkit."""
    return Fix(" ".join(["launch/bootstrap.sh", "--into", shlex.quote(mine["prefix"]), *options]), name)


@check("build")
def build(found: Findings) -> Iterator[Result]:
    """Horovod loads, and was built for the installed TensorFlow, with the same options on all hosts."""
    installed = found.answered("versions")
    for name in installed:
        problem = found.hosts[name].problems.get("build")
        if problem:
            fix = rebuild(name, installed[name])
            fix = Fix("uptime; free -m; vmstat 1 3", name) if "no answer within" in problem else fix
            yield failed(name, f"TensorFlow and Horovod do not load: {problem}", fix)
    there = {name: answer for name, answer in found.answered("build").items() if name in installed}
    if not there:
        yield not_run("Horovod did not load on any host")
        return
    reference, known = next(iter(there.items()))
    for name, mine in there.items():
        fix = rebuild(name, installed[name])
        if mine["built_with"] not in (None, mine["tensorflow"]):
            text = f"Horovod was built for TensorFlow {mine['built_with']}, and {mine['tensorflow']} is installed"
            yield failed(name, text, fix)
        elif not mine["built"]["gloo"] and not mine["built"]["mpi"]:
            yield failed(name, "Horovod was built with neither Gloo nor MPI", fix)
        elif _options(mine) != _options(known):
            fix = rebuild(name, installed[name], *_differing(mine, known))
            yield failed(name, f"Horovod has {_options(mine)}, and {reference}'s has {_options(known)}", fix)
    yield fine(f"Horovod for TensorFlow {known['tensorflow']}, with {_options(known)}")


def _differing(mine: dict[str, Any], known: dict[str, Any]) -> list[str]:
    """The options that make bootstrap.sh build what the other host has; without them it keeps its build."""
    pairs = (("mpi", "--mpi"), ("cuda", "--gpu"))
    wanted = [(flag, known["built"][key]) for key, flag in pairs if mine["built"][key] != known["built"][key]]
    return [part for flag, yes in wanted for part in (flag, "yes" if yes else "no")]


def _options(mine: dict[str, Any]) -> str:
    """The build options by name, without NCCL, which has its own check."""
    shown = {"gloo": "Gloo", "mpi": "MPI", "cuda": "CUDA", "rocm": "ROCm", "ccl": "oneCCL", "ddl": "DDL"}
    return ", ".join(name for key, name in shown.items() if mine["built"][key]) or "no options"


@check("gpus", asks="gpus")
def gpus(found: Findings) -> Iterator[Result]:
    """Every host has as many GPUs as ranks, and TensorFlow sees them; or no host has any."""
    there = found.answered("gpus")
    some = any(answer["gpus"] for answer in there.values())
    models: dict[str, str] = {}
    for name, answer in there.items():
        count, slots = len(answer["gpus"]), found.hosts[name].slots
        usable = found.hosts[name].answers.get("usable_gpus")
        models[name] = summary(
            {str(i): f"{gpu['name']}, driver {gpu['driver']}" for i, gpu in enumerate(answer["gpus"])} or {"": ""}
        )
        if answer["problem"]:
            yield failed(name, answer["problem"], Fix("lsmod | grep nvidia; dmesg | grep -i nvrm | tail", name))
        elif some and not count:
            yield failed(name, "it has no GPU, but other hosts have", Fix("lspci | grep -i nvidia; nvidia-smi", name))
        elif some and count < slots:
            yield failed(name, f"{slots} ranks, but {count} GPU(s)", Fix(f"use -H {name}:{count}"))
        elif some and usable is not None and len(usable) < count:
            python = found.hosts[name].answers["versions"]["executable"]
            version = found.hosts[name].answers["build"]["tensorflow"]
            fix = Fix(f"{shlex.quote(python)} -m pip install 'tensorflow[and-cuda]=={version}'", name)
            yield failed(name, f"nvidia-smi shows {count} GPU(s), but TensorFlow can use {len(usable)}", fix)
    if some and len(set(models.values())) > 1:
        yield warned("all", f"hosts differ, and the slowest sets the pace: {summary(models)}", Fix("nvidia-smi -L"))
    if some:
        yield fine(summary({name: f"{len(a['gpus'])} x {models[name]}" for name, a in there.items()}))
    else:
        yield fine("no host has one: ranks compute on CPUs")


@check("nccl")
def nccl(found: Findings) -> Iterator[Result]:
    """On hosts with GPUs, Horovod was built with NCCL, in the same version on all."""
    with_gpus = [name for name, answer in found.answered("gpus").items() if answer["gpus"]]
    if not with_gpus:
        yield not_run("there is no GPU")
        return
    built = {name: answer["built"]["nccl"] for name, answer in found.answered("build").items() if name in with_gpus}
    for name, version in built.items():
        fix = rebuild(name, found.hosts[name].answers["versions"], "--gpu", "yes")
        if not version:
            yield failed(name, "Horovod was built without NCCL: gradients would go through the host's memory", fix)
        elif version != next(iter(built.values())):
            yield failed(
                name, f"NCCL {_nccl(version)}, and {next(iter(built))} has {_nccl(built[next(iter(built))])}", fix
            )
    yield (
        fine(summary({n: f"NCCL {_nccl(v)}" for n, v in built.items()})) if built else not_run("Horovod does not load")
    )


def _nccl(code: int) -> str:
    """2.21.5 is 22105 (NCCL_VERSION_CODE in nccl.h)."""
    return f"{code // 10000}.{code // 100 % 100}.{code % 100}" if code >= 10000 else str(code)
