"""Kernel size and output patch, the 3D comparison nets."""

from kernel_size import caption_of as caption  # noqa: F401
from kernel_size import draw_of as draw  # noqa: F401
from kernel_size import rows_of


def table(data):
    return rows_of(data, "kernel_size_3d")
