"""The original text format of network descriptions, `.znn`.

A line `nodes NAME` or `edges NAME` opens a section; every other non-empty line is a key and a value. Lines
that start with `#` or `;` are comments. Vectors are z,y,x.

    nodes   type       input | sum | transfer
            size       number of maps
            function   linear | rectify_linear (relu) | tanh | logistics (logistic), for transfer nodes; sum
                       nodes may carry one, as in the original's files, and ignore it. Arguments may follow
                       where they change nothing (linear 1,0 and tanh 1,1): transfer functions here have none.
    edges   type       conv | max_filter | max_pool | dropout | crop
            input, output        names of nodes
            size       kernel (conv) or window (max_filter, max_pool)
            stride     max_filter: the factor by which the sparsity of everything downstream grows (default:
                       size); conv: 1,1,1 (the default) means the sparsity that the filters upstream give,
                       anything else is its sparsity; max_pool: the stride (default: size)
            init       constant | zero | uniform | gaussian | xavier | msra (default), optionally a value
            offset     crop: where it starts (default: centred)
            ratio      dropout: probability of dropping

The original's training keys (eta, momentum, weight_decay, ...) are absolute settings of its optimiser and are
refused: here the optimiser holds them. Transfer nodes have a bias, which begins at 0. A file whose sizes
and strides all have depth 1 is a network with dims=2. The loss is not part of the format: it is "squared".
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from znn import shapes
from znn.errors import SpecError
from znn.spec import EdgeSpec, Extent, Init, NetworkSpec, NodeSpec, topological_order

_NODE_KEYS = ("type", "size", "function")
_EDGE_KEYS = {
    "conv": ("size", "stride", "init"),
    "max_filter": ("size", "stride"),
    "max_pool": ("size", "stride"),
    "dropout": ("ratio",),
    "crop": ("offset",),
}
_ALL_EDGE_KEYS = ("type", "input", "output", "size", "stride", "init", "offset", "ratio")
_TRAINING_KEYS = ("eta", "momentum", "weight_decay", "wc_factor")
_FUNCTIONS = {
    "linear": "linear",
    "rectify_linear": "relu",
    "relu": "relu",
    "tanh": "tanh",
    "logistics": "logistic",
    "logistic": "logistic",
}
_FUNCTION_NAMES = {"linear": "linear", "relu": "rectify_linear", "tanh": "tanh", "logistic": "logistics"}
_NEUTRAL_ARGUMENTS = {"linear": (1.0, 0.0), "tanh": (1.0, 1.0)}
_ONES: Extent = (1, 1, 1)


@dataclass
class _Section:
    """A section as read: where it is, and for each key its value and line number."""

    kind: str
    name: str
    where: str
    line: int
    entries: dict[str, tuple[str, int]] = field(default_factory=dict)

    def at(self, key: str) -> str:
        return f"{self.where}:{self.entries[key][1] if key in self.entries else self.line}"

    def get(self, key: str) -> str | None:
        return self.entries[key][0] if key in self.entries else None

    def need(self, key: str) -> str:
        if key not in self.entries:
            raise SpecError(f"{self.where}:{self.line}: {self.kind} {self.name!r} has no key {key!r}")
        return self.entries[key][0]


def loads(text: str, name: str = "network", where: str = "network.znn") -> NetworkSpec:
    """The network described by `text`; `where` is the file named in errors.

    Raises SpecError with file and line: an unknown or repeated key, a value that cannot be read, a key its
    type does not have; and whatever NetworkSpec refuses.
    """
    sections = _sections(text, where)
    nodes = tuple(_node(section) for section in sections if section.kind == "nodes")
    strides: dict[str, Extent] = {}
    edges = tuple(_edge(section, strides) for section in sections if section.kind == "edges")
    taken = [edge.kernel or edge.window for edge in edges if edge.kernel or edge.window]
    flat = all(extent[0] == 1 for edge in edges for extent in _extents(edge))
    dims = 2 if flat and any(size != _ONES for size in taken) else 3
    try:
        return _with_sparsities(NetworkSpec(name, nodes, edges, dims=dims), strides)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None


def dumps(spec: NetworkSpec) -> str:
    """`spec` in the `.znn` format, such that `loads` gives back the same network (sparsities and dims may
    come back worked out).

    Raises SpecError where the format cannot say it (loss, rates, identity edges, depthwise convolutions,
    biases that are missing or do not begin at 0, sparsities other than the filters give).
    """
    lines = [line for node in spec.nodes for line in _node_lines(node)]
    lines += [line for edge in spec.edges for line in _edge_lines(edge)]
    text = "\n".join(lines)
    try:
        back = loads(text, spec.name)
    except SpecError as error:
        raise SpecError(
            f"the .znn format cannot say network {spec.name!r}, save it as .toml; read back, {error}"
        ) from None
    for mine, read in zip(_resolved(spec), _resolved(back)):
        if mine != read:
            raise SpecError(f"the .znn format cannot say {mine} of network {spec.name!r}; save it as .toml")
    return text


def _extents(edge: EdgeSpec) -> list[Extent]:
    return [extent for extent in (edge.kernel, edge.window, edge.stride, edge.sparsity) if extent is not None]


def _sections(text: str, where: str) -> list[_Section]:
    sections: list[_Section] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line[0] in "#;":
            continue
        key, _, value = line.replace("\t", " ").partition(" ")
        value = value.strip()
        if not value:
            raise SpecError(f"{where}:{number}: {line!r} is a key without a value")
        if key in ("nodes", "edges"):
            sections.append(_Section(key, value, where, number))
        elif not sections:
            raise SpecError(
                f"{where}:{number}: {key!r} comes before the first section; expected nodes or edges"
            )
        else:
            _check_key(sections[-1], key, f"{where}:{number}")
            sections[-1].entries[key] = (value, number)
    return sections


def _check_key(section: _Section, key: str, where: str) -> None:
    known = _NODE_KEYS if section.kind == "nodes" else _ALL_EDGE_KEYS
    if key in _TRAINING_KEYS:
        raise SpecError(
            f"{where}: {key!r} of {section.kind} {section.name!r} is a setting of the original's "
            "optimiser; remove it and give it to the optimiser"
        )
    if key not in known:
        raise SpecError(
            f"{where}: unknown key {key!r} of {section.kind} {section.name!r}; expected one of "
            f"{', '.join(known)}"
        )
    if key in section.entries:
        raise SpecError(f"{where}: {key!r} of {section.kind} {section.name!r} is given twice")


def _node(section: _Section) -> NodeSpec:
    kind = section.need("type")
    transfer = _function(section) if section.get("function") else "linear"
    size = _integers(section, "size", (1,))
    if kind == "transfer":
        section.need("function")
    try:
        return NodeSpec(section.name, size[0], kind, transfer if kind == "transfer" else "linear")
    except SpecError as error:
        raise SpecError(f"{section.at('type')}: {error}") from None


def _function(section: _Section) -> str:
    name, *arguments = section.need("function").replace(",", " ").split()
    if name not in _FUNCTIONS:
        raise SpecError(
            f"{section.at('function')}: function of nodes {section.name!r} is {name!r}; expected one of "
            f"{', '.join(_FUNCTIONS)}"
        )
    if arguments and _numbers(section, "function", arguments) != _NEUTRAL_ARGUMENTS.get(name):
        raise SpecError(
            f"{section.at('function')}: function {name!r} of nodes {section.name!r} has the arguments "
            f"{', '.join(arguments)}; expected none"
        )
    return _FUNCTIONS[name]


def _edge(section: _Section, strides: dict[str, Extent]) -> EdgeSpec:
    """The edge of a section; the stride of a max_filter goes to `strides`."""
    kind = section.need("type")
    if kind not in _EDGE_KEYS:
        raise SpecError(
            f"{section.at('type')}: type of edges {section.name!r} is {kind!r}; expected one of "
            f"{', '.join(_EDGE_KEYS)}"
        )
    for key in section.entries:
        if key not in ("type", "input", "output", *_EDGE_KEYS[kind]):
            raise SpecError(
                f"{section.at(key)}: {key!r} of edges {section.name!r} means nothing for type {kind!r}; "
                f"expected {', '.join(_EDGE_KEYS[kind])}"
            )
    values: dict[str, object] = {}
    if kind in ("conv", "max_filter", "max_pool"):
        values["kernel" if kind == "conv" else "window"] = size = _integers(section, "size", (3,))
        stride = _integers(section, "stride", (3,)) if section.get("stride") else None
        if kind == "max_filter":
            strides[section.name] = stride or size
        elif kind == "max_pool":
            values["stride"] = stride
        elif stride != _ONES:
            values["sparsity"] = stride
    if section.get("init"):
        values["init"] = _init(section)
    if kind == "dropout":
        values["ratio"] = _numbers(section, "ratio", [section.need("ratio")])[0]
    if section.get("offset"):
        values["offset"] = _integers(section, "offset", (3,))
    try:
        return EdgeSpec(section.name, kind, section.need("input"), section.need("output"), **values)
    except SpecError as error:
        raise SpecError(f"{section.at('type')}: {error}") from None


def _init(section: _Section) -> Init:
    kind, *value = section.need("init").split()
    if len(value) > 1:
        raise SpecError(
            f"{section.at('init')}: init of edges {section.name!r} is {section.get('init')!r}; expected "
            "a kind and at most one value"
        )
    numbers = _numbers(section, "init", value)
    try:
        return Init("constant", 0.0) if kind == "zero" and not value else Init(kind, *numbers)
    except SpecError as error:
        raise SpecError(f"{section.at('init')}: edges {section.name!r}: {error}") from None


def _integers(section: _Section, key: str, counts: tuple[int, ...]) -> tuple[int, ...]:
    value = section.need(key)
    parts = value.replace(",", " ").split()
    if len(parts) not in counts or not all(part.isascii() and part.isdigit() for part in parts):
        form = "an integer" if counts == (1,) else "three integers z,y,x"
        raise SpecError(
            f"{section.at(key)}: {key} of {section.kind} {section.name!r} is {value!r}; expected {form}"
        )
    return tuple(int(part) for part in parts)


def _numbers(section: _Section, key: str, parts: list[str]) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in parts)
    except ValueError:
        raise SpecError(
            f"{section.at(key)}: {key} of {section.kind} {section.name!r} is {section.get(key)!r}; "
            "expected numbers"
        ) from None


def _with_sparsities(spec: NetworkSpec, strides: dict[str, Extent]) -> NetworkSpec:
    """Give explicitly every sparsity that the strides of the filters make other than their windows would."""
    plain = {edge.name: replace(edge, window=strides.get(edge.name, edge.window)) for edge in spec.edges}
    order = topological_order(spec)
    wanted = shapes.edge_sparsities(replace(spec, edges=tuple(plain.values())), order)
    by_windows = shapes.upstream_windows(spec, order)
    edges = []
    for edge in spec.edges:
        if edge.kind in ("conv", "max_filter") and edge.sparsity is None:
            if by_windows[edge.source] != {wanted[edge.name]}:
                edge = replace(edge, sparsity=wanted[edge.name])
        edges.append(edge)
    return replace(spec, edges=tuple(edges))


def _resolved(spec: NetworkSpec) -> list[object]:
    """Everything the spec says, with sparsities worked out."""
    sparsities = shapes.edge_sparsities(spec, topological_order(spec))
    edges = [
        replace(edge, sparsity=sparsities[edge.name]) if edge.kind in ("conv", "max_filter") else edge
        for edge in spec.edges
    ]
    return [f"loss {spec.loss!r}", *spec.nodes, *edges]


def _node_lines(node: NodeSpec) -> list[str]:
    function = [f"function {_FUNCTION_NAMES[node.transfer]}"] if node.kind == "transfer" else []
    return [f"nodes {node.name}", f"type {node.kind}", *function, f"size {node.maps}", ""]


def _edge_lines(edge: EdgeSpec) -> list[str]:
    if edge.kind not in _EDGE_KEYS:
        raise SpecError(
            f"the .znn format cannot say edge {edge.name!r} of kind {edge.kind!r}; save it as .toml"
        )
    lines = [f"edges {edge.name}", f"type {edge.kind}"]
    if edge.kind == "conv":
        lines += [f"init {edge.init.kind} {edge.init.value!r}"]
    if (size := edge.kernel or edge.window) is not None:
        stride = {"conv": edge.sparsity or _ONES, "max_filter": edge.window, "max_pool": edge.stride}[
            edge.kind
        ]
        lines += [f"size {_vector(size)}", f"stride {_vector(stride)}"]
    if edge.ratio is not None:
        lines += [f"ratio {edge.ratio!r}"]
    if edge.offset is not None:
        lines += [f"offset {_vector(edge.offset)}"]
    return [*lines, f"input {edge.source}", f"output {edge.target}", ""]


def _vector(extent: Extent) -> str:
    return ",".join(str(n) for n in extent)
