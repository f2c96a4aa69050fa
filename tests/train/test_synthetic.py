import numpy as np
import pytest

from znn.errors import DataError
from znn.train.synthetic import cell_volume


def test_same_seed_same_volume_other_seed_another():
    first, again, other = (cell_volume((3, 48, 64), seed) for seed in (1, 1, 2))
    assert first[0].dtype == np.uint8 and first[1].dtype == np.uint16 and first[0].shape == (3, 48, 64)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert (first[0] != other[0]).mean() > 0.5


def test_membranes_separate_cells_and_are_dark():
    image, labels = cell_volume((4, 96, 96), 0)
    share = (labels == 0).mean()
    assert 0.12 < share < 0.35
    assert image[labels == 0].mean() < image[labels > 0].mean() - 20
    # A cell never touches another one within a section: membrane lies between.
    touching = (labels[:, :, 1:] != labels[:, :, :-1]) & (labels[:, :, 1:] > 0) & (labels[:, :, :-1] > 0)
    assert touching.mean() < 1e-3


def test_the_task_is_not_solved_by_a_threshold():
    image, labels = cell_volume((4, 96, 96), 0)
    membrane = labels == 0
    best = min(((image < level) != membrane).mean() for level in range(256))
    assert best > 0.5 * membrane.mean()


@pytest.mark.parametrize("arguments", [((0, 4, 4),), ((4, 4, 4), -1), ((4, 4, 4), 0, 1.0)])
def test_bad_arguments(arguments):
    with pytest.raises(DataError):
        cell_volume(*arguments)
