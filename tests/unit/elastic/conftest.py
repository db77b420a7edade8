import pytest

from tests.unit.elastic.training import make_model


@pytest.fixture
def model():
    return make_model()
