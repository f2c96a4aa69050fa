"""The memory a network in bundles of maps takes, and candidates chosen so that it keeps within a limit.

What is counted is what the native engine allocates (native/engine/bundled_layers.cpp): images and gradients of the nodes, maxima
and masks, parameters with their moments, and each layer's transformed kernels and spectra. Spectra on their way back to
images, and the halo of tiles, are shared by all layers; scratch is per worker.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from znn.bundled import (GRADIENT_TRANSFORM, HALO, INPUT_SPECTRA, KERNELS, OF_BACKWARD, OWN, SHARED_SPECTRA, SHARED_SUMS_BYTES,
                         SMALL_WINDOW, SUMS,
                         Candidate, Layer, scratch_room)
from znn.cost import gradient_nodes
from znn.errors import PlanError
from znn.graph import Graph, GraphEdge

REST_BYTES = 16 << 20  # tasks, stacks, results on their way to the user: measured
STATEFUL = ("max_filter", "max_pool", "dropout")  # edges that keep a number per voxel for the backward pass


@dataclass(frozen=True)
class Footprint:
    """Bytes by what they hold."""

    images: int
    parameters: int
    spectra: int
    shared: int
    scratch: int
    rest: int = REST_BYTES

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Setting:
    """What a network's memory depends on besides its layers' candidates. moments: of the optimiser, per parameter. Without
    training no gradient and no moment is ever touched, and spectra pass by.
    """

    graph: Graph
    bundle: int
    patches: int = 1
    threads: int = 1
    moments: int = 1
    input_gradient: bool = False
    training: bool = True

    def footprint(self, layers: Sequence[Layer], chosen: Mapping[str, Candidate]) -> Footprint:
        """The whole network's."""
        parts = [layer_bytes(layer, chosen[layer.name], self.patches, self.moments) for layer in layers]
        scratch = max((layer.native(chosen[layer.name]).scratch_bytes for layer in layers), default=0)
        packing = {layer.name for layer in layers if layer.native(chosen[layer.name]).packs_input}
        return Footprint(
            images=self._images({layer.pool.name for layer in layers
                                 if layer.pool and layer.native(chosen[layer.name]).pools}, packing),
            parameters=sum(part.parameters for part in parts),
            spectra=sum(part.spectra for part in parts),
            shared=self.patches * sum(max((getattr(part, buffer) for part in parts), default=0)
                                      for buffer in ("shared", "halo", "sums")),
            scratch=self.threads * scratch_room(max(scratch, self._simple_scratch())),
        )

    @property
    def wanted(self) -> list[bool]:
        """Of which nodes the gradient is computed."""
        return gradient_nodes(self.graph, self.input_gradient, self.training)

    def _voxel_bytes(self, node: int) -> int:
        found = self.graph.nodes[node]
        return 4 * self.bundle * -(-found.maps // self.bundle) * math.prod(found.extent)

    def _images(self, pooled: set[str], packing: set[str]) -> int:
        """pooled: the max-pooling edges that the convolutions before them do: their sources are as large as their targets,
        which are gone, and a byte per voxel says where a maximum was. packing: the convolutions that read a single map as it
        comes in, without the rest of its bundle.
        """
        gone = {edge.source: edge.target for edge in self.graph.edges if edge.name in pooled}
        count = 0
        for i in range(len(self.graph.nodes)):
            if i not in gone.values():
                size = self._voxel_bytes(gone.get(i, i)) // (self.bundle if self._is_packed(i, packing) else 1)
                count += size * (1 + self.wanted[i]) + (size // 4 if i in gone else 0)
        states = sum(self._voxel_bytes(e.target) // (4 if has_small_window(e) else 1)
                     for e in self.graph.edges if e.kind in STATEFUL and e.name not in pooled)
        return self.patches * (count + states)

    def _is_packed(self, node: int, packing: set[str]) -> bool:
        """As in native/engine/bundled_layers.cpp, packs."""
        found = self.graph.nodes[node]
        return (found.name in self.graph.inputs and found.name not in self.graph.outputs and found.maps == 1
                and not self.input_gradient and all(e.name in packing for e in self.graph.edges if e.source == node))

    def _simple_scratch(self) -> int:
        """Of max-filters, whose rows and planes are filtered one axis after the other, in one bundle."""
        sizes = [8 * self.bundle * math.prod(e.in_extent) for e in self.graph.edges
                 if e.kind == "max_filter" and not has_small_window(e)]
        return max(sizes, default=0)


def has_small_window(edge: GraphEdge) -> bool:
    """Whether it is a max-filter whose windows are compared at once, without scratch, and which keeps a byte per voxel."""
    return edge.kind == "max_filter" and math.prod(edge.window) <= SMALL_WINDOW


@dataclass(frozen=True)
class LayerBytes:
    """One layer's part: what it owns, and how much it wants of the buffers that all share, of one patch."""

    parameters: int
    spectra: int
    shared: int
    halo: int
    sums: int


def layer_bytes(layer: Layer, candidate: Candidate, patches: int = 1, moments: int = 1) -> LayerBytes:
    """Bytes of one layer; `shared`, `halo` and `sums` of one patch."""
    native = layer.native(candidate)
    buffers, kernels = native.buffer_bytes, native.kernel_bytes
    if not layer.training:
        passing = buffers[INPUT_SPECTRA] * native.passing_slabs // native.kept_slabs
        return LayerBytes(kernels, buffers[KERNELS] + patches * passing, buffers[SHARED_SPECTRA[0]], 0, 0)
    sums = buffers[SUMS] if buffers[SUMS] >= SHARED_SUMS_BYTES else 0
    own = buffers[KERNELS] + patches * (sum(buffers[i] for i in OWN) - sums)
    if not native.takes_part(GRADIENT_TRANSFORM, layer.backward):  # allocated, never touched
        own -= patches * buffers[4]
    back, forth = SHARED_SPECTRA[1], SHARED_SPECTRA[0]
    return LayerBytes(
        parameters=kernels * (1 + moments + (patches if patches > 1 else 0)),
        spectra=own + buffers[OF_BACKWARD] * layer.backward,
        shared=max(buffers[forth], buffers[back] * layer.backward),
        halo=buffers[HALO] * layer.backward,
        sums=sums,
    )


def within(setting: Setting, layers: Sequence[Layer], seconds: Mapping[str, Mapping[Candidate, float]],
           limit: int) -> dict[str, Candidate]:
    """Per layer a candidate, together within `limit` bytes: from the fastest on, where a byte saved costs least time.

    seconds: per layer the candidates there are, with the seconds of a round. Raises PlanError naming the least that is
    possible.
    """
    chosen = {layer.name: layer.choose(seconds[layer.name]) for layer in layers}
    while (now := setting.footprint(layers, chosen).total) > limit:
        best = None
        for layer in layers:
            for candidate, value in seconds[layer.name].items():
                saved = now - setting.footprint(layers, chosen | {layer.name: candidate}).total
                if saved > 0:
                    price = (value - seconds[layer.name][chosen[layer.name]]) / saved
                    best = min(best or (math.inf,), (price, layer.name, candidate), key=lambda offer: offer[0])
        if best is None:
            raise PlanError(f"memory limit {limit} bytes ({_size(limit)}) is too small for {setting.graph.spec.name} with "
                            f"{setting.patches} patches and {setting.threads} threads: expected {now} bytes ({_size(now)}) at least")
        chosen[best[1]] = best[2]
    return _faster(setting, layers, seconds, limit, chosen)


def _faster(setting: Setting, layers: Sequence[Layer], seconds: Mapping[str, Mapping[Candidate, float]], limit: int,
            chosen: dict[str, Candidate]) -> dict[str, Candidate]:
    """What was given up first may fit after all."""
    for layer in layers:
        options = seconds[layer.name]
        for candidate in sorted(options, key=options.get):
            if options[candidate] >= options[chosen[layer.name]]:
                break
            if setting.footprint(layers, chosen | {layer.name: candidate}).total <= limit:
                chosen[layer.name] = candidate
                break
    return chosen


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"
