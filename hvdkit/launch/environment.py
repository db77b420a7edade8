"""The environment variables of the ranks."""

import os
import re
import shutil
from collections.abc import Mapping
from typing import Any

from hvdkit.launch.binding import Binding

SECRET = "HOROVOD_GLOO_RENDEZVOUS_ADDR"  # contains the job's token


def own_environment() -> dict[str, str]:
    """This process's environment without the variables of a surrounding MPI job, notebook or debugger.

    A kernel's backend for matplotlib, `module://...`, draws into its notebook; ranks may not even have the module.
    """
    others = ("OMPI_COMM_WORLD_", "PMIX_", "JPY_", "PYDEVD_")
    drawn = os.environ.get("MPLBACKEND", "").startswith("module://")
    left_out = {"PYTHONSTARTUP", *(["MPLBACKEND"] if drawn else [])}
    return {n: value for n, value in os.environ.items() if not n.startswith(others) and n not in left_out}


def exported(environment: dict[str, str]) -> dict[str, str]:
    """The variables that are valid on another host: not those of this session, display or user."""
    private = re.compile(
        r"BASH_FUNC_.*|SSH_.*|XDG_.*|DBUS_.*|DISPLAY|HOSTNAME|HOME|USER|LOGNAME|MAIL|SHELL|SHLVL|PWD|OLDPWD|TERM|_"
        r"|TMPDIR|.*CUDA_VISIBLE_DEVICES"
    )
    return {name: value for name, value in environment.items() if not private.fullmatch(name)}


def rank_environment(slot: Any, binding: Binding) -> dict[str, str]:
    """The variables of one rank, without those that all ranks have."""
    names = ("rank", "size", "local_rank", "local_size", "cross_rank", "cross_size")
    variables = {f"HOROVOD_{name.upper()}": str(getattr(slot, name)) for name in names}
    variables["HOROVOD_HOSTNAME"] = slot.hostname
    if binding.cores is not None:
        variables["HVDKIT_OWN_CORES"] = "1"  # tells hvdkit.world to use all visible cores, not a part
    if binding.gpu is not None:
        variables["CUDA_VISIBLE_DEVICES"] = binding.gpu
    return variables


def job_environment(given: Mapping[str, str], *, start_limit: int, stall_limit: float | None) -> dict[str, str]:
    """The variables that all ranks have, on every host. The user's settings override the defaults here.

    Args:
        given: the launcher's own environment.
        start_limit: seconds for the ranks to find each other.
        stall_limit: seconds for the ranks to wait for each other; None for the environment's value, or ten minutes.
    """
    variables = {
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "PYTHONUNBUFFERED": "1",  # a rank writes to a pipe, and its last output must not be lost when it dies
        # By default TensorFlow uses oneDNN only on CPUs with AVX512-VNNI or AMX. It is 2 to 6 times faster on others.
        "TF_ENABLE_ONEDNN_OPTS": given.get("TF_ENABLE_ONEDNN_OPTS") or "1",
    }
    # On a busy host, a rank may need more than Gloo's default of 30 s to load TensorFlow.
    variables["HOROVOD_GLOO_TIMEOUT_SECONDS"] = given.get("HOROVOD_GLOO_TIMEOUT_SECONDS") or str(max(start_limit, 30))
    if stall_limit is not None:
        variables["HVDKIT_STALL_SECONDS"] = f"{stall_limit:g}"
    # By default Horovod only warns of a stall. hvdkit.watchdog knows more and reports earlier.
    stall = given.get("HVDKIT_STALL_SECONDS") if stall_limit is None else f"{stall_limit:g}"
    shutdown = given.get("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS") or stall or "600"
    if shutdown.isdigit():
        variables["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"] = shutdown
    return variables


def terminal_environment(is_terminal: bool) -> dict[str, str]:
    """Ranks write to a pipe, so only the launcher knows whether a person is watching, and how wide the terminal is."""
    if not is_terminal:
        return {}
    columns = str(shutil.get_terminal_size().columns)
    return {"HVDKIT_PROGRESS": os.environ.get("HVDKIT_PROGRESS", "bar"), "COLUMNS": columns}
