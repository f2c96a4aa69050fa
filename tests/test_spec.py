import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_nets import dags, inits, json_values

from znn import spec as spec_module
from znn import zoo
from znn.errors import SpecError, ZnnError
from znn.spec import EdgeSpec, Init, NetworkSpec, NodeSpec, as_extent, topological_order


def chain(*edges, nodes=None, **kwargs):
    nodes = nodes or [NodeSpec("a", 1, "input"), NodeSpec("b", 2, "transfer"), NodeSpec("c", 2, "transfer")]
    return NetworkSpec("net", tuple(nodes), edges, **kwargs)


A_TO_B = EdgeSpec("ab", "conv", "a", "b", kernel=3)
B_TO_C = EdgeSpec("bc", "conv", "b", "c", kernel=3)


# Extents


@pytest.mark.parametrize(
    "value, dims, expected",
    [
        (3, 3, (3, 3, 3)),
        (3, 2, (1, 3, 3)),
        ((4, 5), 3, (1, 4, 5)),
        ([4, 5], 2, (1, 4, 5)),
        ((2, 3, 4), 2, (2, 3, 4)),
    ],
)
def test_extent_from_what_a_user_may_write(value, dims, expected):
    assert as_extent(value, "it", dims) == expected


def test_extent_as_offset_has_depth_zero():
    assert as_extent(2, "it", dims=2, smallest=0) == (0, 2, 2)
    assert as_extent((0, 1), "it", smallest=0) == (0, 0, 1)


@pytest.mark.parametrize(
    "value", [0, -1, True, 2.0, "3", "333", None, (1,), (1, 2, 3, 4), (1, 0, 1), (1, 2.5, 1)]
)
def test_extent_refuses(value):
    with pytest.raises(SpecError, match="kernel of edge 'x'"):
        as_extent(value, "kernel of edge 'x'")


# Single specs


def test_defaults_and_normal_forms():
    assert Init("msra").value == 1.0 and Init("constant").value == 0.0
    assert EdgeSpec("p", "max_pool", "a", "b", window=2).stride == (2, 2, 2)
    assert EdgeSpec("e", "conv", "a", "b", kernel=(3, 5)).kernel == (1, 3, 5)
    assert NodeSpec("s", 1, "sum").bias is False and NodeSpec("i", 1, "input").bias is False
    assert NodeSpec("t", 1, "transfer").bias is True


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Init("magic"), "magic"),
        (lambda: Init("gaussian", -1.0), "-1.0"),
        (lambda: Init("uniform", math.nan), "nan"),
        (lambda: Init("uniform", "much"), "much"),
        (lambda: NodeSpec("", 1, "sum"), "''"),
        (lambda: NodeSpec("two words", 1, "sum"), "two words"),
        (lambda: NodeSpec("n", 0, "sum"), "maps=0"),
        (lambda: NodeSpec("n", 1.5, "sum"), "maps=1.5"),
        (lambda: NodeSpec("n", True, "sum"), "maps=True"),
        (lambda: NodeSpec("n", 1, "hidden"), "hidden"),
        (lambda: NodeSpec("n", 1, "transfer", "sigmoid"), "sigmoid"),
        (lambda: NodeSpec("n", 1, "sum", "relu"), "relu"),
        (lambda: NodeSpec("n", 1, "transfer", bias=1), "bias of node 'n'"),
        (lambda: NodeSpec("n", 1, "transfer", rate=math.inf), "inf"),
        (lambda: NodeSpec("n", 1, "transfer", rate=-1), "-1"),
        (lambda: EdgeSpec("e", "pool", "a", "b"), "'pool'"),
        (lambda: EdgeSpec("e", "conv", "a", "b"), "no kernel"),
        (lambda: EdgeSpec("e", "max_filter", "a", "b"), "no window"),
        (lambda: EdgeSpec("e", "max_pool", "a", "b"), "no window"),
        (lambda: EdgeSpec("e", "dropout", "a", "b"), "no ratio"),
        (lambda: EdgeSpec("e", "dropout", "a", "b", ratio=1.0), "1.0"),
        (lambda: EdgeSpec("e", "dropout", "a", "b", ratio=-0.1), "-0.1"),
        (lambda: EdgeSpec("e", "dropout", "a", "b", ratio=math.nan), "nan"),
        (lambda: EdgeSpec("e", "conv", "a", "b", kernel=0), "kernel of edge 'e' is 0"),
        (lambda: EdgeSpec("e", "conv", "a", "b", kernel=3, window=2), "window"),
        (lambda: EdgeSpec("e", "max_filter", "a", "b", window=2, stride=2), "stride"),
        (lambda: EdgeSpec("e", "max_pool", "a", "b", window=2, sparsity=2), "sparsity"),
        (lambda: EdgeSpec("e", "crop", "a", "b", rate=2.0), "rate"),
        (lambda: EdgeSpec("e", "conv", "a", "b", kernel=3, rate=math.nan), "nan"),
        (lambda: EdgeSpec("e", "conv", "a", "b", kernel=3, weight_decay=-1.0), "-1.0"),
        (lambda: EdgeSpec("e", "conv", "a", "b", kernel=3, init="msra"), "expected an Init"),
    ],
)
def test_single_specs_refuse(make, words):
    with pytest.raises(SpecError, match=words):
        make()


def test_spec_error_is_a_value_error_and_a_znn_error():
    assert issubclass(SpecError, ValueError) and issubclass(SpecError, ZnnError)


# Networks


@pytest.mark.parametrize(
    "edges, nodes, words",
    [
        (
            (A_TO_B, B_TO_C, EdgeSpec("ca", "conv", "c", "b", kernel=1)),
            None,
            "cycle: (b -> c -> b|c -> b -> c)",
        ),
        ((A_TO_B, EdgeSpec("bd", "conv", "b", "d", kernel=1)), None, "target of edge 'bd' is 'd'"),
        ((A_TO_B, EdgeSpec("ab", "conv", "b", "c", kernel=1)), None, "'ab'"),
        ((EdgeSpec("b", "conv", "a", "b", kernel=1), B_TO_C), None, "'b'"),
        ((A_TO_B,), None, "node 'c' is of kind transfer and no edge leads to it"),
        ((A_TO_B, B_TO_C, EdgeSpec("ba", "conv", "b", "a", kernel=1)), None, "input node 'a'"),
        (
            (EdgeSpec("ab", "max_pool", "a", "b", window=2), B_TO_C),
            None,
            "'a' has 1 maps and its target 'b' 2",
        ),
        ((EdgeSpec("ab", "conv", "a", "b", kernel=1, depthwise=True), B_TO_C), None, "depthwise"),
        ((), [NodeSpec("a", 1, "input")], "'a' leads nowhere"),
        ((), [], "no input node"),
        (
            (A_TO_B,),
            [NodeSpec("a", 1, "input"), NodeSpec("a", 1, "input"), NodeSpec("b", 1, "sum")],
            "another node",
        ),
    ],
)
def test_networks_refuse(edges, nodes, words):
    with pytest.raises(SpecError, match=words):
        if nodes is None:
            chain(*edges)
        else:
            NetworkSpec("net", nodes, edges)


def test_cycle_apart_from_the_inputs_is_found():
    nodes = [
        NodeSpec("a", 1, "input"),
        NodeSpec("b", 1, "sum"),
        NodeSpec("c", 1, "sum"),
        NodeSpec("d", 1, "sum"),
    ]
    edges = [
        EdgeSpec("ab", "identity", "a", "b"),
        EdgeSpec("cd", "identity", "c", "d"),
        EdgeSpec("dc", "identity", "d", "c"),
    ]
    with pytest.raises(SpecError, match="cycle"):
        NetworkSpec("net", nodes, edges)


def test_dims_and_loss_are_checked():
    with pytest.raises(SpecError, match="3x3x3 in a network with dims=2"):
        chain(A_TO_B, B_TO_C, dims=2)
    with pytest.raises(SpecError, match="dims"):
        chain(A_TO_B, B_TO_C, dims=4)
    with pytest.raises(SpecError, match="'hinge'"):
        chain(A_TO_B, B_TO_C, loss="hinge")
    with pytest.raises(SpecError, match="network name"):
        replace(chain(A_TO_B, B_TO_C), name="")


def test_lookups():
    net = chain(A_TO_B, B_TO_C)
    assert net.node("b").maps == 2 and net.edge("bc") is B_TO_C
    with pytest.raises(SpecError, match="no edge 'x'; it has ab, bc"):
        net.edge("x")


@given(dags())
def test_topological_order_puts_sources_first(net_and_extent):
    net, _ = net_and_extent
    place = {name: i for i, name in enumerate(topological_order(net))}
    assert sorted(place) == sorted(node.name for node in net.nodes)
    assert all(place[edge.source] < place[edge.target] for edge in net.edges)


# Layered form

LAYERED = """
name = "small"
dims = 2
input_maps = 1
loss = "softmax"
layers = [
  {conv = 8, kernel = 5, transfer = "relu", init = "xavier", rate = 0.5, bias_rate = 2.0, weight_decay = 0.0},
  {max_filter = 2},
  {conv = 8, kernel = [3, 5], transfer = "tanh", dilation = 3, bias = false},
  {max_pool = 3, stride = 2},
  {dropout = 0.25, name = "drop"},
  {conv = 2, kernel = 1, bias_init = {kind = "constant", value = 0.5}},
]
"""


def test_layered_toml():
    net = NetworkSpec.from_toml(LAYERED)
    assert [node.name for node in net.nodes] == [
        "input",
        "nconv1",
        "nfilter1",
        "nconv2",
        "npool1",
        "ndrop",
        "output",
    ]
    assert [edge.name for edge in net.edges] == ["conv1", "filter1", "conv2", "pool1", "drop", "conv3"]
    assert [node.maps for node in net.nodes] == [1, 8, 8, 8, 8, 8, 2]
    assert net.loss == "softmax" and net.dims == 2
    assert net.edge("conv1") == EdgeSpec(
        "conv1", "conv", "input", "nconv1", kernel=(1, 5, 5), init=Init("xavier"), rate=0.5, weight_decay=0.0
    )
    assert net.node("nconv1") == NodeSpec("nconv1", 8, "transfer", "relu", rate=2.0)
    assert net.edge("conv2").kernel == (1, 3, 5) and net.edge("conv2").sparsity == (1, 3, 3)
    assert net.node("nconv2").bias is False
    assert net.edge("pool1").window == (1, 3, 3) and net.edge("pool1").stride == (1, 2, 2)
    assert net.edge("drop").ratio == 0.25
    assert net.node("output").bias_init == Init("constant", 0.5)
    assert NetworkSpec.from_toml(net.to_toml()) == net


@pytest.mark.parametrize(
    "layer, words",
    [
        ({"conv": 3}, "edge 'conv1' is of kind conv and has no kernel"),
        ({"conv": 3, "max_pool": 2}, "layer 1.*exactly one of"),
        ({"relu": True}, "layer 1.*exactly one of"),
        ({"conv": 3, "kernel": 3, "colour": "red"}, "layer 1.*unknown key 'colour'"),
        ({"max_pool": 2, "sparsity": 2}, "layer 1.*unknown key 'sparsity'"),
        ({"conv": 3, "kernel": 3, "sparsity": 2, "dilation": 2}, "both sparsity and dilation"),
        ({"conv": 0, "kernel": 3}, "maps=0"),
        ({"conv": 3, "kernel": 3, "init": {"kind": "msra", "width": 2}}, "unknown key 'width'"),
        ({"conv": 3, "kernel": 3, "name": 7}, "name is 7"),
        ("conv", "layer 1 is 'conv'"),
    ],
)
def test_layers_refuse(layer, words):
    with pytest.raises(SpecError, match=words):
        NetworkSpec.layered("net", 1, [layer])


def test_layered_needs_layers_and_input_maps():
    with pytest.raises(SpecError, match="empty"):
        NetworkSpec.layered("net", 1, [])
    with pytest.raises(SpecError, match="maps=None"):
        NetworkSpec.layered("net", None, [{"conv": 1, "kernel": 1}])
    with pytest.raises(SpecError, match="input_maps"):
        NetworkSpec.from_dict({"name": "net", "layers": [{"conv": 1, "kernel": 1}]})


# TOML, dicts and files


@given(dags())
def test_round_trips(net_and_extent):
    net, _ = net_and_extent
    assert NetworkSpec.from_toml(net.to_toml()) == net
    assert NetworkSpec.from_dict(json.loads(json.dumps(net.to_dict()))) == net


@given(inits)
def test_init_round_trip(init):
    assert Init.from_dict(init.to_dict()) == init


@pytest.mark.parametrize("name", ['quo"te', "back\\slash", "Ünïcode 🧠", "name"])
def test_network_names_survive_toml(name):
    net = replace(chain(A_TO_B, B_TO_C), name=name)
    assert NetworkSpec.from_toml(net.to_toml()).name == name


def test_full_toml_takes_short_extents_and_dilation():
    text = """
    name = "net"
    dims = 2
    nodes = [
      {name = "a", maps = 1, kind = "input"},
      {name = "b", maps = 1, kind = "transfer", transfer = "relu"},
    ]
    [[edges]]
    name = "ab"
    kind = "conv"
    source = "a"
    target = "b"
    kernel = 3
    dilation = 2
    init = "xavier"
    """
    edge = NetworkSpec.from_toml(text).edge("ab")
    assert edge.kernel == (1, 3, 3) and edge.sparsity == (1, 2, 2) and edge.init == Init("xavier")


@pytest.mark.parametrize(
    "text, words",
    [
        ("name = ", "not valid TOML"),
        ('name = "x"', "no key 'nodes'"),
        ('name = "x"\nnodes = 1\nedges = []', "nodes of .*net.toml is 1"),
        ('name = "x"\nnodes = [1]\nedges = []', "node 1 is 1"),
        ('name = "x"\nnodes = [{name = "a"}]\nedges = []', r"node 1 \(a\) has no key 'maps'"),
        ('name = "x"\ncolour = 1\nnodes = []\nedges = []', "unknown key 'colour'"),
        (
            'name = "x"\nnodes = []\nedges = [{name = "e", colour = 1}]',
            r"edge 1 \(e\) has the unknown key 'colour'",
        ),
    ],
)
def test_toml_errors_name_file_and_key(tmp_path, text, words):
    path = tmp_path / "net.toml"
    path.write_text(text)
    with pytest.raises(SpecError, match=words) as caught:
        NetworkSpec.load(path)
    assert str(path) in str(caught.value)


def test_semantic_errors_name_the_file_too(tmp_path):
    path = tmp_path / "net.toml"
    path.write_text(chain(A_TO_B, B_TO_C).to_toml().replace('target = "c"', 'target = "z"'))
    with pytest.raises(SpecError, match="'z'") as caught:
        NetworkSpec.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("ending", [".toml", ".znn"])
def test_files(tmp_path, ending):
    net = zoo.build("scaling_2d", width=3)
    path = tmp_path / f"scaling_2d{ending}"
    net.save(path)
    assert NetworkSpec.load(path) == net and spec_module.load(str(path)) == net
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "net.znn"
    zoo.build("3d_3", width=2).save(path)
    before = path.read_bytes()
    with pytest.raises(SpecError, match="save it as .toml"):
        zoo.build("multiscale").save(path)
    assert path.read_bytes() == before


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(SpecError, match="cannot be read"):
        NetworkSpec.load(tmp_path / "absent.toml")
    with pytest.raises(SpecError, match="expected .toml or .znn"):
        NetworkSpec.load(tmp_path / "net.json")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="cannot be read"):
        NetworkSpec.load(tmp_path / "binary.toml")


NET = chain(A_TO_B, B_TO_C).to_dict()


@settings(max_examples=300)
@given(st.data())
def test_damaged_descriptions_raise_spec_errors_only(data):
    """Any value anywhere in a description either builds a network or raises SpecError."""
    damaged = json.loads(json.dumps(NET))
    table = data.draw(st.sampled_from([damaged, *damaged["nodes"], *damaged["edges"]]))
    key = data.draw(
        st.sampled_from(
            [
                *table,
                "init",
                "bias_init",
                "sparsity",
                "dims",
                "loss",
                "ratio",
                "rate",
                "bias",
                "depthwise",
                "layers",
                "input_maps",
                "dilation",
            ]
        )
    )
    table[key] = data.draw(json_values)
    try:
        net = NetworkSpec.from_dict(damaged)
    except SpecError:
        return
    assert NetworkSpec.from_toml(net.to_toml()) == net
