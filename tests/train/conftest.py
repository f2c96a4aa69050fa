import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import stand_in  # noqa: E402

import znn  # noqa: E402


@pytest.fixture
def stand_in_engine(monkeypatch):
    """Tiny nets on the float64 reference: exact, and quick enough."""
    monkeypatch.setattr(znn, "Network", stand_in.Network, raising=False)
    monkeypatch.setattr(znn, "SGD", stand_in.SGD, raising=False)
    return znn
