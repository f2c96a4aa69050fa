"""The network as the user holds it: options are checked here, work is done by the native engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from znn import _core, fftw, options
from znn import plan as planning
from znn.errors import DataError, EngineError, SpecError, ZnnError
from znn.footprint import Footprint
from znn.graph import Graph, GraphEdge, GraphNode
from znn.init import initial_parameters
from znn.options import SGD, Adam
from znn.spec import NetworkSpec
from znn.trace import EVENT, Trace

Arrays = np.ndarray | Mapping[str, np.ndarray]
PHASES = ("forward", "backward", "update", "loss", "input")
KINDS = ("conv", "max_filter", "max_pool", "dropout", "crop", "identity", "node", "transform", "loss", "input")


class Network:
    """A network with extents, parameters and workers, ready to be trained or used.

    spec       a NetworkSpec or a Graph; with a spec, `output` or `input` gives the extents (see `Graph.build`)
    threads    workers, the calling thread among them; default: one per usable physical core
    bundle     maps per node: 1 is the paper's engine, 8 (or 16) the bundled one, "auto" the fastest that this network,
               plan and processor allow; policy, sum, memoize and allocator are matters of the paper's engine
    plan       "model", "autotune", a method's name (bundle 1: direct, fft; bundles: direct, tiled, in depthwise layers
               direct always), a mapping {edge: method}, a Plan, or the path of a saved one
    policy     order of ready tasks: priority (the paper's), fifo, lifo, stealing
    sum        sums of converging images: wait-free (the paper's), locked, ordered (bit-identical for any threads)
    memoize    spectra kept between the phases: some of kernels, images, gradients
    allocator  pools (the paper's) or malloc
    patches    patches per round (a minibatch)
    seed       of the initial parameters and of dropout
    parameters as `parameters()` returns them, instead of initial ones
    optimiser  a `znn.SGD` or `znn.Adam`
    trace      record who ran which task when, see `trace()`
    pin        pin each worker to a core
    input_gradient  also propagate the gradient to the inputs
    memory_limit    bytes that a network of bundles may take besides what the process holds already: plans "model" and
                    "autotune" then recompute spectra where that costs least; PlanError names the least that is possible
    progress        called with a line about what is measured, while planning
    training        False: for inference alone; plan and memory are made for forward passes, and to train raises EngineError

    Arrays are float32 in C order, (maps, z, y, x), or (patches, maps, z, y, x); with several inputs or outputs,
    dicts of them by node name. Calls may come from any thread; they run one after the other.
    Raises SpecError, PlanError or DataError, naming what is wrong, before any work starts.
    """

    def __init__(self, spec: NetworkSpec | Graph, output: Any = None, input: Any = None, *,  # noqa: A002
                 threads: int | None = None, bundle: int | str = 1, plan: Any = "model", policy: str = "priority", sum: str = "wait-free",
                 memoize: Iterable[str] = options.MEMOIZE, allocator: str = "pools", patches: int = 1, seed: int = 0,
                 parameters: Mapping[str, np.ndarray] | None = None, optimiser: SGD | Adam = SGD(), trace: bool = False,
                 pin: bool = True, input_gradient: bool = False, memory_limit: int | None = None,
                 progress: Callable[[str], None] | None = None, training: bool = True) -> None:
        self._lock = threading.RLock()
        self._core: Any = None
        self.graph = _graph(spec, output, input)
        self.patches = options.whole("patches", patches, 1, 4096)
        self.seed = options.whole("seed", seed, 0)
        self._settings = settings = _core.NetworkOptions()
        settings.policy = getattr(_core.Policy, options.choice("policy", policy, options.POLICIES))
        settings.sum = getattr(_core.SumKind, options.choice("sum", sum, options.SUMS).replace("-", "_"))
        settings.allocator = getattr(_core.Allocator, options.choice("allocator", allocator, options.ALLOCATORS))
        settings.loss = getattr(_core.Loss, self.graph.spec.loss)
        kept = options.memoization(memoize)
        for name in options.MEMOIZE:
            setattr(settings, f"memoize_{name}", name in kept)
        settings.threads = _thread_count(threads)
        settings.patches, settings.seed = self.patches, self.seed
        settings.pin, settings.trace, settings.input_gradient = bool(pin), bool(trace), bool(input_gradient)
        if input_gradient and not training:
            raise SpecError("input_gradient is True with training=False; expected training=True, gradients need a backward pass")
        if not isinstance(optimiser, (SGD, Adam)):
            raise SpecError(f"optimiser is {optimiser!r}, expected a znn.SGD or znn.Adam")
        self.optimiser = optimiser
        settings.second_moments = optimiser.second_moments
        if memory_limit is not None:
            options.whole("memory_limit", memory_limit, 1)
        self.plan_request = planning.Request(self.patches, kept, _bundle(bundle), settings.threads, 1 + optimiser.second_moments,
                                             settings.input_gradient, memory_limit, progress, bool(training))
        if bundle == "auto":
            self.plan, self.plan_request = planning.resolve_width(plan, self.graph, self.plan_request)
        else:
            self.plan = planning.resolve(plan, self.graph, self.plan_request)
        settings.bundle = self.bundle = self.plan_request.bundle
        parameters = initial_parameters(self.graph, self.seed) if parameters is None else parameters
        self._check_state(parameters, complete=True)
        self._build(parameters)

    def _build(self, parameters: Mapping[str, np.ndarray]) -> None:
        if any(layer.method == "fft" for layer in self.plan.layers.values()):
            fftw.load()
        nodes = [_node_description(self.graph, node) for node in self.graph.nodes]
        edges = [_edge_description(edge, self.plan) for edge in self.graph.edges]
        self._core = self._run(lambda: _core.Network(nodes, edges, self._settings))
        fftw.keep_wisdom()
        self._set_state(parameters, "value")
        self.learning_rate = self.optimiser.rate

    # ---- rounds -------------------------------------------------------------------------------------------
    def forward(self, inputs: Arrays, phase: str = "infer") -> Any:
        """The outputs for `inputs`; in the phase "train" dropout is active and `backward` may follow.

        Returns an array, or a dict by name where there are several outputs. Raises DataError, EngineError.
        """
        training = options.choice("phase", phase, ("infer", "train")) == "train"
        with self._open(training):
            return self._run(self._core.forward, inputs, training)

    def backward(self, output_gradients: Arrays) -> None:
        """Propagate gradients with respect to the outputs of the last `forward(..., phase="train")` and update.

        The gradients are divided by the output voxels (patches * z * y * x), as the paper divides the rate. The updates
        are left queued and overlap the next forward pass. Raises DataError, EngineError.
        """
        with self._open(training=True):
            self._run(self._core.backward, output_gradients)

    def train_step(self, inputs: Arrays, targets: Arrays, weights: Arrays | None = None) -> float:
        """Forward, loss, backward and update; returns the loss per output voxel.

        targets: like the outputs. weights: like the outputs, multiply the voxels' terms of the loss (0: masked); softmax
        takes one weight per voxel, the same for all maps. Raises DataError, EngineError.
        """
        with self._open(training=True):
            if weights is not None and self.graph.spec.loss == "softmax":
                self._check_equal(weights)
            return self._run(self._core.train_step, inputs, targets, weights)

    def input_gradient(self) -> Any:
        """The gradient of the last round with respect to the inputs, divided like the loss by the output voxels.

        Raises EngineError unless the network was built with input_gradient=True and a backward pass has run.
        """
        with self._open():
            if not self._settings.input_gradient:
                raise EngineError("the input gradient is not computed: build the network with input_gradient=True")
            return self._run(self._core.input_gradients)

    def sync(self) -> None:
        """Wait for the queued updates."""
        with self._open():
            self._run(self._core.sync)

    # ---- state --------------------------------------------------------------------------------------------
    def parameters(self) -> dict[str, np.ndarray]:
        """Copies of all parameters: kernels (out, in, z, y, x) by edge name, biases (maps,) by node name."""
        return self._get_state("value")

    def set_parameters(self, parameters: Mapping[str, np.ndarray]) -> None:
        """Replace some or all parameters. Raises DataError and changes nothing if any does not fit."""
        with self._open():
            self._check_state(parameters)
            self._set_state(parameters, "value")

    def momenta(self) -> dict[str, np.ndarray]:
        """Copies of the optimiser's momenta, named and shaped like the parameters."""
        return self._get_state("momentum")

    def set_momenta(self, momenta: Mapping[str, np.ndarray]) -> None:
        """Replace some or all momenta. Raises DataError and changes nothing if any does not fit."""
        with self._open():
            self._check_state(momenta)
            self._set_state(momenta, "momentum")

    def second_moments(self) -> dict[str, np.ndarray]:
        """Copies of Adam's running means of squared gradients, named and shaped like the parameters; {} with SGD."""
        return self._get_state("second_moment") if self.optimiser.second_moments else {}

    def set_second_moments(self, second_moments: Mapping[str, np.ndarray]) -> None:
        """Replace some or all second moments. Raises DataError and changes nothing if any does not fit, is negative, or
        the optimiser has none."""
        with self._open():
            self._check_state(second_moments)
            if second_moments and not self.optimiser.second_moments:
                raise DataError(f"second moments are given, but {self.optimiser} has none")
            if any(np.any(value < 0) for value in second_moments.values()):
                raise DataError("second moments are means of squares: expected no negative number")
            self._set_state(second_moments, "second_moment")

    @property
    def round(self) -> int:
        """Rounds trained so far; dropout's masks depend on it."""
        with self._open():
            return self._core.round

    @round.setter
    def round(self, value: int) -> None:
        with self._open():
            self._core.round = options.whole("round", value, 0)

    @property
    def learning_rate(self) -> float:
        """The rate of the next round; starts as the optimiser's."""
        return self._rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        rate = options.number("learning_rate", value, 0)
        with self._open():
            self._core.set_step(*self.optimiser.step(rate))
            self._rate = rate

    # ---- what happened ------------------------------------------------------------------------------------
    @property
    def threads(self) -> int:
        """Number of workers."""
        return self._settings.threads

    def stats(self) -> dict[str, Any]:
        """Counters since the network was built: tasks run, updates FORCEd, forward tasks delegated, transforms by kind,
        memory; with trace=True also seconds per worker in tasks, queue, idle and locks, and the critical path of the last
        pass in seconds (forward, backward)."""
        with self._open():
            self._run(self._core.sync)
            workers = self._core.workers
            counters = {f"{name}_s": [worker[f"{name}_s"] for worker in workers] for name in ("task", "queue", "idle", "lock")}
            return {
                **{name: int(np.sum([worker[name] for worker in workers])) for name in ("tasks", "forced", "delegated")},
                "transforms": dict(self._core.transforms),
                **counters,
                "critical_path_s": tuple(self._core.critical_path_s),
                "pool_bytes": self._core.pool_bytes,
                "pool_blocks": self._core.pool_blocks,
                "kernel_spectra_bytes": self._core.kernel_spectra_bytes,
                "processors": list(self._core.processors),
            }

    def memory(self) -> Footprint:
        """Bytes by what they hold, as planned; of networks of bundles. Raises SpecError for the paper's engine."""
        if self.bundle == 1:
            raise SpecError("memory is planned for networks of bundles: expected bundle 8 or 'auto', got 1")
        return planning.footprint(self.plan, self.graph, self.plan_request)

    def trace(self) -> Trace:
        """The events recorded since the last call (waits for queued updates). Needs trace=True."""
        with self._open():
            if not self._settings.trace:
                raise EngineError("nothing is traced: build the network with trace=True")
            events = self._run(self._core.take_events).astype(EVENT, copy=False)
            # Groups of edges come first in the table of names, groups of nodes after them.
            events["group"][events["kind"] >= KINDS.index("node")] += len(self.graph.edges)
            names = {"phase": PHASES, "kind": KINDS,
                     "group": [edge.name for edge in self.graph.edges] + [node.name for node in self.graph.nodes]}
            counters = {name: value for name, value in self.stats().items() if name in ("queue_s", "idle_s", "lock_s")}
            longest = dict(zip(("forward", "backward"), self._core.critical_path_s))
            return Trace(np.sort(events, order="start_ns"), names, counters, last_pass_s=longest)

    def close(self) -> None:
        """Wait for queued updates and end the workers; the network cannot be used afterwards."""
        with self._lock:
            self._core = None

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._core is None else f"{self.threads} threads"
        return f"<znn.Network {self.graph.spec.name!r}, {self.graph.parameter_count} parameters, {state}>"

    # ---- the border ---------------------------------------------------------------------------------------
    def _open(self, training: bool = False) -> threading.RLock:
        if self._core is None:
            raise EngineError(f"network {self.graph.spec.name!r} is closed")
        if training and not self.plan_request.training:
            raise EngineError(f"network {self.graph.spec.name!r} was built with training=False, for inference alone; expected a "
                              "forward pass in the phase 'infer'")
        return self._lock

    def _run(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Engine errors as ours; running out of memory stays a MemoryError."""
        try:
            return call(*arguments)
        except MemoryError:
            raise MemoryError(f"not enough memory for network {self.graph.spec.name!r}: use a smaller patch or fewer maps, "
                              "or plan='direct', which keeps no spectra") from None
        except (RuntimeError, ValueError, TypeError) as error:
            if isinstance(error, ZnnError):
                raise
            raise EngineError(str(error)) from error

    def _check_equal(self, weights: Arrays) -> None:
        """Raises DataError where weights differ between maps."""
        self._run(self._core.check_weights, weights)
        for array in weights.values() if isinstance(weights, Mapping) else [weights]:
            if not np.array_equal(array, np.broadcast_to(array[..., :1, :, :, :], array.shape)):
                raise DataError("weights differ between the maps of a voxel, expected the same for all with loss 'softmax'")

    def _check_state(self, state: Mapping[str, np.ndarray], complete: bool = False) -> None:
        if not isinstance(state, Mapping):
            raise DataError(f"parameters are a {type(state).__name__}, expected a dict of arrays by name")
        shapes = self.graph.parameter_shapes
        for name, value in state.items():
            if name not in shapes:
                raise DataError(f"there is no parameter {name!r}, expected some of {', '.join(shapes)}")
            _core.check_data(value, f"parameter {name!r}", [shapes[name]])
        missing = [name for name in shapes if name not in state]
        if complete and missing:
            raise DataError(f"parameters lack {', '.join(missing)}")

    def _each_parameter(self) -> Iterable[tuple[str, str, int]]:
        for name in self.graph.parameter_shapes:
            is_edge = any(edge.name == name and edge.kind == "conv" for edge in self.graph.edges)
            item = self.graph.edge(name) if is_edge else self.graph.node(name)
            yield name, "kernels" if is_edge else "biases", item.index

    def _get_state(self, which: str) -> dict[str, np.ndarray]:
        state = getattr(_core.Network.State, which)
        with self._open():
            return {name: self._run(lambda: getattr(self._core, f"get_{kind}")(index, state))
                    for name, kind, index in self._each_parameter()}

    def _set_state(self, state: Mapping[str, np.ndarray], which: str) -> None:
        kept = getattr(_core.Network.State, which)
        for name, kind, index in self._each_parameter():
            if name in state:
                self._run(lambda: getattr(self._core, f"set_{kind}")(index, kept, np.ascontiguousarray(state[name])))


def _graph(spec: Any, output: Any, input: Any) -> Graph:  # noqa: A002
    if isinstance(spec, Graph):
        if output is not None or input is not None:
            raise SpecError("a Graph has its extents: give output= or input= only with a NetworkSpec")
        return spec
    return Graph.build(spec, output=output, input=input)


def _bundle(bundle: Any) -> int:
    """Maps per bundle; for "auto" a number that the plan replaces."""
    if bundle == "auto":
        return 1
    if bundle != 1 and not (isinstance(bundle, int) and _core.has_bundle(bundle)):
        raise SpecError(f"bundle is {bundle!r}, expected 1, 8" + (", 16" if _core.has_bundle(16) else "") + " or 'auto'")
    return int(bundle)


def _thread_count(threads: int | None) -> int:
    if threads is None:
        return len(_core.usable_physical_cores())
    return options.whole("threads", threads, 1, options.MOST_THREADS)


def _node_description(graph: Graph, node: GraphNode) -> Any:
    return _core.NodeGroupDescription(
        name=node.name, maps=node.maps, extent=node.extent, input=node.name in graph.inputs,
        output=node.name in graph.outputs, bias=node.spec.kind == "transfer" and node.spec.bias,
        transfer=getattr(_core.Transfer, node.spec.transfer), rate=node.spec.rate)


def _edge_description(edge: GraphEdge, plan: planning.Plan) -> Any:
    ones = (1, 1, 1)
    layer = plan.layers.get(edge.name)
    return _core.EdgeGroupDescription(
        name=edge.name, kind=getattr(_core.EdgeKind, edge.kind), source=edge.source, target=edge.target,
        kernel=edge.kernel or ones, sparsity=edge.sparsity, window=edge.window or ones, stride=edge.stride,
        offset=edge.offset or (0, 0, 0), ratio=edge.spec.ratio or 0.0, depthwise=edge.spec.depthwise, rate=edge.spec.rate,
        decay=edge.spec.weight_decay, method=getattr(_core.Method, layer.method if layer else "direct"),
        transform=(layer.transform if layer else None) or ones, memoize=layer.memoize if layer else True)
