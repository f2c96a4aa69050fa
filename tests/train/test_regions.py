"""What is held out: boxes and their syntax, which patches may be drawn beside them, and jobs that hold them out."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from znn.cli import main
from znn.checkpoint import load_checkpoint
from znn.errors import DataError
from znn.spec import NetworkSpec
from znn.train import regions as module
from znn.train.augment import NONE, Augmentation
from znn.train.evaluate import Evaluator
from znn.train.job import Settings, load_data, load_volumes, run_job
from znn.train.regions import Region, parse_regions, remainder
from znn.train.sampler import Geometry, PatchReader, PatchSampler
from znn.train.synthetic import cell_volume
from znn.train.volumes import make_volume

RNG = np.random.default_rng(0)
EXTENT = (6, 40, 44)
IMAGE = RNG.standard_normal(EXTENT).astype(np.float32)
# Segments of 3 x 5 x 5 voxels: boundaries and affinities depend on neighbours everywhere.
Z, Y, X = np.indices(EXTENT)
SEGMENTS = 1 + Z // 3 + 2 * (Y // 5) + 16 * (X // 5)
TARGETS = [("boundary", 1, SEGMENTS), ("boundary", 1, SEGMENTS % 2), ("classes", 2, SEGMENTS % 2), ("affinities", 3, SEGMENTS)]
GEOMETRIES = [Geometry((1, 14, 14), (1, 8, 8), (1, 7, 7), (1, 1, 1)), Geometry((4, 13, 13), (2, 8, 8), (3, 6, 6), (1, 1, 1)),
              Geometry((1, 14, 14), (1, 4, 4), (1, 8, 8), (1, 2, 2))]
HELD_OUT = [Region((2, 10, 12), (4, 30, 28)), Region((5, 0, 0), (6, 40, 44)), Region((0, 36, 0), (2, 40, 9))]
LAYERS_2D = [{"conv": 4, "kernel": 5, "transfer": "relu"}, {"conv": 1, "kernel": 3}]
FLAT = NetworkSpec.layered("flat", 1, LAYERS_2D, loss="binomial", dims=2)
SOLID = NetworkSpec.layered("solid", 1, [{"conv": 4, "kernel": 3, "transfer": "relu"}, {"conv": 1, "kernel": (1, 3, 3)}],
                            loss="binomial")
SHORT = Settings(synthetic_extent=(6, 40, 40), rounds=4, validate_every=2, threads=1, plan="direct", sum="ordered", seed=2)


def counted(boxes, extent):
    counts = np.zeros(extent, int)
    for box in boxes:
        counts[tuple(slice(a, b) for a, b in zip(box.start, box.stop))] += 1
    return counts


# ---- boxes --------------------------------------------------------------------------------------------
BOX = st.tuples(*[st.tuples(st.integers(-2, 8), st.integers(0, 6)) for _ in range(3)]).map(
    lambda axes: Region(tuple(a for a, _ in axes), tuple(a + n for a, n in axes)))


@settings(max_examples=100, deadline=None)
@given(st.lists(BOX, max_size=4))
def test_what_boxes_leave_is_every_other_voxel_once(taken):
    whole = Region.whole((5, 6, 7))
    held = counted([box.within(whole) for box in taken if box.within(whole).voxels], (5, 6, 7)) > 0
    np.testing.assert_array_equal(counted(remainder(whole, taken), (5, 6, 7)), ~held)


def test_the_syntax_of_regions():
    volumes = [("a", (30, 512, 400)), ("b", (8, 64, 64))]
    found = parse_regions(["1@24:30,0:256,:", "2@:2, 3: ,:5", "1@0:1,:,:"], volumes)
    assert found == [[Region((24, 0, 0), (30, 256, 400)), Region((0, 0, 0), (1, 512, 400))], [Region((0, 3, 0), (2, 64, 5))]]
    assert parse_regions(["24:30,0:256,:"], volumes[:1]) == parse_regions(["1@24:30,0:256,:"], volumes[:1])
    assert str(found[0][0]) == "24:30,0:256,0:400"


@pytest.mark.parametrize("texts, message", [
    (["24:30,0:256"], "'24:30,0:256': expected three ranges"),
    (["24:30,0:256,5"], "expected three ranges"),
    (["a:b,:,:"], "expected three ranges"),
    (["-6:,:,:"], "expected three ranges"),
    ([3], "region 3: expected three ranges"),
    (["24:30,:,:"], "z is 24:30, but a has 6 voxels along it"),
    (["6:,:,:"], "z is 6:6, but a has 6 voxels along it"),
    ([":,3:3,:"], "empty: y is 3:3"),
    ([":,:,9:4"], "empty: x is 9:4"),
    (["2@:2,:,:"], "no volume 2; expected 1, for one"),
    (["0@:2,:,:"], "no volume 0"),
    ([":3,:,:", "2:4,:,:"], "'2:4,:,:' overlaps 0:3,0:40,0:44 of a"),
])
def test_wrong_regions_are_refused(texts, message):
    with pytest.raises(DataError, match=message):
        parse_regions(texts, [("a", EXTENT)])


def test_of_several_volumes_the_region_says_which():
    with pytest.raises(DataError, match=r"which of the 2 volumes\? Write 1@:2,:,: to 2@:2,:,:"):
        parse_regions([":2,:,:"], [("a", EXTENT), ("b", EXTENT)])
    with pytest.raises(DataError, match="no volume 3; expected 1 to 2"):
        parse_regions(["3@:2,:,:"], [("a", EXTENT), ("b", EXTENT)])


# ---- patches ------------------------------------------------------------------------------------------
def without_held_out(labels, held_out=HELD_OUT):
    return make_volume(IMAGE, labels).hiding(held_out)


@pytest.mark.parametrize("target, maps, labels", TARGETS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("elastic", [0.0, 1.5])
def test_no_sample_depends_on_a_held_out_label_and_none_covers_one(target, maps, labels, geometry, elastic):
    augmentation = Augmentation(elastic=elastic)
    poisoned, mask = labels.copy(), np.ones(EXTENT, bool)
    for region in HELD_OUT:
        box = tuple(slice(a, b) for a, b in zip(region.start, region.stop))
        # Other labels, even other kinds of labels: nothing may tell.
        poisoned[box] = RNG.integers(0, 1000, region.extent)
        mask[box] = False
    readers = [PatchReader([without_held_out(found)], geometry, target, maps) for found in (labels, poisoned)]
    whole = PatchReader([make_volume(IMAGE, labels)], geometry, target, maps)
    drawn = []
    for reader in readers:
        reader.target_patch = lambda index, corner, variant=None, read=reader.target_patch: (
            drawn.append((tuple(corner), variant)), read(index, corner, variant))[1]
    samplers = [PatchSampler(reader, 1, augmentation, balance=target != "affinities") for reader in readers]
    drawn.clear()
    for index in range(60):
        ours, theirs = (sampler.sample(index) for sampler in samplers)
        np.testing.assert_array_equal(ours.target, theirs.target)
        np.testing.assert_array_equal(ours.image, theirs.image)
        if ours.weights is not None:
            np.testing.assert_array_equal(ours.weights, theirs.weights)
        corner, variant = drawn[-1]
        assert mask[tuple(slice(c, c + n) for c, n in zip(corner, geometry.span))].all()
        # And the target is the true one, not one that takes hidden labels for 0.
        np.testing.assert_array_equal(whole.target_patch(0, corner, variant)[0], ours.target)


@pytest.mark.parametrize("target, maps, labels", TARGETS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_place_beside_what_is_held_out_is_reached(target, maps, labels, geometry):
    reader = PatchReader([without_held_out(labels)], geometry, target, maps)
    span = geometry.span
    room = tuple(n - s + 1 for n, s in zip(EXTENT, span))
    near = {"boundary": (0, 1, 1) if labels is SEGMENTS else (0, 0, 0), "classes": (0, 0, 0), "affinities": (1, 1, 1)}[target]
    expected = np.ones(room, int)
    for corner in itertools.product(*map(range, room)):
        expected[corner] = not any(
            all(c < b + r and c + s > a - r for c, s, a, b, r in zip(corner, span, region.start, region.stop, near))
            for region in HELD_OUT
        )
    np.testing.assert_array_equal(counted(reader.free(0), room), expected)
    assert 0 < expected.sum() < expected.size


def test_no_place_left_is_an_error():
    thin = [Region((0, 0, 0), (6, 40, 37))]  # seven columns are left, patches have eight
    reader = PatchReader([without_held_out(SEGMENTS, thin)], GEOMETRIES[0])
    with pytest.raises(DataError, match="nothing is left to train on"):
        PatchSampler(reader, 0, NONE)


def test_exactly_the_held_out_voxels_are_measured():
    """A network that answers with the truth except at single voxels is wrong there, and only if they are held out."""
    geometry, region = GEOMETRIES[0], HELD_OUT[0]
    image = (SEGMENTS % 2).astype(np.float32)
    errors = np.zeros(EXTENT, bool)
    errors[2, 10, 12] = errors[3, 29, 27] = True  # the region's corners
    errors[2, 9, 12] = errors[4, 29, 27] = errors[3, 29, 28] = True  # just beside it
    part = make_volume(np.where(errors, 1 - image, image), SEGMENTS % 2).part(region)

    class Centre:
        patches = 1

        def forward(self, inputs, phase):
            return 0.5 - inputs[:, :, 3:-3, 3:-3]  # the boundary is where the label is 0

    result = Evaluator(PatchReader([part], geometry), "binomial").run(Centre())
    assert result.voxels == region.voxels and result.pixel_error == 2 / region.voxels


def test_what_labels_are_is_told_by_those_trained_on():
    """Numbered cells stay numbered cells in a region that happens to hold two of them, or one."""
    image, cells = cell_volume((4, 48, 48), seed=0)
    cells[:2, :20, :20] = 7
    cells[:, 24:, 24:], cells[:, 24:, 36:] = 3, 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("znn.train.job.cell_volume", lambda *a: (image, cells))
        data = load_data(replace(SHORT, validation_regions=("0:2,:20,:20", "0:4,24:,24:")))
    assert not any(volume.picture for volume in (*data.training, *data.regions))
    reader = PatchReader(data.regions, Geometry((1, 14, 14), (1, 8, 8), (1, 7, 7), (1, 1, 1)))
    boundary, _ = reader.target_patch(1, (0, 1, 8))
    assert boundary[0, 0].tolist() == [[0, 0, 0, 1, 1, 0, 0, 0]] * 8
    assert not reader.target_patch(0, (0, 4, 4))[0].any()


# ---- jobs ---------------------------------------------------------------------------------------------
def files(folder, name, extent, seed=0, labels=None, mask=None):
    rng = np.random.default_rng(seed)
    np.save(folder / f"{name}.npy", rng.random(extent))
    np.save(folder / f"{name}-labels.npy", rng.integers(0, 2, extent) if labels is None else labels)
    if mask is not None:
        np.save(folder / f"{name}-mask.npy", mask)
    return str(folder / f"{name}.npy"), str(folder / f"{name}-labels.npy"), str(folder / f"{name}-mask.npy")


@pytest.mark.parametrize("spec, output", [(FLAT, (1, 8, 8)), (SOLID, (2, 8, 8))])
def test_a_job_holds_regions_out_and_resumes_only_with_the_same_ones(tmp_path, spec, output):
    wanted = replace(SHORT, output=output, validation_regions=("1:4,0:20,20:40", "3:6,20:,:20"))
    summary = run_job(wanted, tmp_path / "run", spec)
    assert summary["measured_on"] == "held-out regions" and summary["voxels"] == 2 * 3 * 20 * 20
    assert (tmp_path / "run" / "best.npz").exists()
    whole = run_job(replace(wanted, rounds=8), tmp_path / "whole", spec)
    resumed = run_job(replace(wanted, rounds=8), tmp_path / "run", spec)
    assert resumed["rounds"] == whole["rounds"] == 8
    with pytest.raises(DataError, match="holds a run with validation_regions"):
        run_job(replace(wanted, validation_regions=("1:4,0:20,20:40",)), tmp_path / "run", spec)
    with pytest.raises(DataError, match="holds a run with hold_out"):
        run_job(replace(wanted, hold_out=0), tmp_path / "run", spec)


def test_a_resumed_run_with_regions_equals_one_never_stopped(tmp_path):
    wanted = replace(SHORT, schedule="constant", warm_up=0.0, elastic=1.0, balance=True, output=(1, 8, 8),
                     validation_regions=("0:6,:20,:20",))
    run_job(wanted, tmp_path / "run", FLAT)
    for folder in ("run", "whole"):
        run_job(replace(wanted, rounds=8), tmp_path / folder, FLAT)
    ours, theirs = (load_checkpoint(tmp_path / folder / "last.npz").parameters for folder in ("run", "whole"))
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)


def test_training_is_the_same_whatever_the_held_out_labels_say(tmp_path):
    extent = (6, 40, 40)
    labels = np.random.default_rng(7).integers(0, 2, extent)
    other = labels.copy()
    other[2:4, :30, 5:25] = 9
    parameters = []
    for name, found in (("a", labels), ("b", other)):
        image, label, _ = files(tmp_path, name, extent, labels=found)
        wanted = replace(SHORT, images=(image,), labels=(label,), validation_regions=("2:4,0:30,5:25",), output=(1, 9, 9), balance=True)
        run_job(wanted, tmp_path / f"run-{name}", FLAT)
        parameters.append(load_checkpoint(tmp_path / f"run-{name}" / "last.npz").parameters)
    for name, value in parameters[0].items():
        np.testing.assert_array_equal(parameters[1][name], value)


def test_validation_volumes_of_their_own(tmp_path):
    mask = np.zeros((3, 30, 34), bool)
    mask[1, 4:20] = True
    image, labels, _ = files(tmp_path, "a", (4, 40, 40))
    own, own_labels, own_mask = files(tmp_path, "b", (3, 30, 34), 1, mask=mask)
    wanted = replace(SHORT, images=(image,), labels=(labels,), output=(1, 8, 8), validation_images=(own,),
                     validation_labels=(own_labels,), validation_masks=(own_mask,))
    data = load_data(wanted)
    assert not data.sections and data.training[0].hidden == () and data.volumes[0].extent == (3, 30, 34)
    summary = run_job(wanted, tmp_path / "run", FLAT)
    assert summary["measured_on"] == "validation volumes" and summary["voxels"] == mask.sum()
    with pytest.raises(DataError, match="holds a run with validation_images"):
        run_job(replace(wanted, validation_images=(image,), validation_labels=(labels,), validation_masks=()),
                tmp_path / "run", FLAT)
    both = run_job(replace(wanted, hold_out=1, validation_regions=("0:1,:10,:10",)), tmp_path / "all", FLAT)
    assert both["measured_on"] == "held-out sections and held-out regions and validation volumes"
    assert both["voxels"] == mask.sum() + 40 * 40 + 100


def test_a_volume_held_out_as_a_whole_leaves_the_others(tmp_path):
    named = [files(tmp_path, name, (4, 30, 30), seed) for seed, name in enumerate("ab")]
    wanted = Settings(images=tuple(f[0] for f in named), labels=tuple(f[1] for f in named), validation_regions=("2@:,:,:",))
    training, held_out = load_volumes(wanted)
    assert [v.name for v in training] == [named[0][0]] and held_out[0].extent == (4, 30, 30)
    with pytest.raises(DataError, match="nothing is left to train on"):
        load_volumes(replace(wanted, validation_regions=("2@:,:,:", "1@:,:,:")))


@pytest.mark.parametrize("change, message", [
    (dict(validation_regions=("3:,:,:",), hold_out=1), "region 3:6,0:40,0:40 overlaps the last 1 sections"),
    (dict(validation_regions=("0:1,:4,:",)), r"extent \(1, 4, 40\) is smaller than the network's field of view \(1, 7, 7\)"),
    (dict(validation_regions=("0:1,:10,:",), output=(1, 12, 12)), "smaller than the output patch"),
    (dict(validation_images=("x.npy",)), "1 validation images but 0 validation labels"),
    (dict(validation_labels=("x.npy",)), "0 validation images but 1 validation labels"),
    (dict(validation_images=("nowhere.npy",), validation_labels=("x.npy",)), "nowhere.npy: no such file"),
    (dict(validation_regions=(":,:37,:",), output=(1, 8, 8)), "nothing is left to train on"),
])
def test_jobs_that_cannot_hold_out_what_is_asked_end_before_any_work(tmp_path, monkeypatch, change, message):
    monkeypatch.setattr("znn.Network", lambda *a, **k: pytest.fail("a network was built"))
    with pytest.raises(DataError, match=message):
        run_job(replace(SHORT, **change), tmp_path / "run", FLAT)
    assert not (tmp_path / "run").exists()


def test_validation_volumes_that_do_not_fit_are_refused(tmp_path):
    image, labels, _ = files(tmp_path, "a", (4, 40, 40))
    wanted = replace(SHORT, images=(image,), labels=(labels,), output=(1, 8, 8), validation_images=(image,), validation_labels=(labels,))
    own, own_labels, _ = files(tmp_path, "b", (3, 30, 34), labels=np.zeros((3, 30, 30)))
    with pytest.raises(DataError, match=r"labels: extent \(3, 30, 30\), but the image's is \(3, 30, 34\)"):
        run_job(replace(wanted, validation_images=(own,), validation_labels=(own_labels,)), tmp_path / "run", FLAT)
    own, own_labels, _ = files(tmp_path, "c", (2, 4, 40, 40), labels=np.arange(4 * 40 * 40).reshape(4, 40, 40))
    with pytest.raises(DataError, match="c.npy: 2 maps, but the input of network 'flat' has 1"):
        run_job(replace(wanted, validation_images=(own,), validation_labels=(own_labels,)), tmp_path / "run", FLAT)
    mask = np.zeros((4, 40, 40))
    mask[:, :20] = 1
    image, labels, mask_file = files(tmp_path, "d", (4, 40, 40), mask=mask)
    masked = replace(SHORT, images=(image,), labels=(labels,), masks=(mask_file,))
    with pytest.raises(DataError, match="mask is empty outside what is held out"):
        load_data(replace(masked, validation_regions=(":,:20,:",)))
    with pytest.raises(DataError, match="mask is empty in this held-out part"):
        load_data(replace(masked, validation_regions=(":,20:,:",)))


def test_from_the_command_line(tmp_path, capsys):
    arguments = ["train", "--rounds", "2", "--output", "1,8,8", "--threads", "1", "--folder", str(tmp_path / "run")]
    (tmp_path / "net.toml").write_text(FLAT.to_toml())
    arguments += ["--net", str(tmp_path / "net.toml")]
    assert main([*arguments, "--validation-region", "0:2,:40,30:80", "--validation-region", "20:22,:,:"]) == 0
    assert "held-out regions" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["voxels"] == 2 * 40 * 50 + 2 * 256 * 256
    assert main([*arguments, "--fresh", "--validation-region", "0:2,:40"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("znn: validation region '0:2,:40': expected three ranges") and error.count("\n") == 1
    assert module.SYNTAX in error
