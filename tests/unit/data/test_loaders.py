"""Loaders of each kind, divided over ranks: each batch on one rank, equally many on all, in the kind's own class."""

import itertools
import pickle

import keras
import numpy as np
import pytest

import hvdkit as hvd
from hvdkit.errors import UsageError


class Numbers(keras.utils.PyDataset):
    """Batch i is [i]."""

    def __init__(self, length, **options):
        super().__init__(**options)
        self.length, self.told = length, []
        self.classes = ["odd", "even"]

    @property
    def num_batches(self):
        return self.length

    def __getitem__(self, index):
        return np.array([index])

    def on_epoch_begin(self):
        self.told.append("begin")

    def on_epoch_end(self):
        self.told.append("end")


def shards(make, size, **policy):
    return [hvd.data.shard(make(), rank, size, **policy) for rank in range(size)]


def numbers(batches):
    return [np.ravel(np.asarray(batch)).tolist() for batch in batches]


# ---- PyDataset ------------------------------------------------------------------------------------------------------


def test_a_py_dataset_gives_each_rank_every_nth_batch(caplog):
    for policy, expected in ("drop", [[0, 2], [1, 3]]), ("pad", [[0, 2, 4], [1, 3, 0]]):
        parts = shards(lambda: Numbers(5), 2, uneven=policy)
        assert [sum(numbers(part), []) for part in parts] == expected
        assert [len(part) for part in parts] == [part.num_batches for part in parts] == [len(e) for e in expected]
    assert "1 of 5 batches are left out" in caplog.text
    assert "1 of 5 batches are taken twice" in caplog.text


def test_a_py_dataset_keeps_its_workers_its_attributes_and_the_calls_of_epochs():
    whole = Numbers(4, workers=3, use_multiprocessing=True, max_queue_size=7)
    part = hvd.data.shard(whole, 1, 2)
    assert (part.workers, part.use_multiprocessing, part.max_queue_size, part.classes) == (3, True, 7, ["odd", "even"])
    part.on_epoch_begin()
    part.on_epoch_end()
    assert whole.told == ["begin", "end"]
    copied = pickle.loads(pickle.dumps(part))  # as for worker processes
    assert numbers(copied) == [[1], [3]]
    with pytest.raises(AttributeError, match="no attribute 'labels'"):
        _ = part.labels
    assert hvd.data.shard(whole, 0, 1) is whole


def test_an_infinite_py_dataset_stays_infinite():
    part = hvd.data.shard(Numbers(None), 1, 3)
    assert part.num_batches is None
    assert numbers(itertools.islice(part, 3)) == [[1], [4], [7]]
    with pytest.raises(TypeError, match="Numbers is infinite"):
        len(part)


# ---- Generators -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "size", "uneven", "expected"),
    [
        (6, 3, "drop", [[0, 3], [1, 4], [2, 5]]),
        (8, 3, "drop", [[0, 3], [1, 4], [2, 5]]),
        (7, 3, "pad", [[0, 3, 6], [1, 4, 0], [2, 5, 1]]),
        (2, 5, "pad", [[0], [1], [0], [1], [0]]),
        (1, 2, "drop", [[], []]),
    ],
)
def test_a_generator_needs_no_length_to_end_on_all_ranks_alike(caplog, length, size, uneven, expected):
    parts = [list(part) for part in shards(lambda: (i for i in range(length)), size, uneven=uneven)]
    assert parts == expected
    left = length % size if uneven == "drop" else 0
    assert (f"{left} of {length} batches of a stream were left out" in caplog.text) == bool(left)


def test_a_generator_is_read_no_further_than_its_round():
    read = []
    endless = hvd.data.shard((read.append(i) or i for i in itertools.count()), 0, 2)
    assert not read
    assert [next(endless), next(endless)] == [0, 2]
    assert read == [0, 1, 2, 3]
    assert type(endless).__name__ == "generator", "of the type that Keras takes"


@pytest.mark.parametrize("make", [lambda: Numbers(4), lambda: iter(range(4))])
def test_what_yields_batches_joins_no_examples(make):
    with pytest.raises(UsageError, match=r"uneven='join' puts examples into batches itself, but a \w+ yields"):
        hvd.data.shard(make(), 0, 2, uneven="join", batch_size=4)


# ---- Other libraries ------------------------------------------------------------------------------------------------


def test_grain_data_sets_are_divided_and_stay_what_they_are():
    grain = pytest.importorskip("grain")

    def batched():
        return grain.MapDataset.range(20).shuffle(seed=3).batch(4)

    whole = numbers(batched())
    parts = [numbers(part) for part in shards(batched, 2)]
    assert parts == [[whole[0], whole[2]], [whole[1], whole[3]]]
    assert [numbers(part) for part in shards(batched, 2, uneven="pad")][1] == [whole[1], whole[3], whole[0]]
    assert all(isinstance(part, grain.MapDataset) for part in shards(batched, 2))
    assert numbers(itertools.islice(hvd.data.shard(batched().repeat(), 1, 2), 3))[:2] == parts[1]
    streams = shards(lambda: batched().to_iter_dataset(), 2)
    assert [numbers(part) for part in streams] == parts
    assert all(isinstance(part, grain.IterDataset) for part in streams)
    with pytest.raises(UsageError, match="has no elements by index to repeat for uneven='pad'"):
        hvd.data.shard(batched().to_iter_dataset(), 0, 2, uneven="pad")


def test_grain_loaders_are_divided_by_records():
    grain = pytest.importorskip("grain")

    def loader(shards=None):
        sampler = grain.samplers.IndexSampler(
            11, shard_options=shards or grain.sharding.NoSharding(), shuffle=True, seed=1, num_epochs=1
        )
        return grain.DataLoader(
            data_source=grain.sources.RangeDataSource(0, 11, 1),
            sampler=sampler,
            operations=[grain.transforms.Batch(2)],
            worker_buffer_size=3,
        )

    parts = shards(loader, 2)
    assert [[len(batch) for batch in numbers(part)] for part in parts] == [[2, 2, 1], [2, 2, 1]]
    order = sum(numbers(loader()), [])[:10]
    assert [sum(numbers(part), []) for part in parts] == [order[0::2], order[1::2]]
    assert parts[0].multiprocessing_options.per_worker_buffer_size == 3
    with pytest.raises(UsageError, match="already divided into 4 shards"):
        hvd.data.shard(loader(grain.sharding.ShardOptions(1, 4)), 0, 2)


def test_hugging_face_data_sets_are_divided_by_examples():
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_dict({"x": list(range(5))}).with_format("numpy")
    parts = [hvd.data.shard(whole, rank, 2) for rank in range(2)]
    assert [part["x"][:].tolist() for part in parts] == [[0, 2], [1, 3]]
    assert hvd.data.shard(whole, 1, 2, uneven="pad")["x"][:].tolist() == [1, 3, 0]
    for data, message in (
        (whole.to_iterable_dataset(), r"hvd.data.shard\(iter\(dataset.batch\(32\)\)\)"),
        (datasets.DatasetDict(train=whole), r"hvd.data.shard\(dataset\['train'\]\)"),
    ):
        with pytest.raises(UsageError, match=message):
            hvd.data.shard(data, 0, 2)


def test_pytorch_loaders_load_only_their_batches(torch):
    loaded = []

    class Examples(torch.utils.data.Dataset):
        def __len__(self):
            return 11

        def __getitem__(self, index):
            loaded.append(index)
            return index

    def loader(**options):
        return torch.utils.data.DataLoader(Examples(), **{"batch_size": 2, **options})

    parts = shards(loader, 2)
    assert [numbers(part) for part in parts] == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10]]]
    assert sorted(loaded) == list(range(11)), "each example once"
    assert [len(part) for part in parts] == [3, 3]
    assert isinstance(parts[0], torch.utils.data.DataLoader)
    shuffled = shards(lambda: loader(shuffle=True), 2)
    epochs = [[sum(numbers(part), []) for part in shuffled] for _ in range(2)]
    assert all(sorted(sum(epoch, [])) == list(range(11)) for epoch in epochs), "the same order on both ranks"
    assert epochs[0] != epochs[1]
    assert numbers(hvd.data.shard(loader(batch_size=None), 1, 2, uneven="pad")) == [[1], [3], [5], [7], [9], [0]]
    sampler = torch.utils.data.DistributedSampler(Examples(), num_replicas=2, rank=0)
    with pytest.raises(UsageError, match="has a DistributedSampler, which divides its examples over ranks already"):
        hvd.data.shard(loader(sampler=sampler), 0, 2)


def test_pytorch_streams_are_read_as_a_whole(torch):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(9))

    class Counted(Stream):
        def __len__(self):
            return 9

    for kind in Stream, Counted:
        parts = shards(lambda kind=kind: torch.utils.data.DataLoader(kind(), batch_size=2), 2)
        assert [numbers(part) for part in parts for _ in range(2)] == [[[0, 1], [4, 5]]] * 2 + [[[2, 3], [6, 7]]] * 2
    assert len(parts[0]) == 2
