"""One process: hvdkit's world is that of a process that runs alone."""

import pytest

from hvdkit import world


@pytest.fixture(autouse=True)
def alone():
    world.enter(world.World.single())
    yield
    world._world = None
