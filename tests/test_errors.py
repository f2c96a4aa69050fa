"""Bad input: one clear exception each, naming the culprit, before work starts; the network stays usable."""
from __future__ import annotations

import _thread
import itertools
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

import znn
from checks import (assert_identical, pair, random_inputs, random_output_gradients, random_targets,
                    small_graph, train_alike)
from znn.errors import DataError, ZnnError
from znn.spec import NetworkSpec


@pytest.fixture
def graph():
    return small_graph("multiscale_small")


@pytest.fixture(params=[1, 8], ids="bundles of {}".format)
def net(graph, request):
    with znn.Network(graph, threads=2, bundle=request.param, plan="direct", sum="ordered", seed=3) as network:
        yield network


# Ways to spoil a good array (patches apart, (maps, z, y, x)), and a word the message must hold.
SPOILED = {
    "float64": (lambda a: a.astype(np.float64), "float64"),
    "integers": (lambda a: a.astype(np.int32), "int32"),
    "half": (lambda a: a.astype(np.float16), "float16"),
    "other byte order": (lambda a: a.astype(">f4"), "float32"),
    "a list": (lambda a: a.tolist(), "list"),
    "None": (lambda a: None, "None"),
    "missing axis": (lambda a: a[0], "shape"),
    "extra axes": (lambda a: a[None, None], "shape"),
    "maps": (lambda a: np.concatenate([a, a]), "shape"),
    "extent too small": (lambda a: np.ascontiguousarray(a[..., :-1]), "shape"),
    "extent too large": (lambda a: np.pad(a, [(0, 0), (0, 0), (0, 1), (0, 0)]), "shape"),
    "axes swapped": (lambda a: np.ascontiguousarray(a.swapaxes(1, 3)), "shape"),
    "Fortran order": (np.asfortranarray, "order"),
    "a strided view": (lambda a: np.repeat(a, 2, axis=-1)[..., ::2], "order"),
    "NaN": (lambda a: put(a, np.nan), "NaN|finite"),
    "infinity": (lambda a: put(a, -np.inf), "inf|finite"),
}


def put(array, value):
    array = array.copy()
    array[-1, -1, -1, -1] = value
    return array


def forward_again(net, graph):
    return net.forward(random_inputs(graph, np.random.default_rng(5)))


# ---- arrays -------------------------------------------------------------------------------------------
CALLS = {
    "inputs": ("image", lambda net, a: net.forward(a["inputs"])),
    "training inputs": ("image", lambda net, a: net.train_step(a["inputs"], a["targets"])),
    "targets": ("out", lambda net, a: net.train_step(a["inputs"], a["targets"])),
    "weights": ("out", lambda net, a: net.train_step(a["inputs"], a["targets"], a["weights"])),
    "gradients": ("out", lambda net, a: net.backward(a["gradients"])),
}


@pytest.mark.parametrize("call, how", [(call, how) for call, how in itertools.product(CALLS, SPOILED)
                                       if (call, how) != ("weights", "None")])
def test_bad_arrays_are_refused_and_named(rng, graph, net, call, how):
    (name, run), (spoil, word) = CALLS[call], SPOILED[how]
    arrays = {"inputs": random_inputs(graph, rng), "targets": random_targets(graph, rng),
              "gradients": random_output_gradients(graph, rng)}
    arrays["weights"] = np.abs(arrays["targets"])
    before, parameters = forward_again(net, graph), net.parameters()
    net.forward(arrays["inputs"], "train")
    key = call.split()[-1]
    with pytest.raises(DataError, match=f"(?=.*{name})(?=.*({word}))"):
        run(net, arrays | {key: spoil(arrays[key])})
    assert_identical(net.parameters(), parameters)
    assert_identical(forward_again(net, graph), before)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("voxel", [0, 12345, -1])
def test_training_goes_on_as_if_a_bad_input_had_not_been_there(rng, threads, voxel):
    """Also with updates on their way; the bundled engine sees what is wrong while it loads the input, a part at a time."""
    graph = znn.Graph.build(NetworkSpec.layered("large", 1, [{"conv": 9, "kernel": 3, "transfer": "relu"}, {"conv": 2, "kernel": 3}]),
                        output=(30, 32, 34))
    pairs = [(rng.standard_normal((1, *graph.node("input").extent), dtype=np.float32),
              rng.standard_normal((2, 30, 32, 34), dtype=np.float32)) for _ in range(3)]
    results = []
    for refused in (False, True):
        with znn.Network(graph, bundle=8, plan="direct", threads=threads, seed=3) as net:
            losses = []
            for x, target in pairs:
                losses.append(net.train_step(x, target))
                bad = x.copy()
                bad.flat[voxel] = np.nan
                for call in (lambda: net.train_step(bad, target), lambda: net.forward(bad, "train")) if refused else ():
                    with pytest.raises(DataError, match="input.*NaN"):
                        call()
                if refused:
                    with pytest.raises(ZnnError, match="forward"):
                        net.backward(target)
            assert net.round == len(pairs)
            results.append({"losses": np.array(losses)} | net.parameters() | {"output": net.forward(pairs[0][0])})
    assert_identical(results[0], results[1])


@pytest.mark.parametrize("inputs, word", [
    (lambda x: x["image"], "hint"),
    (lambda x: {"image": x["image"]}, "hint"),
    (lambda x: x | {"nobody": x["image"]}, "nobody"),
    (lambda x: {"image": x["hint"], "hint": x["image"]}, "shape"),
])
def test_inputs_by_name_must_be_the_networks(rng, inputs, word):
    graph = small_graph("several_ends")
    with znn.Network(graph) as net:
        x, targets = random_inputs(graph, rng), random_targets(graph, rng)
        with pytest.raises(DataError, match=word):
            net.forward(inputs(x))
        net.train_step(x, targets)
        with pytest.raises(DataError, match="side"):
            net.train_step(x, {"main": targets["main"]})
        with pytest.raises(DataError, match="side"):
            net.backward(targets["main"])


def test_the_patches_must_be_those_of_the_network(rng, graph):
    with znn.Network(graph, patches=3) as net:
        net.forward(random_inputs(graph, rng, 3))
        for patches in (None, 1, 2, 4):
            with pytest.raises(DataError, match="shape"):
                net.forward(random_inputs(graph, rng, patches))


# ---- order of calls -----------------------------------------------------------------------------------
def test_backward_needs_a_forward_in_the_train_phase(rng, graph, net):
    gradient, parameters = random_output_gradients(graph, rng), net.parameters()
    with pytest.raises(ZnnError, match="forward"):
        net.backward(gradient)
    forward_again(net, graph)
    with pytest.raises(ZnnError, match="train"):
        net.backward(gradient)
    net.forward(random_inputs(graph, rng), "train")
    net.backward(gradient)
    with pytest.raises(ZnnError, match="forward"):
        net.backward(gradient)
    assert net.round == 1
    assert any(np.any(net.parameters()[name] != parameters[name]) for name in parameters)


def test_an_unknown_phase_is_refused(rng, graph, net):
    with pytest.raises(ValueError, match="'test'.*infer.*train"):
        net.forward(random_inputs(graph, rng), "test")


def test_the_input_gradient_must_be_asked_for_and_computed(rng, graph, net):
    net.train_step(random_inputs(graph, rng), random_targets(graph, rng))
    with pytest.raises(ZnnError, match="input_gradient"):
        net.input_gradient()
    with znn.Network(graph, input_gradient=True) as other, pytest.raises(ZnnError, match="backward"):
        other.input_gradient()


def test_a_closed_network_says_so(rng, graph, net):
    inputs, targets = random_inputs(graph, rng), random_targets(graph, rng)
    net.train_step(inputs, targets)
    net.close()
    net.close()
    for call in (lambda: net.forward(inputs), lambda: net.train_step(inputs, targets),
                 lambda: net.backward(targets), lambda: net.set_parameters({}), net.parameters, net.momenta,
                 net.sync):
        with pytest.raises(ZnnError, match="closed"):
            call()


# ---- state --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("setter", ["set_parameters", "set_momenta"])
@pytest.mark.parametrize("change, word", [
    (lambda p: p | {"nobody": np.zeros(1, np.float32)}, "nobody"),
    (lambda p: p | {"conv_a": p["conv_a"][:1]}, "conv_a"),
    (lambda p: p | {"conv_a": p["conv_a"].swapaxes(3, 4).copy()}, "conv_a"),
    (lambda p: p | {"a": np.zeros((3, 1), np.float32)}, "a"),
    (lambda p: p | {"conv_b": p["conv_b"] * np.float32(np.nan)}, "conv_b"),
    (lambda p: p | {"conv_b": None}, "conv_b"),
], ids=["name", "shape", "axes", "rank", "NaN", "None"])
def test_bad_parameters_are_refused_and_nothing_is_changed(net, setter, change, word):
    before, momenta = net.parameters(), net.momenta()
    spoiled = change({name: value + 1 for name, value in before.items()})
    with pytest.raises(DataError, match=word):
        getattr(net, setter)(spoiled)
    assert_identical(net.parameters(), before)
    assert_identical(net.momenta(), momenta)


def test_initial_parameters_must_be_complete(graph):
    parameters = znn.init.initial_parameters(graph, 0)
    del parameters["conv_b"]
    with pytest.raises(DataError, match="conv_b"):
        znn.Network(graph, parameters=parameters)


# ---- options ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("option, value", [
    ("threads", 0), ("threads", -1), ("threads", 100_000), ("threads", 1.5), ("threads", "two"),
    ("threads", True), ("policy", "random"), ("policy", 3), ("sum", "atomic"), ("sum", None),
    ("allocator", "arena"), ("memoize", ("kernels", "weights")), ("memoize", "everything"),
    ("plan", "guess"), ("plan", 7), ("patches", 0), ("patches", -2), ("patches", 1.5), ("seed", -1),
    ("seed", "x"), ("optimiser", "adam"),
])
def test_bad_options_are_named_with_their_value(graph, option, value):
    shown = "weights" if value == ("kernels", "weights") else str(value)
    with pytest.raises(ZnnError, match=f"(?=.*{option})(?=.*{shown})"):
        znn.Network(graph, **{option: value})


@pytest.mark.parametrize("setting", [
    {"rate": -0.1}, {"rate": float("nan")}, {"momentum": -0.5}, {"momentum": 1.5}, {"weight_decay": -1.0},
    {"weight_decay": float("inf")}, {"rate": "fast"}])
def test_bad_settings_of_the_optimiser_are_named(setting):
    with pytest.raises(ZnnError, match=next(iter(setting))):
        znn.SGD(**setting)


@pytest.mark.parametrize("rate", [-1.0, float("nan"), "fast"])
def test_a_bad_learning_rate_is_refused(net, rate):
    before = net.learning_rate
    with pytest.raises(ZnnError, match="rate"):
        net.learning_rate = rate
    assert net.learning_rate == before


@pytest.mark.parametrize("arguments, word", [
    ({}, "extent"), ({"output": 0}, "output"), ({"output": (1, 2, 3, 4)}, "output"),
    ({"output": "big"}, "output"), ({"input": (3, 4, 5)}, "conv"), ({"output": 3, "input": 30}, "30"),
    ({"output": {"nobody": 3}}, "nobody")])
def test_extents_that_do_not_fit_are_refused(arguments, word):
    spec = NetworkSpec.layered("n", 1, [{"conv": 2, "kernel": (2, 3, 7)}])
    with pytest.raises(znn.errors.SpecError, match=word):
        znn.Network(spec, **arguments)


@pytest.mark.parametrize("spec", [None, 3, "scaling_3d", {"name": "n"}])
def test_what_is_no_description_is_refused(spec):
    with pytest.raises(znn.errors.SpecError, match="NetworkSpec"):
        znn.Network(spec, 3)


def test_a_graph_has_its_extents_already(graph):
    with pytest.raises(znn.errors.SpecError, match="output"):
        znn.Network(graph, (1, 1, 1))


# ---- interruption and lack of memory ------------------------------------------------------------------
@pytest.mark.parametrize("plan", ["direct", "fft"])
def test_keyboard_interrupt_leaves_the_network_usable(rng, plan):
    net, expected = pair(small_graph("dense_3d"), plan=plan)
    inputs, targets = random_inputs(net.graph, rng), random_targets(net.graph, rng)
    with net:
        threading.Timer(0.2, _thread.interrupt_main).start()
        with pytest.raises(KeyboardInterrupt):
            end = time.monotonic() + 60
            while time.monotonic() < end:
                net.train_step(inputs, targets)
        start = {name: value.astype(np.float32) for name, value in expected.parameters().items()}
        net.set_parameters(start)
        net.set_momenta({name: np.zeros_like(value) for name, value in net.momenta().items()})
        train_alike(net, expected, rng)


def run_python(code: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr}"
    return done.stdout


def test_no_memory_is_an_exception_and_a_smaller_network_works_afterwards():
    """With 1.5 GB of address space a network that needs several times that says so; the process lives on."""
    out = run_python("""
        import resource
        import numpy as np
        import znn

        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        limit = used + 1500 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        spec = znn.NetworkSpec.layered("n", 1, [{"conv": 16, "kernel": 3}, {"conv": 1, "kernel": 3}])
        try:
            with znn.Network(spec, 300, plan="direct", threads=2) as net:
                net.forward(np.zeros((1, 304, 304, 304), np.float32))
        except (MemoryError, znn.errors.ZnnError) as error:
            assert "memory" in str(error), error
            print("refused")
        with znn.Network(spec, 3, plan="direct", threads=2) as net:
            print(net.forward(np.ones((1, 7, 7, 7), np.float32)).shape)
    """)
    assert out.split("\n")[:2] == ["refused", "(1, 3, 3, 3)"]


def test_an_interpreter_that_ends_with_work_queued_ends_cleanly():
    out = run_python("""
        import numpy as np
        import znn

        spec = znn.NetworkSpec.layered("n", 1, [{"conv": 8, "kernel": 3}, {"conv": 1, "kernel": 3}])
        net = znn.Network(spec, 8, threads=4, pin=False)
        net.forward(np.ones((1, 12, 12, 12), np.float32), "train")
        net.backward(np.ones((1, 8, 8, 8), np.float32))
        print("done")
    """)
    assert out == "done\n"
