"""The native layers behind znn.torch: which plan a shape gets, the layers in use, and the threads and memory they share."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from znn import _core, bundled, options
from znn.errors import PlanError
from znn.graph import Graph
from znn.spec import EdgeSpec, Extent, NetworkSpec, NodeSpec

LAYERS_KEPT = 256  # a layer is a plan and its tasks, some hundred kilobytes at most
MAPS_RATE = 12e9  # operations per second and core of the direct method on single maps
ALIKE = 1.3  # ratio of the volumes of tiles of which the better one does
SHARE_OF_MEMORY = 0.25


@dataclass(frozen=True)
class Problem:
    """A convolution without stride; extents (z, y, x), `before` and `after` are zeros around the image."""

    in_maps: int
    out_maps: int
    groups: int
    input: Extent
    kernel: Extent
    dilation: Extent
    before: Extent
    after: Extent

    @property
    def padded(self) -> Extent:
        return tuple(b + n + a for b, n, a in zip(self.before, self.input, self.after))

    @property
    def output(self) -> Extent:
        return tuple(n - d * (k - 1) for n, d, k in zip(self.padded, self.dilation, self.kernel))

    @property
    def flop(self) -> float:
        """Multiplications and additions of one image's forward pass, done directly."""
        return 2.0 * math.prod(self.output) * math.prod(self.kernel) * self.in_maps * self.out_maps / self.groups


@dataclass(frozen=True)
class Method:
    """How a problem is computed: `bundle` 1 is the direct method on single maps, otherwise see native/tiled."""

    name: str
    bundle: int
    tile: Extent = (1, 1, 1)

    def __str__(self) -> str:
        if self.bundle == 1:
            return "direct, single maps"
        return self.name + (f" {'x'.join(map(str, self.tile))}" if self.name != "direct" else "")


@lru_cache(maxsize=1024)
def ranked_methods(problem: Problem, backward: bool = True) -> tuple[Method, ...]:
    """Methods worth a measurement, by predicted seconds of a round, the least first; one core, one image.

    backward: the gradient of the input is wanted. Raises PlanError where there is none.
    """
    seconds: dict[Method, float] = {}
    group = problem.in_maps // problem.groups, problem.out_maps // problem.groups
    if problem.groups > 1:
        seconds[Method("direct", 1)] = 3 * problem.flop / MAPS_RATE
    if problem.groups == 1 or min(group) > 1:
        graph = _graph(problem, *group, backward)
        for bundle in bundled.widths():
            layer, = bundled.layers(graph, bundle)
            for candidate in layer.ranked():
                method = Method(candidate.method, bundle, candidate.transform or (1, 1, 1))
                if not any(_alike(method, other) for other in seconds):
                    seconds[method] = problem.groups * layer.predict(candidate)
    return tuple(sorted(seconds, key=seconds.get))


def _alike(a: Method, b: Method) -> bool:
    low, high = sorted((math.prod(a.tile), math.prod(b.tile)))
    return (a.name, a.bundle) == (b.name, b.bundle) and high < ALIKE * low


def _graph(problem: Problem, in_maps: int, out_maps: int, backward: bool) -> Graph:
    """One convolution, below parameters of which it needs the gradient if `backward`."""
    nodes = (NodeSpec("input", in_maps, "input"), NodeSpec("above", in_maps, "transfer", bias=backward),
             NodeSpec("output", out_maps, "transfer"))
    edges = (EdgeSpec("join", "identity", "input", "above"),
             EdgeSpec("conv", "conv", "above", "output", kernel=problem.kernel, sparsity=problem.dilation))
    return Graph.build(NetworkSpec("layer", nodes, edges), input=problem.padded)


# ---- layers in use ----------------------------------------------------------------------------------------
_layers: OrderedDict[tuple, Any] = OrderedDict()
_chosen: dict[Problem, Method] = {}  # by measurement, see replace_convs


def choose(problem: Problem, method: Method) -> None:
    """From now on compute `problem` by `method`."""
    _chosen[problem] = method


def method_of(problem: Problem) -> Method:
    """What was measured to be the fastest, else what the cost model likes best. Raises PlanError."""
    return _chosen.get(problem) or ranked_methods(problem)[0]


def native(problem: Problem, keep: bool, method: Method | None = None) -> Any:
    """The native layer of a problem. keep: it keeps spectra of its inputs for backward. Raises PlanError."""
    method = method or method_of(problem)
    key = problem, keep, method
    if key in _layers:
        _layers.move_to_end(key)
        return _layers[key]
    try:
        layer = _core.Layer(problem.in_maps, problem.out_maps, problem.groups, problem.input, problem.kernel,
                            problem.dilation, problem.before, problem.after, getattr(_core.Method, method.name),
                            method.bundle, method.tile, keep)
    except (ValueError, RuntimeError) as error:
        raise PlanError(str(error)) from None
    _layers[key] = layer
    while len(_layers) > LAYERS_KEPT:
        _layers.popitem(last=False)  # spectra still kept for a backward pass keep their layer alive
    return layer


def cache_name() -> str:
    """Names the file of measurements in ZNN's cache: those of one build do not hold for another."""
    build = _core.build_info()
    return f"torch-layers-{_core.isa()}-{build['version']}-{build['commit']}.json"


# ---- threads and memory -----------------------------------------------------------------------------------
_threads: int | None = None
_threads_now: int | None = None
_limit: int | None = None


def set_threads(count: int | None) -> None:
    """Threads that all layers share; None (as at first): as many as `torch.get_num_threads()` says at each call.

    Raises SpecError for anything but a whole number from 1.
    """
    global _threads
    _threads = None if count is None else options.whole("threads", count, 1, options.MOST_THREADS)


def threads() -> int:
    """The threads that the next call runs on."""
    return _threads or torch.get_num_threads()


def use_threads() -> None:
    """Have the number of threads set."""
    global _threads_now
    wanted = threads()
    if wanted != _threads_now:
        _core.set_team_threads(wanted)
        _threads_now = wanted


def set_memory_limit(limit: int | None) -> None:
    """Bytes of spectra that may be kept from forward to backward passes, over all layers; None: a quarter of the memory.

    Beyond it they are computed once more for the weights' gradients. Raises SpecError for anything but a whole number.
    """
    global _limit
    _limit = None if limit is None else options.whole("limit", limit, 0)


def memory_limit() -> int:
    return _limit if _limit is not None else _quarter_of_memory()


@lru_cache(maxsize=None)
def _quarter_of_memory() -> int:
    return int(SHARE_OF_MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def may_keep(layer: Any, batch: int) -> bool:
    """Whether the spectra of a batch fit under the limit."""
    return _core.team_bytes_in_use() + layer.kept_bytes(batch) <= memory_limit()


def memory() -> dict[str, int]:
    """Bytes held outside PyTorch: `kept` (spectra waiting for a backward pass) and `idle` (work space, spare blocks)."""
    return {"kept": _core.team_bytes_in_use(), "idle": _core.team_idle_bytes()}


def free_memory() -> None:
    """Give idle memory back to the system and forget the layers; they are made again when they are needed."""
    _layers.clear()
    _core.free_team_memory()


def _after_fork() -> None:
    global _threads_now
    _threads_now = None
    _layers.clear()  # their threads stayed behind


os.register_at_fork(after_in_child=_after_fork)
