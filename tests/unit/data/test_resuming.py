"""Each kind of source that is streamed resumes in the middle of an epoch, with as many ranks or with others."""

import itertools

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from hvdkit.data import balance, pipeline
from hvdkit.data.epoch_order import Stretch
from hvdkit.data.sources import open_source, with_validation
from tests.unit.data.test_records import example, write

ROWS, STEPS = 230, 13
VALUES = np.arange(ROWS)


def write_arrays(path):
    np.save(path / "x.npy", VALUES[:, np.newaxis].astype("float32"))
    np.save(path / "y.npy", VALUES % 3)
    return path / "x.npy"


def write_archive(path):
    np.savez(path / "x.npz", x=VALUES[:, np.newaxis].astype("float32"), y=VALUES % 3)
    return path / "x.npz"


def write_records(path, suffix):
    for shard, values in enumerate(np.array_split(VALUES, 3)):
        write(path / f"x-{shard}.{suffix}", [example(n=float(value), label=int(value % 3)) for value in values])
    return path


def write_row_groups(path):
    table = pyarrow.table({"n": VALUES.astype(float), "label": VALUES % 3})
    pyarrow.parquet.write_table(table, path / "x.parquet", row_group_size=20)
    return path / "x.parquet"


SOURCES = {
    "arrays": write_arrays,
    "archive": write_archive,
    "TFRecord": lambda path: write_records(path, "tfrecord"),
    "ArrayRecord": lambda path: write_records(path, "array_record"),
    "Parquet": write_row_groups,
}


def batches_of(source, ranks, stretches):
    """Returns the batches of each rank from where the stretches end, what was handed over, and the buffers."""
    shares = [pipeline.read_share(source, "train", rank, ranks, cache_bytes=0) for rank in range(ranks)]
    options = {"seed": 3, "global_batch": 12, "steps_per_epoch": STEPS}
    buffers = tuple(share.buffer() for share in shares)
    starts = [pipeline.start_of(1, stretches, source, [share], buffers, **options) for share in shares]
    sampling = balance.Sampling("none", np.array([source.size("train")]))
    streams = [
        pipeline.training_batches(
            [share], local_batch=12 // ranks, steps_per_epoch=STEPS, seed=3, sampling=sampling, start=start
        )
        for share, (start, _) in zip(shares, starts, strict=True)
    ]
    return streams, starts[0][1], buffers


def taken(stream, steps):
    return [x[:, 0].astype(int).tolist() for x, _ in itertools.islice(stream.as_numpy_iterator(), steps)]


@pytest.mark.parametrize("kind", SOURCES)
def test_an_interrupted_epoch_goes_on_also_with_other_ranks(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(pipeline.Share, "buffer", lambda self: 17)  # smaller than a share, as of much data
    source = with_validation(open_source(str(SOURCES[kind](tmp_path))), 0.1)
    streams, _, buffers = batches_of(source, 2, [])
    whole = [taken(stream, STEPS + 2) for stream in streams]
    before = [Stretch(2, 4, buffers)]
    again, handed_over, _ = batches_of(source, 2, before)
    assert [taken(stream, STEPS - 2) for stream in again] == [rank[4:] for rank in whole], "bit for bit"
    assert handed_over == []
    others, handed_over, _ = batches_of(source, 3, before)
    assert handed_over == before
    seen = [n for rank in whole for batch in rank[:4] for n in batch]
    seen += [n for stream in others for batch in taken(stream, STEPS - 4) for n in batch]
    assert len(seen) == len(set(seen)) == 12 * STEPS, "no example twice in an epoch"
