"""From a script of one process to one of many ranks, and from Horovod's Keras 2 examples to hvdkit."""

import difflib
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import run_command
from tests.migration.originals import migrate, shorten

HERE = Path(__file__).parent
README = (HERE.parents[1] / "README.md").read_text()
# What README's guide to migration names: a changed line is one of these.
GUIDE = {
    "import": r"import hvdkit as hvd|",
    "init": r"hvd\.init\(\)",
    "shard": r"(\w+) = hvd\.data\.shard\(.*\)",
    "optimizer": r"optimizer = hvd\.DistributedOptimizer\(.*hvd\.scaled\(.*\)\)",
    "callbacks": r"callbacks = hvd\.callbacks\.standard\(.*\)",
    "rank 0 saves and prints": r"if hvd\.rank\(\) == 0:"
    r"|callbacks\.append\((keras\.callbacks\.ModelCheckpoint|Timing).*\)",
    "elastic": r"state = hvd\.elastic\.KerasState\(.*\)|@hvd\.elastic\.run|def train\(state\):|train\(state\)"
    r"|callbacks\.append\(hvd\.elastic\..*\)|model\.fit\(.*epochs=epochs - state\.epoch.*\)",
}
LINES = {
    "mnist": (4, 8),
    "advanced": (4, 8),
    "benchmark": (3, 7),
    "elastic": (6, 14),
}  # of each pair: taken away, added


def changes(before, after):
    """The lines that differ between two texts, their first lines (the docstring's) left out."""
    lines = list(difflib.unified_diff(before.splitlines()[1:], after.splitlines()[1:], lineterm="", n=0))[2:]
    return [line[1:] for line in lines if line[0] == "-"], [line[1:] for line in lines if line[0] == "+"]


@pytest.mark.parametrize("name", LINES)
def test_a_script_changes_in_the_lines_that_the_guide_names(name):
    before, after = (HERE / f"{name}_single.py").read_text(), (HERE / f"{name}.py").read_text()
    gone, new = changes(before, after)
    assert (len(gone), len(new)) == LINES[name]
    strangers = [line for line in new if not any(re.fullmatch(p, line.strip()) for p in GUIDE.values())]
    assert not strangers, f"{name}.py changes lines that the guide does not name: {strangers}"


def weights(output):
    return [float(w) for w in re.findall(r"weights ([\d.]+)", output)]


def test_the_readme_shows_one_of_the_pairs():
    shown = re.search(r"`diff mnist_single\.py mnist\.py`:\n\n```diff\n(.*?)```", README, re.DOTALL)[1].splitlines()
    gone, new = changes(*((HERE / name).read_text() for name in ("mnist_single.py", "mnist.py")))
    assert [line[1:] for line in shown if line[0] == "-"] == [line for line in gone if line]
    assert [line[1:] for line in shown if line[0] == "+"] == [line for line in new if line]


@pytest.mark.slow
@pytest.mark.parametrize("name", LINES)
def test_both_scripts_of_a_pair_run(name, tmp_path):
    for folder in ("single", "ranks"):
        (tmp_path / folder).mkdir()
    alone = run_command(
        [sys.executable, HERE / f"{name}_single.py", 2], timeout=240, cwd=tmp_path / "single", env=_here()
    )
    assert alone.code == 0, alone.output
    launcher = [sys.executable, "-m", "hvdkit.launch", "-np", 2, "--"]
    many = run_command(
        [*launcher, sys.executable, HERE / f"{name}.py", 2], timeout=400, cwd=tmp_path / "ranks", env=_here()
    )
    assert many.code == 0, many.output
    first, second = weights(many.output)
    assert first == second, "the ranks must end with one model"
    assert len(weights(alone.output)) == 1
    assert "[1] Epoch" not in many.output, "rank 0 alone shows its progress"
    assert len(re.findall(r"Epoch 1/|epoch 0:", many.output)) == 1
    saved = [sorted(p.name for p in (tmp_path / f).glob("*.keras")) for f in ("single", "ranks")]
    assert saved[0] == saved[1]


@pytest.fixture(scope="module")
def examples():
    """Horovod's folder `examples`, which is not part of this repository."""
    if "HOROVOD_EXAMPLES" not in os.environ:
        pytest.skip("HOROVOD_EXAMPLES does not name Horovod's folder examples/, of its source at v0.28.1")
    return Path(os.environ["HOROVOD_EXAMPLES"])


@pytest.fixture(scope="module")
def mnist(shared_data, tmp_path_factory):
    """A small MNIST in the form of the file that Keras downloads."""
    import tensorflow_datasets as tfds

    arrays = {}
    for split, number in (("train", 600), ("test", 128)):
        examples = list(tfds.load("mnist", split=f"{split}[:{number}]", data_dir=str(shared_data)).as_numpy_iterator())
        arrays[f"x_{split}"] = np.stack([e["image"][..., 0] for e in examples])
        arrays[f"y_{split}"] = np.stack([e["label"] for e in examples]).astype("uint8")
    path = tmp_path_factory.mktemp("mnist") / "mnist.npz"
    np.savez(path, **arrays)
    return path


BENCHMARK = "--model MobileNetV2 --batch-size 2 --num-batches-per-iter 2 --num-iters 2 --no-cuda"
ORIGINALS = {  # its arguments, and how many of its lines change
    "tensorflow2_keras_mnist.py": ("", 3),
    "tensorflow2_keras_synthetic_benchmark.py": (BENCHMARK, 3),
    "tensorflow2_keras_mnist_elastic.py": ("", 4),
    "keras_mnist.py": ("", 5),
    "keras_mnist_advanced.py": ("--epochs 2 --batch-size 32", 8),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ORIGINALS)
def test_horovods_own_example_runs_with_the_import_changed(examples, mnist, name, tmp_path):
    arguments, expected = ORIGINALS[name]
    source = next(examples.rglob(name)).read_text()
    migrated, reasons = migrate(source)
    diff = list(difflib.unified_diff(source.splitlines(), migrated.splitlines(), lineterm="", n=0))[2:]
    print(f"\n{name}: {'; '.join(reasons)}", *diff, sep="\n")
    gone = [line for line in diff if line.startswith("-") and line.strip("-").strip() and "# Horovod" not in line]
    assert len(gone) <= expected, f"more lines had to change than documented: {gone}"
    assert "import hvdkit as hvd" in migrated
    assert "as hvd" not in migrated.replace("import hvdkit as hvd", "")
    (tmp_path / name).write_text(shorten(migrated))
    launcher = [sys.executable, "-m", "hvdkit.launch", "-np", 2, "--"]
    command = [*launcher, sys.executable, HERE / "originals.py", tmp_path / name, mnist, *arguments.split()]
    ended = run_command(command, timeout=500, cwd=tmp_path, env=_here())
    assert ended.code == 0, ended.output
    values = weights(ended.output)
    if values:  # tensorflow2_keras_mnist.py keeps its model to itself
        assert values[0] == values[1]
    print(ended.output[-1500:])


def _here():
    return {"PYTHONPATH": str(HERE.parents[1]), "TF_CPP_MIN_LOG_LEVEL": "2"}
