"""tf.data's service on the ranks of a job of its own: hosts with CPUs prepare the batches of hosts with GPUs.

    hvdkit launch -np 4 -H c1:2,c2:2 -- python -m hvdkit.data.compute_worker /shared/service.json
    hvdkit launch -np 2 -H g1:2 -- python train_mine.py

where `train_mine.py` sends its data set to the first job:

    from hvdkit.data.compute_service import TfDataServiceConfig

    service = TfDataServiceConfig.read("/shared/service.json", wait_for_file_creation=True)
    dataset = dataset.send_to_data_service(service, hvd.rank(), hvd.size(), reuse_dataset=True)

Names and arguments are those of `horovod.tensorflow.data.compute_service`, whose servers only tell each other
"localhost"; here they give the name of their host, which the other hosts must be able to resolve. tf.data's service
authenticates nobody: use it in a network that you trust. `service.compute_client().shutdown()` ends the first job.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from hvdkit import world
from hvdkit.compat.tensorflow import stop_server
from hvdkit.errors import UsageError

world.horovod()  # raises an error with instructions if Horovod is missing
from horovod.tensorflow.data.compute_service import TfDataServiceConfig  # noqa: E402

__all__ = ["TfDataServiceConfig", "compute_worker_fn", "send_to_data_service", "tf_data_service"]


@contextlib.contextmanager
def tf_data_service(compute_config: TfDataServiceConfig, rank: int) -> Iterator[str]:
    """Returns a context with the address of this rank's dispatcher; runs the dispatcher if that is this job's task.

    Args:
        compute_config: the service.
        rank: the rank of this process in the training job.
    """
    client = compute_config.compute_client()
    several = compute_config.dispatchers > 1
    server = None
    if compute_config.dispatcher_side == "training" and (several or rank == 0):
        server = _start_dispatcher(client, rank)
    try:
        number = rank if several else 0
        address = client.wait_for_dispatcher_registration(number, compute_config.timeout)
        client.wait_for_dispatcher_worker_registration(number, compute_config.timeout)
        yield address
    finally:
        if server:
            _stop(server)


def send_to_data_service(
    dataset: tf.data.Dataset,
    compute_config: TfDataServiceConfig,
    rank: int,
    size: int | None = None,
    processing_mode: str = "distributed_epoch",
    reuse_dataset: bool = False,
    round_robin: bool = False,
) -> tf.data.Dataset:
    """Returns a data set that reads what the service's workers prepare; also a method of `tf.data.Dataset`.

    Args:
        dataset: what the workers run.
        compute_config: the service, with its dispatcher on the workers' side.
        rank: the rank of this process in the training job.
        size: the number of ranks of the training job, for `round_robin`.
        processing_mode: how the workers divide the data: see `tf.data.experimental.service.distribute`.
        reuse_dataset: whether the ranks share one run of the data set, each getting a part, or each has its own.
        round_robin: with `reuse_dataset`, whether the ranks take turns.

    Raises:
        UsageError: the dispatcher runs in the training job; `tf_data_service` is for that.
    """
    if compute_config.dispatcher_side == "training":
        raise UsageError(
            "send_to_data_service was given a service whose dispatchers run in the training job. Start it with "
            "--dispatcher-side compute, or write: with tf_data_service(config, rank) as address."
        )
    takes_turns = reuse_dataset and round_robin
    with tf_data_service(compute_config, rank) as address:
        return dataset.apply(
            tf.data.experimental.service.distribute(
                processing_mode=processing_mode,
                service=address,
                job_name="job" if reuse_dataset else None,
                consumer_index=rank if takes_turns else None,
                num_consumers=size if takes_turns else None,
            )
        )


tf.data.Dataset.send_to_data_service = send_to_data_service


def compute_worker_fn(compute_config: TfDataServiceConfig) -> None:
    """Runs a worker of the service on this rank, and on some ranks a dispatcher, until the service is shut down.

    Args:
        compute_config: the service, the same on all ranks.
    """
    number, place = divmod(world.init().rank, compute_config.workers_per_dispatcher)
    client = compute_config.compute_client()
    servers = []
    if compute_config.dispatcher_side == "compute" and place == 0:
        servers.append(_start_dispatcher(client, number))
    address = client.wait_for_dispatcher_registration(number, compute_config.timeout)
    settings = tf.data.experimental.service.WorkerConfig(
        dispatcher_address=address.split("://")[1],
        worker_address=f"{world.current().host}:%port%",
        heartbeat_interval_ms=1000,
        dispatcher_timeout_ms=compute_config.timeout * 1000,
    )
    servers.insert(0, tf.data.experimental.service.WorkerServer(settings))
    client.register_worker_for_dispatcher(number, world.rank())
    client.wait_for_shutdown()
    for server in servers:
        _stop(server)


def _start_dispatcher(client: Any, number: int) -> Any:
    """Starts a dispatcher and registers it under a name that other hosts can reach."""
    server = tf.data.experimental.service.DispatchServer()
    protocol, _, address = server.target.partition("://")
    port = address.rpartition(":")[2]
    client.register_dispatcher(number, f"{protocol}://{world.current().host}:{port}")
    return server


def _stop(server: Any) -> None:
    stop_server(server)
    server.join()
