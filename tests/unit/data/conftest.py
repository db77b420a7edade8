"""What several tests of data need."""

import sys
from pathlib import Path

import pytest


@pytest.fixture
def torch(monkeypatch):
    """PyTorch, from the environment in which `hvdkit.bench peers` measures it, if it is not installed."""
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    peers = Path.home() / ".cache/hvdkit/peers/torch/lib" / python / "site-packages"
    monkeypatch.setattr(sys, "path", [*sys.path, str(peers)])
    return pytest.importorskip("torch.utils.data") and sys.modules["torch"]
