"""Kernel size and output patch, 3D: forward passes alone."""

from functools import partial

from kernel_size import caption_of, draw_of, rows_of

table = partial(rows_of, experiment="kernel_size_3d", phase="forward")
caption = partial(caption_of, what="forward pass")
draw = partial(draw_of, what="forward pass")
