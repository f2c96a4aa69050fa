"""Network descriptions: frozen dataclasses, validated on construction, written to and read from TOML and
`.znn` files.

A network is a directed acyclic graph of node groups (the feature maps of a layer) and edge groups (one
operation from every map of one node to the maps of another). Extents are not part of a description:
`znn.graph.Graph.build` works them out from an output patch or an input extent.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from znn.errors import SpecError
from znn.files import atomic_write

Extent = tuple[int, int, int]

NODE_KINDS = ("input", "sum", "transfer")
TRANSFERS = ("linear", "relu", "tanh", "logistic")
EDGE_KINDS = ("conv", "max_filter", "max_pool", "dropout", "crop", "identity")
INIT_KINDS = ("constant", "uniform", "gaussian", "xavier", "msra")
LOSSES = ("squared", "binomial", "softmax")

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\Z")
_INIT_DEFAULTS = {"constant": 0.0, "uniform": 0.1, "gaussian": 0.01, "xavier": 1.0, "msra": 1.0}

# Which optional fields an edge of each kind may set.
_EDGE_FIELDS = {
    "conv": {"kernel", "sparsity", "depthwise", "init", "rate", "weight_decay"},
    "max_filter": {"window", "sparsity"},
    "max_pool": {"window", "stride"},
    "dropout": {"ratio"},
    "crop": {"offset"},
    "identity": set(),
}
_EDGE_REQUIRED = {"conv": "kernel", "max_filter": "window", "max_pool": "window", "dropout": "ratio"}


def as_extent(value: Any, what: str, dims: int = 3, smallest: int = 1) -> Extent:
    """The extent `(z, y, x)` meant by a user's `value`.

    A triple is taken as it is, a pair `(y, x)` has depth 1, an int is a cube where `dims` is 3 and a square
    of depth 1 where `dims` is 2. With `smallest=0` the value is an offset and a missing depth is 0.

    Raises SpecError, naming `what`, for anything but integers of at least `smallest`.
    """
    if _is_int(value):
        numbers = (smallest, value, value) if dims == 2 else (value, value, value)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value) in (2, 3):
        numbers = tuple(value) if len(value) == 3 else (smallest, *value)
    else:
        raise SpecError(f"{what} is {value!r}; expected an int, (y, x) or (z, y, x)")
    if not all(_is_int(n) and n >= smallest for n in numbers):
        raise SpecError(f"{what} is {value!r}; expected integers of at least {smallest}")
    return tuple(int(n) for n in numbers)


def format_extent(extent: Sequence[int]) -> str:
    """`(12, 12, 12)` as `12x12x12`."""
    return "x".join(str(n) for n in extent)


def _is_int(value: Any) -> bool:
    # numpy integers pass, bools do not: True is never meant as an extent.
    return not isinstance(value, bool) and hasattr(value, "__index__")


def _number(value: Any, what: str, low: float = -math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) and not hasattr(value, "__float__"):
        raise SpecError(f"{what} is {value!r}; expected a number")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise SpecError(f"{what} is {value!r}; expected a number") from None
    if not math.isfinite(number) or number < low:
        bound = "" if low == -math.inf else f" of at least {low:g}"
        raise SpecError(f"{what} is {value!r}; expected a finite number{bound}")
    return number


def _choice(value: Any, choices: Sequence[str], what: str) -> None:
    if value not in choices:
        raise SpecError(f"{what} is {value!r}; expected one of {', '.join(choices)}")


def _flag(value: Any, what: str) -> None:
    if not isinstance(value, bool):
        raise SpecError(f"{what} is {value!r}; expected true or false")


def _name(value: Any, what: str) -> None:
    if not isinstance(value, str) or not _NAME.match(value):
        raise SpecError(f"{what} name is {value!r}; expected letters, digits, '_', '-' and '.'")


def _maps(value: Any, what: str) -> int:
    if not _is_int(value) or value < 1:
        raise SpecError(f"{what} has maps={value!r}; expected an integer of at least 1")
    return int(value)


@dataclass(frozen=True)
class Init:
    """How a parameter group is first filled.

    kind: constant | uniform | gaussian | xavier | msra. value: the constant; the half-width of the uniform
    distribution around 0; the standard deviation of the Gaussian around 0; for xavier (Glorot and Bengio
    2010, uniform) and msra (He et al. 2015, Gaussian) a factor on the width they prescribe. Left out, it is
    0, 0.1, 0.01, 1 and 1. Raises SpecError for an unknown kind or a value that is not finite (negative,
    except for constant).
    """

    kind: str
    value: float | None = None

    def __post_init__(self) -> None:
        _choice(self.kind, INIT_KINDS, "init kind")
        value = _INIT_DEFAULTS[self.kind] if self.value is None else self.value
        low = -math.inf if self.kind == "constant" else 0.0
        object.__setattr__(self, "value", _number(value, f"value of init {self.kind!r}", low))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "value": self.value}

    @classmethod
    def from_dict(cls, data: Any, what: str = "init") -> Init:
        """From `{"kind": ..., "value": ...}`, or from the kind alone as a string."""
        if isinstance(data, Init):
            return data
        if isinstance(data, str):
            return cls(data)
        _table(data, {"kind", "value"}, what, required=("kind",))
        return cls(**data)


@dataclass(frozen=True)
class NodeSpec:
    """A group of `maps` feature maps.

    kind: input | sum | transfer. A transfer node sums its converging edges, adds a bias per map (where
    `bias`) and applies `transfer`: linear | relu | tanh | logistic. A sum node only sums. Input and sum nodes
    have no parameters: their `bias` is False whatever was given. rate multiplies the optimiser's learning
    rate for the bias. Raises SpecError.
    """

    name: str
    maps: int
    kind: str
    transfer: str = "linear"
    bias: bool = True
    bias_init: Init = field(default=Init("constant", 0.0))
    rate: float = 1.0

    def __post_init__(self) -> None:
        _name(self.name, "node")
        what = f"node {self.name!r}"
        object.__setattr__(self, "maps", _maps(self.maps, what))
        _choice(self.kind, NODE_KINDS, f"kind of {what}")
        _choice(self.transfer, TRANSFERS, f"transfer of {what}")
        _flag(self.bias, f"bias of {what}")
        if not isinstance(self.bias_init, Init):
            raise SpecError(f"bias_init of {what} is {self.bias_init!r}; expected an Init")
        object.__setattr__(self, "rate", _number(self.rate, f"rate of {what}", 0.0))
        if self.kind != "transfer":
            if self.transfer != "linear":
                raise SpecError(
                    f"{what} is of kind {self.kind} and has transfer={self.transfer!r}; "
                    "only transfer nodes have a transfer function"
                )
            object.__setattr__(self, "bias", False)

    def to_dict(self) -> dict[str, Any]:
        """Only what differs from the defaults."""
        data: dict[str, Any] = {"name": self.name, "maps": self.maps, "kind": self.kind}
        if self.kind == "transfer":
            data["transfer"] = self.transfer
            if not self.bias:
                data["bias"] = False
        return data | _changed(self, ("bias_init", "rate"))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "node") -> NodeSpec:
        keys = {f.name for f in fields(cls)}
        _table(data, keys, _called(where, data), required=("name", "maps", "kind"))
        values = dict(data)
        if "bias_init" in values:
            values["bias_init"] = Init.from_dict(values["bias_init"], f"bias_init of {_called(where, data)}")
        return cls(**values)


@dataclass(frozen=True)
class EdgeSpec:
    """One operation from node `source` to node `target`.

    kind conv: every map of source to every map of target (depthwise: map i to map i), `kernel` extent,
    `sparsity` (dilation; None: worked out from the max-filters upstream), init, rate and weight_decay
    (multipliers of the optimiser's). max_filter: sliding `window` at stride 1, `sparsity`. max_pool: `window`
    at `stride` (default: the window). dropout: `ratio`, the probability of dropping. crop: `offset` into the
    source (None: centred). identity: nothing. All but conv join map i to map i. An int for an extent means a
    cube. Raises SpecError, also for a field that the kind does not have.
    """

    name: str
    kind: str
    source: str
    target: str
    kernel: Extent | None = None
    sparsity: Extent | None = None
    window: Extent | None = None
    stride: Extent | None = None
    ratio: float | None = None
    offset: Extent | None = None
    depthwise: bool = False
    init: Init = field(default=Init("msra"))
    rate: float = 1.0
    weight_decay: float = 1.0

    def __post_init__(self) -> None:
        _name(self.name, "edge")
        what = f"edge {self.name!r}"
        _choice(self.kind, EDGE_KINDS, f"kind of {what}")
        for end in ("source", "target"):
            _name(getattr(self, end), f"{end} of {what}:")
        self._check_fields(what)
        for key in ("kernel", "sparsity", "window", "stride", "offset"):
            if getattr(self, key) is not None:
                value = as_extent(getattr(self, key), f"{key} of {what}", smallest=int(key != "offset"))
                object.__setattr__(self, key, value)
        if self.kind == "max_pool" and self.stride is None:
            object.__setattr__(self, "stride", self.window)
        if self.ratio is not None:
            ratio = _number(self.ratio, f"ratio of {what}")
            if not 0.0 <= ratio < 1.0:
                raise SpecError(f"ratio of {what} is {self.ratio!r}; expected a probability in [0, 1)")
            object.__setattr__(self, "ratio", ratio)
        for key in ("rate", "weight_decay"):
            object.__setattr__(self, key, _number(getattr(self, key), f"{key} of {what}", 0.0))

    def _check_fields(self, what: str) -> None:
        _flag(self.depthwise, f"depthwise of {what}")
        if not isinstance(self.init, Init):
            raise SpecError(f"init of {what} is {self.init!r}; expected an Init")
        allowed = _EDGE_FIELDS[self.kind]
        for f in fields(self)[4:]:
            if f.name not in allowed and getattr(self, f.name) != f.default:
                raise SpecError(
                    f"{what} is of kind {self.kind} and has {f.name}={getattr(self, f.name)!r}; "
                    f"expected only {', '.join(sorted(allowed)) or 'no options'}"
                )
        required = _EDGE_REQUIRED.get(self.kind)
        if required and getattr(self, required) is None:
            raise SpecError(f"{what} is of kind {self.kind} and has no {required}")

    def to_dict(self) -> dict[str, Any]:
        """Only what differs from the defaults."""
        data: dict[str, Any] = {
            "name": self.name,
            "kind": self.kind,
            "source": self.source,
            "target": self.target,
        }
        changed = _changed(self, [f.name for f in fields(self)[4:]])
        if self.kind == "max_pool" and self.stride == self.window:
            del changed["stride"]
        return data | changed

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "edge", dims: int = 3) -> EdgeSpec:
        """From a table; `dilation` means `sparsity`, ints are squares of depth 1 where `dims` is 2."""
        keys = {f.name for f in fields(cls)} | {"dilation"}
        where = _called(where, data)
        _table(data, keys, where, required=("name", "kind", "source", "target"))
        values = _dilation(dict(data), where)
        for key in ("kernel", "sparsity", "window", "stride", "offset"):
            if values.get(key) is not None:
                values[key] = as_extent(values[key], f"{key} of {where}", dims, int(key != "offset"))
        if "init" in values:
            values["init"] = Init.from_dict(values["init"], f"init of {where}")
        return cls(**values)


@dataclass(frozen=True)
class NetworkSpec:
    """A network: node groups, edge groups, a loss (squared | binomial | softmax) and the meaning of an int
    extent.

    dims=2: every kernel and window has depth 1, and an int wherever an extent may be given means a square
    of depth 1 (a patch given as (z, y, x) may be deeper: each section is then worked on by itself). In
    Python, `EdgeSpec(kernel=3)` is a cube whatever the network's dims. Raises SpecError for duplicate or
    unknown names, cycles, nodes that nothing reaches, input nodes with incoming edges, and edges that
    join map i to map i between nodes of different width.
    """

    name: str
    nodes: tuple[NodeSpec, ...]
    edges: tuple[EdgeSpec, ...]
    loss: str = "squared"
    dims: int = 3

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or not self.name.isprintable():
            raise SpecError(f"network name is {self.name!r}; expected a non-empty printable string")
        object.__setattr__(self, "nodes", tuple(self.nodes))
        object.__setattr__(self, "edges", tuple(self.edges))
        _choice(self.loss, LOSSES, f"loss of network {self.name!r}")
        if self.dims not in (2, 3) or isinstance(self.dims, bool):
            raise SpecError(f"dims of network {self.name!r} is {self.dims!r}; expected 2 or 3")
        self._check_names()
        self._check_edges()
        self._check_reachable()
        topological_order(self)

    def _check_names(self) -> None:
        seen: dict[str, str] = {}
        for what, items in (("node", self.nodes), ("edge", self.edges)):
            for item in items:
                if item.name in seen:
                    raise SpecError(
                        f"{what} {item.name!r} of network {self.name!r} has the name of another "
                        f"{seen[item.name]}; names of nodes and edges must all differ"
                    )
                seen[item.name] = what

    def _check_edges(self) -> None:
        nodes = {node.name: node for node in self.nodes}
        for edge in self.edges:
            for end in ("source", "target"):
                if getattr(edge, end) not in nodes:
                    raise SpecError(
                        f"{end} of edge {edge.name!r} is {getattr(edge, end)!r}; expected one of the "
                        f"nodes {', '.join(nodes)}"
                    )
            source, target = nodes[edge.source], nodes[edge.target]
            if target.kind == "input":
                raise SpecError(
                    f"edge {edge.name!r} leads into the input node {target.name!r}; "
                    "input nodes have no incoming edges"
                )
            if (edge.kind != "conv" or edge.depthwise) and source.maps != target.maps:
                kind = "depthwise conv" if edge.kind == "conv" else edge.kind
                raise SpecError(
                    f"edge {edge.name!r} ({kind}) joins map to map, but its source {source.name!r} has "
                    f"{source.maps} maps and its target {target.name!r} {target.maps}"
                )
            for key in ("kernel", "window", "stride", "sparsity"):
                extent = getattr(edge, key)
                if self.dims == 2 and extent is not None and extent[0] != 1:
                    raise SpecError(
                        f"{key} of edge {edge.name!r} is {format_extent(extent)} in a network with "
                        "dims=2; expected depth 1"
                    )

    def _check_reachable(self) -> None:
        targets = {edge.target for edge in self.edges}
        sources = {edge.source for edge in self.edges}
        if not any(node.kind == "input" for node in self.nodes):
            raise SpecError(f"network {self.name!r} has no input node")
        for node in self.nodes:
            if node.kind != "input" and node.name not in targets:
                raise SpecError(f"node {node.name!r} is of kind {node.kind} and no edge leads to it")
            if node.kind == "input" and node.name not in sources:
                raise SpecError(f"input node {node.name!r} leads nowhere; expected at least one edge from it")

    def node(self, name: str) -> NodeSpec:
        """The node called `name`. Raises SpecError."""
        return _find(self.nodes, name, "node", self.name)

    def edge(self, name: str) -> EdgeSpec:
        """The edge called `name`. Raises SpecError."""
        return _find(self.edges, name, "edge", self.name)

    def to_dict(self) -> dict[str, Any]:
        """The full form, of plain lists, strings and numbers (JSON and TOML can hold it)."""
        return {
            "name": self.name,
            "loss": self.loss,
            "dims": self.dims,
            "nodes": [node.to_dict() for node in self.nodes],
            "edges": [edge.to_dict() for edge in self.edges],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "network") -> NetworkSpec:
        """From the full form (keys nodes, edges) or the layered one (keys input_maps, layers)."""
        if isinstance(data, Mapping) and "layers" in data:
            _table(
                data, {"name", "loss", "dims", "input_maps", "layers"}, where, required=("name", "input_maps")
            )
            _array(data["layers"], f"layers of {where}")
            return cls.layered(
                data["name"],
                data["input_maps"],
                data["layers"],
                data.get("loss", "squared"),
                data.get("dims", 3),
                where=where,
            )
        _table(data, {"name", "loss", "dims", "nodes", "edges"}, where, required=("name", "nodes", "edges"))
        for key in ("nodes", "edges"):
            _array(data[key], f"{key} of {where}")
        dims = data.get("dims", 3)
        nodes = tuple(
            NodeSpec.from_dict(node, f"{where}: node {i + 1}") for i, node in enumerate(data["nodes"])
        )
        edges = tuple(
            EdgeSpec.from_dict(edge, f"{where}: edge {i + 1}", dims) for i, edge in enumerate(data["edges"])
        )
        return cls(data["name"], nodes, edges, data.get("loss", "squared"), dims)

    @classmethod
    def layered(
        cls,
        name: str,
        input_maps: int,
        layers: Sequence[Mapping[str, Any]],
        loss: str = "squared",
        dims: int = 3,
        where: str = "network",
    ) -> NetworkSpec:
        """A chain of layers from a list of short tables, one operation each:

        `{conv = 40, kernel = 5, transfer = "relu"}` (40 maps; also sparsity or dilation, bias, bias_init,
        bias_rate, init, rate, weight_decay, depthwise), `{max_filter = 2}` (also sparsity), `{max_pool = 2}`
        (also stride), `{dropout = 0.5}`. Any layer may give its edge a `name`. By default edges are called
        conv1, pool1, filter1, dropout1, ... by kind, the node an edge leads to has the edge's name with an
        `n` in front, the first node is `input` and the last `output`. Raises SpecError.
        """
        _array(layers, f"layers of {where}")
        if not layers:
            raise SpecError(f"layers of {where} is empty; expected at least one layer")
        nodes = [NodeSpec("input", _maps(input_maps, "node 'input'"), "input")]
        edges: list[EdgeSpec] = []
        for i, layer in enumerate(layers):
            edge_name = _layer_name(layer, edges, f"{where}: layer {i + 1}")
            target = "output" if i + 1 == len(layers) else f"n{edge_name}"
            node, edge = _layer(dict(layer), edge_name, nodes[-1], target, f"{where}: layer {i + 1}", dims)
            nodes.append(node)
            edges.append(edge)
        return cls(name, tuple(nodes), tuple(edges), loss, dims)

    def to_toml(self) -> str:
        """The full form as TOML; `from_toml` gives an equal spec back."""
        data = self.to_dict()
        lines = [f"{key} = {_toml(data[key])}" for key in ("name", "loss", "dims")]
        for key in ("nodes", "edges"):
            for table in data[key]:
                lines += ["", f"[[{key}]]", *(f"{k} = {_toml(v)}" for k, v in table.items())]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_toml(cls, text: str, where: str = "network") -> NetworkSpec:
        """From TOML text, full or layered. Raises SpecError naming `where` (a file) and the key."""
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise SpecError(f"{where} is not valid TOML: {error}") from None
        return cls.from_dict(data, where)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> NetworkSpec:
        """Read a `.toml` or `.znn` file. Raises SpecError."""
        path = Path(path)
        reader = _by_ending(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"{path} cannot be read: {error}") from None
        try:
            return reader[0](text, path)
        except SpecError as error:
            if str(path) in str(error):
                raise
            raise SpecError(f"{path}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `.toml` or `.znn` file, atomically. Raises SpecError where `.znn` cannot say it."""
        path = Path(path)
        text = _by_ending(path)[1](self)
        with atomic_write(path, "w") as file:
            file.write(text)


def topological_order(spec: NetworkSpec) -> tuple[str, ...]:
    """Node names, sources before targets, of several ready ones as declared. Raises SpecError (cycle)."""
    waiting = {node.name: 0 for node in spec.nodes}
    for edge in spec.edges:
        waiting[edge.target] += 1
    order: list[str] = []
    while waiting:
        ready = next((name for name, count in waiting.items() if count == 0), None)
        if ready is None:
            raise SpecError(f"network {spec.name!r} has a cycle: {' -> '.join(_cycle(spec, waiting))}")
        order.append(ready)
        del waiting[ready]
        for edge in spec.edges:
            if edge.source == ready:
                waiting[edge.target] -= 1
    return tuple(order)


def _cycle(spec: NetworkSpec, remaining: Mapping[str, int]) -> list[str]:
    # Every remaining node has a remaining predecessor, so walking backwards must come round.
    before = {e.target: e.source for e in spec.edges if e.source in remaining and e.target in remaining}
    walk = [next(iter(before))]
    while walk[-1] not in walk[:-1]:
        walk.append(before[walk[-1]])
    return walk[walk.index(walk[-1]) :][::-1]


def _find(items: Sequence[Any], name: str, what: str, network: str) -> Any:
    for item in items:
        if item.name == name:
            return item
    raise SpecError(f"network {network!r} has no {what} {name!r}; it has {', '.join(i.name for i in items)}")


def _changed(item: Any, names: Sequence[str]) -> dict[str, Any]:
    defaults = {f.name: f.default for f in fields(item) if f.default is not MISSING}
    data = {}
    for name in names:
        value = getattr(item, name)
        if value != defaults[name]:
            data[name] = (
                value.to_dict()
                if isinstance(value, Init)
                else list(value)
                if isinstance(value, tuple)
                else value
            )
    return data


def _called(where: str, data: Any) -> str:
    name = data.get("name") if isinstance(data, Mapping) else None
    return f"{where} ({name})" if isinstance(name, str) else where


def _table(data: Any, keys: set[str], where: str, required: Sequence[str] = ()) -> None:
    if not isinstance(data, Mapping):
        raise SpecError(f"{where} is {data!r}; expected a table")
    for key in data:
        if key not in keys:
            raise SpecError(f"{where} has the unknown key {key!r}; expected {', '.join(sorted(keys))}")
    for key in required:
        if key not in data:
            raise SpecError(f"{where} has no key {key!r}")


def _array(data: Any, where: str) -> None:
    if not isinstance(data, Sequence) or isinstance(data, str | bytes):
        raise SpecError(f"{where} is {data!r}; expected an array of tables")


def _dilation(values: dict[str, Any], where: str) -> dict[str, Any]:
    if "dilation" in values:
        if "sparsity" in values:
            raise SpecError(f"{where} has both sparsity and dilation; they are the same, give one")
        values["sparsity"] = values.pop("dilation")
    return values


_LAYER_KEYS = {
    "conv": {
        "kernel",
        "sparsity",
        "dilation",
        "depthwise",
        "init",
        "rate",
        "weight_decay",
        "transfer",
        "bias",
        "bias_init",
        "bias_rate",
    },
    "max_filter": {"sparsity", "dilation"},
    "max_pool": {"stride"},
    "dropout": set(),
}
# Keys of a conv layer that belong to its node, and what the node calls them.
_LAYER_NODE_KEYS = {"transfer": "transfer", "bias": "bias", "bias_init": "bias_init", "bias_rate": "rate"}
_LAYER_STEMS = {"conv": "conv", "max_filter": "filter", "max_pool": "pool", "dropout": "dropout"}


def _layer_kind(layer: Any, where: str) -> str:
    if not isinstance(layer, Mapping):
        raise SpecError(f"{where} is {layer!r}; expected a table such as {{conv = 40, kernel = 5}}")
    kinds = [kind for kind in _LAYER_KEYS if kind in layer]
    if len(kinds) != 1:
        raise SpecError(
            f"{where} has the keys {', '.join(map(str, layer))}; expected exactly one of "
            f"{', '.join(_LAYER_KEYS)}"
        )
    return kinds[0]


def _layer_name(layer: Any, edges: Sequence[EdgeSpec], where: str) -> str:
    kind = _layer_kind(layer, where)
    if "name" in layer:
        _name(layer["name"], where)
        return layer["name"]
    return f"{_LAYER_STEMS[kind]}{1 + sum(edge.kind == kind for edge in edges)}"


def _layer(
    layer: dict[str, Any], name: str, source: NodeSpec, target: str, where: str, dims: int
) -> tuple[NodeSpec, EdgeSpec]:
    kind = _layer_kind(layer, where)
    _table(layer, _LAYER_KEYS[kind] | {kind, "name"}, where)
    edge = {"name": name, "kind": kind, "source": source.name, "target": target}
    edge |= {key: layer[key] for key in _LAYER_KEYS[kind] - set(_LAYER_NODE_KEYS) if key in layer}
    if kind == "conv":
        node: dict[str, Any] = {"name": target, "maps": layer["conv"], "kind": "transfer"}
        node |= {name: layer[key] for key, name in _LAYER_NODE_KEYS.items() if key in layer}
    else:
        node = {"name": target, "maps": source.maps, "kind": "sum"}
        edge["ratio" if kind == "dropout" else "window"] = layer[kind]
    return NodeSpec.from_dict(node, where), EdgeSpec.from_dict(edge, where, dims)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + "".join(_toml_char(c) for c in value) + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + "}"
    return repr(value)


def _toml_char(c: str) -> str:
    if c in '"\\':
        return "\\" + c
    return c


def _by_ending(path: Path) -> tuple[Any, Any]:
    if path.suffix == ".toml":
        return lambda text, path: NetworkSpec.from_toml(text, str(path)), NetworkSpec.to_toml
    if path.suffix == ".znn":
        from znn import znn_format  # it builds specs, so it imports this module

        return (lambda text, path: znn_format.loads(text, path.stem, str(path))), znn_format.dumps
    raise SpecError(f"{path} ends in {path.suffix!r}; expected .toml or .znn")


def load(path: str | os.PathLike[str]) -> NetworkSpec:
    """`NetworkSpec.load`: read a `.toml` or `.znn` file. Raises SpecError."""
    return NetworkSpec.load(path)
