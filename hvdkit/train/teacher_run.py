"""The run of a teacher: its model's file, and the flags that name its data. This loads no TensorFlow."""

from pathlib import Path

from hvdkit import reporting
from hvdkit.errors import UsageError
from hvdkit.train.settings import Config

_DATA = ("dataset", "data_dir", "task", "label_column", "text_column", "feature_columns", "encoding", "image_size")


def file_of(teacher: str) -> Path:
    """Returns the file of a teacher.

    Args:
        teacher: a `.keras` file, or the `--workdir` of a finished run.

    Raises:
        UsageError: there is none.
    """
    path = Path(teacher).expanduser()
    file = path if path.suffix == ".keras" else path / "model.keras"
    if not file.is_file():
        raise UsageError(
            f"--teacher={teacher} has no model: there is no file {file}. Give a .keras file, or the --workdir of a "
            f"finished hvdkit train."
        )
    return file


def data_flags_of(file: Path, config: Config) -> list[str]:
    """Returns the flags that name the data of a teacher's run, but for those in `config`; none if it is not known.

    Args:
        file: the teacher's file.
        config: the flags of the student.
    """
    theirs = reporting.read_json(file.with_name("config.json"))
    if theirs is None or config.dataset is not None:
        return []
    return [f"--{name}={theirs[name]}" for name in _DATA if theirs.get(name) is not None]
