from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from znn import znn_format, zoo
from znn.errors import SpecError
from znn.graph import Graph
from znn.spec import EdgeSpec, Init, NetworkSpec, NodeSpec

EXAMPLE = """\
# a comment
nodes input
type input
size 1

; another comment
edges conv1
type conv
init uniform
size 1,5,5
stride 1,1,1
input input
output nl1

nodes nl1
type\ttransfer
function rectify_linear
size 12

edges pool1
type max_filter
size 1,2,2
stride 1,2,2
input nl1
output nl2

nodes nl2
type sum
function rectify_linear
size 12

edges conv2
type conv
init gaussian 0.02
  size 1,3,3
stride 1,1,1
input nl2
output nl3

nodes nl3
type transfer
function tanh 1,1
size 12

edges drop
type dropout
ratio 0.25
input nl3
output nl4

nodes nl4
type sum
size 12

edges conv3
type conv
size 1,1,1
input nl4
output output

nodes output
type transfer
function logistics
size 2
"""


def test_example():
    spec = znn_format.loads(EXAMPLE, "example")
    assert spec.name == "example" and spec.dims == 2 and spec.loss == "squared"
    assert [node.name for node in spec.nodes] == ["input", "nl1", "nl2", "nl3", "nl4", "output"]
    assert [node.kind for node in spec.nodes] == ["input", "transfer", "sum", "transfer", "sum", "transfer"]
    assert [node.transfer for node in spec.nodes] == [
        "linear",
        "relu",
        "linear",
        "tanh",
        "linear",
        "logistic",
    ]
    assert spec.edge("conv1") == EdgeSpec(
        "conv1", "conv", "input", "nl1", kernel=(1, 5, 5), init=Init("uniform")
    )
    assert spec.edge("conv2").init == Init("gaussian", 0.02)
    assert spec.edge("pool1") == EdgeSpec("pool1", "max_filter", "nl1", "nl2", window=(1, 2, 2))
    assert spec.edge("drop").ratio == 0.25
    assert spec.edge("conv3").init == Init("msra")
    graph = Graph.build(spec, output=1)
    assert graph.edge("conv2").sparsity == (1, 2, 2)
    assert graph.field_of_view() == (1, 10, 10)


def line_of(text):
    return next(i for i, line in enumerate(EXAMPLE.splitlines(), 1) if line.strip() == text)


def changed(old, new):
    assert EXAMPLE.count(old) == 1
    return EXAMPLE.replace(old, new)


@pytest.mark.parametrize(
    "old, new, line, words",
    [
        ("ratio 0.25", "chance 0.25", "ratio 0.25", "unknown key 'chance' of edges 'drop'"),
        ("function tanh 1,1", "colour red", "function tanh 1,1", "unknown key 'colour' of nodes 'nl3'"),
        (
            "ratio 0.25",
            "eta 0.01",
            "ratio 0.25",
            "'eta' of edges 'drop' is a setting of the original's optimiser",
        ),
        ("ratio 0.25", "ratio 1.25", "type dropout", "1.25"),
        ("ratio 0.25", "ratio often", "ratio 0.25", "'often'; expected numbers"),
        (
            "ratio 0.25",
            "stride 1,1,1",
            "ratio 0.25",
            "'stride' of edges 'drop' means nothing for type 'dropout'",
        ),
        ("type dropout", "type dropin", "type dropout", "'dropin'; expected one of conv, max_filter"),
        ("init uniform", "init", "init uniform", "key without a value"),
        ("init uniform", "init magic", "init uniform", "'magic'"),
        ("init uniform", "init uniform 1 2", "init uniform", "at most one value"),
        ("init uniform", "type conv", "init uniform", "'type' of edges 'conv1' is given twice"),
        ("size 1,5,5", "size 5", "size 1,5,5", "'5'; expected three integers"),
        ("size 1,5,5", "size 1,5,x", "size 1,5,5", "'1,5,x'; expected three integers"),
        ("size 1,5,5", "size 1,-5,5", "size 1,5,5", "expected three integers"),
        ("function tanh 1,1", "function tanh 1.7159,0.6666", "function tanh 1,1", "arguments 1.7159, 0.6666"),
        ("function tanh 1,1", "function softplus", "function tanh 1,1", "'softplus'"),
        ("size 2", "size two", "size 2", "'two'; expected an integer"),
        ("size 2", "size 0", "function logistics", "maps=0"),
        ("# a comment", "type conv", "# a comment", "before the first section"),
    ],
)
def test_errors_name_file_and_line(old, new, line, words):
    with pytest.raises(SpecError, match=words) as caught:
        znn_format.loads(changed(old, new), "net", "nets/a.znn")
    number = line_of(line) + (-1 if line == "function logistics" else 0)
    assert str(caught.value).startswith(f"nets/a.znn:{number}: ")


@pytest.mark.parametrize(
    "old, words",
    [
        ("ratio 0.25\n", "edges 'drop' has no key 'ratio'"),
        ("size 1,5,5\n", "edges 'conv1' has no key 'size'"),
        ("output nl1\n", "edges 'conv1' has no key 'output'"),
        ("size 2\n", "nodes 'output' has no key 'size'"),
        ("function logistics\n", "nodes 'output' has no key 'function'"),
    ],
)
def test_missing_keys_name_the_section(old, words):
    with pytest.raises(SpecError, match=r"a.znn:\d+: " + words):
        znn_format.loads(changed(old, ""), "net", "a.znn")


def test_network_errors_name_the_file():
    with pytest.raises(SpecError, match="a.znn: target of edge 'drop' is 'nowhere'"):
        znn_format.loads(changed("output nl4", "output nowhere"), "net", "a.znn")


def test_windows_line_endings_and_blank_lines_are_nothing():
    assert znn_format.loads(EXAMPLE.replace("\n", "\r\n\r\n"), "example") == znn_format.loads(
        EXAMPLE, "example"
    )


@pytest.mark.parametrize(
    "text, init",
    [
        ("zero", Init("constant", 0.0)),
        ("constant 0.5", Init("constant", 0.5)),
        ("xavier", Init("xavier")),
        ("msra", Init("msra")),
        ("gaussian", Init("gaussian")),
    ],
)
def test_init(text, init):
    assert znn_format.loads(changed("init uniform", f"init {text}"), "x").edge("conv1").init == init


def test_sparsity_grows_by_the_stride_of_a_filter_not_its_window():
    spec = znn_format.loads(changed("size 1,2,2\nstride 1,2,2", "size 1,3,3\nstride 1,2,2"), "x")
    assert Graph.build(spec, output=4).edge("conv2").sparsity == (1, 2, 2)
    spec = znn_format.loads(changed("size 1,2,2\nstride 1,2,2", "size 1,3,3"), "x")
    assert spec.edge("conv2").sparsity is None
    assert Graph.build(spec, output=4).edge("conv2").sparsity == (1, 3, 3)


def test_conv_stride_is_its_sparsity():
    spec = znn_format.loads(EXAMPLE.replace("  size 1,3,3\nstride 1,1,1", "  size 1,3,3\nstride 1,5,5"), "x")
    graph = Graph.build(spec, output=4)
    assert graph.edge("conv2").sparsity == (1, 5, 5) and graph.edge("conv3").sparsity == (1, 2, 2)


def test_max_pool_and_crop():
    text = """
    nodes a
    type input
    size 1
    nodes b
    type sum
    size 1
    nodes c
    type sum
    size 1
    edges p
    type max_pool
    size 2,3,3
    stride 2,2,2
    input a
    output b
    edges q
    type crop
    offset 0,1,2
    input b
    output c
    """
    spec = znn_format.loads(text, "x")
    assert spec.dims == 3
    assert spec.edge("p") == EdgeSpec("p", "max_pool", "a", "b", window=(2, 3, 3), stride=(2, 2, 2))
    assert spec.edge("q").offset == (0, 1, 2)
    assert znn_format.loads(znn_format.dumps(spec), "x") == spec
    without = znn_format.loads(text.replace("    stride 2,2,2\n", "").replace("    offset 0,1,2\n", ""), "x")
    assert without.edge("p").stride == (2, 3, 3) and without.edge("q").offset is None


@pytest.mark.parametrize("form", ["dense", "strided"])
@pytest.mark.parametrize("name", [name for name in zoo.names() if name != "multiscale"])
def test_the_zoo_can_be_written(name, form):
    spec = zoo.build(name, form=form)
    assert znn_format.loads(znn_format.dumps(spec), spec.name) == spec


LAYERS = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {
                "conv": st.integers(1, 3),
                "kernel": st.tuples(*[st.integers(1, 4)] * 3),
                "transfer": st.sampled_from(["linear", "relu", "tanh", "logistic"]),
                "init": st.sampled_from(["msra", "xavier", {"kind": "gaussian", "value": 0.125}]),
            }
        ),
        st.fixed_dictionaries({"max_filter": st.tuples(*[st.integers(1, 3)] * 3)}),
        st.fixed_dictionaries(
            {"max_pool": st.tuples(*[st.integers(1, 3)] * 3), "stride": st.tuples(*[st.integers(1, 3)] * 3)}
        ),
        st.fixed_dictionaries({"dropout": st.floats(0, 0.99)}),
    ),
    min_size=1,
    max_size=6,
)


@given(LAYERS)
def test_layered_networks_round_trip(layers):
    spec = NetworkSpec.layered("net", 2, layers)
    back = znn_format.loads(znn_format.dumps(spec), "net")
    assert replace(back, dims=3) == spec
    sizes = [size for edge in spec.edges if (size := edge.kernel or edge.window)]
    strides = [edge.stride for edge in spec.edges if edge.stride]
    flat = all(extent[0] == 1 for extent in sizes + strides)
    assert back.dims == (2 if flat and any(size != (1, 1, 1) for size in sizes) else 3)


A, B = NodeSpec("a", 1, "input"), NodeSpec("b", 1, "transfer")
CONV = EdgeSpec("c", "conv", "a", "b", kernel=3)


@pytest.mark.parametrize(
    "spec",
    [
        NetworkSpec("n", (A, B), (CONV,), loss="softmax"),
        NetworkSpec("n", (A, replace(B, bias=False)), (CONV,)),
        NetworkSpec("n", (A, replace(B, bias_init=Init("constant", 1.0))), (CONV,)),
        NetworkSpec("n", (A, B), (replace(CONV, rate=2.0),)),
        NetworkSpec("n", (A, B), (replace(CONV, depthwise=True),)),
        NetworkSpec("n", (A, B), (EdgeSpec("i", "identity", "a", "b"),)),
        NetworkSpec("n", (A, B), (EdgeSpec("f", "max_filter", "a", "b", window=2, sparsity=2),)),
        zoo.build("multiscale"),
    ],
)
def test_what_the_format_cannot_say_is_refused(spec):
    with pytest.raises(SpecError, match="the .znn format cannot say .*save it as .toml"):
        znn_format.dumps(spec)


WORDS = [
    "nodes",
    "edges",
    "type",
    "conv",
    "crop",
    "size",
    "1,1,1",
    "1",
    "input",
    "output",
    "x",
    "stride",
    "0",
    "-1",
    "init",
    "function",
    "nan",
    "ratio",
    "#",
    "max_filter",
    "transfer",
    "offset",
]


@settings(max_examples=300)
@given(
    st.integers(0, len(EXAMPLE.splitlines()) - 1), st.lists(st.sampled_from(WORDS), max_size=3), st.booleans()
)
def test_damaged_files_raise_spec_errors_only(line, words, insert):
    lines = EXAMPLE.splitlines()
    lines[line : line + (not insert)] = [" ".join(words)]
    try:
        spec = znn_format.loads("\n".join(lines), "net", "a.znn")
    except SpecError as error:
        assert "a.znn" in str(error)
    else:
        assert spec.nodes
