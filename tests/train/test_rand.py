import numpy as np
import pytest

from znn.train.rand import adapted_rand_error, connected_components, rand_error_of_boundaries

metrics = pytest.importorskip("skimage.metrics")
measure = pytest.importorskip("skimage.measure")


@pytest.mark.parametrize("seed", range(12))
def test_components_equal_scikit_image(seed):
    rng = np.random.default_rng(seed)
    inside = rng.random(rng.integers(1, 40, 2)) < rng.uniform(0.2, 0.8)
    ours, theirs = connected_components(inside), measure.label(inside, connectivity=1)
    assert ((ours > 0) == inside).all()
    # The same components under other numbers.
    pairs = np.unique(np.stack([ours.ravel(), theirs.ravel()]), axis=1)
    assert len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]


def test_a_spiral_is_one_component():
    spiral = np.array(
        [[1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]], bool
    )
    assert connected_components(spiral).max() == 1
    assert connected_components(np.zeros((3, 4), bool)).max() == 0


@pytest.mark.parametrize("seed", range(8))
def test_adapted_rand_error_equals_scikit_image(seed):
    rng = np.random.default_rng(seed)
    truth, found = rng.integers(0, 6, (2, 15, 17))
    assert adapted_rand_error(truth, found) == pytest.approx(
        metrics.adapted_rand_error(truth, found)[0], rel=1e-12
    )


def test_extremes():
    labels = np.repeat(np.arange(1, 5), 10)
    assert adapted_rand_error(labels, labels) == 0
    assert adapted_rand_error(labels, np.ones_like(labels)) == pytest.approx(
        1 - 2 * 4 * 90 / (4 * 90 + 40 * 39)
    )
    assert np.isnan(adapted_rand_error(np.zeros(4, int), labels[:4]))


def test_a_missing_boundary_costs_a_merger():
    target = np.zeros((9, 9))
    target[:, 4] = 1
    broken = target.copy()
    broken[3, 4] = 0.4
    assert rand_error_of_boundaries(target, target, 0.5) == 0
    assert rand_error_of_boundaries(target, broken, 0.5) > 0.3
    assert rand_error_of_boundaries(target, broken, 0.3) == 0
