"""A TensorFlow cluster made of the job's ranks: who listens where, with no `TF_CONFIG` to write.

The ranks tell each other where their servers will listen. They must do so before TensorFlow starts: its runtime takes a
cluster only when it is made, and it is made with the first tensor.
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
    """A rank of the cluster: its host's name, the address to which that resolves there, and its server's port."""

    host: str
    address: str
    port: int


def join(mistake: UsageError | None) -> tf.distribute.cluster_resolver.ClusterResolver:
    """Meets the other ranks; returns the description of the cluster in which this rank is one worker.

    Every rank must call it. The port was free a moment ago, and is held until all ranks have told theirs.

    Args:
        mistake: what is wrong on this rank already; the others learn of it here, instead of waiting for this one.

    Raises:
        UsageError: on all ranks, if one had a mistake, or if a rank cannot be reached by those on other hosts.
    """
    with _free_port() as port:
        mine = {"mistake": str(mistake)} if mistake else dataclasses.asdict(_myself(port))
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
        # Named, because TensorFlow would count the GPUs of all workers as this one's.
        num_accelerators={"GPU": len(tf.config.get_visible_devices("GPU"))},
        rpc_layer="grpc",
    )


def refuse_tf_config() -> None:
    """Raises a `UsageError` if `TF_CONFIG` describes another cluster."""
    if os.environ.get("TF_CONFIG"):
        raise UsageError(
            "TF_CONFIG is set, but --strategy=multiworker makes its cluster of the ranks that the launcher started. "
            "Unset TF_CONFIG."
        )


def check_reachable(members: Sequence[Member]) -> None:
    """Checks that ranks on several hosts do not listen where only their own host can reach them.

    Raises:
        UsageError: a host's name resolves to a loopback address there; the message says what to write where.
    """
    if len({m.host for m in members}) == 1:
        return
    for member in members:
        if ipaddress.ip_address(member.address).is_loopback:
            raise UsageError(
                f"On host {member.host} its own name resolves to {member.address}, where other hosts cannot reach it. "
                f"In /etc/hosts of {member.host}, put the address by which they reach it in place of {member.address}:"
                f" a line such as '192.168.0.7 {member.host}'."
            )


def _myself(port: int) -> Member:
    host = world.current().host
    return Member(host, socket.gethostbyname(host), port)


@contextlib.contextmanager
def _free_port() -> Iterator[int]:
    """A port that nobody else gets as long as the context lasts. TensorFlow's server cannot share it."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        yield listener.getsockname()[1]
