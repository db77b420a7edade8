"""What `import hvdkit as hvd` shows: to Python, to a reader, and to a type checker that reads a user's script."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hvdkit as hvd
from hvdkit.world import ranks

ROOT = Path(__file__).parents[2]

RIGHT = """
import hvdkit as hvd
import keras

world: hvd.World = hvd.init()
rank: int = hvd.rank()
optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(hvd.scaled(1e-3)), op=hvd.Average)
optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(), compression=hvd.Compression.fp16, process_set=None)
some = hvd.add_process_set([0, 1])
number: int | None = some.rank()
callbacks = [*hvd.callbacks.standard(warmup_epochs=1), hvd.callbacks.CheckpointCallback("checkpoints")]
mesh = hvd.Mesh(model=2)
share = hvd.data.shard(range(3))
built: bool = hvd.gloo_built()
try:
    hvd.barrier()
except hvd.UsageError as error:
    print(error, hvd.__version__)
"""
# Strict, but for what Keras and TensorFlow, which ship no types, make untyped. A checkout is not where mypy looks.
SETTINGS = f"""
[mypy]
strict = true
mypy_path = {ROOT}
[mypy-hvdkit.*]
follow_imports = silent
[mypy-keras.*]
ignore_missing_imports = true
"""
REVEALED = {
    "hvd.rank": "def () -> int",
    "hvd.init": "def (*args: Any, mesh: hvdkit.collectives.mesh.Mesh | None =, **kwargs: Any)"
    " -> hvdkit.world.ranks.World",
    "hvd.scaled": "def (learning_rate: float) -> float",
    "hvd.nccl_built": "def () -> int",
    "hvd.broadcast_object": "def (obj: Any, root_rank: int =, session: Any =, name: str | None =,"
    " process_set: Any =) -> Any",
    "hvd.global_process_set.ranks": "list[int] | None",
}
WRONG = {
    'hvd.rank("x")': "Too many arguments",
    "hvd.DistributedOptimizer(3, nonsense=1)": 'Unexpected keyword argument "nonsense" for "DistributedOptimizer"',
    "hvd.nosuch": 'Module has no attribute "nosuch"',
    "hvd.callbacks.nosuch()": 'Module has no attribute "nosuch"',
    "hvd.scaled('fast')": 'Argument 1 to "scaled" has incompatible type "str"; expected "float"',
    "hvd.rank() + 'x'": 'Unsupported operand types for + ("int" and "str")',
    "hvd.Mesh(modle=2)": 'Unexpected keyword argument "modle" for "Mesh"',
    "hvd.remove_process_set(3)": 'incompatible type "int"; expected "ProcessSet"',
}


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """What mypy says of a user's script, by line: the right one, then what is revealed, then what is wrong."""
    folder = tmp_path_factory.mktemp("user")
    lines = [*RIGHT.splitlines(), *(f"reveal_type({name})" for name in REVEALED), *WRONG]
    (folder / "train_mine.py").write_text("\n".join(lines) + "\n")
    (folder / "mypy.ini").write_text(SETTINGS)
    command = [sys.executable, "-m", "mypy", "--no-color-output", "--cache-dir", str(folder / "cache"), "train_mine.py"]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)
    said = {}
    for line in ended.stdout.splitlines():
        if place := re.match(r"train_mine.py:(\d+): (.*)", line):
            said.setdefault(lines[int(place[1]) - 1], place[2])
    assert said, ended.stdout + ended.stderr
    return said


def test_a_right_script_passes_strict_type_checking(checked):
    assert {line: said for line, said in checked.items() if line in RIGHT.splitlines()} == {}


def test_a_type_checker_sees_the_real_signatures(checked):
    revealed = {name: checked[f"reveal_type({name})"] for name in REVEALED}
    assert revealed == {name: f'note: Revealed type is "{signature}"' for name, signature in REVEALED.items()}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_call_is_an_error(checked, line):
    assert checked[line].startswith("error: ")
    assert WRONG[line] in checked[line]


def test_dir_shows_the_public_names_alone():
    assert dir(hvd) == sorted(hvd.__all__)
    assert {"rank", "DistributedOptimizer", "callbacks", "nccl_built"} <= set(dir(hvd))
    assert not {"versions", "importlib", "Any", "Path", "_HOMES"} & set(dir(hvd))


def test_each_name_stands_once_on_the_page():
    page = ast.parse((ROOT / "hvdkit" / "__init__.pyi").read_text())
    names = [alias.asname for s in page.body if isinstance(s, ast.ImportFrom) for alias in s.names if alias.asname]
    names += [s.name for s in page.body if isinstance(s, ast.FunctionDef | ast.ClassDef)]
    names += [s.target.id for s in page.body if isinstance(s, ast.AnnAssign)]
    assert sorted(n for n in names if not n.startswith("_")) == hvd.__all__


def test_horovods_own_names_have_the_types_that_the_page_declares():
    engine = ranks.horovod()
    page = ast.parse((ROOT / "hvdkit" / "__init__.pyi").read_text())
    for statement in page.body:
        if isinstance(statement, ast.FunctionDef):
            declared = [argument.arg for argument in statement.args.args]
            assert list(inspect.signature(getattr(engine, statement.name)).parameters) == declared, statement.name
            assert getattr(hvd, statement.name) == getattr(engine, statement.name)
        elif isinstance(statement, ast.AnnAssign) and statement.target.id[0] != "_":
            assert type(getattr(hvd, statement.target.id)).__name__ == ast.unparse(statement.annotation)


def test_what_help_lists_exists():
    contents = hvd.__doc__.partition("what does it:")[2].partition("Names and arguments")[0]
    listed = [name for line in contents.splitlines() for name in re.findall(r"[\w.]+", line[43:])]
    prose = {"for", "layers", "that", "stay", "each", "rank", "s", "own", "callbacks", "has", "by", "its", "name"}
    assert len(listed) > 40
    for name in set(listed) - prose:
        thing = hvd
        for part in name.split("."):
            thing = getattr(thing, part)


def test_the_types_are_installed_with_the_package():
    project = (ROOT / "pyproject.toml").read_text()
    assert 'hvdkit = ["py.typed", "__init__.pyi"]' in project
    assert (ROOT / "hvdkit" / "py.typed").exists()


def test_every_package_is_installed():
    """An installation that is not editable has what pyproject.toml lists, and nothing else."""
    listed = set(re.findall(r'^    "(hvdkit(?:\.\w+)*)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    folders = (path.parent.relative_to(ROOT) for path in (ROOT / "hvdkit").rglob("__init__.py"))
    assert listed == {".".join(folder.parts) for folder in folders}
