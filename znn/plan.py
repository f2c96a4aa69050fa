"""The plan: which method, and which transform extent, each convolution layer uses, and how that is chosen.

A plan comes from a cost model (`model_plan`), from measurement on this machine (`autotune_plan`, the paper's layer-wise
autotuning), or from the user. It prints as a table and is stored as JSON.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from znn import _core, bundled, cache, fftw
from znn.bundled import Candidate
from znn.cost import MEMOIZE
from znn.cost import METHODS as EDGE_METHODS
from znn.cost import PhaseCost, edge_cost, smooth_extent, transform_extent
from znn.errors import PlanError
from znn.files import atomic_write
from znn.footprint import Footprint, Setting, within
from znn.graph import Graph, GraphEdge
from znn.spec import Extent, format_extent

FORMAT = "znn plan"
VERSION = 1
# Which methods an engine has: the paper's, with one map per node, or the one with bundles of maps.
OF_BUNDLE_1, OF_BUNDLES = EDGE_METHODS, bundled.METHODS
METHODS = tuple(dict.fromkeys(OF_BUNDLE_1 + OF_BUNDLES))
MOST_ALTERNATIVES = 6  # kept in a plan

# Rates of the cost model, in operations per second. Only their ratios decide; autotuning measures instead.
DIRECT_RATE, TRANSFORM_RATE, PRODUCT_RATE = 30e9, 12e9, 12e9
# A kernel transform skips the lines that are zero: of three passes one is whole.
PRUNED_SHARE = 0.4
EDGE_OVERHEAD_S = 1.5e-6


@dataclass(frozen=True)
class LayerPlan:
    """How one convolution layer is computed.

    transform: extent at which one sub-lattice is transformed (fft), or a tile (tiled, fused). seconds: of one round with one worker, by the
    model or as composed from measurements; alternatives: the same for the candidates not chosen, by their description.
    memoize: tiled keeps all spectra from the forward and backward pass for the update, else it makes them once more.
    """

    method: str
    transform: Extent | None = None
    seconds: float | None = None
    alternatives: Mapping[str, float] | None = None
    memoize: bool = True

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.method, self.transform, self.memoize)

    def describe(self) -> str:
        return self.candidate.describe()


@dataclass(frozen=True)
class Plan:
    """A method per convolution edge; `source` says where it came from: model, autotune or user."""

    layers: Mapping[str, LayerPlan]
    source: str = "user"

    @classmethod
    def uniform(cls, graph: Graph, method: str, bundle: int = 1) -> Plan:
        """The same method everywhere, at the default transform extents; depthwise layers in bundles are direct always.

        Raises PlanError.
        """
        methods = dict.fromkeys(conv_names(graph), method)
        if bundle != 1 and method in OF_BUNDLES:
            methods |= {edge.name: "direct" for edge in graph.edges if edge.spec.depthwise}
        return cls.of(graph, methods, bundle)

    @classmethod
    def of(cls, graph: Graph, methods: Mapping[str, str | tuple[str, Extent]], bundle: int = 1) -> Plan:
        """A plan by hand: {edge: method, or (method, transform or tile extent)}. Raises PlanError."""
        layers = {}
        for name, choice in methods.items():
            method, extent = (choice, None) if isinstance(choice, str) else choice
            if method not in METHODS:
                raise PlanError(f"method of edge {name!r} is {method!r}, expected one of {', '.join(METHODS)}")
            if method == "fft" and extent is None and name in conv_names(graph):
                extent = transform_extent(graph.edge(name))
            if method in ("tiled", "fused") and extent is None and bundle != 1 and name in conv_names(graph):
                extent = _bundled_layer(graph, name, bundle).first_tile()
            layers[name] = LayerPlan(method, tuple(extent) if extent else None)
        plan = cls(layers)
        plan.check(graph, bundle)
        return plan

    def check(self, graph: Graph, bundle: int = 1) -> None:
        """Raises PlanError unless this plan covers exactly the convolutions of `graph` with methods and extents that fit."""
        names = conv_names(graph)
        if set(self.layers) != set(names):
            odd = ", ".join(sorted(set(self.layers) ^ set(names)))
            raise PlanError(f"the plan covers {', '.join(self.layers) or 'nothing'}, expected exactly the convolutions "
                            f"{', '.join(names)} ({odd} missing or too many)")
        for name, layer in self.layers.items():
            known = OF_BUNDLE_1 if bundle == 1 else OF_BUNDLES
            if layer.method not in known:
                raise PlanError(f"method of edge {name!r} is {layer.method!r}, expected one of {', '.join(known)} "
                                f"with bundle {bundle}")
            if layer.method == "fft":
                _check_transform(graph.edge(name), layer.transform)
            if layer.method in ("tiled", "fused"):
                _bundled_layer(graph, name, bundle).native(layer.candidate)

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` reads it back."""
        layers = {name: {"method": p.method, "transform": p.transform, "seconds": p.seconds,
                         "alternatives": dict(p.alternatives) if p.alternatives else None, "memoize": p.memoize}
                  for name, p in self.layers.items()}
        return json.dumps({"format": FORMAT, "version": VERSION, "source": self.source, "layers": layers}, indent=1)

    @classmethod
    def from_json(cls, text: str, where: str = "plan") -> Plan:
        """Raises PlanError naming `where` for anything that is not a plan of a known version."""
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise PlanError(f"{where}: format is {data['format']!r}, expected {FORMAT!r}")
            if data["version"] > VERSION:
                raise PlanError(f"{where}: version {data['version']} is newer than this program's {VERSION}")
            layers = {name: LayerPlan(_known(where, name, p["method"]), tuple(p["transform"]) if p["transform"] else None,
                                      p.get("seconds"), p.get("alternatives"), bool(p.get("memoize", True)))
                      for name, p in data["layers"].items()}
            return cls(layers, data["source"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"{where} is not a plan as `znn plan` writes it: {error}") from None

    def save(self, path: str | os.PathLike) -> None:
        """Write JSON, atomically."""
        with atomic_write(path, "w") as file:
            file.write(self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> Plan:
        """Raises PlanError naming the file."""
        try:
            with open(path, encoding="utf-8") as file:
                return cls.from_json(file.read(), str(path))
        except OSError as error:
            raise PlanError(f"cannot read the plan {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise PlanError(f"{path} is not a plan: not UTF-8 text") from None

    def __str__(self) -> str:
        rows = [("layer", "method", "ms/round", "instead")]
        for name, layer in self.layers.items():
            others = layer.alternatives or {}
            rows.append((name, layer.describe(), "" if layer.seconds is None else f"{layer.seconds * 1e3:.3g}",
                         ", ".join(f"{other} {seconds * 1e3:.3g}" for other, seconds in others.items())))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]).rstrip() for row in rows]
        return "\n".join([f"plan from {self.source}", *lines])


def conv_names(graph: Graph) -> list[str]:
    """The convolution edge groups of a graph, in its order."""
    return [edge.name for edge in graph.edges if edge.kind == "conv"]


def _bundled_layer(graph: Graph, name: str, bundle: int) -> bundled.Layer:
    return next(layer for layer in bundled.layers(graph, bundle) if layer.name == name)


def needs_single_maps(plan: Any) -> bool:
    """Whether a plan, as `resolve` takes it, uses a method that bundles of maps do not have."""
    if isinstance(plan, (str, os.PathLike)) and os.path.isfile(plan):
        plan = Plan.load(plan)
    if isinstance(plan, Plan):
        return any(layer.method not in OF_BUNDLES for layer in plan.layers.values())
    choices = plan.values() if isinstance(plan, Mapping) else [plan]
    return any(choice == "fft" or (isinstance(choice, tuple) and choice[:1] == ("fft",)) for choice in choices)


@dataclass(frozen=True)
class Request:
    """What a plan is made for. memory_limit: bytes that a network of bundles may take, besides what the process holds;
    progress is told what is measured. Without training a round is a forward pass (inference).
    """

    patches: int = 1
    memoize: frozenset[str] = frozenset(MEMOIZE)
    bundle: int = 1
    threads: int = 1
    moments: int = 1
    input_gradient: bool = False
    memory_limit: int | None = None
    progress: Callable[[str], None] | None = None
    training: bool = True

    def setting(self, graph: Graph) -> Setting:
        return Setting(graph, self.bundle, self.patches, self.threads, self.moments, self.input_gradient, self.training)

    def layers(self, graph: Graph) -> list[bundled.Layer]:
        """The convolution layers, in bundles of maps."""
        return bundled.layers(graph, self.bundle, self.input_gradient, self.training, self.threads / self.patches)


def resolve(plan: Any, graph: Graph, request: Request | None = None, **asked: Any) -> Plan:
    """What `znn.Network(plan=...)` accepts, as a checked Plan, for a Request or the fields of one.

    plan: "model", "autotune", a method's name, a mapping as for `Plan.of`, a Plan, or the path of a saved one.
    Raises PlanError, also where the plan takes more than the memory limit.
    """
    request = request or Request(**asked)
    bundle = request.bundle
    if isinstance(plan, Plan):
        result = plan
    elif isinstance(plan, Mapping):
        result = Plan.of(graph, plan, bundle)
    elif plan == "model":
        result = model_plan(graph, request) if bundle == 1 else tiled_model_plan(graph, request)
    elif plan == "autotune":
        result = autotune_plan(graph, request) if bundle == 1 else tiled_autotune_plan(graph, request)
    elif isinstance(plan, str) and plan in METHODS:
        result = Plan.uniform(graph, plan, bundle)
    elif isinstance(plan, os.PathLike) or (isinstance(plan, str) and (os.path.exists(plan) or plan.endswith(".json"))):
        result = Plan.load(plan)
    else:
        raise PlanError(f"plan is {plan!r}, expected model, autotune, {', '.join(METHODS)}, a Plan, or the path of a saved one")
    result.check(graph, bundle)
    _check_memory(result, graph, request)
    return result


def resolve_width(plan: Any, graph: Graph, request: Request) -> tuple[Plan, Request]:
    """`resolve` for the width of bundles that this network is fastest with (1 where the plan has a method that only the paper's
    engine has): the plan, and the request with the width. Of those that are as fast, the widest that pads no more maps is taken:
    what a plan does not time, the work between convolutions, is faster in wide vectors.
    """
    if needs_single_maps(plan):
        single = replace(request, bundle=1)
        return resolve(plan, graph, single), single
    requests = [replace(request, bundle=width) for width in bundled.widths()]
    likely = _likely(graph, requests) if plan == "autotune" else requests
    found, refused = [], []
    for some in (likely, [each for each in requests if each not in likely]):
        for each in some:
            try:
                found.append((resolve(plan, graph, each), each))
            except PlanError as error:
                refused.append(error)
        if found:
            break
    if not found:
        raise refused[0]
    seconds = [_seconds(chosen, graph, each) for chosen, each in found]
    alike = [pair for pair, s in zip(found, seconds) if s <= (1 + bundled.SUMS_NOISE) * min(seconds)]
    inside = {edge.target for edge in graph.edges}  # what comes in is packed by the first layer, where it is a single map
    floats = [bundled.image_floats(graph, each.bundle, inside) for _, each in alike]
    return [pair for pair, count in zip(alike, floats) if count <= (1 + bundled.NOISE) * min(floats)][-1]


def _likely(graph: Graph, requests: Sequence[Request]) -> list[Request]:
    """Those that are not clearly slower by the model, whatever memory they take."""
    free = [replace(request, memory_limit=None) for request in requests]
    predicted = [_seconds(tiled_model_plan(graph, each), graph, each) for each in free]
    return [request for request, s in zip(requests, predicted) if s <= bundled.WORTH_MEASURING * min(predicted)]


def _seconds(plan: Plan, graph: Graph, request: Request) -> float:
    """Seconds of a round on one core: of convolutions as the plan has them (predicted where it does not say), of other edges what
    reading and writing their images takes.
    """
    total = request.patches * bundled.image_seconds(graph, request.bundle, request.training)
    for layer in request.layers(graph):
        known = plan.layers[layer.name]
        total += request.patches * layer.predict(known.candidate) if known.seconds is None else known.seconds
    return total


def footprint(plan: Plan, graph: Graph, request: Request) -> Footprint:
    """The memory of a network of bundles with this plan."""
    chosen = {name: layer.candidate for name, layer in plan.layers.items()}
    return request.setting(graph).footprint(request.layers(graph), chosen)


def _check_memory(plan: Plan, graph: Graph, request: Request) -> None:
    if request.memory_limit is None:
        return
    if request.bundle == 1:
        raise PlanError(f"memory_limit is {request.memory_limit}, which the paper's engine cannot keep: expected bundle 8 or 'auto'")
    needed = footprint(plan, graph, request).total
    if needed > request.memory_limit:
        raise PlanError(f"memory limit {request.memory_limit} bytes is too small for this plan of {graph.spec.name}: expected {needed} "
                        "bytes, or plan 'model' or 'autotune', which may recompute spectra")


# ---- the cost model ---------------------------------------------------------------------------------------
def model_plan(graph: Graph, request: Request = Request()) -> Plan:
    """The method with fewer predicted seconds per layer, at fixed rates of operations."""
    wanted, layers = request.setting(graph).wanted, {}
    for name in conv_names(graph):
        edge = graph.edge(name)
        seconds = {method: request.patches * _model_seconds(graph, edge, method, request, wanted[edge.source])
                   for method in EDGE_METHODS}
        best = min(seconds, key=seconds.get)
        extent = transform_extent(edge) if best == "fft" else None
        others = {method: value for method, value in seconds.items() if method != best}
        layers[name] = LayerPlan(best, extent, seconds[best], others)
    return Plan(layers, "model")


def _phases(graph: Graph, edge: GraphEdge, method: str, request: Request, backward: bool) -> dict[str, PhaseCost]:
    """The costs of the phases that a round has; backward: the gradient of the edge's source is wanted."""
    phases = edge_cost(graph, edge, method, request.memoize, backward).phases
    return {name: phase for name, phase in phases.items() if request.training or name == "forward"}


def _model_seconds(graph: Graph, edge: GraphEdge, method: str, request: Request, backward: bool) -> float:
    phases = _phases(graph, edge, method, request, backward).values()
    if method == "direct":
        # Rows shorter than a vector waste the rest of it.
        waste = max(1.0, 8 / edge.out_extent[2])
        tasks = sum(phase.multiply_adds > 0 for phase in phases) * _pairs(graph, edge)
        return sum(phase.flop for phase in phases) * waste / DIRECT_RATE + tasks * EDGE_OVERHEAD_S
    extent = transform_extent(edge)
    one = 2.5 * math.prod(extent) * math.log2(max(2, math.prod(extent)))
    lattices = math.prod(edge.sparsity)
    seconds = 0.0
    for phase in phases:
        whole = (phase.image_transforms + phase.inverse_transforms) * lattices
        seconds += (whole + PRUNED_SHARE * phase.kernel_transforms) * one / TRANSFORM_RATE
        seconds += 8 * phase.multiply_adds / PRODUCT_RATE
        seconds += _pairs(graph, edge) * EDGE_OVERHEAD_S * (phase.multiply_adds > 0)
    return seconds


def _pairs(graph: Graph, edge: GraphEdge) -> int:
    fan_in = 1 if edge.spec.depthwise else graph.nodes[edge.source].maps
    return fan_in * graph.nodes[edge.target].maps


# ---- autotuning -------------------------------------------------------------------------------------------
PIECES = ("encode_image", "encode_gradient", "encode_padding", "transform_kernel", "forward", "backward", "update",
          "decode_forward", "decode_backward")
LEAST_SAMPLES, MOST_SAMPLES, PIECE_BUDGET_S, SPREAD = 5, 40, 0.06, 0.05


def candidates(edge: GraphEdge) -> list[Candidate]:
    """What is worth measuring for one layer: direct, and fft at the smallest smooth extents."""
    sub = [-(-n // s) for n, s in zip(edge.in_extent, edge.sparsity)]
    smooth = tuple(smooth_extent(n) for n in sub)
    found = [Candidate("direct", None), Candidate("fft", smooth)]
    for next_extent in (tuple(_power_extent(n) for n in sub),):
        if next_extent != smooth and math.prod(next_extent) <= 1.6 * math.prod(smooth):
            found.append(Candidate("fft", next_extent))
    return found


@lru_cache(maxsize=None)
def _power_extent(n: int) -> int:
    """The smallest extent >= n of the form 2^a 3^b with a >= 2: longer, yet often faster to transform. 1 stays 1."""
    if n == 1:
        return 1
    size = max(4, n)
    while True:
        rest = size
        while rest % 3 == 0:
            rest //= 3
        if size % 4 == 0 and rest & (rest - 1) == 0:
            return size
        size += 1


def autotune_plan(graph: Graph, request: Request = Request()) -> Plan:
    """Choose per layer by timing one edge of it in all phases, one candidate after the other in turns.

    The seconds of a layer are composed from those of its pieces (transforms, products, ...), so that a layer of f x f'
    edges costs no more to tune than one edge. Timings are cached per machine.
    """
    wanted, layers = request.setting(graph).wanted, {}
    fftw.load()
    for name in conv_names(graph):
        edge = graph.edge(name)
        pieces = _measured_pieces(graph, edge, request.patches, request.progress)
        seconds = {candidate: compose_seconds(graph, edge, candidate.method, piece, request, wanted[edge.source])
                   for candidate, piece in pieces.items()}
        layers[name] = _layer_plan(min(seconds, key=seconds.get), seconds, 1)
    fftw.keep_wisdom()
    return Plan(layers, "autotune")


def compose_seconds(graph: Graph, edge: GraphEdge, method: str, piece: Mapping[str, float], request: Request,
                    backward: bool) -> float:
    """Seconds of a layer's round with one worker from the seconds of its pieces (counts: paper.md's table)."""
    pairs, g, phases = _pairs(graph, edge), graph.nodes[edge.target].maps, _phases(graph, edge, method, request, backward)
    done = [name for name, phase in phases.items() if phase.multiply_adds]
    total = pairs * (sum(piece[name] for name in done) + EDGE_OVERHEAD_S)
    if method == "direct":
        return total + g * piece["encode_padding"] * ("backward" in done)
    for name, phase in phases.items():
        images = "encode_gradient" if name == "backward" else "encode_image"
        inverse = "decode_backward" if name == "backward" else "decode_forward"
        total += phase.image_transforms * piece[images] + phase.inverse_transforms * piece[inverse]
        # The update's inverse kernel transforms are inside its piece; only those recomputed are counted here.
        total += (phase.kernel_transforms if name != "update" else 0) * piece["transform_kernel"]
    return total


def _measured_pieces(graph: Graph, edge: GraphEdge, patches: int,
                     progress: Callable[[str], None] | None) -> dict[Candidate, dict[str, float]]:
    """Median seconds of every piece of every candidate, from the cache or by measurement in turns."""
    keys = {candidate: _cache_key(graph, edge, candidate, patches) for candidate in candidates(edge)}
    known = _read_timings()
    missing = [candidate for candidate, key in keys.items() if key not in known]
    if missing:
        if progress:
            progress(f"{edge.name}: timing {', '.join(c.describe() for c in keys)}")
        # All of a layer are measured together: timings of different moments do not compare.
        for candidate, piece in _measure(graph, edge, list(keys), patches).items():
            known[keys[candidate]] = piece
        _write_timings(known)
    return {candidate: known[key] for candidate, key in keys.items()}


def _measure(graph: Graph, edge: GraphEdge, tried: list[Candidate], patches: int) -> dict[Candidate, dict[str, float]]:
    f, pairs = graph.nodes[edge.source].maps, _pairs(graph, edge)
    probes = {c: _core.ConvProbe(getattr(_core.Method, c.method), edge.in_extent, edge.kernel, edge.sparsity, patches,
                                 c.transform or (1, 1, 1), f, pairs) for c in tried}
    return {c: piece for c, piece in zip(tried, _interleave([_Sampler(probe) for probe in probes.values()]))}


class _Sampler:
    """Samples of all pieces of one candidate; done when the medians are steady or the budget is spent."""

    def __init__(self, probe: Any) -> None:
        self.probe, self.samples, self.spent = probe, {piece: [] for piece in PIECES}, 0.0
        for piece in PIECES:  # warm-up
            probe.run(getattr(_core.ConvProbe.Piece, piece))

    def lap(self) -> None:
        for piece, values in self.samples.items():
            values.append(self.probe.run(getattr(_core.ConvProbe.Piece, piece)))
            self.spent += values[-1]

    @property
    def done(self) -> bool:
        count = len(self.samples["forward"])
        if count < LEAST_SAMPLES:
            return False
        return count >= MOST_SAMPLES or self.spent > PIECE_BUDGET_S * len(PIECES) or all(map(_steady, self.samples.values()))


def _steady(values: list[float]) -> bool:
    """The noise guard: the quarter points are within SPREAD of the median (or below the clock's resolution)."""
    low, middle, high = statistics.quantiles(values, n=4)
    return high - low <= max(SPREAD * middle, 2e-7)


def _interleave(samplers: list[_Sampler]) -> list[dict[str, float]]:
    while not all(sampler.done for sampler in samplers):
        for sampler in samplers:
            sampler.lap()
    return [{piece: statistics.median(values) for piece, values in s.samples.items()} for s in samplers]


# ---- bundles ----------------------------------------------------------------------------------------------
def tiled_model_plan(graph: Graph, request: Request) -> Plan:
    """Per layer the method and tile extent with the fewest seconds predicted by the native cost model."""
    layers = request.layers(graph)
    return _tiled_plan("model", graph, request, layers,
                       {layer.name: {c: layer.predict(c) for c in layer.explored(layer.ranked())} for layer in layers})


def tiled_autotune_plan(graph: Graph, request: Request, exhaustive: bool = False) -> Plan:
    """Choose per layer by timing the likeliest candidates, phase by phase (see `znn.bundled`); exhaustive: all there are."""
    layers, seconds = request.layers(graph), {}
    for layer in layers:
        measured = layer.searched(request.progress) if exhaustive else layer.measured(request.progress)
        seconds[layer.name] = {candidate: layer.total(candidate, phases) for candidate, phases in measured.items()}
    return _tiled_plan("autotune", graph, request, layers, seconds)


@dataclass(frozen=True)
class Search:
    """A layer's choice beside the best of `candidates` that were all timed: seconds of a round of both, taken in turns."""

    layer: str
    chosen: str
    best: str
    seconds: tuple[float, ...]
    best_seconds: tuple[float, ...]
    candidates: int


def exhaustive_search(graph: Graph, plan: Plan, request: Request, repeats: int = 1) -> list[Search]:
    """Time all candidates of every layer that are not hopeless by the model, then the best and the plan's once more, in turns,
    `repeats` times. Minutes; for networks of bundles. Raises PlanError.
    """
    best, found = tiled_autotune_plan(graph, request, exhaustive=True), []
    for layer in request.layers(graph):
        pair = [p.layers[layer.name].candidate for p in (plan, best)]
        again = [layer.timed_again(pair) for _ in range(repeats)]
        seconds = [tuple(layer.total(candidate, phases[candidate]) for phases in again) for candidate in pair]
        found.append(Search(layer.name, pair[0].describe(), pair[1].describe(), *seconds, len(layer.everything())))
    return found


def _tiled_plan(source: str, graph: Graph, request: Request, layers: Sequence[bundled.Layer],
                seconds: Mapping[str, Mapping[Candidate, float]]) -> Plan:
    """The fastest candidates, or those within the memory limit."""
    if request.memory_limit is None or request.bundle == 1:
        chosen = {layer.name: layer.choose(seconds[layer.name]) for layer in layers}
    else:
        seconds = {layer.name: _smaller(layer, seconds[layer.name]) for layer in layers}
        chosen = within(request.setting(graph), layers, seconds, request.memory_limit)
    return Plan({name: _layer_plan(best, seconds[name], request.patches) for name, best in chosen.items()}, source)


def _smaller(layer: bundled.Layer, seconds: Mapping[Candidate, float]) -> dict[Candidate, float]:
    """The candidates with those that take less memory, at seconds in proportion to their predictions."""
    found = dict(seconds)
    fastest = min(seconds, key=seconds.get)
    scale = seconds[fastest] / layer.predict(fastest)
    for candidate in (*seconds, *(c for c in layer.ranked() if c.method == "direct")):
        for other in (candidate, replace(candidate, memoize=False)):
            if other not in found and (other.memoize or not layer.keeps(other)):
                base = seconds[candidate] / layer.predict(candidate) if candidate in seconds else scale
                found[other] = base * layer.predict(other)
    return found


def _layer_plan(best: Candidate, seconds: Mapping[Candidate, float], patches: int) -> LayerPlan:
    others = sorted((c for c in seconds if c != best), key=seconds.get)[:MOST_ALTERNATIVES]
    instead = {c.describe(): patches * seconds[c] for c in others}
    return LayerPlan(best.method, best.transform, patches * seconds[best], instead or None, best.memoize)


def _cache_key(graph: Graph, edge: GraphEdge, candidate: Candidate, patches: int) -> str:
    maps = graph.nodes[edge.source].maps, graph.nodes[edge.target].maps
    return repr((candidate.describe(), edge.in_extent, edge.kernel, edge.sparsity, patches, maps, edge.spec.depthwise))


def _timings_name() -> str:
    build = _core.build_info()
    return f"timings-{_core.isa()}-{_core.fftw_version()}-{_core.fftw_rigour()}-{build['version']}.json"


def _read_timings() -> dict[str, dict[str, float]]:
    text = cache.read_text(_timings_name())
    try:
        data = json.loads(text) if text else {}
        return {key: value for key, value in data.items() if set(value) == set(PIECES)}
    except (ValueError, AttributeError, TypeError):
        return {}  # damaged: measured again and overwritten


def _write_timings(timings: Mapping[str, Mapping[str, float]]) -> None:
    cache.write_text(_timings_name(), json.dumps(timings, indent=0, sort_keys=True))




def _known(where: str, name: str, method: str) -> str:
    if method not in METHODS:
        raise PlanError(f"{where}: method of edge {name!r} is {method!r}, expected one of {', '.join(METHODS)}")
    return method


def _check_transform(edge: GraphEdge, transform: Extent | None) -> None:
    needed = tuple(-(-n // s) for n, s in zip(edge.in_extent, edge.sparsity))
    fits = transform is not None and len(transform) == 3 and all(
        isinstance(t, int) and n <= t and (t == 1 or n > 1) for t, n in zip(transform, needed))
    if not fits:
        raise PlanError(f"transform extent of edge {edge.name!r} is {transform}, expected at least {needed} "
                        f"for an image of extent {edge.in_extent} at sparsity {edge.sparsity} (and 1 where that is 1)")
