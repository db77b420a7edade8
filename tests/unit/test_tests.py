"""The tests themselves: a reader finds the test of a file by the file's folder and name."""

from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGES = sorted(p.parent.relative_to(ROOT / "hvdkit") for p in (ROOT / "hvdkit").glob("*/__init__.py"))
# Packages that only commands and ranks of their own run: their tests start these, in tests/integration.
BY_COMMAND = {Path("command"): "unit/test_command.py", Path("compare"): "integration/test_compare.py"}


@pytest.mark.parametrize("package", PACKAGES, ids=str)
def test_each_package_has_a_folder_of_tests(package):
    folders = [ROOT / "tests" / kind / package for kind in ("unit", "parallel")]
    found = [file for folder in folders for file in folder.glob("test_*.py")]
    if package in BY_COMMAND:
        found.append(ROOT / "tests" / BY_COMMAND[package])
    assert any(file.is_file() for file in found), f"tests/unit/{package} and tests/parallel/{package} have no test"


def test_each_folder_of_tests_is_that_of_a_package():
    for kind in ("unit", "parallel"):
        folders = {p.name for p in (ROOT / "tests" / kind).iterdir() if p.is_dir() and p.name != "__pycache__"}
        assert folders - {"models"} <= {str(p) for p in PACKAGES}
