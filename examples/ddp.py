#!/usr/bin/env python3
"""Data-parallel training with PyTorch's DistributedDataParallel and ZNN's convolutions.

Started by itself it runs two processes on this machine, each with half of every batch, trains the same net once more in one
process with the joint batch, and checks that both end with the same parameters. Over several machines the same file is
started by PyTorch's launcher, for instance on each of two:

    torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/ddp.py
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import znn.torch

TOLERANCE = 1e-5  # of the largest parameter: the sums of two halves round differently


def net(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(znn.torch.Conv3d(1, width, 5, padding=2), nn.ReLU(), znn.torch.Conv3d(width, width, 5, padding=2),
                         nn.ReLU(), znn.torch.Conv3d(width, 1, 1))


def batches(steps: int, size: int, extent: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images and targets, (batch, 1, z, y, x): an image is to be smoothed."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(size, 1, extent, extent, extent, generator=generator) for _ in range(steps)]
    return [(image, nn.functional.avg_pool3d(image, 3, 1, 1)) for image in images]


def train(model: nn.Module, data: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The parameters after a step on every batch."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for image, target in data:
        optimiser.zero_grad()
        nn.functional.mse_loss(model(image), target).backward()
        optimiser.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def share(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """What one of several processes does: its share of every batch, gradients averaged by DDP."""
    rank, world = dist.get_rank(), dist.get_world_size()
    data = [(image[rank::world], target[rank::world]) for image, target in batches(args.steps, args.batch, args.extent)]
    return train(DistributedDataParallel(net(args.width)), data)


def process(rank: int, folder: str, args: argparse.Namespace) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=args.processes,
                            timeout=timedelta(seconds=120))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.processes))
    torch.save(share(args), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest, relative to the largest parameter."""
    largest = max(value.abs().max() for value in wanted.values())
    return max(float((found[f"module.{name}"] - value).abs().max() / largest) for name, value in wanted.items())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=8, help="feature maps (8)")
    parser.add_argument("--extent", type=int, default=16, help="of the cubic images (16)")
    parser.add_argument("--batch", type=int, default=4, help="images of a batch, over all processes (4)")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(arguments)
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")
        found, rank = share(args), dist.get_rank()
        dist.destroy_process_group()
    else:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(process, (folder, args), args.processes)
            states = [torch.load(f"{folder}/{rank}.pt") for rank in range(args.processes)]
        found, rank = states[0], 0
        assert all(torch.equal(state[name], found[name]) for state in states for name in found), "the processes differ"
    apart = difference(found, train(net(args.width), batches(args.steps, args.batch, args.extent)))
    if rank == 0:
        print(f"after {args.steps} steps the parameters of all processes and of one with the joint batch differ by {apart:.1e}")
    return 0 if apart <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
