from types import SimpleNamespace

import numpy as np
import pytest

from znn.train.evaluate import Evaluator, cover, probabilities, wrong_voxels
from znn.train.sampler import Geometry, PatchReader
from znn.train.volumes import make_volume

RNG = np.random.default_rng(0)
IMAGE = RNG.standard_normal((3, 20, 25)).astype(np.float32)
LABELS = (IMAGE < 0.8).astype(np.uint8)
GEOMETRY = Geometry((2, 10, 11), (2, 8, 8), (1, 3, 4), (1, 1, 1))


class Centre:
    """A network whose output is a function of the input voxel in the middle."""

    def __init__(self, function, geometry=GEOMETRY, patches=1):
        self.function, self.geometry, self.patches = function, geometry, patches

    def forward(self, inputs, phase):
        assert phase == "infer"
        g = self.geometry
        inner = tuple(slice(c, c + n, t) for c, n, t in zip(g.centre, g.span, g.stride))
        return self.function(inputs[(..., *inner)])


def reader(mask=None, geometry=GEOMETRY):
    return PatchReader([make_volume(IMAGE, LABELS, mask)], geometry)


LEVEL = (0.8 - IMAGE.mean()) / IMAGE.std()


@pytest.mark.parametrize("patches", [1, 4])
def test_a_network_that_knows_is_never_wrong_and_one_that_does_not_is_as_wrong_as_it_must_be(patches):
    if patches > 1:
        right = Centre(lambda x: 9 * (x - LEVEL), patches=patches)
    else:
        right = Centre(lambda x: 9 * (x - LEVEL))
    result = Evaluator(reader(), "binomial").run(right)
    boundary = (LABELS == 0).mean()
    assert result.pixel_error == 0 and result.voxels == LABELS.size
    assert result.trivial_error == pytest.approx(boundary)
    nothing = Evaluator(reader(), "binomial").run(Centre(lambda x: np.full_like(x, -1.0), patches=patches))
    assert nothing.pixel_error == pytest.approx(boundary)
    expected = np.where(LABELS == 0, np.log1p(np.exp(1)), np.log1p(np.exp(-1))).mean()
    assert nothing.loss == pytest.approx(expected)


def test_masked_voxels_do_not_count():
    mask = np.zeros(LABELS.shape, bool)
    mask[:, 5:9] = True
    result = Evaluator(reader(mask), "binomial").run(Centre(lambda x: np.full_like(x, -1.0)))
    assert result.voxels == mask.sum()
    assert result.pixel_error == pytest.approx((LABELS == 0)[:, 5:9].mean())


def test_few_tiles_are_spread_over_the_volume():
    result = Evaluator(reader(), "binomial", tiles=4).run(Centre(lambda x: x))
    assert result.tiles == 4 and 0 < result.voxels < LABELS.size


def test_strided_networks_are_measured_where_they_answer():
    geometry = Geometry((1, 18, 18), (1, 8, 8), (1, 4, 4), (1, 2, 2))
    result = Evaluator(reader(geometry=geometry), "binomial").run(Centre(lambda x: x - LEVEL, geometry))
    assert result.pixel_error == 0 and result.voxels > 0


def test_a_section_is_assembled_from_tiles():
    image, target, probability = Evaluator(reader(), "squared").section(Centre(lambda x: x))
    scaled = (IMAGE[1] - IMAGE.mean()) / IMAGE.std()
    np.testing.assert_allclose(image, scaled, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(probability[0], np.clip(scaled, 0, 1), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(target[0], LABELS[1] == 0)


def test_tiles_cover_every_voxel_once():
    counts = np.zeros((5, 9, 7), int)
    for corner, fresh in cover(counts.shape, (2, 4, 7)):
        tile = counts[tuple(slice(c, c + s) for c, s in zip(corner, (2, 4, 7)))]
        assert tile.shape == (2, 4, 7)
        tile[fresh] += 1
    assert (counts == 1).all()


def test_decisions_and_probabilities():
    logits = np.array([-1000.0, 0.0, 1000.0]).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(probabilities(logits, "binomial").ravel(), [0, 0.5, 1])
    np.testing.assert_allclose(probabilities(logits, "softmax").ravel(), [0, 0, 1])
    np.testing.assert_allclose(probabilities(logits, "squared").ravel(), [0, 0, 1])
    target = np.array([0.0, 1.0, 0.0]).reshape(3, 1, 1, 1)
    probability = np.array([0.3, 0.4, 0.3]).reshape(3, 1, 1, 1)
    assert wrong_voxels(probability, target, exclusive=True).sum() == 0
    assert wrong_voxels(probability, target, exclusive=False).sum() == 1


def test_nothing_to_measure_gives_nan():
    evaluator = Evaluator(reader(), "binomial")
    evaluator._tiles = []
    assert np.isnan(evaluator.run(SimpleNamespace(patches=1)).pixel_error)
