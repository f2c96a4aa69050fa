"""A znn.Network made of the float64 reference, for tests of what surrounds the engine where it is not built."""

from dataclasses import dataclass

import numpy as np

from znn.graph import Graph
from znn.init import initial_parameters
from znn.reference import ReferenceNetwork


@dataclass(frozen=True)
class SGD:
    rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0


class Network(ReferenceNetwork):
    def __init__(self, spec, output=None, *, patches=1, seed=0, parameters=None, optimiser=SGD(), **engine):
        graph = Graph.build(spec, output=output)
        super().__init__(graph, parameters or initial_parameters(graph, seed), optimiser.rate, optimiser.momentum,
                         optimiser.weight_decay)
        self.patches, self.seed, self.optimiser = patches, seed, optimiser

    def forward(self, inputs, phase="infer", masks=None):
        return super().forward(inputs, phase, masks).astype(np.float32)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass
