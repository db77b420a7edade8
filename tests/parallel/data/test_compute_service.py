"""tf.data's service in a job of its own, read by the ranks of another job."""

import subprocess
import sys

import pytest

from tests import forked


def consumed(file):
    """This rank's part of twenty numbers that the service squares, and the address of its dispatcher."""
    import tensorflow as tf

    import hvdkit as hvd
    from hvdkit.data.compute_service import TfDataServiceConfig, tf_data_service

    me = hvd.init()
    service = TfDataServiceConfig.read(file, wait_for_file_creation=True)
    with tf_data_service(service, me.rank) as address:
        pass
    dataset = tf.data.Dataset.range(20).map(lambda x: x * x)
    dataset = dataset.send_to_data_service(service, me.rank, me.size, reuse_dataset=True)
    mine = [int(x) for x in dataset]
    hvd.barrier()
    if me.is_root:
        service.compute_client().shutdown()
    return mine, address.rpartition(":")[0] == f"grpc://{me.host}"


def test_the_ranks_of_a_job_share_what_another_job_prepares(ranks, tmp_path):
    file = tmp_path / "service.json"
    command = [sys.executable, "-m", "hvdkit.launch", "-np", "2", "--"]
    command += forked.command("-m", "hvdkit.data.compute_worker", str(file))
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        found = ranks(2, consumed, file=str(file), timeout=120)
        assert job.wait(60) == 0, (tmp_path / "log").read_text()
    finally:
        if job.poll() is None:
            job.terminate()
            job.wait(60)
    assert sorted(x for mine, _ in found for x in mine) == [x * x for x in range(20)]
    assert all(is_host for _, is_host in found), "other hosts could not reach localhost"


def test_a_number_of_ranks_that_cannot_be_divided_is_refused(monkeypatch):
    from hvdkit import UsageError, world
    from hvdkit.data.compute_worker import main

    monkeypatch.setattr(world, "init", lambda: world.World(0, 3, 0, 3, 0, 1, "h1"))
    with pytest.raises(UsageError, match="3 ranks cannot be divided over --dispatchers 2"):
        main(2, "compute", "unused", 60)
