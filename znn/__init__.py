"""ZNN: train 2D and 3D ConvNets on CPUs as a graph of tasks, and measure how fast that is.

    import znn
    net = znn.Network(znn.zoo.build("scaling_3d", width=10), output=12)
    loss = net.train_step(image, target)
"""

from znn import errors, init, spec, zoo
from znn.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from znn.errors import CheckpointError, DataError, EngineError, PlanError, SpecError, ZnnError
from znn.graph import Graph
from znn.network import Network
from znn.options import SGD, Adam
from znn.plan import Plan
from znn.spec import EdgeSpec, Init, NetworkSpec, NodeSpec
from znn.trace import Trace

__version__ = "0.1.0"

__all__ = [
    "SGD", "Adam", "Checkpoint", "CheckpointError", "DataError", "EdgeSpec", "EngineError", "Graph", "Init", "Network",
    "NetworkSpec", "NodeSpec", "Plan", "PlanError", "SpecError", "Trace", "ZnnError", "errors", "init",
    "load_checkpoint", "save_checkpoint", "spec", "zoo",
]
