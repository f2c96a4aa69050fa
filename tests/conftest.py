"""Fixtures for all tests."""
from __future__ import annotations

import signal

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    """The same random numbers in every test and every run."""
    return np.random.default_rng(1510_06706)
