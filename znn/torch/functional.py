"""`conv2d` and `conv3d` with PyTorch's semantics and autograd, on ZNN's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import Function, forward_ad
from torch.autograd.function import once_differentiable
from torch.overrides import has_torch_function

from znn.errors import DataError
from znn.torch import layers
from znn.torch.layers import Method, Problem

Size = int | Sequence[int]


def conv3d(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, stride: Size = 1,  # noqa: A002
           padding: Size | str = 0, dilation: Size = 1, groups: int = 1) -> torch.Tensor:
    """Cross-correlate as `torch.nn.functional.conv3d`.

    input: (batch, in, z, y, x) or (in, z, y, x). weight: (out, in / groups, kz, ky, kx). bias: (out,). stride, padding,
    dilation: an int or a triple; padding also "valid" or "same". Returns (batch, out, z', y', x') or (out, z', y', x').
    Differentiable once. Strides above 1, dtypes other than float32, devices other than the CPU, autocast, tracing,
    torch.func, forward-mode differentiation and subclasses of Tensor are PyTorch's own convolution. Raises DataError for shapes and options that do not fit.
    """
    return _conv(3, input, weight, bias, stride, padding, dilation, groups)


def conv2d(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, stride: Size = 1,  # noqa: A002
           padding: Size | str = 0, dilation: Size = 1, groups: int = 1) -> torch.Tensor:
    """Cross-correlate as `torch.nn.functional.conv2d`.

    input: (batch, in, y, x) or (in, y, x). weight: (out, in / groups, ky, kx). bias: (out,). Otherwise as `conv3d`.
    """
    return _conv(2, input, weight, bias, stride, padding, dilation, groups)


def _conv(dims: int, input: Any, weight: Any, bias: Any, stride: Size, padding: Size | str,  # noqa: A002
          dilation: Size, groups: int) -> torch.Tensor:
    if not _is_ours(input, weight, bias) or _sizes(stride, "stride", dims, 1) != (1,) * dims:
        theirs = torch.nn.functional.conv3d if dims == 3 else torch.nn.functional.conv2d
        return theirs(input, weight, bias, stride, padding, dilation, groups)
    problem = _problem(dims, input, weight, bias, padding, dilation, groups)
    return run(problem, dims, input, weight, bias)


def _is_ours(input: Any, weight: Any, bias: Any) -> bool:  # noqa: A002
    tensors = (input, weight) if bias is None else (input, weight, bias)
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor):
            raise DataError(f"got a {type(tensor).__name__}, expected tensors for input, weight and bias")
    plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) and t.dtype == torch.float32 and t.device.type == "cpu"
                and t.layout == torch.strided and not t.is_neg() for t in tensors)
    return (plain and input.numel() > 0 and not has_torch_function(tensors) and not torch.is_autocast_enabled("cpu")
            and not torch.jit.is_tracing() and not _exporting() and not _transformed())


# torch.compiler.is_exporting came with PyTorch 2.6.
_exporting = getattr(torch.compiler, "is_exporting", lambda: False)
_transforms = getattr(torch._C, "_functorch", None)


def _transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is under way (there is no public way to ask)."""
    inside = getattr(_transforms, "peek_interpreter_stack", lambda: None)() is not None
    return inside or getattr(forward_ad, "_current_level", -1) >= 0


# ---- the problem ------------------------------------------------------------------------------------------
def _problem(dims: int, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,  # noqa: A002
             padding: Size | str, dilation: Size, groups: int) -> Problem:
    name = f"conv{dims}d"
    if input.ndim not in (dims + 1, dims + 2):
        raise DataError(f"{name}: input has shape {tuple(input.shape)}, expected {dims + 2} axes (batch, maps, ...) or {dims + 1}")
    if weight.ndim != dims + 2 or 0 in weight.shape:
        raise DataError(f"{name}: weight has shape {tuple(weight.shape)}, expected (out, in / groups, {'z, y, x' if dims == 3 else 'y, x'})")
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or weight.shape[0] % groups:
        raise DataError(f"{name}: groups is {groups!r}, expected a divisor of the {weight.shape[0]} output maps")
    maps = input.shape[-dims - 1]
    if maps != weight.shape[1] * groups:
        raise DataError(f"{name}: input has {maps} maps, expected {weight.shape[1] * groups} for weight of shape "
                        f"{tuple(weight.shape)} and groups {groups}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise DataError(f"{name}: bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},)")
    kernel, apart = tuple(weight.shape[2:]), _sizes(dilation, "dilation", dims, 1)
    before, after = _padding(padding, kernel, apart)
    one, zero = (1,) * (3 - dims), (0,) * (3 - dims)
    problem = Problem(maps, weight.shape[0], groups, one + tuple(input.shape[-dims:]), one + kernel, one + apart,
                      zero + before, zero + after)
    if min(problem.output) < 1:
        raise DataError(f"{name}: kernel {kernel} with dilation {apart} does not fit the padded input {problem.padded[-dims:]}")
    return problem


def _sizes(value: Any, what: str, dims: int, least: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    if len(values) == 1:
        values *= dims
    if len(values) != dims or not all(hasattr(n, "__index__") and not isinstance(n, bool) and n >= least for n in values):
        raise DataError(f"conv{dims}d: {what} is {value!r}, expected an int of at least {least} or {dims} of them")
    return tuple(int(n) for n in values)


def _padding(padding: Size | str, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Zeros before and after the image per axis; PyTorch puts the odd one of "same" behind it."""
    dims = len(kernel)
    if padding == "valid":
        return (0,) * dims, (0,) * dims
    if padding == "same":
        whole = [d * (k - 1) for d, k in zip(dilation, kernel)]
        return tuple(n // 2 for n in whole), tuple(n - n // 2 for n in whole)
    if isinstance(padding, str):
        raise DataError(f"conv{dims}d: padding is {padding!r}, expected numbers, 'valid' or 'same'")
    return (_sizes(padding, "padding", dims, 0),) * 2


# ---- running ----------------------------------------------------------------------------------------------
@torch.compiler.disable
def run(problem: Problem, dims: int, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,  # noqa: A002
        method: Method | None = None) -> torch.Tensor:
    """The convolution of float32 CPU tensors that fit `problem`, by `method` (None: the best known)."""
    batched = input.ndim == dims + 2
    images = input if batched else input[None]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias)):
        output = _Convolution.apply(images, weight, bias, problem, dims, method)
    else:
        output = _forward(images, weight, bias, problem, dims, False, method)[0]
    return output if batched else output[0]


def _volume(tensor: torch.Tensor | None, dims: int) -> torch.Tensor | None:
    """The tensor with a depth, outside autograd: the same memory."""
    if tensor is None:
        return None
    return tensor.detach() if dims == 3 else tensor.detach().unsqueeze(2)


def _empty(like: torch.Tensor, shape: tuple[int, ...], layer_method: Method) -> torch.Tensor:
    """For a result, channels last where the input is; single maps lie one after the other."""
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    is_last = layer_method.bundle != 1 and like.shape[1] > 1 and like.is_contiguous(memory_format=last) and not like.is_contiguous()
    return torch.empty(shape, memory_format=last if is_last else torch.contiguous_format)


def _forward(images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, problem: Problem, dims: int,
             differentiate: bool, method: Method | None) -> tuple[torch.Tensor, Any, Any]:
    """The output, the native layer that made it, and the spectra of the images that it kept (or None)."""
    layers.use_threads()
    method, batch = method or layers.method_of(problem), images.shape[0]
    layer = layers.native(problem, differentiate, method)
    if differentiate and not layers.may_keep(layer, batch):
        differentiate, layer = False, layers.native(problem, False, method)
    output = _empty(images, (batch, problem.out_maps, *problem.output[-dims:]), method)
    kept = layer.forward(batch, _volume(images, dims), _volume(weight, dims), None if bias is None else bias.detach().contiguous(),
                         _volume(output, dims), differentiate)
    # As a tensor, so that autograd frees it like every other that it saved.
    return output, layer, None if kept is None else torch.frombuffer(kept, dtype=torch.float32)


class _Convolution(Function):
    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, problem: Problem, dims: int,
                method: Method | None) -> torch.Tensor:
        method = method or layers.method_of(problem)
        output, layer, kept = _forward(images, weight, bias, problem, dims, ctx.needs_input_grad[1], method)
        needs_images = ctx.needs_input_grad[1] and kept is None
        ctx.save_for_backward(weight, images if needs_images else None, kept)
        ctx.layer, ctx.problem, ctx.dims, ctx.method = layer, problem, dims, method
        ctx.image_shape = images.shape
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, images, kept = ctx.saved_tensors
        problem, dims = ctx.problem, ctx.dims
        layers.use_threads()
        of_input = _empty(gradient, ctx.image_shape, ctx.method) if ctx.needs_input_grad[0] else None
        of_weight = torch.empty(weight.shape) if ctx.needs_input_grad[1] else None
        of_bias = torch.empty(problem.out_maps) if ctx.needs_input_grad[2] else None
        ctx.layer.backward(ctx.image_shape[0], _volume(images, dims), kept, _volume(weight, dims), _volume(gradient, dims),
                           _volume(of_input, dims), _volume(of_weight, dims), of_bias)
        return of_input, of_weight, of_bias, None, None, None
