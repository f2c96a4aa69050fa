"""Training on people's own volumes: volumes, patches, augmentation, the loop and its pictures."""

from znn.train.augment import Augmentation
from znn.train.evaluate import Evaluation, Evaluator
from znn.train.job import Settings, load_volumes, run_job
from znn.train.loop import Limits, Progress, Run, Schedule, State, read_curve
from znn.train.nets import boundary_network
from znn.train.regions import Region
from znn.train.sampler import Geometry, PatchReader, PatchSampler, Prefetcher, Sample
from znn.train.synthetic import cell_volume
from znn.train.tensorboard import EventLog
from znn.train.volumes import Volume, make_volume, open_array, read_volume

__all__ = [
    "Augmentation",
    "Evaluation",
    "Evaluator",
    "EventLog",
    "Geometry",
    "Limits",
    "PatchReader",
    "PatchSampler",
    "Prefetcher",
    "Progress",
    "Region",
    "Run",
    "Sample",
    "Schedule",
    "Settings",
    "State",
    "Volume",
    "boundary_network",
    "cell_volume",
    "load_volumes",
    "make_volume",
    "open_array",
    "read_curve",
    "read_volume",
    "run_job",
]
