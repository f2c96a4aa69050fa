"""How layers of bundles of maps may be computed, and what that takes: by the native cost model, by measurement on this
machine, in memory, and at least, by the machine's roofline.

A *candidate* is a method with its tile extent. The cost model ranks them all; a few that differ are timed, then a few
like the best of those; what was timed is kept with the machine, for all layers of the same shape.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from znn import _core, cache
from znn.cost import gradient_nodes
from znn.errors import PlanError
from znn.graph import Graph, GraphEdge
from znn.spec import Extent, format_extent

METHODS = ("direct", "tiled", "fused")
FUSED_MAPS = 4  # most input maps of the fused method (native/tiled/tiled.hpp)

# The phases of native/tiled/tiled.hpp in the passes that the engine runs them in: kernels are transformed after the update.
PASSES = {"forward": (2, 3, 4), "backward": (5, 6, 7, 8), "update": (9, 10, 0, 1)}
INPUT_TRANSFORM, GRADIENT_TRANSFORM, UPDATE_PRODUCT = 2, 5, 9
# Its buffers: transformed kernels, those of a layer and a patch, those that layers share, and the sums of kernel gradients, which
# are either.
KERNELS, OF_BACKWARD, OWN, INPUT_SPECTRA, SHARED_SPECTRA, HALO, SUMS = 0, 1, (2, 4, 7), 2, (3, 5), 6, 7
SPECTRA_OF = {2: 2, 3: 3, 5: 4, 6: 5}  # the buffers that phases write spectra to

SHARED_SUMS_BYTES = _core.SHARED_SUMS_BYTES  # a layer's buffer of kernel gradients, from which on layers share one
SMALL_WINDOW = _core.SMALL_WINDOW  # voxels of the largest max-filter whose windows are compared at once
scratch_room = _core.scratch_room  # bytes that a worker's scratch of so many takes
EXPLORED, REFINED = 4, 2  # candidates timed: that differ, and like the best of those
ALIKE = 1.3  # ratio of the tiles' volumes
RANKED, ALL = 60, 1 << 20  # tile extents that the model is asked for
WORTH_MEASURING = 1.6  # times the best prediction
WORTH_SEARCHING = 2.0  # the same for an exhaustive search: beyond it the model would have to be wrong by as much
ROUGHLY = 1.4  # and by short probes, times the best
CLEARLY_SLOWER = 1.25  # times the best measured so far: not timed further
NOISE, SUMS_NOISE = 0.03, 0.01  # within this of the best measured, the model decides; of sums over layers, the padding does
PROBE_S, TOGETHER = 0.02, 6  # about the seconds of one lap of a probe; probes held at once
FUSED_PROBE_S = 0.3  # of the fused method, whose output and sums, larger than the caches, a part would find there again
# Laps after the first, which meets cold memory: at least, and at most; seconds of a probe that are enough if they were quiet, and
# that are if not.
LAPS, ENOUGH_S, PATIENCE_S = (2, 15), 0.08, 0.4
EXCHANGE_RATES = (1e9, 100e9)  # bytes per second from another core's cache that make sense
WHOLE_S, WARM_UPS = 60.0, 3  # beside the peak: a layer that takes less is measured whole; turns that are not kept


@dataclass(frozen=True)
class Candidate:
    """A way to compute a layer: method, extent of transform or tile, and whether spectra are kept for the update."""

    method: str
    transform: Extent | None
    memoize: bool = True

    def describe(self) -> str:
        text = self.method + (f" {format_extent(self.transform)}" if self.transform else "")
        return text if self.memoize else text + " recomputed"


# ---- the machine ------------------------------------------------------------------------------------------
RATES = ("product_flops", "direct_flops", "transform_flops", "expand_flops", "line_flops", "memory_bytes", "spectra_bytes",
         "expanded_bytes", "spill", "fused", "gather")
PEAKS = ("flops", "cache_bytes", "memory_bytes")


def _build() -> str:
    """Names the compiled core: what was measured of one build does not hold for another."""
    facts = os.stat(_core.__file__)
    return f"{facts.st_size}-{facts.st_mtime_ns}"


def _read(name: str) -> dict[str, Any]:
    try:
        data = json.loads(cache.read_text(name) or "{}")
        return data["values"] if data["build"] == _build() else {}
    except (ValueError, KeyError, TypeError):
        return {}  # none, of another build, or damaged: found out again and overwritten


def _write(name: str, values: Mapping[str, Any]) -> None:
    cache.write_text(name, json.dumps({"build": _build(), "values": values}, indent=0, sort_keys=True))


def widths() -> tuple[int, ...]:
    """The bundle widths that the code path of this machine has."""
    return tuple(width for width in (8, 16) if _core.has_bundle(width))


@lru_cache(maxsize=None)
def peaks() -> Any:
    """The peaks of one core, measured in about a second or taken from the cache: operations per second, bytes per second of copies
    in the last cache and in memory.
    """
    return _kept("peaks", _core.TiledPeaks(), PEAKS, _core.tiled_peaks)


@lru_cache(maxsize=None)
def machine(bundle: int) -> Any:
    """The constants of the cost model for bundles of one width: from the cache, or by a calibration of about 0.5 s."""
    return _kept(f"bundle-{bundle}", _core.TiledMachine(), RATES, lambda: _core.tiled_calibrate(peaks(), bundle))


def place_of(count: int) -> str:
    """Where so many bytes are found when they are read again: "cache", the last one, or "memory"."""
    return "cache" if count <= _core.TiledMachine().l3_bytes / 2 else "memory"


def copy_rate(place: str) -> float:
    """Bytes per second, read and written, that one core copies there."""
    return peaks().cache_bytes if place == "cache" else peaks().memory_bytes


@lru_cache(maxsize=None)
def pool_rates(bundle: int, filters: bool = False) -> Any:
    """Floats of an image in the caches that one core pools (or filters) in a second by windows of 2 x 2 x 2, forward and backward:
    measured in milliseconds, or from the cache.
    """
    name, measure = ("filtering", _core.measure_filtering) if filters else ("pooling", _core.measure_pooling)
    return _kept(f"{name}-{bundle}", _core.PoolRates(), ("forward", "backward"), lambda: measure(bundle))


@lru_cache(maxsize=None)
def exchange_rate(bundle: int) -> float:
    """Bytes of spectra per second from core to core, beyond what they take within one (native/engine/exchange.hpp): the most that
    any process has measured here, because virtual machines have their cores moved apart for a while. In about 20 ms; what would be
    the most is measured twice more. More than makes sense is a disturbed measurement (or only one core) and not kept.
    """
    name = _file(f"exchange-{bundle}")
    try:
        known = float(_read(name)["rate"])
    except (KeyError, TypeError, ValueError):
        known = 0.0
    measured = exchange_rate_now(bundle)
    if measured > known:
        measured = sorted([measured, exchange_rate_now(bundle), exchange_rate_now(bundle)])[1]
    if measured >= EXCHANGE_RATES[1]:
        return known or measured
    if measured > known:
        _write(name, {"rate": measured})
    return max(measured, known)


def exchange_rate_now(bundle: int) -> float:
    """The same at this moment; the most that makes sense where there is only one core."""
    least, most = EXCHANGE_RATES
    return min(max(_core.exchange_rate(bundle) or most, least), most)


def _file(what: str) -> str:
    """Where constants of the machine are kept: what one code path measured does not hold for another."""
    return f"machine-{_core.isa()}-{what}.json"


def _kept(what: str, found: Any, rates: Sequence[str], measure: Callable[[], Any]) -> Any:
    name = _file(what)
    known = _read(name)
    try:
        for rate in rates:
            setattr(found, rate, float(known[rate]))
    except (KeyError, TypeError, ValueError):
        found = measure()
        _write(name, {rate: getattr(found, rate) for rate in rates})
    return found


# ---- one layer --------------------------------------------------------------------------------------------
class Layer:
    """One convolution layer of a graph in bundles of maps; backward: the gradient of its input is wanted. Without training its
    round is the forward pass alone. workers: those that share one patch.
    """

    def __init__(self, graph: Graph, edge: GraphEdge, bundle: int, backward: bool, training: bool = True,
                 workers: float = 1) -> None:
        self.name, self.bundle, self.backward, self.training, self.workers = edge.name, bundle, backward, training, workers
        self.maps = graph.nodes[edge.source].maps, graph.nodes[edge.target].maps
        self.depthwise = edge.spec.depthwise
        self.shape = (*self.maps, edge.in_extent, edge.kernel, edge.sparsity, self.depthwise, bundle)
        self.pool = pool_after(graph, edge)
        self._kernel, self._output = edge.kernel, edge.out_extent
        self._window = self.pool.window if self.pool else (1, 1, 1)
        self._filter = self.pool is not None and self.pool.kind == "max_filter"
        self._pooled = [bundle * -(-self.maps[1] // bundle) * math.prod(extent) for extent in
                        ((self.pool.in_extent, self.pool.out_extent) if self.pool else ())]
        self._native: dict[Candidate, Any] = {}

    def native(self, candidate: Candidate) -> Any:
        """The candidate as the native core plans it. Raises PlanError for what cannot be."""
        if candidate not in self._native:
            method, tile = getattr(_core.Method, candidate.method), candidate.transform or (1, 1, 1)
            self._native[candidate] = self._call(_core.TiledLayer, method, tile, candidate.memoize, self._window,
                                                 self._filter, math.ceil(self.workers))
        return self._native[candidate]

    def key(self, candidate: Candidate) -> tuple:
        """What the candidate's timings depend on besides itself."""
        round_of = self.backward if self.training else "forward pass"
        native = self.native(candidate)
        return self.shape, round_of, (self._window, self._filter) if native.pools else None, native.pieces

    def _call(self, function: Callable[..., Any], *rest: Any) -> Any:
        try:
            return function(*self.shape, *rest)
        except (ValueError, RuntimeError) as error:
            raise PlanError(f"edge {self.name!r}: {error}") from None

    def tiles(self, count: int, fused: bool = False) -> list[Extent]:
        """Tile extents by predicted seconds of a round, the least first."""
        found = self._call(_core.tiled_candidates, machine(self.bundle), count, self.backward, fused)
        return [tuple(tile) for tile in found]

    def first_tile(self) -> Extent:
        """The tile extent that the model likes best. Raises PlanError where none fits."""
        tiles = self.tiles(RANKED)
        if self.depthwise:
            raise PlanError(f"edge {self.name!r} is depthwise, which bundles of maps do by the direct method only")
        if not tiles:
            raise PlanError(f"edge {self.name!r}: no tile extent fits kernel {format_extent(self.shape[3])}, use direct")
        return min(tiles, key=lambda tile: self.predict(Candidate("tiled", tile)))

    def ranked(self, count: int = RANKED) -> list[Candidate]:
        """Direct, and each other method (depthwise: none) at its `count` likeliest tile extents, by predicted seconds of a
        round.
        """
        found = [Candidate("direct", None), *(Candidate("tiled", tile) for tile in self.tiles(count))]
        if self.maps[0] <= FUSED_MAPS:
            found += [Candidate("fused", tile) for tile in self.tiles(count, fused=True)]
        return sorted(found, key=self.predict)

    def phases(self, candidate: Candidate) -> list[float]:
        """Predicted seconds of every phase on one core; 0 for those that do not take part."""
        predicted = self.native(candidate).predict(machine(self.bundle), self.backward)
        return self.recomputed(candidate, [s if self.takes_part(candidate, i) else 0.0 for i, s in enumerate(predicted)])

    def takes_part(self, candidate: Candidate, phase: int) -> bool:
        """Whether a round has this phase."""
        return (self.training or phase in PASSES["forward"]) and self.native(candidate).takes_part(phase, self.backward)

    def passes(self) -> dict[str, tuple[int, ...]]:
        """The phases by the pass in which this layer runs them: gradients that go no further are for the update alone."""
        if not self.training:
            return {"forward": PASSES["forward"], "backward": (), "update": ()}
        if self.backward:
            return PASSES
        return {"forward": PASSES["forward"], "backward": (), "update": (*PASSES["update"], *PASSES["backward"])}

    def predict(self, candidate: Candidate) -> float:
        """Predicted seconds of a round, as `total` counts them."""
        return self.total(candidate, self.phases(candidate))

    def total(self, candidate: Candidate, phases: Sequence[float]) -> float:
        """Seconds of a round from those of the phases on one core: with those of workers who wait while others do the last pieces of
        a phase, with what spectra take that several workers exchange, and with the pooling that follows, where the candidate
        leaves it to an edge of its own, which reads and writes whole images.
        """
        native = self.native(candidate)
        held = sum(s * self._turns(phase, count) for phase, (s, count) in enumerate(zip(phases, native.pieces)))
        if self.workers > 1:
            held += (1 - 1 / self.workers) * self._exchanged(candidate) / exchange_rate(self.bundle)
        if not self._pooled or native.pools:
            return held
        whole, pooled = self._pooled
        rates, copied = pool_rates(self.bundle, self._filter), copy_rate(place_of(4 * whole))
        held += max(whole / rates.forward, 4 * (whole + 2 * pooled) / copied)
        # Backward: zeros first, then the gradients.
        return held + self.training * max(whole / rates.backward, 4 * (2 * whole + pooled) / copied)

    def _turns(self, phase: int, pieces: int) -> float:
        """How much longer workers need for so many equal pieces than if these could be cut. Where there are some for each, updates of
        other layers fill the gaps that the last leave in a backward pass and in each other, but for the first layers' updates, which
        are the last of a round.
        """
        filled = self.backward and phase not in PASSES["forward"]
        turns = max(1.0, pieces / self.workers) if filled else math.ceil(pieces / self.workers)
        return turns * self.workers / pieces if pieces else 1.0

    def _exchanged(self, candidate: Candidate) -> int:
        """Bytes of spectra that one core would find in its own second cache, while workers find in theirs what they wrote
        themselves: transforms go tile by tile, products frequency by frequency. As a product reads one buffer, writes another, and
        reads kernels, a quarter of the cache counts for each.
        """
        if candidate.method == "direct":
            return 0
        native = self.native(candidate)
        sizes, pieces, most = native.buffer_bytes, native.pieces, machine(self.bundle).l2_bytes // 4
        return sum(min(sizes[buffer], most) for phase, buffer in SPECTRA_OF.items()
                   if pieces[phase] and self.takes_part(candidate, phase))

    def recomputed(self, candidate: Candidate, phases: Sequence[float]) -> list[float]:
        """Phases with the input's transforms, made once more for the update where spectra are not kept."""
        found = list(phases)
        if not self.keeps(candidate):
            found[UPDATE_PRODUCT] += found[INPUT_TRANSFORM]
        return found

    def keeps(self, candidate: Candidate) -> bool:
        """Whether all spectra are there when the update comes, or are not needed."""
        if not self.training or candidate.method == "direct":
            return True
        if candidate.method == "fused":
            return candidate.memoize or not self.native(Candidate("fused", candidate.transform)).pieces[INPUT_TRANSFORM]
        return self.native(candidate).kept_slabs == self.native(candidate).slabs

    # ---- measuring
    def measured(self, progress: Callable[[str], None] | None = None) -> dict[Candidate, list[float]]:
        """Seconds of every phase of the candidates worth it: from the cache, or timed now."""
        timings, ranked = Timings(self, progress), self.ranked()
        explored = timings.of(self.explored(ranked))
        best = self.choose({c: self.total(c, phases) for c, phases in explored.items()})
        refined = [c for c in ranked if c not in explored and _alike(c, best)][:REFINED]
        return explored | timings.of([best, *refined])

    def everything(self) -> list[Candidate]:
        """All candidates that are not hopeless by the model."""
        ranked = self.ranked(ALL)
        return [candidate for candidate in ranked if self.predict(candidate) <= WORTH_SEARCHING * self.predict(ranked[0])]

    def searched(self, progress: Callable[[str], None] | None = None) -> dict[Candidate, list[float]]:
        """The same of all candidates, but those that already short probes find hopeless."""
        rough = Timings(self, progress, rough=True).of(self.everything())
        totals = {c: self.total(c, phases) for c, phases in rough.items()}
        return Timings(self, progress).of([c for c, s in totals.items() if s <= ROUGHLY * min(totals.values())])

    def explored(self, ranked: list[Candidate]) -> list[Candidate]:
        """The first few that differ in method or volume of the tile, and the likeliest of each other method even where the
        model, which a disturbed calibration may have misled, thinks little of it; the direct one unless that would be hopeless.
        """
        limit, found = WORTH_MEASURING * self.predict(ranked[0]), []
        for candidate in ranked:
            if len(found) == EXPLORED or self.predict(candidate) > limit:
                break
            if not any(_alike(candidate, other) for other in found):
                found.append(candidate)
        hopeless = WORTH_SEARCHING * self.predict(ranked[0])
        for method in METHODS:
            likeliest = next((candidate for candidate in ranked if candidate.method == method), None)
            if likeliest is None or any(candidate.method == method for candidate in found):
                continue
            if method != "direct" or self.predict(likeliest) <= hopeless:
                found.append(likeliest)
        return found

    def choose(self, seconds: Mapping[Candidate, float]) -> Candidate:
        """The fastest; of those that differ by no more than noise, the one that the model likes best."""
        least = min(seconds.values())
        return min((c for c, s in seconds.items() if s <= (1 + NOISE) * least), key=lambda c: (self.predict(c), c.describe()))

    def timed_again(self, candidates: Sequence[Candidate]) -> dict[Candidate, list[float]]:
        """The same, timed now in turns whatever is known: for a comparison of a few."""
        timings = Timings(self)
        return {c: self.recomputed(c, phases) for c, phases in timings.take_turns(list(dict.fromkeys(candidates))).items()}

    def beside_peak(self, candidate: Candidate, turns: int) -> dict[str, Any]:
        """`flop`, the operations of a pass by direct convolution, and lists of seconds of one thread, one for each turn: what each
        pass took ("forward_s", ...: all its phases) and what as many operations take that wait for nothing but the core's
        arithmetic ("peak_s").
        """
        pairs = self.maps[0] if self.depthwise else math.prod(self.maps)
        flop = 2.0 * pairs * math.prod(self._kernel) * math.prod(self._output)
        probe = _core.TiledProbe(self.native(candidate), machine(self.bundle), WHOLE_S)
        found: dict[str, list[float]] = {name: [] for name in ("peak", *self.passes())}
        for turn in range(-WARM_UPS, turns):
            seconds = {"peak": _core.tiled_peak_seconds(flop)}
            for name, phases in self.passes().items():
                seconds[name] = sum(probe.run(phase) for phase in phases if self.takes_part(candidate, phase))
            for name, value in seconds.items() if turn >= 0 else ():
                found[name].append(value)
        return {"code_path": _core.isa(), "flop": flop} | {f"{name}_s": values for name, values in found.items()}

    # ---- the roofline
    def bounds(self, candidate: Candidate) -> list[tuple[float, str]]:
        """For every phase the seconds that one core needs at least, and what bounds it: arithmetic, cache or memory."""
        native, found = self.native(candidate), []
        for phase, (flops, count) in enumerate(zip(native.flops, native.bytes)):
            part = self.takes_part(candidate, phase)
            place = "cache" if native.slabs > 1 else place_of(count)
            found.append(max((part * flops / peaks().flops, "arithmetic"), (part * count / copy_rate(place), place)))
        if not self.keeps(candidate):
            product = found[UPDATE_PRODUCT]
            found[UPDATE_PRODUCT] = product[0] + found[INPUT_TRANSFORM][0], product[1]
        return found


def pool_after(graph: Graph, edge: GraphEdge) -> GraphEdge | None:
    """The max-pooling by disjoint windows, or max-filtering of the convolution's sparsity, that alone follows a convolution and that
    the convolution may do as it writes its output (native/engine/bundled_layers.cpp, pool_to_absorb), if one does.
    """
    leaving = [other for other in graph.edges if other.source == edge.target]
    if len(graph.incoming(edge.target)) != 1 or len(leaving) != 1:
        return None
    pool, plain = leaving[0], graph.nodes[leaving[0].target]
    bias = plain.spec.kind == "transfer" and (plain.spec.bias or plain.spec.transfer != "linear")
    names = {graph.nodes[edge.target].name, plain.name}
    alone = len(graph.incoming(pool.target)) == 1 and not names & set(graph.outputs)
    disjoint = pool.kind == "max_pool" and pool.window == pool.stride
    alike = pool.kind == "max_filter" and pool.sparsity == edge.sparsity
    return pool if (disjoint or alike) and alone and not bias else None


def image_floats(graph: Graph, bundle: int, nodes: Iterable[int]) -> int:
    """Floats of the images of these nodes, padded to whole bundles."""
    return sum(bundle * -(-node.maps // bundle) * math.prod(node.extent) for node in (graph.nodes[n] for n in nodes))


def image_seconds(graph: Graph, bundle: int, training: bool) -> float:
    """Seconds of a round in which one core reads and writes the images of all edges but convolutions, padded to whole bundles, and but
    the poolings that these may do as they write: `Layer.total` counts them where they do not.
    """
    counted = {pool_after(graph, edge) for edge in graph.edges if edge.kind == "conv"}
    total = 0.0
    for edge in graph.edges:
        if edge.kind != "conv" and edge not in counted:
            count = 4 * image_floats(graph, bundle, (edge.source, edge.target))
            total += count * (1 + training) / copy_rate(place_of(count))
    return total


def _alike(a: Candidate, b: Candidate) -> bool:
    if a.method != b.method:
        return False
    volumes = sorted(math.prod(c.transform or (1,)) for c in (a, b))
    return volumes[1] <= ALIKE * volumes[0]


class Timings:
    """Seconds by phase of one layer's candidates, kept with the machine. rough: by short probes of all methods."""

    def __init__(self, layer: Layer, progress: Callable[[str], None] | None = None, rough: bool = False) -> None:
        self._layer, self._progress, self._rough = layer, progress, rough
        self._name = f"tiled-timings-{_core.isa()}.json"

    def of(self, candidates: Iterable[Candidate]) -> dict[Candidate, list[float]]:
        """Those that take part in a round, with what recomputing adds. What is not known is timed together."""
        wanted = list(candidates)
        stored = {c: Candidate(c.method, c.transform) for c in wanted}  # recomputing takes no other kernels
        keys = {c: repr((c.describe(), *self._layer.key(c), self._probe_s(c))) for c in stored.values()}
        known = {key: phases for key, phases in _read(self._name).items() if len(phases) == _core.TILED_PHASES}
        if any(key not in known for key in keys.values()):
            self._time(list(keys), keys, known)
        return {c: self._layer.recomputed(c, known[keys[stored[c]]]) for c in wanted}

    def _time(self, candidates: list[Candidate], keys: Mapping[Candidate, str], known: dict[str, list[float]]) -> None:
        """Times all of the candidates, a few at once, and keeps what is `known` as it comes: a search can be gone on with."""
        missing = [c for c in candidates if keys[c] not in known]
        candidates = candidates if len(candidates) <= TOGETHER else missing
        best = min((self._layer.total(c, known[keys[c]]) for c in keys if keys[c] in known), default=math.inf)
        for first in range(0, len(candidates), TOGETHER):
            some = candidates[first:first + TOGETHER]
            if self._progress:
                many = f" ({first} of {len(candidates)} done)" if len(candidates) > TOGETHER else ""
                self._progress(f"{self._layer.name}: timing {', '.join(c.describe() for c in some)}{many}")
            for candidate, phases in self.take_turns(some, best).items():
                known[keys[candidate]] = list(map(min, phases, known.get(keys[candidate], phases)))
                best = min(best, self._layer.total(candidate, known[keys[candidate]]))
            _write(self._name, known)

    def take_turns(self, candidates: Iterable[Candidate], best: float = math.inf) -> dict[Candidate, list[float]]:
        """The shortest of a few runs of each phase, in turns, so that a disturbance meets all. Who is clearly slower than
        the best leaves early.
        """
        probes = {c: _core.TiledProbe(self._layer.native(c), machine(self._layer.bundle), self._probe_s(c)) for c in candidates}
        part = {c: [self._layer.takes_part(c, phase) for phase in range(_core.TILED_PHASES)] for c in probes}
        least = {c: [math.inf] * _core.TILED_PHASES for c in probes}
        totals: dict[Candidate, list[float]] = {c: [] for c in probes}  # of the laps
        total = lambda c, phases: self._layer.total(c, self._layer.recomputed(c, phases))  # noqa: E731
        spent = 0.0
        for lap in range(-1, LAPS[1]):
            begin = time.perf_counter()
            for candidate, probe in probes.items():
                laps = [probe.run(phase) if part[candidate][phase] else 0.0 for phase in range(_core.TILED_PHASES)]
                if lap >= 0:
                    least[candidate] = list(map(min, least[candidate], laps))
                    totals[candidate].append(total(candidate, laps))
            if lap >= 0:
                spent += (time.perf_counter() - begin) / len(probes)
            if lap + 1 >= LAPS[0]:  # no single lap that was disturbed may decide
                limit = CLEARLY_SLOWER * min(best, *(total(c, phases) for c, phases in least.items()))
                probes = {c: probe for c, probe in probes.items() if total(c, least[c]) <= limit}
            enough = ENOUGH_S if all(_is_quiet(totals[c]) for c in probes) else PATIENCE_S
            if not probes or (lap + 1 >= LAPS[0] and spent > enough):
                break
        return least

    def _probe_s(self, candidate: Candidate) -> float:
        return FUSED_PROBE_S if candidate.method == "fused" and not self._rough else PROBE_S


def _is_quiet(seconds: Sequence[float]) -> bool:
    """Whether the shortest lap was no accident: another one was as short."""
    return len(seconds) > 1 and sorted(seconds)[1] <= (1 + NOISE) * min(seconds)


def layers(graph: Graph, bundle: int, input_gradient: bool = False, training: bool = True, workers: float = 1) -> list[Layer]:
    """The convolution layers of a graph, in its order."""
    wanted = gradient_nodes(graph, input_gradient, training)
    return [Layer(graph, edge, bundle, wanted[edge.source], training, workers) for edge in graph.edges if edge.kind == "conv"]
