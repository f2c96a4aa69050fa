"""Fixtures and marks for all tests."""
from __future__ import annotations

import numpy as np
import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than ten seconds; leave out with -m 'not slow'")


@pytest.fixture
def rng() -> np.random.Generator:
    """The same random numbers in every test and every run."""
    return np.random.default_rng(1510_06706)
