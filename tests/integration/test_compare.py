"""`python -m hvdkit.compare` trains one task in several ways and puts them side by side."""

import json

import pytest

from tests import forked
from tests.conftest import run_command


@pytest.fixture
def compare(tmp_path):
    def run(*arguments):
        return run_command(forked.command("-m", "hvdkit.compare", *arguments), timeout=600, cwd=tmp_path)

    return run


@pytest.mark.slow
def test_ways_side_by_side(compare, tmp_path):
    """One process and branches found by themselves end alike; a way that the model does not have is named."""
    flags = ["--model=branch_cnn", "--dataset=digits", "--steps=20", "--global_batch=32"]
    ways = ["--ways", "single,branches,branches:3", "--no-plan"]
    ended = compare("-np", "2", *ways, "--json", "found.json", "--plot", "found.png", "--", *flags)
    assert ended.code == 0, ended.output
    found = json.loads((tmp_path / "found.json").read_text())
    single, branches = found["rows"]
    assert (single["way"], single["ranks"], branches["way"], branches["ranks"]) == ("single", 1, "branches", 2)
    assert branches["test_loss"] == pytest.approx(single["test_loss"], rel=1e-3)
    assert branches["test_accuracy"] == pytest.approx(single["test_accuracy"], abs=1e-2)
    assert branches["sent_bytes_per_step"] > 0  # of the whole host, on which other tests send, too
    assert min(single["peak_bytes"] + branches["peak_bytes"]) > 100e6
    assert "multiple of 3 ranks, but 2 were started" in found["left_out"]["branches:3"]
    assert found["fastest"] in ("single", "branches")
    assert (tmp_path / "found.png").read_bytes()[1:4] == b"PNG"
    assert "branches:3: " in ended.output
    assert f"The fastest is {found['fastest']}." in ended.output


@pytest.mark.parametrize("way", ["data", "single:2", "tensor:two"])
def test_a_way_that_there_is_not(compare, way):
    ended = compare("--ways", way, "--", "--model=mnist_mlp")
    assert (ended.code, "Traceback" in ended.output) == (2, False), ended.output
    assert f"--ways: {way!r} is not one of" in ended.output
