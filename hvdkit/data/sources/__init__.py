"""Sources of examples: one file per kind of source, one small interface, and `open_source` to choose among them."""

from collections.abc import Callable, Sequence
from pathlib import Path

from hvdkit.command.functions import names_function
from hvdkit.data.sources import array_files, arrow_files, table_files
from hvdkit.data.sources.array_files import has_arrays, load_arrays
from hvdkit.data.sources.arrays import ArraySource, load_breast_cancer, load_digits, synthetic
from hvdkit.data.sources.base import Parted, Source, edges_of
from hvdkit.data.sources.boxes import CocoSource, is_coco_folder, load_digit_scenes
from hvdkit.data.sources.folder import FolderSource, has_class_folders
from hvdkit.data.sources.function import FunctionSource, load_function
from hvdkit.data.sources.parted_table import Survey, is_parted_table, load_parted, survey
from hvdkit.data.sources.record_files import SUFFIXES as RECORD_SUFFIXES
from hvdkit.data.sources.records import is_record_path, load_records
from hvdkit.data.sources.schema import AS_COMPILED, CLASSIFICATION, MULTILABEL, REGRESSION, Schema
from hvdkit.data.sources.selection import FoldSource, long_tailed, with_validation
from hvdkit.data.sources.table import load_table
from hvdkit.data.sources.tfds import TfdsSource, open_named, open_prepared, open_texts
from hvdkit.data.sources.tokens import TokenSource, load_pydoc, load_text
from hvdkit.errors import UsageError

__all__ = [
    "AS_COMPILED",
    "CLASSIFICATION",
    "MULTILABEL",
    "REGRESSION",
    "ArraySource",
    "FoldSource",
    "FolderSource",
    "FunctionSource",
    "Parted",
    "Schema",
    "Source",
    "Survey",
    "TfdsSource",
    "TokenSource",
    "edges_of",
    "long_tailed",
    "open_source",
    "survey_source",
    "with_validation",
]


def open_source(
    dataset: str,
    data_dir: str | None = None,
    *,
    download: bool = False,
    image_size: int | None = None,
    schema: Schema | None = None,
    seed: int = 0,
    surveys: Sequence[Survey] | None = None,
) -> Source:
    """Opens a data set by the name or path that the user gave.

    Args:
        dataset: one of

            - `digits`: 1,797 real handwritten digits, 8×8 pixels, that come with scikit-learn;
            - `breast_cancer`: 569 real tumors with 30 measurements each, that come with scikit-learn;
            - `digit_scenes`: 4,500 images, each with one to four of these digits and boxes around them;
            - `synthetic:HxWxC:CLASSES:EXAMPLES`: random images of any shape;
            - `pydoc`: the reference texts that come with Python, as bytes to predict;
            - `text:PATH`: a file, or a folder of files, as bytes to predict;
            - `text:NAME`: the texts of a TFDS data set (its name, or its prepared directory), as bytes to predict;
            - a path to a prepared TFDS directory (with `dataset_info.json`);
            - a path to a folder of images, `train/CLASS/*.png` and `test/CLASS/*.png`, or `CLASS/*.png` alone;
            - a path to a folder in COCO's format, with `annotations/instances_train2017.json`;
            - a path to a `.csv`, `.tsv`, `.jsonl`, `.parquet` or `.arrow` file, to a folder of `.parquet` or `.arrow`
              files, or to one that Hugging Face's `datasets` saved, with a column of labels, and one of texts or else
              columns of numbers and categories;
            - a path to a `.tfrecord` or `.array_record` file with `tf.train.Example` messages, or to a folder of such
              files, named `train...` and `test...`;
            - a path to a `.npz` file, a `.npy` file or a folder of these, with arrays `x_train`, `y_train`, `x_test`
              and `y_test`, or `x` and `y`, or `images` and `labels`;
            - `path/to/file.py:function` or `package.module:function`, which returns data of any structure, see
              `load_function`;
            - the name of a TFDS data set, prepared under `data_dir` or, with `download`, downloaded.
        data_dir: folder of the TFDS data sets; by default TFDS' own `~/tensorflow_datasets`.
        download: whether to download and prepare a data set that is not in `data_dir`.
        image_size: height and width to resize images to, if their sizes differ.
        schema: what to learn, and from which columns, where a guess would be wrong.
        seed: the run's seed, for a function that takes it.
        surveys: what `survey_source` has found on all ranks, in order; by default, everything is read here.

    Raises:
        UsageError: there is no such data set, its content is invalid, or it is not what the schema says.
    """
    schema = schema or Schema()
    if _is_function(dataset):
        return _open_function(dataset, schema, seed)
    path = Path(dataset).expanduser()
    if is_parted_table(path):
        source = load_parted(path, schema, surveys)
    else:
        source = _open(dataset, data_dir, schema, download=download, image_size=image_size)
    if schema.task not in ("auto", source.task):
        what = "text of which each byte is predicted" if source.kind == "tokens" else f"data for {source.task}"
        raise UsageError(
            f"--task={schema.task} does not fit {dataset}, which has {what}. Leave it out, or give a table with such "
            f"labels."
        )
    return source


def survey_source(dataset: str, schema: Schema, share: int, shares: int) -> Survey | None:
    """Reads one share of a table that is read in parts, for `open_source`, which then need not read all of it.

    Args:
        dataset: the name or path that the user gave.
        schema: what to learn, and from which columns.
        share: index of the share.
        shares: number of shares, each a part of the work.

    Returns:
        What was found; None for data sets of other kinds.

    Raises:
        UsageError: the table cannot be read, or its content is invalid.
    """
    path = Path(dataset).expanduser()
    if _is_function(dataset) or not is_parted_table(path):
        return None
    return survey(path, schema, share, shares)


def _is_function(dataset: str) -> bool:
    return names_function(dataset) and not dataset.startswith("text:")


def _open_function(dataset: str, schema: Schema, seed: int) -> FunctionSource:
    if schema != Schema():
        raise UsageError(
            f"--task, --encoding and the flags for columns describe tables, and --dataset={dataset} is a function: "
            f"what it returns is learned by the loss that the model is compiled with. Leave them out."
        )
    return load_function(dataset, seed)


def _open(dataset: str, data_dir: str | None, schema: Schema, *, download: bool, image_size: int | None) -> Source:
    path = Path(dataset).expanduser()
    if path.suffix.lower() in table_files.SUFFIXES:
        return load_table(path, schema)
    if is_record_path(path) and not (path / "dataset_info.json").is_file():
        return load_records(path, schema, image_size)
    if schema.names_columns():
        raise UsageError(
            f"--label-column, --text-column and --feature-columns name columns of a table, or features of records, and "
            f"{dataset} has none. Leave them out, or give a table ({', '.join(_TABLES)})."
        )
    if path.suffix.lower() in array_files.SUFFIXES:
        return load_arrays(path, schema.task, image_size)
    if dataset in _EMBEDDED:
        return _EMBEDDED[dataset]()
    if dataset.startswith("synthetic"):
        return synthetic(dataset)
    if dataset.startswith("text:"):
        return _open_text(dataset.removeprefix("text:"), data_dir, download=download)
    if has_arrays(path):
        return load_arrays(path, schema.task, image_size)
    return _open_folder(dataset, image_size) or open_named(dataset, data_dir, download=download, image_size=image_size)


_TABLES = (*table_files.SUFFIXES, *arrow_files.SUFFIXES)
_EMBEDDED: dict[str, Callable[[], Source]] = {
    "digits": load_digits,
    "digit_scenes": load_digit_scenes,
    "breast_cancer": load_breast_cancer,
    "pydoc": load_pydoc,
}


def _open_folder(dataset: str, image_size: int | None) -> Source | None:
    """Returns the data set of a folder; None if the user gave a name, and no path."""
    path = Path(dataset).expanduser()
    if (path / "dataset_info.json").is_file():
        return open_prepared(path, image_size)
    if is_coco_folder(path):
        return CocoSource(path, image_size)
    if has_class_folders(path):
        return FolderSource(path, image_size)
    if dataset.startswith(("/", "./", "../", "~")) or (
        "/" in dataset and path.is_dir()
    ):  # TFDS names contain slashes, too
        what = "is neither a prepared TFDS directory nor a folder of images" if path.is_dir() else "does not exist"
        raise UsageError(
            f"The data set {dataset} {what}. Give the path of a directory with dataset_info.json, of one with "
            f"train/CLASS/*.png or CLASS/*.png, of a table ({', '.join(_TABLES)}), of arrays "
            f"({', '.join(array_files.SUFFIXES)}), or of records ({', '.join(RECORD_SUFFIXES)})."
        )
    return None


def _open_text(name: str, data_dir: str | None, *, download: bool) -> TokenSource:
    path = Path(name).expanduser()
    if name and path.exists() and not (path / "dataset_info.json").is_file():
        return load_text(path)
    if not name or (not path.exists() and (name.startswith(("/", "./", "../", "~")) or path.suffix[1:].isalpha())):
        raise UsageError(
            f"--dataset=text:{name} names no file or folder that exists. Give the path of a text file, of a folder of "
            f"texts, or the name of a TFDS data set with texts."
        )
    return open_texts(name, data_dir, download=download)
