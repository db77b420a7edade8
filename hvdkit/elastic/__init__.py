"""`hvdkit.elastic`: training that continues when ranks are lost or hosts are added.

    state = hvd.elastic.KerasState(model, epoch=0, batch=0)

    @hvd.elastic.run
    def train(state):
        state.model.fit(make_dataset(), epochs=10 - state.epoch, callbacks=[
            hvd.elastic.UpdateEpochStateCallback(state),
            hvd.elastic.UpdateBatchStateCallback(state),
            hvd.elastic.CommitStateCallback(state, batches_per_commit=50),
        ])

    train(state)

Start it with `python -m hvdkit.launch --elastic -H h1:2,h2:2 --workdir DIR -- python train.py`, or with Horovod's
`horovodrun -np 2 --min-np 1 --host-discovery-script ./hosts.sh python train.py`. When a rank is lost, the others return
to the last commit. When hosts are added, training continues from its current state. In both cases ranks and size may
change, all ranks take rank 0's state, and `train` is called again. Create inside `train` everything that depends on the
size, such as this rank's shard of the data.

The two launchers work differently. Horovod's keeps the processes of the remaining ranks and restarts Horovod in them.
hvdkit's restarts all processes: this discards any state of a failed collective. There, rank 0 keeps its commits in the
launcher's `--workdir`.
"""

from hvdkit import world

world.horovod()  # raises an error with instructions if Horovod is missing
from hvdkit.elastic.callbacks import CommitStateCallback, UpdateBatchStateCallback, UpdateEpochStateCallback  # noqa: E402
from hvdkit.elastic.restarts import run  # noqa: E402
from hvdkit.elastic.states import KerasState, TensorFlowKerasState, TensorFlowState  # noqa: E402

__all__ = [
    "CommitStateCallback",
    "KerasState",
    "TensorFlowKerasState",
    "TensorFlowState",
    "UpdateBatchStateCallback",
    "UpdateEpochStateCallback",
    "run",
]
