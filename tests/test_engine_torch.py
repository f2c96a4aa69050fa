"""Whole training steps of the engine against PyTorch in float64 (autograd and torch.optim.SGD)."""
from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import znn
from checks import (NETWORK_TOLERANCE, NETWORKS, OPTIMISER, PLANS, assert_close, pair, random_inputs,
                    random_targets, small_graph, train_alike)
from torch_oracle import TorchNetwork
from znn import zoo
from znn.graph import Graph

plans = pytest.mark.parametrize("plan", PLANS)


@plans
@pytest.mark.parametrize("patches, weighted", [(None, True), (3, False)])
@pytest.mark.parametrize("name", NETWORKS)
def test_training_is_pytorchs(rng, name, plan, patches, weighted):
    net, reference = pair(small_graph(name), patches=patches, plan=plan)
    with net:
        train_alike(net, TorchNetwork(net.graph, reference.parameters(), **OPTIMISER), rng, rounds=5,
                    patches=patches, weighted=weighted)


@plans
@pytest.mark.parametrize("name, form, width, output, patches", [
    ("scaling_3d", "dense", 4, 3, None), ("3d_3", "strided", 4, 3, None), ("3d_3", "dense", 3, 2, None),
    ("2d_5", "strided", 3, 3, 2), ("2d_5", "dense", 2, 4, None)])
def test_training_of_the_zoo_is_pytorchs(rng, name, form, width, output, patches, plan):
    graph = Graph.build(zoo.build(name, width=width, form=form), output=output)
    optimiser = {"rate": 0.001, "momentum": 0.9, "weight_decay": 0.01}
    net, reference = pair(graph, patches=patches, plan=plan, optimiser=optimiser)
    theirs = TorchNetwork(graph, reference.parameters(), **optimiser)
    with net:
        for _ in range(4):
            inputs, targets = random_inputs(graph, rng, patches), random_targets(graph, rng, patches)
            losses = [n.train_step(inputs, targets) for n in (net, theirs)]
            assert losses[0] == pytest.approx(losses[1], rel=NETWORK_TOLERANCE)
        assert_close(net.parameters(), theirs.parameters(), NETWORK_TOLERANCE, "parameters")
        assert_close(net.forward(inputs), theirs.forward(inputs), NETWORK_TOLERANCE, "output")


def modules(form: str) -> torch.nn.Sequential:
    """conv 3, pool 2, conv 3, pool 2, conv 2 as a PyTorch user writes them; dense: dilated, not strided."""
    def pool(dilation: int) -> torch.nn.Module:
        strided = form == "strided"
        return torch.nn.MaxPool3d(2) if strided else torch.nn.MaxPool3d(2, stride=1, dilation=dilation)

    second, third = (2, 4) if form == "dense" else (1, 1)
    return torch.nn.Sequential(
        torch.nn.Conv3d(1, 3, 3), torch.nn.ReLU(), pool(1), torch.nn.Conv3d(3, 4, 3, dilation=second),
        torch.nn.Tanh(), pool(second), torch.nn.Conv3d(4, 1, 2, dilation=third)).double()


@plans
@pytest.mark.parametrize("form, output", [("strided", (2, 1, 2)), ("dense", (3, 2, 4))])
def test_training_is_that_of_a_network_written_in_modules(rng, form, output, plan):
    """Written out by hand, so that sparsities and extents are checked too, not only the arithmetic."""
    pool = {"max_pool" if form == "strided" else "max_filter": 2}
    spec = znn.NetworkSpec.layered("modules", 1, [{"conv": 3, "kernel": 3, "transfer": "relu"}, pool,
                                                  {"conv": 4, "kernel": 3, "transfer": "tanh"}, pool,
                                                  {"conv": 1, "kernel": 2}])
    torch.manual_seed(0)
    model = modules(form)
    convs = [module for module in model if isinstance(module, torch.nn.Conv3d)]
    names = [("conv1", "nconv1"), ("conv2", "nconv2"), ("conv3", "output")]

    def exported() -> dict[str, np.ndarray]:
        arrays = {}
        for (kernel, bias), conv in zip(names, convs):
            flipped = torch.flip(conv.weight, (2, 3, 4)).detach().numpy()
            arrays[kernel] = np.ascontiguousarray(flipped, np.float32)
            arrays[bias] = conv.bias.detach().numpy().astype(np.float32)
        return arrays

    groups = [{"params": [conv.weight for conv in convs], "weight_decay": 0.01},
              {"params": [conv.bias for conv in convs]}]
    optimiser = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    with znn.Network(spec, output, parameters=exported(), plan=plan,
                     optimiser=znn.SGD(rate=0.01, momentum=0.9, weight_decay=0.01)) as net:
        for _ in range(5):
            x, t = random_inputs(net.graph, rng), random_targets(net.graph, rng)
            difference = model(torch.tensor(x[None]).double()) - torch.tensor(t[None]).double()
            loss = 0.5 * (difference**2).sum() / difference.numel()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            assert net.train_step(x, t) == pytest.approx(loss.item(), rel=NETWORK_TOLERANCE)
        assert_close(net.parameters(), exported(), NETWORK_TOLERANCE, "parameters")
