"""One process: hvdkit's world is that of a process that runs alone."""

import pytest

from hvdkit import world
from hvdkit.world import ranks


@pytest.fixture(autouse=True)
def alone():
    world.enter(world.World.single())
    yield
    ranks._world = None
