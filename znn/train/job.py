"""A training job from files (or the synthetic volume) to checkpoints, learning curve, pictures and a
summary.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from znn.checkpoint import load_checkpoint
from znn.errors import DataError
from znn.files import atomic_write
from znn.graph import Graph
from znn.spec import NetworkSpec
from znn.train.augment import NONE, Augmentation
from znn.train.evaluate import Evaluator
from znn.train.loop import Limits, Progress, Run, Schedule, State, read_curve
from znn.train.nets import boundary_network
from znn.train.pictures import draw_learning_curve, draw_side_by_side
from znn.train.rand import rand_error_of_boundaries
from znn.train.regions import Region, check_syntax, parse_regions
from znn.train.sampler import Geometry, PatchReader, PatchSampler
from znn.train.synthetic import cell_volume
from znn.train.tensorboard import EventLog
from znn.train.volumes import Volume, is_labelled, label_values, make_volume, read_volume

# What a resumed run may change without becoming another run.
_FREE = ("rounds", "minutes", "keep_every", "threads", "bundle", "plan", "sum", "tensorboard")
RATES = {"sgd": 0.02, "adam": 0.002}
_RAND_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
_RAND_SECTIONS = 8
_HELD_OUT = 0.2  # share of the sections held out where the user does not say


@dataclass(frozen=True)
class Settings:
    """Everything a training job depends on; plain values, kept in its checkpoints.

    images, labels, masks       files, one of each per volume (masks: none, or one per volume); no images: the
                                synthetic volume of `synthetic_extent` and `seed`
    hold_out                    last sections of every volume kept for validation; None: a fifth of them, or none where
                                one of the next two is given
    validation_regions          boxes kept for validation, such as "24:30,0:256,:" (z, y, x in voxels) or, of the
                                second of several volumes, "2@24:30,0:256,:" (see `regions.parse_regions`)
    validation_images, validation_labels, validation_masks
                                files of volumes that serve for validation only
    target                      boundary | classes | affinities
    output                      extent of the output patch (z, y, x); None: see `default_output`
    optimiser                   sgd | adam; rate None: 0.02 for sgd, 0.002 for adam
    elastic                     deviation of the elastic deformation in voxels, see `Augmentation`
    tensorboard                 also write event files, into the folder "tensorboard" of the run
    The others are those of `Schedule`, `Limits`, `Augmentation`, `PatchSampler`, `znn.SGD` and `znn.Network`.
    """

    images: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    synthetic_extent: tuple[int, int, int] = (24, 256, 256)
    hold_out: int | None = None
    validation_regions: tuple[str, ...] = ()
    validation_images: tuple[str, ...] = ()
    validation_labels: tuple[str, ...] = ()
    validation_masks: tuple[str, ...] = ()
    target: str = "boundary"
    output: tuple[int, int, int] | None = None
    patches: int = 1
    optimiser: str = "sgd"
    rate: float | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-5
    schedule: str = "cosine"
    warm_up: float = 0.02
    rounds: int | None = None
    minutes: float | None = None
    validate_every: int = 100
    validation_tiles: int = 24
    keep_every: int | None = None
    augment: bool = True
    elastic: float = 0.0
    balance: bool = False
    seed: int = 0
    threads: int | None = None
    bundle: int | str = "auto"
    plan: str = "model"
    sum: str = "wait-free"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.optimiser not in RATES:
            raise DataError(f"optimiser {self.optimiser!r}; expected one of {', '.join(RATES)}")
        if self.rate is None:
            object.__setattr__(self, "rate", RATES[self.optimiser])
        check_syntax(self.validation_regions)

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))


@dataclass(frozen=True)
class Data:
    """Volumes to train on, from which what is held out is hidden, and the held-out ones by how they were named."""

    training: tuple[Volume, ...]
    sections: tuple[Volume, ...]
    regions: tuple[Volume, ...]
    volumes: tuple[Volume, ...]

    @property
    def held_out(self) -> list[Volume]:
        return [*self.sections, *self.regions, *self.volumes]

    @property
    def measured_on(self) -> str:
        """In words, what the network is judged by."""
        named = (self.sections, "held-out sections"), (self.regions, "held-out regions"), (self.volumes, "validation volumes")
        return " and ".join(words for volumes, words in named if volumes) or "training sections"


def load_volumes(settings: Settings) -> tuple[list[Volume], list[Volume]]:
    """The training volumes and the held-out ones. Raises DataError for unequal numbers of files, bad files, and for
    held-out sections or regions that do not fit, overlap or leave nothing.
    """
    data = load_data(settings)
    return list(data.training), data.held_out


def load_data(settings: Settings) -> Data:
    """As `load_volumes`, by kind."""
    if not settings.images:
        if settings.labels or settings.masks:
            raise DataError("labels or masks are given without images; give as many --images")
        whole = [make_volume(*cell_volume(settings.synthetic_extent, settings.seed), name="synthetic cells")]
    else:
        whole = _read_all("", settings.images, settings.labels, settings.masks)
    boxes = parse_regions(settings.validation_regions, [(volume.name, volume.extent) for volume in whole])
    validation = _read_all("validation ", settings.validation_images, settings.validation_labels, settings.validation_masks)
    training, sections, regions = [], [], []
    for volume, own in zip(whole, boxes):
        last = _last_sections(volume, settings, own)
        hiding = volume.hiding([*last, *own])
        if hiding.known:
            # A small part may happen to have two labels only: what they are is told by those trained on.
            picture = len(label_values(hiding)) == 2
            volume, hiding = replace(volume, picture=picture), replace(hiding, picture=picture)
            training.append(hiding)
        sections += [volume.part(region) for region in last]
        regions += [volume.part(region) for region in own]
    if not training:
        raise DataError("every voxel of every volume is held out, so nothing is left to train on")
    for volume in training:
        if not is_labelled(volume):
            raise DataError(f"{volume.name}: the mask is empty outside what is held out, so nothing could be learned from it")
    for volume in (*sections, *regions):
        if not is_labelled(volume):
            raise DataError(f"{volume.name}: the mask is empty in this held-out part, so nothing could be measured in it")
    return Data(tuple(training), tuple(sections), tuple(regions), tuple(validation))


def _read_all(kind: str, images: Sequence[str], labels: Sequence[str], masks: Sequence[str]) -> list[Volume]:
    for name, files in (("labels", labels), ("masks", masks)):
        if len(files) != len(images) and (files or name == "labels"):
            raise DataError(f"{len(images)} {kind}images but {len(files)} {kind}{name}; give one for each volume")
    return [read_volume(*files) for files in zip(images, labels, masks or [None] * len(images))]


def _last_sections(volume: Volume, settings: Settings, regions: Sequence[Region]) -> list[Region]:
    """The region of the sections that `hold_out` keeps, if any."""
    depth, *rest = volume.extent
    count = settings.hold_out
    if count is None:
        elsewhere = settings.validation_regions or settings.validation_images
        count = 0 if elsewhere else round(_HELD_OUT * depth)
    if not 0 <= count < depth:
        raise DataError(f"{volume.name}: cannot hold out {count} of {depth} sections; expected 0 to {depth - 1}")
    last = Region((depth - count, 0, 0), (depth, *rest))
    for region in regions:
        if last.within(region).voxels:
            raise DataError(f"{volume.name}: validation region {region} overlaps the last {count} sections, which are held out")
    return [last] if count else []


def default_output(spec: NetworkSpec, extent: Sequence[int]) -> tuple[int, int, int]:
    """An output patch that spans about 96 x 96 voxels for 2D nets, 4 x 32 x 32 for 3D nets, and no more than
    `extent`, that of the smallest volume."""
    geometry = Geometry.of(Graph.build(spec, output=2))
    span = (1, 96, 96) if spec.dims == 2 else (4, 32, 32)
    return tuple(max(1, min(most, n) // stride) for most, n, stride in zip(span, extent, geometry.stride))


def run_job(
    settings: Settings,
    folder: str | os.PathLike,
    spec: NetworkSpec | None = None,
    fresh: bool = False,
    report: Callable[[dict[str, Any]], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train, or go on training, in `folder`, and return the summary (also written to summary.json).

    The folder's checkpoint is resumed if there is one; `fresh` discards it. `spec` defaults to
    `nets.boundary_network`. Writes curve.jsonl, checkpoints, learning-curve.png, sections.png and
    summary.json. Raises DataError for bad data or settings that contradict the run in the folder, SpecError
    for a network that does not fit, CheckpointError for a damaged checkpoint, KeyboardInterrupt after a clean
    stop.
    """
    folder = Path(folder)
    if fresh and folder.exists():
        _discard(folder)
    schedule = Schedule(settings.rate, settings.schedule, settings.warm_up)
    limits = Limits(settings.rounds, settings.minutes, settings.validate_every, settings.keep_every)
    data = load_data(settings)
    checkpoint, state = _resume(folder, settings, spec)
    if spec is None:
        spec = checkpoint.spec if checkpoint else boundary_network(data.training[0].maps)
    output = checkpoint.output if checkpoint else settings.output or default_output(spec, _smallest(data))
    sampler, held_out = _readers(settings, data, Graph.build(spec, output=output))
    with _network(settings, spec, checkpoint, output) as net:
        follow = Evaluator(held_out, spec.loss, settings.validation_tiles) if held_out else None
        with _event_log(settings, folder, net.round, report) as report:
            run = Run(net, sampler, follow, folder, schedule, limits, state, report, progress)
            run.train()
        return _conclude(net, held_out or sampler.reader, data, run.state, folder)


def _readers(settings: Settings, data: Data, graph: Graph) -> tuple[PatchSampler, PatchReader | None]:
    """The training stream, and a reader of what is held out. Raises DataError where they do not suit the network."""
    geometry = Geometry.of(graph)
    maps, wanted = (graph.node(names[0]).maps for names in (graph.outputs, graph.inputs))
    for volume in (*data.training, *data.held_out):
        if volume.maps != wanted:
            raise DataError(f"{volume.name}: {volume.maps} maps, but the input of network {graph.spec.name!r} has {wanted}")
    for volume in data.regions:
        if any(n < f for n, f in zip(volume.extent, geometry.fov)):
            raise DataError(
                f"{volume.name}: the held-out region's extent {volume.extent} is smaller than the network's field of "
                f"view {geometry.fov}; hold out a larger one"
            )
    reader = PatchReader(data.training, geometry, settings.target, maps)
    augmentation = Augmentation(elastic=settings.elastic) if settings.augment else NONE
    sampler = PatchSampler(reader, settings.seed, augmentation, settings.patches, settings.balance)
    return sampler, PatchReader(data.held_out, geometry, settings.target, maps) if data.held_out else None


def _smallest(data: Data) -> tuple[int, ...]:
    """An extent that fits into every held-out volume, and into what is left of each training volume."""
    left = [max(volume.known, key=lambda region: region.voxels).extent for volume in data.training]
    return tuple(min(sizes) for sizes in zip(*left, *(volume.extent for volume in data.held_out)))


@contextmanager
def _event_log(settings: Settings, folder: Path, round: int, report: Callable[[dict[str, Any]], None] | None):
    """`report`, and with event files also what writes them."""
    if not settings.tensorboard:
        yield report
        return
    lines = [line for line in read_curve(folder / "curve.jsonl") if line["round"] <= round]
    with EventLog(folder / "tensorboard", lines) as log:
        def both(line: dict[str, Any]) -> None:
            log.write(line)
            if report is not None:
                report(line)

        yield both


def _network(settings: Settings, spec: NetworkSpec, checkpoint, output):
    import znn

    engine = {"threads": settings.threads, "bundle": settings.bundle, "plan": settings.plan, "sum": settings.sum}
    if checkpoint is not None:
        return checkpoint.network(**engine)
    kind = {"sgd": znn.SGD, "adam": znn.Adam}[settings.optimiser]
    optimiser = kind(rate=settings.rate, momentum=settings.momentum, weight_decay=settings.weight_decay)
    return znn.Network(
        spec, output=output, patches=settings.patches, seed=settings.seed, optimiser=optimiser, **engine
    )


def _resume(folder: Path, settings: Settings, spec: NetworkSpec | None):
    path = folder / "last.npz"
    if not path.exists():
        return None, State(settings=settings.to_dict())
    checkpoint = load_checkpoint(path)
    state = State.from_extra(checkpoint.extra)
    # Runs begun by an older version lack the newer settings, and went by their defaults.
    wanted, found = settings.to_dict(), Settings().to_dict() | state.settings
    for name in (field.name for field in dataclasses.fields(Settings) if field.name not in _FREE):
        if found[name] != wanted[name]:
            raise DataError(
                f"{folder} holds a run with {name} = {found[name]}, not {wanted[name]}; "
                "choose another folder, or discard that run (--fresh)"
            )
    if spec is not None and spec != checkpoint.spec:
        raise DataError(
            f"{folder} holds a run of another network; choose another folder, or discard that run (--fresh)"
        )
    state.settings = wanted
    return checkpoint, state


def _discard(folder: Path) -> None:
    """Remove what a run writes, and nothing else, from its folder."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; choose another place for the run")
    for pattern in (
        "last.npz",
        "best.npz",
        "round-*.npz",
        "curve.jsonl",
        "summary.json",
        "learning-curve.png",
        "sections.png",
        "tensorboard/events.out.tfevents.*",
    ):
        for file in folder.glob(pattern):
            file.unlink()


def _conclude(net, reader: PatchReader, data: Data, state: State, folder: Path) -> dict[str, Any]:
    loss = net.graph.spec.loss
    result = Evaluator(reader, loss, None if data.held_out else 64).run(net)
    summary = {
        "network": net.graph.spec.name,
        "parameters": sum(p.size for p in net.parameters().values()),
        "rounds": net.round,
        "seconds": state.seconds,
        "measured_on": data.measured_on,
    } | result.to_dict()
    evaluator = Evaluator(reader, loss)
    if reader.target == "boundary" and max(reader.geometry.stride) == 1:
        summary |= _rand_error(evaluator, net)
    with atomic_write(folder / "summary.json", "w") as file:
        json.dump(summary, file, indent=1)
    draw_learning_curve(read_curve(folder / "curve.jsonl"), folder / "learning-curve.png")
    title = (
        f"{summary['measured_on']}: pixel error {result.pixel_error:.2%} "
        f"(all one class: {result.trivial_error:.2%})"
    )
    draw_side_by_side(*evaluator.section(net), folder / "sections.png", title)
    return summary


def _rand_error(evaluator: Evaluator, net) -> dict[str, float]:
    """Adapted Rand error of the cells within sections, mean over at most so many sections of the first
    volume, at the threshold that makes it least, as the ISBI 2012 challenge takes it."""
    depth = evaluator.reader.volumes[0].extent[0]
    chosen = np.unique(np.linspace(0, depth - 1, min(depth, _RAND_SECTIONS)).astype(int))
    sections = [evaluator.section(net, 0, int(z))[1:] for z in chosen]
    errors = {
        threshold: float(
            np.mean(
                [
                    rand_error_of_boundaries(target[0], probability[0], threshold)
                    for target, probability in sections
                ]
            )
        )
        for threshold in _RAND_THRESHOLDS
    }
    best = min(errors, key=errors.get)
    return {"rand_error": errors[best], "rand_threshold": best, "rand_sections": len(chosen)}
