"""Tables that are read in parts: the row groups of Parquet files, the record batches of Arrow files and `datasets`."""

import bisect
import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hvdkit.data.sources.table_files import Column, cell_of, cells, is_saved_dataset, saved_files
from hvdkit.errors import UsageError

_ROWS_AT_ONCE = 8192

Read = Callable[[int, Sequence[str]], Iterator[Any]]


@dataclasses.dataclass(frozen=True)
class _File:
    """A file of a table.

    Attributes:
        path: the file.
        columns: names of all columns.
        sizes: number of rows of each part.
        read: function from a part's number and names of columns to Arrow tables of some rows each.
    """

    path: Path
    columns: list[str]
    sizes: list[int]
    read: Read


class PartedTable:
    """A table in one or more files of the same columns, of which any part can be read alone.

    Args:
        path: what the user gave, for messages.
        files: its files, in order.

    Attributes:
        columns: names of all columns.
        edges: row number of the first row of each part, and the number of all rows.

    Raises:
        UsageError: a file cannot be read, or the files' columns differ.
    """

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        self.path = path
        self._files = [_OPENERS.get(file.suffix.lower(), _open_arrow)(file) for file in files]
        self.columns = self._files[0].columns
        for file in self._files:
            if file.columns != self.columns:
                raise UsageError(
                    f"{file.path} has the columns {', '.join(file.columns)}, and {self._files[0].path} has "
                    f"{', '.join(self.columns)}. Files of one table need the same columns."
                )
        self.edges = [0, *itertools.accumulate(size for file in self._files for size in file.sizes)]
        self._first_parts = [0, *itertools.accumulate(len(file.sizes) for file in self._files)]
        self._class_names = _class_names(path) if is_saved_dataset(path) else {}

    def __len__(self) -> int:
        return self.edges[-1]

    def place(self, row: int) -> str:
        """Returns what a message calls a row."""
        if len(self._files) == 1 or is_saved_dataset(self.path):
            return f"row {row + 1}"
        number = bisect.bisect_right(self._first_parts, bisect.bisect_right(self.edges, row) - 1) - 1
        return f"{self._files[number].path.name}, row {row - self.edges[self._first_parts[number]] + 1}"

    def read(self, part: int, names: Sequence[str]) -> Iterator[tuple[int, list[Column]]]:
        """Yields the rows of a part, some thousand at a time: the number of the first one, and the named columns.

        Raises:
            UsageError: the part cannot be read, or has values that are neither texts, numbers nor lists of these.
        """
        number = bisect.bisect_right(self._first_parts, part) - 1
        file = self._files[number]
        row = self.edges[part]
        for table in file.read(part - self._first_parts[number], names):
            places = _Places(self, row, table.num_rows)
            columns = [_column_of(self.path, name, table[name], places) for name in names]
            yield row, [self._named(name, column) for name, column in zip(names, columns, strict=True)]
            row += table.num_rows

    def places(self, row: int, rows: int) -> Sequence[str]:
        """Returns what messages call some rows, made when it is needed."""
        return _Places(self, row, rows)

    def _named(self, name: str, column: Column) -> Column:
        """Replaces numbers of classes by the names that a description of `datasets` gives them, also in lists."""
        classes = self._class_names.get(name)
        if not classes:
            return column

        def name_of(number: str) -> str:
            return classes[int(number)] if number not in ("", "-1") else ""

        return [[*map(name_of, cell)] if isinstance(cell, list) else name_of(cell) for cell in cells(column)]


class _Places(Sequence[str]):
    """What messages call some rows of a table."""

    def __init__(self, table: PartedTable, row: int, rows: int) -> None:
        self._table, self._row, self._rows = table, row, rows

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(self._rows))]
        if not 0 <= index < self._rows:
            raise IndexError(index)
        return self._table.place(self._row + index)


def _class_names(path: Path) -> dict[str, list[str]]:
    """Returns the names of classes by column, as the description of a folder of `datasets` gives them."""
    features = json.loads((path / "dataset_info.json").read_text()).get("features") or {}
    found = {}
    for name, feature in features.items():
        of_items = feature.get("feature") if isinstance(feature, dict) else None
        named = feature if isinstance(feature, dict) and "names" in feature else of_items
        found[name] = named.get("names") or [] if isinstance(named, dict) else []
    return found


def parted_table(path: Path, files: Sequence[Path] = ()) -> PartedTable:
    """Opens a file, a folder of `datasets`, or some files of one table; reads no row.

    Raises:
        UsageError: it does not exist, cannot be read, or has no rows.
    """
    if is_saved_dataset(path):
        files = saved_files(path)
    elif not files:
        if not path.is_file():
            raise UsageError(f"The data set {path} does not exist. Give the path of a file or folder of tables.")
        files = [path]
    table = PartedTable(path, files)
    if not len(table):
        raise UsageError(f"{path} has names of columns but no rows.")
    return table


# ------------------------------------------------------------------------------------------------------------- Formats


def _open_parquet(path: Path) -> _File:
    import pyarrow.parquet  # tensorflow-datasets depends on it

    with _readable(path, "Parquet"):
        metadata = pyarrow.parquet.read_metadata(path)
    sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]

    def read(part: int, names: Sequence[str]) -> Iterator[Any]:
        with _readable(path, "Parquet"), pyarrow.parquet.ParquetFile(path, metadata=metadata) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[part], columns=list(names)):
                yield pyarrow.Table.from_batches([batch])

    return _File(path, metadata.schema.to_arrow_schema().names, sizes, read)


def _open_arrow(path: Path) -> _File:
    """Opens a file in one of Arrow's two formats, which have the same suffix."""
    import pyarrow

    with _readable(path, "Arrow"):
        source = pyarrow.memory_map(str(path))
        try:
            columns = pyarrow.ipc.open_file(source).schema.names
        except pyarrow.ArrowInvalid:
            return _arrow_stream(path, source)
        return _arrow_file(path, source, columns)


def _arrow_file(path: Path, source: Any, columns: list[str]) -> _File:
    import pyarrow

    def batch_of(part: int, names: Sequence[str]) -> Any:
        wanted = pyarrow.ipc.IpcReadOptions(included_fields=[columns.index(name) for name in names])
        return pyarrow.ipc.open_file(source, options=wanted).get_batch(part)

    def read(part: int, names: Sequence[str]) -> Iterator[Any]:
        with _readable(path, "Arrow"):
            yield from _pieces(batch_of(part, names))

    parts = range(pyarrow.ipc.open_file(source).num_record_batches)
    return _File(path, columns, [batch_of(part, columns[:1]).num_rows for part in parts], read)


def _arrow_stream(path: Path, source: Any) -> _File:
    """Opens a stream, as `datasets` writes it. Unless it is compressed, its batches stay in the file until used."""
    import pyarrow

    source.seek(0)
    table = pyarrow.ipc.open_stream(source).read_all()
    batches = table.to_batches()

    def read(part: int, names: Sequence[str]) -> Iterator[Any]:
        yield from _pieces(batches[part].select(list(names)))

    return _File(path, table.column_names, [batch.num_rows for batch in batches], read)


def _pieces(batch: Any) -> Iterator[Any]:
    import pyarrow

    for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
        yield pyarrow.Table.from_batches([batch.slice(start, _ROWS_AT_ONCE)])


def _column_of(path: Path, name: str, column: Any, places: Sequence[str]) -> Column:
    import pyarrow

    is_number = (pyarrow.types.is_integer, pyarrow.types.is_floating, pyarrow.types.is_boolean)
    may_be_missing = column.null_count and not pyarrow.types.is_floating(column.type)  # 1 must not become 1.0
    if any(check(column.type) for check in is_number) and not may_be_missing:
        return column.to_numpy()
    return [cell_of(path, place, name, value) for place, value in zip(places, column.to_pylist(), strict=True)]


@contextlib.contextmanager
def _readable(path: Path, form: str) -> Iterator[None]:
    """Turns Arrow's errors into one that names the file."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UsageError(f"{path} cannot be read as {form} ({reason}). Is it complete? Write it again.") from None


_OPENERS: dict[str, Callable[[Path], _File]] = {
    ".parquet": _open_parquet,
    ".arrow": _open_arrow,
    ".feather": _open_arrow,
}
SUFFIXES = (*_OPENERS,)
