"""Fixtures and set-up for all tests."""
from __future__ import annotations

import signal

import numpy as np
import pytest


def pytest_configure() -> None:
    """A shell that runs us in the background has Ctrl-C ignored, by us and by every process we start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def rng() -> np.random.Generator:
    """The same random numbers in every test and every run."""
    return np.random.default_rng(1510_06706)
