"""What the README shows is what happens."""

import re
import sys

from tests import forked
from tests.conftest import ROOT, run_command

README = (ROOT / "README.md").read_text()


def test_the_script_on_the_first_page_runs(tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "train_mine.py").write_text(program + 'print("rank", hvd.rank(), model.history.history["loss"][-1])\n')
    ended = run_command(
        [sys.executable, "-m", "hvdkit.launch", "-np", 2, "--", *forked.command(tmp_path / "train_mine.py")],
        timeout=120,
    )
    assert ended.code == 0, ended.output
    losses = re.findall(r"rank \d ([\d.]+)$", ended.output, re.MULTILINE)
    assert len(losses) == 2
    assert losses[0] == losses[1], "the metrics are those of all ranks"
    assert ended.output.count("Epoch 5/5") == 1, "rank 0 alone shows progress"


def test_the_quick_start_has_two_commands():
    section = re.search(r"^## Quick start\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)[1]
    assert re.findall(r"```sh\n(.*?)\n```", section) == ["launch/local.sh", "tests/run.sh"]


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"@[A-Z]+@|TODO|TBD", README)


def test_the_number_of_optimizers_is_right():
    from tests.parallel.optimizers.test_parity import OPTIMIZERS

    assert f"each of Keras' {len(OPTIMIZERS)} optimizers" in README
