"""Pictures of a training run: the learning curve, and image, label and output side by side (PNG)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from znn.files import atomic_write


def draw_learning_curve(lines: Sequence[dict[str, Any]], path: str | os.PathLike) -> None:
    """Loss and pixel error against minutes of training, from the lines of a learning curve
    (`loop.read_curve`).

    The band around the validation error is twice its standard error over tiles; the dashed line is the error
    of calling everything one class.
    """
    plot = _pyplot()
    train = [line for line in lines if line["kind"] == "train"]
    validation = [line for line in lines if line["kind"] == "validation"]
    figure, (left, right) = plot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    minutes = lambda rows: np.array([row["seconds"] for row in rows]) / 60
    left.plot(minutes(train), [row["loss"] for row in train], color="0.6", lw=0.8, label="training patches")
    left.plot(minutes(validation), [row["loss"] for row in validation], "o-", ms=3, label="validation")
    left.set(xlabel="training time (min)", ylabel="loss per voxel", ylim=(0, None))
    left.legend(frameon=False)
    if validation:
        error = 100 * np.array([row["pixel_error"] for row in validation])
        band = 200 * np.array([row["standard_error"] for row in validation])
        right.plot(minutes(validation), error, "o-", ms=3, label="validation")
        right.fill_between(minutes(validation), error - band, error + band, alpha=0.25, lw=0)
        right.axhline(
            trivial := 100 * validation[-1]["trivial_error"],
            color="0.4",
            ls="--",
            lw=1,
            label="all one class",
        )
        right.set_ylim(0, 1.15 * max(trivial, error.max()))
        right.legend(frameon=False)
    right.set(xlabel="training time (min)", ylabel="pixel error (%)", xlim=left.get_xlim())
    _save(figure, path)


def draw_side_by_side(
    image: np.ndarray, target: np.ndarray, probability: np.ndarray, path: str | os.PathLike, title: str = ""
) -> None:
    """Image (y, x), the first map of target and of probability (maps, y, x); NaN stays white."""
    plot = _pyplot()
    height, width = image.shape
    figure, axes = plot.subplots(1, 3, figsize=(13.5, 13.5 * height / width / 3 + 0.6), layout="constrained")
    low, high = np.percentile(image, (0.5, 99.5))
    for axis, picture, name, limits in zip(
        axes, (image, target[0], probability[0]), ("image", "label", "output"), ((low, high), (0, 1), (0, 1))
    ):
        axis.imshow(
            picture,
            cmap="gray" if name == "image" else "gray_r",
            vmin=limits[0],
            vmax=limits[1],
            interpolation="nearest",
        )
        axis.set_title(name)
        axis.set_axis_off()
    figure.suptitle(title)
    _save(figure, path)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plot

    return plot


def _save(figure, path: str | os.PathLike) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
    _pyplot().close(figure)
