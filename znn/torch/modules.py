"""Modules: PyTorch's own with the convolution exchanged, so that state dicts, repr, copies, pickles and DDP are theirs."""

from __future__ import annotations

import torch

from znn.torch.functional import conv2d, conv3d


class Conv3d(torch.nn.Conv3d):
    """`torch.nn.Conv3d` on ZNN's kernels: the same arguments, parameters and state dict. See `znn.torch.conv3d`."""

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # noqa: A002
        input, padding = _pad(self, input)  # noqa: A001
        return conv3d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class Conv2d(torch.nn.Conv2d):
    """`torch.nn.Conv2d` on ZNN's kernels: the same arguments, parameters and state dict. See `znn.torch.conv2d`."""

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # noqa: A002
        input, padding = _pad(self, input)  # noqa: A001
        return conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


def _pad(conv: torch.nn.Conv2d | torch.nn.Conv3d, input: torch.Tensor) -> tuple[torch.Tensor, int | str | tuple[int, ...]]:  # noqa: A002
    """Padding other than with zeros is PyTorch's: the padded input, and what is left to pad."""
    if conv.padding_mode == "zeros":
        return input, conv.padding
    return torch.nn.functional.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
