"""Parquet and Arrow tables that are read in parts, on files that pandas, pyarrow and datasets wrote."""

import decimal
import itertools

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from hvdkit.data import checks, pipeline
from hvdkit.data.sources import Schema, arrow_files, edges_of, open_source, survey_source, with_validation
from hvdkit.errors import UsageError

pandas = pytest.importorskip("pandas", reason="pandas is not installed")
ROWS, PART = 230, 20


def table(rows=ROWS, first=0):
    numbers = np.arange(first, first + rows)
    columns = {"n": numbers.astype(float), "half": numbers // 2, "city": [f"c{i // 50}" for i in numbers]}
    return pandas.DataFrame(columns | {"code": [str(i // 100) for i in numbers], "label": numbers % 3})


def write_parts(path):
    """A whole table in parts of 20 rows, in the format that the name says."""
    if path.suffix == ".parquet":
        table().to_parquet(path, row_group_size=PART)
    elif path.suffix == ".feather":
        table().to_feather(path, chunksize=PART)  # compressed by default
    elif path.suffix == ".arrow":
        whole = pyarrow.Table.from_pandas(table())
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, whole.schema) as writer:
            writer.write_table(whole, max_chunksize=PART)
    else:
        datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
        datasets.Dataset.from_pandas(table()).save_to_disk(str(path), num_shards=3)


def read(source, split, start=0, stop=None):
    stop = source.size(split) if stop is None else stop
    return [(x, int(y)) for x, y in source.read(split, start, stop).as_numpy_iterator()]


@pytest.mark.parametrize("name", ["x.parquet", "x.feather", "x.arrow", "saved"])
def test_any_range_is_read_from_the_parts_that_have_it(tmp_path, name, monkeypatch):
    write_parts(tmp_path / name)
    read_parts = set()
    whole = arrow_files.PartedTable.read

    def noted(self, part, names):
        read_parts.add(part)
        return whole(self, part, names)

    monkeypatch.setattr(arrow_files.PartedTable, "read", noted)
    source = open_source(str(tmp_path / name))
    cities = [f"city=c{i}" for i in range(5)]
    assert source.feature_names == ["n", "half", *cities, "code"], "texts that are all numbers are numbers"
    assert (source.kind, source.task, source.shape, source.label_names) == (
        "features",
        "classification",
        (8,),
        ["0", "1", "2"],
    )
    assert (source.size("train"), source.size("test")) == (184, 46)
    rows = {split: read(source, split) for split in ("train", "test")}
    assert sorted(int(x[0]) for part in rows.values() for x, _ in part) == list(range(ROWS))
    for x, y in itertools.chain(*rows.values()):
        n = int(x[0])
        assert x.tolist() == [n, n // 2, *(float(n // 50 == c) for c in range(5)), n // 100]
        assert y == n % 3
    assert all(n % 3 == y for (n, *_), y in rows["test"])
    for start, stop in ((0, 184), (70, 101), (183, 184), (5, 5)):
        read_parts.clear()
        assert [int(x[0]) for x, _ in read(source, "train", start, stop)] == [
            int(x[0]) for x, _ in rows["train"][start:stop]
        ]
    read_parts.clear()
    read(source, "train", 70, 80)
    assert len(read_parts) <= 2 < len(edges_of(source, "train")) - 1
    assert source.locate("test", 0).endswith(f", row {int(rows['test'][0][0][0]) + 1}")


def test_ranks_that_survey_parts_learn_what_one_learns_from_all(tmp_path):
    rows = table()
    rows["code"] = ["x" if i % 2 and i > 150 else str(i // 30) for i in range(ROWS)]  # numbers in the first parts
    rows["tags"] = [[f"t{i // 70}", "all"] for i in range(ROWS)]
    rows.to_parquet(tmp_path / "x.parquet", row_group_size=PART)
    path = str(tmp_path / "x.parquet")
    for schema in (Schema(feature_columns=("n", "code")), Schema("multilabel", "tags", "city")):
        alone = open_source(path, schema=schema)
        for ranks in (2, 3, 20):
            surveys = [survey_source(path, schema, rank, ranks) for rank in range(ranks)]
            together = open_source(path, schema=schema, surveys=surveys)
            assert (together.label_names, together.feature_names) == (alone.label_names, alone.feature_names)
    assert alone.label_names == ["all", "t0", "t1", "t2", "t3"]
    assert survey_source("digits", Schema(), 0, 2) is None


@pytest.mark.parametrize("ranks", [2, 3])
def test_an_epoch_takes_each_example_once_and_its_parts_in_another_order(tmp_path, ranks):
    write_parts(tmp_path / "x.parquet")
    source = with_validation(open_source(str(tmp_path / "x.parquet")), 0.1)
    expected = sorted(int(x[0]) for x, _ in read(source, "train"))
    epochs = {}
    for rank in range(ranks):
        share = pipeline.read_share(source, "train", rank, ranks, cache_bytes=0)
        checks.check_share(share, "train", 3)
        for epoch in range(3):
            read_in_order = [int(x[0]) for x, _ in share.in_epoch(epoch).as_numpy_iterator()]
            assert sorted(read_in_order) == [int(x[0]) for x, _ in share.stream.as_numpy_iterator()]
            neighbours = np.mean(np.diff(read_in_order) > 0)
            assert neighbours > 0.8, "a part's examples are read together"
            epochs.setdefault(epoch, []).append(read_in_order)
    assert all(sorted(sum(parts, [])) == expected for parts in epochs.values())
    assert len({str(parts) for parts in epochs.values()}) == 3


def test_folders_of_files_named_like_splits(tmp_path):
    for place, name in enumerate(["train-00000-of-00002", "train-00001-of-00002", "validation-00000", "test-00000"]):
        table(10, 10 * place).drop(columns="city").to_parquet(tmp_path / f"{name}.parquet", row_group_size=4)
    source = open_source(str(tmp_path))
    assert {split: source.size(split) for split in source.splits} == {"train": 20, "test": 10, "validation": 10}
    assert [int(x[0]) for x, _ in read(source, "train")] == list(range(20))
    assert [int(x[0]) for x, _ in read(source, "test")] == list(range(30, 40))
    assert source.locate("train", 13) == f"{tmp_path}, train-00001-of-00002.parquet, row 4"
    for split in ("train", "test"):
        (tmp_path / "folders" / split).mkdir(parents=True)
        table(10).to_parquet(tmp_path / "folders" / split / "0.parquet")
    assert open_source(str(tmp_path / "folders")).size("test") == 10
    table(10).to_parquet(tmp_path / "test-00001.parquet")
    with pytest.raises(
        UsageError, match="test-00001.parquet has the columns .*city.* Files of one table need the same"
    ):
        open_source(str(tmp_path))
    table(10).to_parquet(tmp_path / "others.parquet")
    with pytest.raises(UsageError, match="not clear to which split others.parquet belong"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("column", "values", "schema", "message"),
    [
        ("n", {7: np.nan, 150: np.nan}, {}, r"x\.parquet, row 8: the number in column 'n' is missing"),
        ("n", {150: 1e60}, {}, "row 151: the number in column 'n' is infinite, or too large for 32 bits"),
        ("city", {3: "", 99: None}, {}, "row 4, row 100: the category in column 'city' is missing"),
        ("code", {i: f"w{i}" for i in range(5)}, {}, r"row 1 \('w0'\), .*: no number, as the others in column 'code'"),
        ("code", {i: f"{i},5" for i in range(ROWS)}, {}, "'code' has numbers with a decimal comma, such as 0,5"),
        ("code", {i: f"t{i}" for i in range(ROWS)}, {}, "230 different texts in 230 rows, such as 't0'"),
        ("label", {99: np.nan}, {}, "row 100: the label in column 'label' is empty"),
        ("label", {i: i + 0.5 for i in range(ROWS)}, {}, "measured values, such as 0.5"),
        ("label", {i: f"w{i}" for i in range(ROWS)}, {}, "230 different labels in 230 rows"),
        ("label", {99: np.inf}, {"task": "regression"}, "row 100: there is no value to train on"),
        ("city", {99: " "}, {"text_column": "city"}, "row 100: the text or the label is empty"),
        ("n", {}, {"text_column": "code"}, "column of texts, 'code', has nothing but numbers"),
    ],
)
def test_what_is_wrong_in_any_part_is_found_whoever_surveys_it(tmp_path, column, values, schema, message):
    rows = table()
    rows[column] = [values.get(i, value) for i, value in enumerate(rows[column])]
    rows.to_parquet(tmp_path / "x.parquet", row_group_size=PART)
    path, schema = str(tmp_path / "x.parquet"), Schema(**schema)
    with pytest.raises(UsageError, match=message):
        open_source(path, schema=schema)
    with pytest.raises(UsageError, match=message):
        open_source(path, schema=schema, surveys=[survey_source(path, schema, rank, 2) for rank in range(2)])


def test_other_splits_must_fit_the_training_split(tmp_path, caplog):
    table(40).to_parquet(tmp_path / "train.parquet", row_group_size=PART)
    changed = table(40, 200)
    changed.to_parquet(tmp_path / "test.parquet", row_group_size=PART)
    source = open_source(str(tmp_path / "train.parquet"))
    assert "column city has categories that no training row has: c4" in caplog.text
    assert read(source, "test")[0][0].tolist() == [200, 100, 0, 2]
    changed["code"] = ["x" if i == 30 else "1" for i in range(40)]
    changed.to_parquet(tmp_path / "test.parquet", row_group_size=PART)
    with pytest.raises(UsageError, match=r"test.parquet, row 31: 'x' in column 'code' is no number, as the training"):
        open_source(str(tmp_path / "train.parquet"))
    table(40).assign(label=7).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(UsageError, match=r"test.parquet has classes that train.parquet lacks: 7"):
        open_source(str(tmp_path / "train.parquet"))
    table(1).to_parquet(tmp_path / "one.parquet")
    with pytest.raises(UsageError, match="1 example.* cannot be split"):
        open_source(str(tmp_path / "one.parquet"))


def test_columns_as_other_writers_have_them(tmp_path):
    """Dictionaries of texts and of numbers, decimals, texts that are not marked as such, and integers with nulls."""
    numbers = list(range(40))
    columns = {
        "kind": pyarrow.array([f"k{n % 3}" for n in numbers]).dictionary_encode(),
        "level": pyarrow.array([n % 4 for n in numbers]).dictionary_encode(),
        "price": pyarrow.array([decimal.Decimal(n) / 4 for n in numbers], pyarrow.decimal128(8, 2)),
        "city": pyarrow.array([f"Zürich {n // 20}".encode() for n in numbers], pyarrow.binary()),
        "label": pyarrow.array([None if n == 39 else n % 2 for n in numbers], pyarrow.int64()),
    }
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=10)
    source = open_source(str(path), schema=Schema("multilabel"))
    kinds, cities = [f"kind=k{n}" for n in range(3)], ["city=Zürich 0", "city=Zürich 1"]
    assert source.feature_names == [*kinds, "level", "price", *cities]
    assert source.label_names == ["0", "1"], "also in the part with a null"
    for x, y in itertools.chain(*(source.read(split, 0, source.size(split)) for split in ("train", "test"))):
        n = int(x[4] * 4)
        assert x.numpy().tolist() == [*(n % 3 == k for k in range(3)), n % 4, n / 4, n < 20, n >= 20]
        assert y.numpy().tolist() == ([0, 0] if n == 39 else [n % 2 == 0, n % 2 == 1])
    with pytest.raises(UsageError, match="row 40: the label in column 'label' is empty"):
        open_source(str(path))
    columns["city"] = pyarrow.array([b"\xff\x00"] * 40, pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=10)
    with pytest.raises(UsageError, match="row 1: city has bytes that are no text. Leave the column out"):
        open_source(str(path), schema=Schema("multilabel"))
    columns["city"] = pyarrow.array([[1.0, 2.0]] * 40)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=10)
    with pytest.raises(UsageError, match="row 1: city is a list, but must be a text or a number"):
        open_source(str(path), schema=Schema("multilabel"))


def test_folders_as_spark_writes_them(tmp_path):
    """One part of the table a file, beside a marker and checksums; and by the values of a column, which is refused."""
    spark = tmp_path / "spark"
    spark.mkdir()
    for place in range(3):
        table(20, 20 * place).to_parquet(spark / f"part-0000{place}-3f9-c000.snappy.parquet")
        (spark / f".part-0000{place}-3f9-c000.snappy.parquet.crc").write_bytes(b"crc")
    (spark / "_SUCCESS").touch()
    source = open_source(str(spark))
    assert (source.size("train"), source.size("test")) == (48, 12)
    table(40).to_parquet(tmp_path / "hive", partition_cols=["city"])
    with pytest.raises(
        UsageError, match="hive is divided by the values of a column .city=c.*Write the table as one folder"
    ):
        open_source(str(tmp_path / "hive"))
