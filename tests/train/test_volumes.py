import numpy as np
import pytest

from znn.errors import DataError
from znn.train import volumes
from znn.train.regions import Region
from znn.train.volumes import (
    label_values,
    make_volume,
    mirrored_indices,
    open_array,
    read_mirrored,
    read_volume,
    targets_from_labels,
)

tifffile = pytest.importorskip("tifffile")
RNG = np.random.default_rng(0)
STACK = RNG.integers(0, 255, (5, 12, 14)).astype(np.uint8)


def test_patch_is_scaled_to_zero_mean_and_unit_deviation():
    volume = make_volume(STACK)
    patch = volume.image_patch((0, 0, 0), STACK.shape)
    assert patch.dtype == np.float32 and patch.shape == (1, 5, 12, 14)
    assert abs(patch.mean()) < 1e-5 and abs(patch.std() - 1) < 1e-5
    np.testing.assert_allclose(patch[0], (STACK - STACK.mean()) / STACK.std(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "corner, extent", [((-3, -15, 2), (9, 40, 7)), ((4, 11, 13), (1, 3, 2)), ((1, 2, 3), (2, 4, 5))]
)
def test_mirrored_reading_equals_numpy_padding(corner, extent):
    padded = np.pad(STACK, 40, mode="reflect")
    expected = padded[tuple(slice(c + 40, c + 40 + e) for c, e in zip(corner, extent))]
    np.testing.assert_array_equal(read_mirrored(STACK, corner, extent), expected)


def test_mirroring_one_voxel_repeats_it():
    assert mirrored_indices(-2, 5, 1).tolist() == [0] * 5


def test_a_part_keeps_the_scale_and_sees_the_image_around_it():
    whole = make_volume(STACK, STACK > 99, STACK >= 0)
    part = whole.part(Region((2, 3, 0), (4, 9, 14)))
    assert part.extent == (2, 6, 14) and part.name == "volume[2:4,3:9,0:14]"
    for read in ("image_patch", "label_patch", "mask_patch"):
        np.testing.assert_array_equal(
            getattr(part, read)((-1, -1, -2), (4, 8, 9)), getattr(whole, read)((1, 2, -2), (4, 8, 9))
        )
    np.testing.assert_array_equal(label_values(part), [False, True])
    inner = part.part(Region((1, 2, 3), (2, 5, 7)))
    np.testing.assert_array_equal(inner.label_patch((0, 0, 0), (1, 3, 4)), (STACK > 99)[3:4, 5:8, 3:7])


def test_hidden_labels_read_as_zero_wherever_the_mirror_shows_them():
    labels = np.arange(1, STACK.size + 1).reshape(STACK.shape)
    hidden = make_volume(STACK, labels).hiding([Region((0, 0, 2), (2, 5, 6)), Region((3, 4, 4), (5, 12, 14))])
    blank = labels.copy()
    blank[0:2, 0:5, 2:6] = blank[3:5, 4:12, 4:14] = 0
    for corner, extent in (((-2, -4, -5), (9, 20, 24)), ((1, 2, 3), (2, 4, 4))):
        np.testing.assert_array_equal(hidden.label_patch(corner, extent), read_mirrored(blank, corner, extent))
    assert labels.min() == 1  # the array itself is as before
    assert set(label_values(hidden)) == set(np.unique(blank)) - {0}
    assert sum(part.voxels for part in hidden.known) == (blank > 0).sum()
    with pytest.raises(DataError, match="every label is held out"):
        label_values(hidden.hiding([Region.whole(STACK.shape)]))


def test_targets():
    labels = np.array([[1, 1, 2, 2], [1, 1, 2, 2], [0, 1, 3, 3], [1, 1, 3, 3]])
    labels = np.pad(np.stack([labels] * 3), ((0, 0), (1, 1), (1, 1)), mode="edge")
    boundary = targets_from_labels(labels, "boundary")
    assert boundary.shape == (1, 1, 4, 4)
    assert boundary[0, 0].tolist() == [[0, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]]
    picture = targets_from_labels(labels != 0, "boundary")
    assert picture.sum() == 1 and picture[0, 0, 2, 0] == 1
    classes = targets_from_labels(labels, "classes", 4)
    assert classes.shape == (4, 1, 4, 4) and (classes.sum(0) == 1).all() and classes[3].sum() == 4
    z, y, x = targets_from_labels(labels, "affinities")
    assert z[0].tolist() == (labels[1, 1:-1, 1:-1] != 0).tolist()
    assert x[0, :, 2].tolist() == [0, 0, 0, 0] and y[0, 2].tolist() == [0, 1, 0, 0]


def test_files_of_every_kind_give_the_same_patch(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK, compression="zlib")
    np.save(tmp_path / "a.npy", STACK)
    expected = make_volume(STACK).image_patch((1, -2, 3), (3, 9, 9))
    for name in ("a.tif", "a.npy"):
        np.testing.assert_array_equal(
            read_volume(str(tmp_path / name)).image_patch((1, -2, 3), (3, 9, 9)), expected
        )
    assert isinstance(open_array(tmp_path / "a.npy"), np.memmap)


@pytest.mark.parametrize("axes, shape", [("ZCYX", (5, 2, 12, 14)), ("TCYX", (3, 2, 12, 14)), ("CYX", (2, 12, 14)), ("ZTYX", (2, 3, 12, 14))])
def test_axes_that_a_tiff_names_are_taken_at_their_word(tmp_path, axes, shape):
    """Such a stack has the rank of another: its channels would be taken for sections."""
    tifffile.imwrite(tmp_path / "a.tif", np.zeros(shape, np.uint8), ome=True, metadata={"axes": axes})
    with pytest.raises(DataError, match=f"a.tif: axes {axes} of extents .*expected YX, ZYX or CZYX"):
        open_array(tmp_path / "a.tif")


def test_axes_that_are_as_expected(tmp_path):
    for axes, shape in (("ZYX", (5, 12, 14)), ("TYX", (5, 12, 14)), ("YX", (12, 14)), ("CZYX", (2, 5, 12, 14))):
        tifffile.imwrite(tmp_path / "a.tif", np.zeros(shape, np.uint8), ome=True, metadata={"axes": axes})
        assert open_array(tmp_path / "a.tif").shape == shape
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 12, 14, 3), np.uint8), photometric="rgb")
    with pytest.raises(DataError, match="axes QYXS"):
        open_array(tmp_path / "a.tif")


def test_tiff_stacks_larger_than_memory_are_read_by_section(tmp_path, monkeypatch):
    monkeypatch.setattr(volumes, "memory_bytes", lambda: STACK.nbytes)
    tifffile.imwrite(tmp_path / "plain.tif", STACK)
    tifffile.imwrite(tmp_path / "packed.tif", STACK, compression="zlib")
    plain, packed = open_array(tmp_path / "plain.tif"), open_array(tmp_path / "packed.tif")
    assert isinstance(plain, np.memmap) and isinstance(packed, volumes._TiffSections)
    expected = make_volume(STACK, STACK > STACK.mean())
    for images in (plain, packed):
        volume = make_volume(images, STACK > STACK.mean())
        assert volume.mean == expected.mean and volume.extent == expected.extent
        for corner in ((1, -2, 3), (-1, 4, 4)):
            np.testing.assert_array_equal(volume.image_patch(corner, (3, 9, 9)), expected.image_patch(corner, (3, 9, 9)))
        np.testing.assert_array_equal(
            volume.part(Region((2, 0, 0), (4, 12, 14))).image_patch((0, 0, 0), (2, 3, 3)), expected.image_patch((2, 0, 0), (2, 3, 3))
        )


def test_hdf5(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["volumes/raw"] = STACK
        file["volumes/labels"] = STACK
    volume = read_volume(f"{tmp_path}/a.h5:volumes/raw")
    np.testing.assert_array_equal(
        volume.image_patch((1, -2, 3), (3, 9, 9)), make_volume(STACK).image_patch((1, -2, 3), (3, 9, 9))
    )
    with pytest.raises(DataError, match="volumes/labels, volumes/raw"):
        open_array(f"{tmp_path}/a.h5")


def test_zarr(tmp_path):
    zarr = pytest.importorskip("zarr")
    zarr.save(str(tmp_path / "a.zarr"), STACK)
    np.testing.assert_array_equal(
        read_volume(str(tmp_path / "a.zarr")).image_patch((1, -2, 3), (3, 9, 9)),
        make_volume(STACK).image_patch((1, -2, 3), (3, 9, 9)),
    )


def test_a_2d_image_is_a_volume_of_one_section_and_maps_are_kept():
    assert make_volume(STACK[0]).extent == (1, 12, 14)
    assert make_volume(np.stack([STACK, STACK])).maps == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((np.full((2, 3, 4), 7),), "every voxel is 7"),
        ((STACK.astype(complex),), "type complex128"),
        ((np.zeros((2, 2, 2, 2, 2)),), r"expected \(z, y, x\)"),
        ((np.zeros((2, 0, 2)),), "empty"),
        ((np.array([[1.0, np.nan]]),), "NaN or infinity"),
        ((np.zeros((9, 40, 40, 3)),), "channels came last"),
        ((np.zeros((40, 40, 3)),), "channels came last"),
        ((STACK, STACK.transpose(1, 2, 0)), r"labels: extent \(12, 14, 5\), but the image's is \(5, 12, 14\)"),
        ((STACK, STACK[:, 1:]), r"labels: extent \(5, 11, 14\), but the image's is \(5, 12, 14\)"),
        ((STACK, STACK, np.zeros_like(STACK)), "mask is empty"),
    ],
)
def test_bad_arrays_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        make_volume(*arguments)


def test_bad_files_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK, compression="zlib")
    content = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(content[: len(content) // 2])
    (tmp_path / "foreign.npy").write_bytes(b"not numpy at all")
    (tmp_path / "a.jpg").write_bytes(b"")
    np.save(tmp_path / "objects.npy", np.array([{}], object))
    tifffile.imwrite(tmp_path / "plain.tif", STACK)
    (tmp_path / "cut-plain.tif").write_bytes((tmp_path / "plain.tif").read_bytes()[: -STACK.nbytes // 3])
    (tmp_path / "empty.tif").write_bytes(b"")
    (tmp_path / "foreign.h5").write_bytes(b"not HDF5")
    for name, message in (
        ("none.tif", "no such file"),
        ("cut.tif", "damaged"),
        ("cut-plain.tif", "truncated"),
        ("empty.tif", "damaged"),
        ("foreign.h5", "damaged"),
        ("foreign.npy", "damaged"),
        ("a.jpg", "cannot read files ending in '.jpg'"),
        ("objects.npy", "damaged"),
    ):
        with pytest.raises(DataError, match=message) as error:
            open_array(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)


def test_nan_is_found_where_it_is_read():
    """A large volume is not looked through when it is opened."""
    image = np.random.default_rng(0).standard_normal((40, 8, 8)).astype(np.float32)
    image[1, 3, 3] = np.nan
    volume = make_volume(image, image > 0, name="deep.h5")
    volume.image_patch((2, 0, 0), (4, 8, 8))
    with pytest.raises(DataError, match=r"deep.h5: image: NaN or infinity found in the \(2, 4, 4\) voxels from \(0, 1, 1\)"):
        volume.image_patch((0, 1, 1), (2, 4, 4))
    labels = np.where(np.arange(8) > 3, np.nan, 1.0) * np.ones((40, 8, 8))
    with pytest.raises(DataError, match="labels: NaN"):
        label_values(make_volume(np.nan_to_num(image), labels))
