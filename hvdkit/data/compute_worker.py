"""The ranks of tf.data's service (see `hvdkit.data.compute_service`).

hvdkit launch -np 4 -- python -m hvdkit.data.compute_worker CONFIG.json
"""

import argparse

from hvdkit import world
from hvdkit.data.compute_service import TfDataServiceConfig, compute_worker_fn
from hvdkit.errors import UsageError


def main(dispatchers: int, dispatcher_side: str, configfile: str, timeout: int) -> None:
    """Runs this rank of the service until a client shuts it down.

    Args:
        dispatchers: number of dispatchers; the number of ranks must be a multiple of it.
        dispatcher_side: "compute" for dispatchers in this job, "training" for dispatchers in the training job.
        configfile: where rank 0 writes what clients need to know.
        timeout: seconds until all parts of the service must have met.

    Raises:
        UsageError: the number of ranks is not a multiple of the number of dispatchers.
    """
    from horovod.runner.common.service.compute_service import ComputeService
    from horovod.runner.common.util import secret

    me = world.init()
    if me.size % dispatchers:
        raise UsageError(f"{me.size} ranks cannot be divided over --dispatchers {dispatchers}: start a multiple of it.")
    workers = me.size // dispatchers
    service = ComputeService(dispatchers, workers, key=(key := secret.make_secret_key())) if me.is_root else None
    try:
        config = None
        if service:
            config = TfDataServiceConfig(dispatchers, workers, dispatcher_side, service.addresses(), key, timeout)
            config.write(configfile)
        compute_worker_fn(world.horovod().broadcast_object(config, name="TfDataServiceConfig"))
    finally:
        if service:
            service.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configfile", help="file that rank 0 writes, for TfDataServiceConfig.read")
    parser.add_argument("--dispatchers", default=1, type=int, help="number of dispatchers")
    parser.add_argument("--dispatcher-side", default="compute", choices=["compute", "training"], help="where they run")
    parser.add_argument("--timeout", default=60, type=int, help="seconds until all parts must have met")
    main(**vars(parser.parse_args()))
