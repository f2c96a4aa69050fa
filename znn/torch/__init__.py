"""PyTorch users: convolutions that run on ZNN's kernels, as ordinary functions and modules with autograd.

    import znn.torch
    y = znn.torch.conv3d(x, weight, bias, padding="same")      # as torch.nn.functional.conv3d
    print(znn.torch.replace_convs(model, example))             # swaps the layers that are faster here

Everything has PyTorch's semantics (cross-correlation, NCDHW). What the kernels do not do (strides, other types than
float32, other devices than the CPU) is handed to PyTorch's own convolution.
"""

try:
    import torch as _torch
except ImportError:
    raise ImportError("znn.torch needs PyTorch 2.4 or newer: pip install 'znn[torch]'") from None
if tuple(int(part) for part in _torch.__version__.split(".")[:2]) < (2, 4):
    raise ImportError(f"znn.torch needs PyTorch 2.4 or newer, this is {_torch.__version__}: pip install 'znn[torch]'")

from znn.torch.convert import from_torch, to_torch
from znn.torch.functional import conv2d, conv3d
from znn.torch.layers import free_memory, memory, set_memory_limit, set_threads
from znn.torch.modules import Conv2d, Conv3d
from znn.torch.replace import Report, replace_convs, restore_convs

__all__ = [
    "Conv2d", "Conv3d", "Report", "conv2d", "conv3d", "free_memory", "from_torch", "memory", "replace_convs", "restore_convs",
    "set_memory_limit", "set_threads", "to_torch",
]
