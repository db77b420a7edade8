"""Tables of numbers and categories, measured values, and several labels, as pandas, pyarrow and datasets write them."""

import json

import numpy as np
import pytest

from hvdkit.data import checks, pipeline
from hvdkit.data.moments import Moments, standardization
from hvdkit.data.sources import Schema, open_source, with_validation
from hvdkit.errors import UsageError

pandas = pytest.importorskip("pandas", reason="pandas is not installed")
CITIES = ["Rome", "Oslo", "Bern"]


def houses(rows=40):
    generator = np.random.default_rng(0)
    table = pandas.DataFrame(
        {
            "area": generator.permutation(rows) * 7.3 + 20,  # all different
            "rooms": generator.integers(1, 9, rows),
            "garden": generator.random(rows) < 0.5,
            "city": [CITIES[i % 3] for i in range(rows)],
            "same": 7,
        }
    )
    table["price"] = (table.area * 1000 + table.rooms * 5000.5).round(2)
    table["label"] = np.where(table.area > 150, "large", "small")
    return table


FORMATS = {
    "x.csv": lambda table, path: table.to_csv(path),  # with pandas' index, a column without a name
    "x.tsv": lambda table, path: table.to_csv(path, sep="\t", index=False),
    "x.jsonl": lambda table, path: table.to_json(path, orient="records", lines=True),
    "x.parquet": lambda table, path: table.to_parquet(path),
    "x.feather": lambda table, path: table.to_feather(path),
}


def everything(source, split="train"):
    examples = list(source.read(split, 0, source.size(split)).as_numpy_iterator())
    return np.stack([x for x, _ in examples]), np.stack([y for _, y in examples])


@pytest.mark.parametrize("name", FORMATS)
def test_columns_of_numbers_booleans_and_categories(tmp_path, name):
    table = houses()
    FORMATS[name](table, tmp_path / name)
    columns = ("area", "rooms", "garden", "city", "same")
    classes = open_source(str(tmp_path / name), schema=Schema(feature_columns=columns))
    assert (classes.kind, classes.task, classes.label_names) == ("features", "classification", ["large", "small"])
    names = ["area", "rooms", "garden", "city=Bern", "city=Oslo", "city=Rome", "same"]
    assert (classes.feature_names, classes.shape) == (names, (7,))
    inputs, labels = map(np.concatenate, zip(everything(classes), everything(classes, "test"), strict=True))
    assert (inputs.dtype, labels.dtype, len(inputs)) == (np.float32, np.int64, 40)
    by_area = {np.float32(row.area): row for row in table.itertuples()}
    for x, y in zip(inputs, labels, strict=True):
        row = by_area[x[0]]
        expected = [row.area, row.rooms, row.garden, *(row.city == c for c in sorted(CITIES)), 7]
        assert x.tolist() == np.float32(expected).tolist()
        assert classes.label_names[y] == row.label
    assert open_source(str(tmp_path / name)).feature_names == [*names, "price"], "all but the label, and no index"
    values = open_source(str(tmp_path / name), schema=Schema("regression", "price", feature_columns=columns[:2]))
    assert (values.task, values.label_names, values.feature_names) == ("regression", ["price"], ["area", "rooms"])
    inputs, prices = everything(values)
    assert (prices.dtype, prices.shape) == (np.float32, (32, 1))
    assert prices[0, 0] == pytest.approx(inputs[0, 0] * 1000 + inputs[0, 1] * 5000.5, rel=1e-6)


def test_a_folder_of_datasets_with_numbers_and_lists_of_labels(tmp_path):
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    rows = {"a": [0.5, 1.5, 2.5, 3.5], "b": [1, 2, 3, 4], "labels": [[0, 1], [], [1], [0]]}
    named = datasets.Sequence(datasets.ClassLabel(names=["red", "green"]))
    features = datasets.Features({"a": datasets.Value("float64"), "b": datasets.Value("int32"), "labels": named})
    whole = datasets.Dataset.from_dict(rows, features=features)
    both = {"train": whole, "validation": whole.select([1, 2]), "test": whole.select([3])}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "all")
    source = open_source(str(tmp_path / "all"))
    assert (source.task, source.label_names, source.feature_names) == ("multilabel", ["green", "red"], ["a", "b"])
    assert source.splits == ("train", "test", "validation")
    inputs, labels = everything(source)
    assert inputs.tolist() == [[0.5, 1], [1.5, 2], [2.5, 3], [3.5, 4]]
    assert labels.tolist() == [[1, 1], [0, 0], [1, 0], [0, 1]]
    assert everything(source, "test")[1].tolist() == [[0, 1]]


def write(path, text):
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    "cells",
    [("red;green", "", " green"), ("red|green", "", "green"), ('"[""red"", ""green""]"', "[]", '"[""green""]"')],
)
def test_several_labels_in_a_text(tmp_path, cells):
    rows = "".join(f"text {i},{cell}\n" for i, cell in enumerate(cells * 2))
    path = write(tmp_path / "train.csv", "text,tags\n" + rows)
    write(tmp_path / "test.csv", "text,tags\n" + rows)
    source = open_source(path, schema=Schema("multilabel"))
    assert (source.kind, source.task, source.label_names) == ("text", "multilabel", ["green", "red"])
    assert everything(source)[1].tolist() == [[1, 1], [0, 0], [1, 0]] * 2


def test_categories_are_learned_from_the_training_split_alone(tmp_path, caplog):
    write(tmp_path / "test.csv", "n,city,label\n3,Paris,a\n4,Oslo,b\n")
    source = open_source(write(tmp_path / "train.csv", "n,city,label\n1,Oslo,a\n2,Rome,b\n"))
    assert source.feature_names == ["n", "city=Oslo", "city=Rome"]
    assert everything(source, "test")[0].tolist() == [[3, 0, 0], [4, 1, 0]]
    assert "column city has categories that no training row has: Paris" in caplog.text


def numbered(cells, name="n"):
    return f"{name},label\n" + "".join(f"{cell},{'ab'[i % 2]}\n" for i, cell in enumerate(cells))


@pytest.mark.parametrize(
    ("content", "schema", "message"),
    [
        ("n,m,label\n1,2,a\n,3,b\n4,NA,b\n", {}, r"line 3: the number in column 'n' is missing. Fill it in"),
        ("n,m,label\n1,2,a\n1,NaN,b\n4,?,b\n", {}, r"line 3, line 4: the number in column 'm' is missing"),
        ("n,label\n1,a\n1e60,b\n", {}, r"line 3: the number in column 'n' is infinite, or too large for 32 bits"),
        (numbered([*range(29), "3O"]), {}, r"line 31 \('3O'\): no number, as the others in column 'n' are"),
        (numbered([f'"{i},5"' for i in range(30)]), {}, r"'n' has numbers with a decimal comma, such as 0,5\."),
        (numbered([f"text {i}" for i in range(30)]), {}, r"30 different texts .* give --text-column=n; otherwise"),
        ("n,c,label\n1,x,a\n2,,b\n3,y,a\n", {}, r"line 3: the category in column 'c' is missing"),
        ("text,label\n1,a\n2,b\n", {}, r"'text', has nothing but numbers\..* give --feature-columns=text"),
        ("n,label\n1,a\n2,b\n", {"label_column": "m"}, r"no column 'm', which --label-column names; .*: n, label"),
        ("n,label\n1,a\n2,b\n", {"feature_columns": ("q",)}, r"no column 'q', which --feature-columns names"),
        ("n,label\n1,a\n2,b\n", {"feature_columns": ("label",)}, "'label' cannot be both the label and"),
        ("n,n,label\n1,1,a\n2,2,b\n", {}, "two columns named 'n'"),
        ("n,label\n1,a\n2,\n", {}, r"line 3: the label in column 'label' is empty"),
        ("n,m\n1,a\n2,b\n", {}, r"needs a text column .* or columns of features, and a label column .*: n,m\. Name"),
        ("n,label\n1,0.5\n2,x\n", {"task": "regression"}, r"line 3: the label 'x' is no number, as --task=regression"),
        ("n,label\n1,0.5\n2,inf\n", {"task": "regression"}, "line 3: there is no value to train on"),
        ("n,label\n1,0.5\n2,1.5\n", {}, "measured values, such as 0.5, .* or train on measured values with --task=reg"),
        (numbered(range(30)).replace(",a", ",x;1").replace(",b", ",y"), {"task": "regression"}, "'x;1' is no number"),
        ("n,label\n1,\n2,\n", {"task": "multilabel"}, r"No row of .* has a label"),
        ('n,label\n1,"[1"\n2,a\n', {"task": "multilabel"}, r"line 2: '\[1' is no list in JSON"),
    ],
)
def test_tables_of_features_that_are_not_what_they_should_be(tmp_path, content, schema, message):
    with pytest.raises(UsageError, match=message):
        open_source(write(tmp_path / "x.csv", content), schema=Schema(**schema))


def test_what_a_data_set_cannot_be_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--task=regression does not fit digits, which has data for classification"):
        open_source("digits", schema=Schema("regression"))
    with pytest.raises(UsageError, match="columns of a table, or features of records, and digits has none"):
        open_source("digits", schema=Schema(label_column="x"))
    with pytest.raises(UsageError, match="pydoc, which has text of which each byte is predicted"):
        open_source("pydoc", schema=Schema("multilabel"))
    rows = "".join(json.dumps({"n": i, "label": ["a"] if i else []}) + "\n" for i in range(4))
    path = write(tmp_path / "v.jsonl", '{"v": [1, 2], "label": "a"}\n{"v": [3, 4], "label": "b"}\n')
    with pytest.raises(UsageError, match="line 1: v is a list, but must be a text or a number"):
        open_source(path)
    with pytest.raises(UsageError, match="line 1: the label is a list, but --task=classification needs one class"):
        open_source(write(tmp_path / "x.jsonl", rows), schema=Schema("classification"))


def test_an_embedded_table():
    source = open_source("breast_cancer")
    assert (source.kind, source.shape, source.size("train"), source.size("test")) == ("features", (30,), 455, 114)
    assert source.label_names == ["malignant", "benign"]
    assert source.feature_names[0] == "mean radius"


def test_means_and_variances_do_not_depend_on_batches_and_constants_do_no_harm():
    generator = np.random.default_rng(0)
    data = (generator.standard_normal([1000, 4]) * [1, 100, 0, 1] + [0, 1e6, 0.1, -3]).astype(np.float32)
    mean, variance = standardization(Moments.of(batch, (0,)) for batch in np.split(data, 10))
    exact = data.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(variance, np.where(exact.var(axis=0) > 1e-12, exact.var(axis=0), 1), rtol=1e-9)
    assert variance[2] == 1


@pytest.mark.parametrize("cache_bytes", [1e9, 0])
def test_shares_of_features_with_values_are_checked_and_batched(tmp_path, cache_bytes):
    houses().to_csv(tmp_path / "x.csv", index=False)
    schema = Schema("regression", "price", feature_columns=("area", "rooms"))
    source = with_validation(open_source(str(tmp_path / "x.csv"), schema=schema), 0.25)
    assert (source.task, source.feature_names, source.shape) == ("regression", ["area", "rooms"], (2,))
    shares = [pipeline.read_share(source, "train", i, 2, cache_bytes=cache_bytes) for i in range(2)]
    assert [checks.check_share(share, "train", 1).tolist() for share in shares] == [[12], [12]]
    spec, label_spec = checks.specs(shares[0])
    assert (spec.shape, label_spec.shape, label_spec.dtype) == ((2,), (1,), "float32")
    sampling = pipeline.balance.Sampling("none", np.array([24]))
    batches = pipeline.training_batches(shares, local_batch=4, steps_per_epoch=3, seed=0, sampling=sampling)
    rows = np.concatenate([np.concatenate([x, y], axis=1) for x, y in batches.take(3).as_numpy_iterator()])
    inputs, labels = everything(source)
    assert sorted(rows.tolist()) == sorted(np.concatenate([inputs, labels], axis=1).tolist()), "each example once"
