#!/usr/bin/env python3
"""Train a modern 3D net with large kernels, depthwise ones included, with PyTorch's convolutions and with ZNN's.

The net is a ConvNeXt (Liu et al. 2022) in three dimensions: blocks of a depthwise 7x7x7 convolution, a normalisation and two
pointwise layers around a skip connection, between a full 7x7x7 stem and a pointwise head. It learns to find the edges of random blobs. Both copies
start from the same parameters and take turns step by step; the losses must agree.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Sequence

import torch
from torch import nn

import znn.torch


class Block(nn.Module):
    """Depthwise convolution of large kernels, then mixing of the maps voxel by voxel, added to the input."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.steps = nn.Sequential(nn.Conv3d(width, width, kernel, padding="same", groups=width), nn.GroupNorm(1, width),
                                   nn.Conv3d(width, 2 * width, 1), nn.GELU(), nn.Conv3d(2 * width, width, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images + self.steps(images)


def large_kernel_net(width: int, blocks: int, kernel: int) -> nn.Module:
    """(batch, 1, z, y, x) to (batch, 1, z, y, x)."""
    return nn.Sequential(nn.Conv3d(1, width, kernel, padding="same"), *(Block(width, kernel) for _ in range(blocks)),
                         nn.Conv3d(width, 1, 1))


def blobs(extent: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A noisy image of random blobs and where their edges are, (1, 1, z, y, x) each."""
    generator = torch.Generator().manual_seed(seed)
    smooth = nn.functional.avg_pool3d(torch.randn(1, 1, extent, extent, extent, generator=generator), 5, 1, 2)
    inside = (smooth > 0).float()
    edges = nn.functional.max_pool3d(inside, 3, 1, 1) + nn.functional.max_pool3d(-inside, 3, 1, 1)
    return inside + 0.3 * torch.randn(inside.shape, generator=generator), edges


class Trainer:
    """A model, its optimiser, and what its steps took."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.optimiser = model, torch.optim.AdamW(model.parameters(), lr=2e-3)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, image: torch.Tensor, edges: torch.Tensor) -> None:
        start = time.perf_counter()
        self.optimiser.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(self.model(image), edges)
        loss.backward()
        self.optimiser.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())


def main(arguments: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=16, help="feature maps (16)")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--kernel", type=int, default=7)
    parser.add_argument("--extent", type=int, default=24, help="of the cubic image (24)")
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = large_kernel_net(args.width, args.blocks, args.kernel)
    eager, ours = Trainer(copy.deepcopy(model)), Trainer(model)
    report = znn.torch.replace_convs(model, blobs(args.extent, 0)[0])
    print(report, "\n")
    print("step  loss with PyTorch's  seconds  with ZNN's  seconds")
    for step in range(args.steps):
        for trainer in (eager, ours):
            trainer.step(*blobs(args.extent, step))
        print(f"{step:4}  {eager.losses[-1]:19.4f}  {eager.seconds[-1]:7.3f}  {ours.losses[-1]:10.4f}  {ours.seconds[-1]:7.3f}")
    medians = [statistics.median(trainer.seconds[1:] or trainer.seconds) for trainer in (eager, ours)]
    print(f"median step: PyTorch {medians[0]:.3f} s, with {len(report.replaced)} convolutions replaced {medians[1]:.3f} s, "
          f"{medians[0] / medians[1]:.1f} times faster")
    return {"replaced": report.replaced, "losses": (eager.losses, ours.losses), "seconds": medians}


if __name__ == "__main__":
    main()
