"""Makes a TensorFlow cluster of the job's ranks, without `TF_CONFIG`.

The ranks exchange the addresses of their servers. This must happen before TensorFlow starts: its runtime accepts a
cluster only when it is created, with the first tensor.
"""

import contextlib
import dataclasses
import ipaddress
import os
import socket
from collections.abc import Iterator, Sequence

import tensorflow as tf

from hvdkit import world
from hvdkit.errors import UsageError
from hvdkit.world.introduction import introduce


@dataclasses.dataclass(frozen=True)
class Member:
    """A rank of the cluster: the name of its host, the address to which it resolves there, and its server's port."""

    host: str
    address: str
    port: int


def join(mistake: UsageError | None) -> tf.distribute.cluster_resolver.ClusterResolver:
    """Exchanges addresses with the other ranks; returns the cluster, with this rank as one worker.

    Call it on every rank. It reserves a free port until all ranks have sent theirs.

    Args:
        mistake: an earlier error on this rank. It is sent to the others, which would otherwise wait for this rank.

    Raises:
        UsageError: on all ranks, if one of them has an earlier error, or ranks on other hosts cannot reach a rank.
    """
    with _free_port() as port:
        mine = {"mistake": str(mistake)} if mistake else dataclasses.asdict(_own_member(port))
        everyone = introduce(mine, "cluster")
    first = next((m["mistake"] for m in everyone if "mistake" in m), None)
    if first is not None:
        raise UsageError(first) from mistake
    members = [Member(**m) for m in everyone]
    check_reachable(members)
    return tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": [f"{m.address}:{m.port}" for m in members]}),
        task_type="worker",
        task_id=world.rank(),
        # Given explicitly, because TensorFlow would count the GPUs of all workers for this one.
        num_accelerators={"GPU": len(tf.config.get_visible_devices("GPU"))},
        rpc_layer="grpc",
    )


def refuse_tf_config() -> None:
    """Raises a `UsageError` if `TF_CONFIG` describes a different cluster."""
    if os.environ.get("TF_CONFIG"):
        raise UsageError(
            "TF_CONFIG is set, but --strategy=multiworker makes its cluster of the ranks that the launcher started. "
            "Unset TF_CONFIG."
        )


def check_reachable(members: Sequence[Member]) -> None:
    """Checks that ranks on several hosts do not listen on loopback addresses.

    Raises:
        UsageError: a host's name resolves to a loopback address there; the message says how to fix it.
    """
    if len({m.host for m in members}) == 1:
        return
    for member in members:
        if ipaddress.ip_address(member.address).is_loopback:
            raise UsageError(
                f"On host {member.host} its own name resolves to {member.address}, where other hosts cannot reach it. "
                f"In /etc/hosts of {member.host}, replace {member.address} by the address that other hosts use for it, "
                f"in a line such as '192.168.0.7 {member.host}'."
            )


def _own_member(port: int) -> Member:
    host = world.current().host
    return Member(host, socket.gethostbyname(host), port)


@contextlib.contextmanager
def _free_port() -> Iterator[int]:
    """Reserves a free port while the context lasts. TensorFlow's server cannot listen on it during that time."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        yield listener.getsockname()[1]
