"""Whether the image is proven already: a stamp in the cache, named by a hash of all that decides what its tests find.

Of hvdkit and the models, the hash takes the names of all files, the packages that they import, and in full only the
folders that compile and start ranks. All other lines run in the image as in any environment, and other tests run them
there. `HVDKIT_TEST_IMAGE=always` builds the image even so, as before a release.
"""

import ast
import hashlib
import json
import os
import platform
import re
import time
from pathlib import Path

import pytest
import tomllib

from tests.conftest import run_command

WHOLE = ["Dockerfile", ".dockerignore", "requirements.txt", "launch/bootstrap.sh", "launch/image"]
# What finds other programs, other users' files or the network wanting, as it may only in the image.
WHOLE += ["hvdkit/native", "hvdkit/launch", "hvdkit/world", "tests/integration/test_image.py"]


def _files(root, part, pattern="*"):
    """The files of a folder that git would take, or the file itself."""
    found = sorted(p for p in (root / part).rglob(pattern) if p.is_file()) if (root / part).is_dir() else [root / part]
    return [p for p in found if "__pycache__" not in p.parts and p.suffix != ".so"]


def _imports(source):
    """The packages that a module imports, at whatever place."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return sorted({name.partition(".")[0] for name in names})


def sources(root):
    """What of a checkout decides how its image comes out: a dictionary that JSON can take."""
    whole = {str(f.relative_to(root)): f.read_bytes() for part in WHOLE for f in _files(root, part)}
    python = [f for part in ("hvdkit", "models") for f in _files(root, part, "*.py")]
    others = [str(f.relative_to(root)) for part in ("hvdkit", "models") for f in _files(root, part)]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    return {
        "whole": {name: hashlib.sha256(content).hexdigest() for name, content in whole.items()},
        "names": others,
        "imports": sorted({package for f in python for package in _imports(f.read_text())}),
        "project": [project["project"], project["build-system"], project["tool"].get("setuptools")],
    }


def builder(root):
    """What of this machine does: its release and the versions that apt would install, the tools, the compiler."""
    listed = re.findall(r"--no-install-recommends \\\n((?:.*\\\n)*?.*?) \\\n", (root / "Dockerfile").read_text())
    packages = sorted({word for line in listed for word in line.split() if re.fullmatch(r"[a-z][a-z0-9.+-]+", word)})
    assert packages, "the Dockerfile's packages were not found in it"
    policy = run_command(["apt-cache", "policy", *packages], timeout=60).output
    return {
        "release": platform.freedesktop_os_release(),
        "machine": platform.machine(),
        "packages": re.findall(r"^(\S+):$|^  Candidate: (\S+)$", policy, re.MULTILINE),
        "tools": [run_command([program, "--version"], timeout=60).output for program in ("buildah", "debootstrap")],
    }


class Proof:
    """The stamp of an image that comes from these sources on this machine."""

    def __init__(self, root):
        described = json.dumps([sources(root), builder(root)], sort_keys=True)
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        cache = Path(os.environ.get("HVDKIT_CACHE", home / "hvdkit"))
        self.stamp = cache / "proven" / f"image-{hashlib.sha256(described.encode()).hexdigest()[:16]}"

    def skip_if_proven(self):
        """Skips the test where the stamp is there, unless the variable says that it is to run."""
        asked = os.environ.get("HVDKIT_TEST_IMAGE", "")
        if asked not in ("", "always"):
            pytest.fail(f"HVDKIT_TEST_IMAGE is '{asked}'; expected is 'always', or that it is not set")
        if self.stamp.exists() and not asked:
            when = self.stamp.read_text().strip()
            pytest.skip(f"proven before, {when}: stamp {self.stamp}; HVDKIT_TEST_IMAGE=always builds it again")

    def keep(self):
        """Writes the stamp: all checks have passed."""
        self.stamp.parent.mkdir(parents=True, exist_ok=True)
        written = self.stamp.with_suffix(".new")
        written.write_text(time.strftime("%Y-%m-%d %H:%M:%S %z\n"))
        written.replace(self.stamp)
