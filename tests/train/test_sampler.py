import numpy as np
import pytest

from znn.errors import DataError
from znn.graph import Graph
from znn.spec import NetworkSpec
from znn.train.augment import NONE, Augmentation, Deformation, Variant, deform_image, deform_labels
from znn.train.sampler import Geometry, PatchReader, PatchSampler, Prefetcher
from znn.train.volumes import make_volume

RNG = np.random.default_rng(0)
IMAGE = RNG.standard_normal((6, 40, 44)).astype(np.float32)
# A voxel's label is a function of its own intensity, so every patch shows whether image and label align.
LABELS = (IMAGE > 0).astype(np.uint8)
EVEN = Geometry((1, 23, 23), (1, 16, 16), (1, 8, 8), (1, 1, 1))
ODD = Geometry((4, 20, 20), (2, 14, 14), (3, 7, 7), (1, 1, 1))
STRIDED = Geometry((1, 22, 22), (1, 8, 8), (1, 8, 8), (1, 2, 2))


def reader(geometry, labels=LABELS, mask=None, **options):
    return PatchReader([make_volume(IMAGE, labels, mask)], geometry, **options)


def under_the_output(sample, geometry):
    """The voxels of the input that the output voxels stand for."""
    return sample.image[
        (
            slice(None),
            *(slice(c, c + n, t) for c, n, t in zip(geometry.centre, geometry.span, geometry.stride)),
        )
    ]


@pytest.mark.parametrize("geometry", [EVEN, ODD, STRIDED])
def test_image_and_target_stay_aligned_under_every_augmentation(geometry):
    patches = reader(geometry)
    sampler = PatchSampler(patches, 3, Augmentation(intensity=0.0))
    for index in range(40):
        sample = sampler.sample(index)
        assert sample.image.shape == (1, *geometry.in_extent) and sample.image.dtype == np.float32
        assert sample.target.shape == (1, *geometry.out_extent) and sample.weights is None
        inside = under_the_output(sample, geometry) > -IMAGE.mean() / IMAGE.std()
        np.testing.assert_array_equal(inside, sample.target == 0)


def test_a_sample_depends_on_seed_and_index_alone():
    samplers = [PatchSampler(reader(EVEN), 5, Augmentation(), patches=2) for _ in range(2)]
    late = samplers[0].sample(7)
    for i in range(7):
        samplers[1].sample(i)
    again, other = samplers[1].sample(7), samplers[1].sample(8)
    assert late.image.shape == (2, 1, 1, 23, 23) and late.target.shape == (2, 1, 1, 16, 16)
    np.testing.assert_array_equal(late.image, again.image)
    np.testing.assert_array_equal(late.target, again.target)
    assert not np.array_equal(late.image, other.image)


def test_prefetching_keeps_the_order():
    sampler = PatchSampler(reader(EVEN), 1, Augmentation())
    with Prefetcher(sampler, start=3, threads=3) as samples:
        for index in range(3, 12):
            np.testing.assert_array_equal(next(samples).image, sampler.sample(index).image)


def test_an_exception_in_the_prefetch_thread_reaches_the_caller():
    class Broken:
        def sample(self, index):
            raise DataError(f"patch {index} is bad")

    with Prefetcher(Broken()) as samples, pytest.raises(DataError, match="patch 0 is bad"):
        next(samples)


def test_every_position_is_reached_and_none_beyond():
    sampler = PatchSampler(reader(Geometry((1, 40, 42), (1, 38, 40), (1, 3, 3), (1, 1, 1))), 0, NONE)
    starts = set()
    scaled = (IMAGE - IMAGE.mean()) / IMAGE.std()
    for index in range(1500):
        middle = sampler.sample(index).image[0, 0, 1:-1, 1:-1]
        found = [
            (z, y, x)
            for z in range(6)
            for y in range(3)
            for x in range(5)
            if abs(scaled[z, y, x] - middle[0, 0]) < 1e-4
        ]
        starts.update(found)
    assert len(starts) == 6 * 3 * 5


def test_masked_voxels_weigh_nothing():
    mask = np.zeros(LABELS.shape, bool)
    mask[:, :, :22] = True
    sampler = PatchSampler(reader(EVEN, mask=mask), 0)
    sample = sampler.sample(0)
    assert set(np.unique(sample.weights)) <= {0.0, 1.0}
    assert np.mean([sampler.sample(i).weights.mean() for i in range(30)]) < 0.95


def test_a_mask_that_patches_never_meet_is_an_error():
    mask = np.zeros(LABELS.shape, bool)
    mask[0, 0, 0] = True
    tiny = Geometry((1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1))
    with pytest.raises(DataError, match="without one voxel inside the mask"):
        for index in range(20):
            PatchSampler(reader(tiny, mask=mask), 0).sample(index)


@pytest.mark.parametrize("target, maps", [("boundary", 1), ("classes", 2)])
def test_balance_gives_classes_equal_weight(target, maps):
    labels = (IMAGE > -1).astype(np.uint8)
    sampler = PatchSampler(reader(EVEN, labels, target=target, maps=maps), 0, balance=True)
    totals = np.zeros(2)
    for index in range(60):
        sample = sampler.sample(index)
        positive = sample.target[-1] > 0
        totals += sample.weights[-1][positive].sum(), sample.weights[-1][~positive].sum()
    assert totals[0] / totals[1] == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(labels=None), "no labels"),
        (dict(labels=np.ones_like(LABELS)), "every label is 1"),
        (dict(target="edges"), "target 'edges'"),
        (dict(target="affinities"), "3 maps"),
        (dict(labels=LABELS * 3, target="classes", maps=2), "expected whole numbers from 0 to 1"),
        (
            dict(geometry=Geometry((9, 9, 9), (7, 7, 7), (3, 3, 3), (1, 1, 1))),
            "smaller than the output patch",
        ),
    ],
)
def test_unsuitable_volumes_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        reader(**{"geometry": EVEN} | change)


def rare(kind):
    """40 sections, of which 16 are looked at before training: what is wrong is in one of the others."""
    image = RNG.standard_normal((40, 24, 24)).astype(np.float32)
    labels, mask = (image > 0).astype(np.float32), np.ones(image.shape, np.float32)
    wrong = {"image": image, "labels": labels, "mask": mask, "classes": labels}[kind]
    wrong[1] = 2 if kind == "classes" else np.nan
    return make_volume(image, labels, mask)


@pytest.mark.parametrize("kind, message", [
    ("image", "image: NaN or infinity found in the"), ("labels", "labels: NaN or infinity found in the"),
    ("mask", "mask: NaN or infinity found in the"), ("classes", "labels from 0.0 to 2.0; expected whole numbers from 0 to 1"),
])
def test_what_the_look_before_training_misses_is_found_when_it_is_read(kind, message):
    sampler = PatchSampler(PatchReader([rare(kind)], EVEN, "classes", 2), 0)
    with pytest.raises(DataError, match=message):
        for index in range(400):
            sampler.sample(index)


def test_geometry_of_dense_and_strided_networks():
    layers = [{"conv": 2, "kernel": 3}, {"max_filter": 2}, {"conv": 1, "kernel": 3}]
    dense = Geometry.of(Graph.build(NetworkSpec.layered("dense", 1, layers, dims=2), output=(1, 5, 5)))
    assert (dense.fov, dense.stride, dense.in_extent) == ((1, 8, 8), (1, 1, 1), (1, 12, 12))
    layers[1] = {"max_pool": 2}
    strided = Geometry.of(Graph.build(NetworkSpec.layered("strided", 1, layers, dims=2), output=(1, 5, 5)))
    assert (strided.fov, strided.stride, strided.span) == ((1, 8, 8), (1, 2, 2), (1, 9, 9))


def test_variants_are_all_eight_of_a_section_and_their_inverse_exists():
    picture = np.arange(6).reshape(1, 1, 2, 3)
    augmentation = Augmentation(flip=(False, True, True), intensity=0)
    seen = {
        augmentation.draw(np.random.default_rng(i)).move(picture).tobytes()
        + bytes(augmentation.draw(np.random.default_rng(i)).move(picture).shape)
        for i in range(100)
    }
    assert len(seen) == 8


def test_intensity_jitter_is_linear():
    image = RNG.standard_normal((1, 2, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(
        Variant((False,) * 3, False, 1.5, -0.25).shade(image), 1.5 * image - 0.25, rtol=1e-6
    )


# Labels that are a smooth picture cut in two: where the image is far from the cut, deformed image and labels agree.
SMOOTH = np.sin(np.arange(60) / 5)[:, None] + np.cos(np.arange(64) / 6) + np.arange(6)[:, None, None] * 0.1
SMOOTH = SMOOTH.astype(np.float32)


@pytest.mark.parametrize("geometry", [EVEN, ODD, STRIDED])
def test_image_and_labels_are_deformed_alike(geometry):
    volume = make_volume(SMOOTH, SMOOTH > 0, SMOOTH > -1)
    sampler = PatchSampler(PatchReader([volume], geometry), 4, Augmentation(intensity=0.0, elastic=2.5))
    moved = 0
    for index in range(30):
        sample = sampler.sample(index)
        assert sample.image.shape == (1, *geometry.in_extent) and sample.image.dtype == np.float32
        seen = under_the_output(sample, geometry) * SMOOTH.std() + SMOOTH.mean()
        sure = np.abs(seen) > 0.3
        np.testing.assert_array_equal((seen > 0)[sure], (sample.target == 0)[sure])
        mask_sure = np.abs(seen + 1) > 0.3
        np.testing.assert_array_equal((seen > -1)[mask_sure], (sample.weights > 0)[mask_sure])
        still = Augmentation(intensity=0.0)
        moved += not np.allclose(sample.image, PatchSampler(sampler.reader, 4, still).sample(index).image)
    assert moved == 30


def test_a_deformation_is_smooth_of_the_size_asked_for_and_a_function_of_its_seed():
    field = np.stack([Deformation(seed, 4.0).displacement((3, 90, 100)) for seed in range(50)])
    assert field.shape == (50, 2, 3, 90, 100) and np.abs(field).max() <= 12
    assert np.std(field, axis=(0, 1)) == pytest.approx(4.0, rel=0.35)  # everywhere, at the borders too
    assert np.abs(np.diff(field, axis=-1)).max() < 1.0 and np.abs(np.diff(field, axis=-2)).max() < 1.0
    np.testing.assert_array_equal(Deformation(3, 4.0).displacement((3, 90, 100)), field[3])
    assert Deformation(3, 4.0).margin == 12


def test_no_displacement_is_no_deformation_and_a_whole_one_is_a_shift():
    image = RNG.standard_normal((2, 3, 14, 15)).astype(np.float32)
    still = np.zeros((2, 3, 8, 9), np.float32)
    np.testing.assert_array_equal(deform_image(image, still, 3), image[..., 3:-3, 3:-3])
    np.testing.assert_array_equal(deform_labels(image[0], still, 3), image[0, :, 3:-3, 3:-3])
    still[0], still[1] = 3, -2
    np.testing.assert_array_equal(deform_image(image, still, 3), image[..., 6:, 1:10])
    half = np.full((2, 3, 8, 9), 0.5, np.float32)
    mean = (image[..., 3:-3, 3:-3] + image[..., 4:-2, 3:-3] + image[..., 3:-3, 4:-2] + image[..., 4:-2, 4:-2]) / 4
    np.testing.assert_allclose(deform_image(image, half, 3), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("amount", [{"elastic": -1.0}, {"intensity": float("nan")}])
def test_amounts_out_of_range_are_refused(amount):
    with pytest.raises(DataError, match=f"augmentation: {next(iter(amount))} is"):
        Augmentation(**amount)
