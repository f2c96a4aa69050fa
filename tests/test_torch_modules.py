"""znn.torch's modules, replace_convs, and networks to and from modules; `znn convert` with PyTorch's files; the examples."""
from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import znn
import znn.torch
from checks import NETWORKS, small_graph
from znn import cli, zoo
from znn.errors import DataError, SpecError
from znn.torch import files, layers, measure, replace
from znn.torch.layers import Method
from znn.torch.measure import Timing

nn = torch.nn
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("ZNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(layers, "_chosen", {})


def images(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- modules ----------------------------------------------------------------------------------------------
MODULES = [(znn.torch.Conv3d, nn.Conv3d, 3), (znn.torch.Conv2d, nn.Conv2d, 2)]


@pytest.mark.parametrize("ours, theirs, dims", MODULES)
@pytest.mark.parametrize("options", [{}, {"padding": "same", "dilation": 2}, {"padding": 1, "groups": 2, "bias": False},
                                     {"padding": 2, "padding_mode": "circular"}, {"padding": 1, "padding_mode": "reflect"},
                                     {"stride": 2}], ids=str)
def test_modules_are_pytorchs(ours, theirs, dims, options):
    torch.manual_seed(0)
    plain, own = theirs(4, 6, 3, **options), ours(4, 6, 3, **options)
    own.load_state_dict(plain.state_dict())
    assert repr(own) == repr(plain)
    x = images(2, 4, *(8,) * dims)
    results = []
    for module in (plain, own, copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        module.zero_grad()
        out = module(x)
        out.square().sum().backward()
        results.append((out.detach(), module.weight.grad))
    for out, gradient in results[1:]:
        torch.testing.assert_close(out, results[0][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-4, atol=1e-4)


def test_modules_survive_torch_save():
    model = nn.Sequential(znn.torch.Conv3d(1, 2, 3), nn.ReLU())
    file = io.BytesIO()
    torch.save(model, file)
    again = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert isinstance(again[0], znn.torch.Conv3d) and torch.equal(again[0].weight, model[0].weight)


def test_inside_torch_compile_it_is_an_opaque_call():
    model = nn.Sequential(znn.torch.Conv3d(2, 4, 3), nn.ReLU())
    x = images(1, 2, 8, 8, 8)
    assert torch.equal(torch.compile(model, backend="eager")(x), model(x))


# ---- replace_convs ----------------------------------------------------------------------------------------
class Net(nn.Module):
    """One of each: a fast layer, a slow one, one with a stride, one never used, one used twice; norm and dropout."""

    def __init__(self):
        super().__init__()
        self.fast, self.slow = nn.Conv3d(2, 8, 3, padding=1), nn.Conv3d(8, 8, 1)
        self.strided, self.unused, self.twice = nn.Conv3d(8, 8, 2, 2), nn.Conv3d(1, 1, 1), nn.Conv3d(8, 8, 3, padding=1)
        self.norm, self.drop = nn.BatchNorm3d(8), nn.Dropout(0.5)

    def forward(self, x):
        x = self.drop(self.norm(self.strided(self.slow(self.fast(x)).relu())))
        return {"out": [self.twice(self.twice(x))]}


def decreed(theirs, ours):
    method = Method("direct", 8)
    return Timing(theirs, {method: ours}, {None: min(theirs), method: min(ours)})


@pytest.fixture
def measured(monkeypatch):
    """Measurements by decree: layers of kernel 1 are slow with ours, the others twice as fast; the model as decreed."""
    calls, whole = [], {"seconds": replace.Seconds(2.0, 1.0, 2.0, 1.0)}

    def measure(case, budget_s, *_):
        calls.append(case)
        ours = 2.0 if case.problem.kernel == (1, 1, 1) else 0.5
        return decreed((1.0,), (ours,))

    monkeypatch.setattr(replace, "measure", measure)
    monkeypatch.setattr(replace, "_time_model", lambda *_: whole["seconds"])
    return calls, whole


def test_only_faster_layers_are_replaced(measured):
    model, x = Net(), images(1, 2, 8, 8, 8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parameters, fast, seed = list(model.parameters()), model.fast, torch.random.get_rng_state()
    report = znn.torch.replace_convs(model, x)
    assert report.replaced == ("fast", "twice")
    assert type(model.fast) is znn.torch.Conv3d and type(model.twice) is znn.torch.Conv3d and type(model.slow) is nn.Conv3d
    assert model.fast is fast and all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    reasons = {d.name: d.reason for d in report.decisions}
    assert reasons["strided"] == "stride 2x2x2" and reasons["unused"] == "not used for this example"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "running statistics changed"
    assert torch.equal(torch.random.get_rng_state(), seed) and all(p.grad is None for p in parameters)
    assert all(word in str(report) for word in ("fast", "torch ms", "stride 2x2x2", "whole model: 2e+03 ms before"))
    assert {case.input_gradient for case in measured[0] if case.problem.in_maps == 2} == {False}
    assert znn.torch.restore_convs(model) == ("fast", "twice") and type(model.fast) is nn.Conv3d


def test_decisions_are_remembered(measured):
    calls, _ = measured
    znn.torch.replace_convs(Net(), images(1, 2, 8, 8, 8))
    count = len(calls)
    assert count == 3  # the layer used twice has one shape
    assert znn.torch.replace_convs(Net(), images(1, 2, 8, 8, 8)).replaced == ("fast", "twice")
    assert len(calls) == count
    znn.torch.replace_convs(Net(), images(1, 2, 8, 8, 8), remeasure=True)
    znn.torch.replace_convs(Net(), images(2, 2, 8, 8, 8), backward=False)  # another batch and direction
    assert len(calls) > 2 * count
    for path in Path(os.environ["ZNN_CACHE"]).rglob("torch-layers*"):
        path.write_text("{ torn")
    assert znn.torch.replace_convs(Net(), images(1, 2, 8, 8, 8)).replaced == ("fast", "twice")


def test_a_model_that_became_slower_is_put_back(measured):
    measured[1]["seconds"] = replace.Seconds(1.0, 1.01, 0.9, 0.8)
    model = Net()
    report = znn.torch.replace_convs(model, images(1, 2, 8, 8, 8))
    assert not report.replaced and type(model.fast) is nn.Conv3d
    assert {d.reason for d in report.decisions if d.name in ("fast", "twice")} == {"the whole model was no faster"}


def test_a_margin_decides(measured):
    assert not znn.torch.replace_convs(Net(), images(1, 2, 8, 8, 8), margin=1.5).replaced


def test_a_layer_that_is_not_faster_in_its_shortest_lap_is_left(measured, monkeypatch):
    """On a busy machine medians tell how each side bears other work."""
    theirs = {"slow": (1.0, 1.0, 1.1), "disturbed": (0.4, 30.0, 31.0)}
    for name, found in theirs.items():
        monkeypatch.setattr(replace, "measure", lambda *_, found=found: decreed(found, (0.5, 0.6, 0.6)))
        replaced = znn.torch.replace_convs(Net(), images(1, 2, 8, 8, 8), remeasure=True).replaced
        assert replaced == (("fast", "slow", "twice") if name == "slow" else ())


def test_a_model_that_is_not_faster_in_its_shortest_lap_is_put_back(measured):
    measured[1]["seconds"] = replace.Seconds(30.0, 1.0, 0.5, 0.6)
    assert not znn.torch.replace_convs(Net(), images(1, 2, 8, 8, 8)).replaced


def test_a_short_turn_is_the_mean_of_many_laps():
    laps = []
    found = measure.turn(lambda: laps.append(time.sleep(0.001)), 0.01)
    assert 2 <= len(laps) <= 12 and 0.001 <= found.least <= found.mean
    laps.clear()
    found = measure.turn(lambda: laps.append(time.sleep(0.02)), 0.01)
    assert len(laps) == 1 and found.least == found.mean


def test_layers_of_one_shape_are_measured_once_and_decided_alike(measured):
    layers = [nn.Conv3d(4, 4, 3, padding=1) for _ in range(3)]
    znn.torch.replace_convs(nn.Sequential(nn.Conv3d(1, 4, 1), *layers), images(1, 1, 8, 8, 8), remeasure=True)
    assert len(measured[0]) == 2


def test_the_whole_model_is_timed_in_turns_and_left_as_decided(monkeypatch):
    order = []
    monkeypatch.setattr(replace, "measure", lambda *_: decreed((1.0,), (0.5,)))
    monkeypatch.setattr(replace, "_pass", lambda model, *_, **__: order.append(type(model[0])) or time.sleep(replace.MODEL_TURN_S))
    monkeypatch.setattr(replace, "_watch", lambda model, inputs, convs, backward: {
        name: [replace._case(conv, inputs[0], backward)] for name, conv in convs.items()})
    model = nn.Sequential(nn.Conv3d(2, 8, 3))
    report = znn.torch.replace_convs(model, images(1, 2, 8, 8, 8), remeasure=True)
    ours, theirs = (order.count(kind) for kind in (znn.torch.Conv3d, nn.Conv3d))
    assert ours == theirs >= 1 + replace.MODEL_ROUNDS[0]
    assert len(set(zip(order[2:], order[3:]))) == 4, "one side always follows the other"
    assert report.model_s and type(model[0]) is (znn.torch.Conv3d if report.replaced else nn.Conv3d)


def test_replacing_for_real_keeps_what_the_model_computes():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv3d(2, 8, 5, padding=2), nn.ReLU(), nn.Conv3d(8, 8, 5)), images(1, 2, 14, 14, 14)
    wanted = model(x)
    report = znn.torch.replace_convs(model, x, budget_s=0.05)
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    assert len(report.decisions) == 2 and all(d.torch_s > 0 and d.znn_s > 0 for d in report.decisions)
    assert report.replaced == () or report.model_s


def test_an_example_must_be_a_tensor():
    with pytest.raises(DataError, match="example is a str"):
        znn.torch.replace_convs(Net(), "x")


# ---- networks as modules ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name, form", [("3d_3", "strided"), ("3d_3", "dense"), ("2d_10", "strided"), ("multiscale", None)])
def test_to_torch_computes_the_same(name, form):
    options = {"form": form} if form else {}
    with znn.Network(zoo.build(name, width=3, **options), output=2, seed=5) as net:
        module = znn.torch.to_torch(net)
        x = np.random.default_rng(0).standard_normal((3, 1, *net.graph.node("input").extent), dtype=np.float32)
        got = module(torch.from_numpy(x)).detach().numpy()
        for patch in range(3):
            np.testing.assert_allclose(got[patch], net.forward(x[patch]), rtol=1e-4, atol=1e-4)
        larger = np.pad(x, [(0, 0)] * 3 + [(0, 4), (0, 4)])
        assert module(torch.from_numpy(larger)).shape[3] > got.shape[3]
        again = pickle.loads(pickle.dumps(copy.deepcopy(module)))
        assert torch.equal(again(torch.from_numpy(x)), module(torch.from_numpy(x)))


@pytest.mark.parametrize("name", NETWORKS)
def test_to_torch_of_every_kind_of_edge(name):
    graph = small_graph(name)
    with znn.Network(graph) as net:
        module = znn.torch.to_torch(net).eval()
        rng = np.random.default_rng(1)
        inputs = {name: rng.standard_normal((graph.node(name).maps, *graph.node(name).extent), dtype=np.float32)
                  for name in graph.inputs}
        got = module(*(torch.from_numpy(inputs[name][None]) for name in module.inputs))
        want = net.forward(inputs if len(inputs) > 1 else next(iter(inputs.values())))
    got = got if isinstance(got, dict) else {graph.outputs[0]: got}
    want = want if isinstance(want, dict) else {graph.outputs[0]: want}
    for output in graph.outputs:
        np.testing.assert_allclose(got[output][0].detach().numpy(), want[output], rtol=1e-4, atol=1e-5)


def test_to_torch_needs_parameters_that_fit():
    spec = zoo.build("3d_3", width=2)
    assert isinstance(znn.torch.to_torch(spec), nn.Module)
    with pytest.raises(DataError, match="conv1.*expected"):
        znn.torch.to_torch(spec, {"conv1": np.zeros((1, 1, 1, 1, 1), np.float32)})
    with pytest.raises(DataError, match="got a str"):
        znn.torch.to_torch("3d_3")
    with pytest.raises(DataError, match="got 2 inputs"):
        znn.torch.to_torch(spec)(images(1, 1, 50, 50, 50), images(1, 1, 50, 50, 50))


def sequential():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, 3, 3), nn.MaxPool3d(2), nn.ReLU(),
                         nn.Sequential(nn.Conv3d(3, 4, 2, dilation=2, bias=False), nn.Tanh()), nn.Dropout(0.2),
                         nn.MaxPool3d(2, stride=1), nn.Identity(), nn.Conv3d(4, 4, 2, dilation=2, groups=4), nn.Sigmoid(),
                         nn.Conv3d(4, 2, 1))


def test_from_torch_reads_a_sequential():
    model = sequential().eval()
    spec, parameters = znn.torch.from_torch(model)
    assert [edge.kind for edge in spec.edges] == ["conv", "max_pool", "conv", "dropout", "max_filter", "conv", "conv"]
    assert [node.transfer for node in spec.nodes if node.kind == "transfer"] == ["relu", "tanh", "logistic", "linear"]
    with znn.Network(spec, output=3, parameters=parameters) as net:
        x = np.random.default_rng(0).standard_normal((1, *net.graph.node("input").extent), dtype=np.float32)
        np.testing.assert_allclose(net.forward(x), model(torch.from_numpy(x[None]))[0].detach().numpy(), rtol=1e-4, atol=1e-5)


def test_from_torch_reads_2d():
    model = nn.Sequential(nn.Conv2d(1, 4, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 3))
    spec, parameters = znn.torch.from_torch(model, name="flat", loss="softmax")
    assert (spec.dims, spec.name, spec.loss) == (2, "flat", "softmax")
    with znn.Network(spec, output=(1, 4, 4), parameters=parameters) as net:
        x = np.random.default_rng(0).standard_normal((1, *net.graph.node("input").extent), dtype=np.float32)
        want = model(torch.from_numpy(x))[0][:, None] if x.ndim == 3 else model(torch.from_numpy(x))
        np.testing.assert_allclose(net.forward(x)[:, 0], want[0].detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer, words", [
    (nn.Conv3d(1, 2, 3, stride=2), "stride"), (nn.Conv3d(1, 2, 3, padding=1), "padding"), (nn.Conv3d(2, 4, 1, groups=2), "groups"),
    (nn.BatchNorm3d(2), "BatchNorm3d"), (nn.MaxPool3d(2, padding=1), "padding"), (nn.MaxPool3d(3, 2, dilation=2), "dilation"),
    (nn.ReLU(), "does not follow")])
def test_from_torch_names_what_it_cannot_read(layer, words):
    with pytest.raises(SpecError, match=words) as error:
        znn.torch.from_torch(nn.Sequential(layer))
    assert "module '0'" in str(error.value) and "\n" not in str(error.value)


def test_state_dicts_go_round():
    with znn.Network(zoo.build("3d_3", width=3), output=1, seed=3) as net:
        want, spec = net.parameters(), net.graph.spec
    module = znn.torch.to_torch(spec, want)
    for source in (module, module.state_dict()):
        _, found = znn.torch.from_torch(source, spec)
        assert set(found) == set(want) and all(np.array_equal(found[name], want[name]) for name in want)
    plain = [edge for edge in spec.edges if edge.kind == "conv"]
    renamed = {f"features.{i}.{kind}": module.state_dict()[f"edges.{edge.name}.{kind}"]
               for i, edge in enumerate(plain) for kind in ("weight", "bias")}
    assert all(np.array_equal(value, want[name]) for name, value in znn.torch.from_torch(renamed, spec)[1].items())
    with pytest.raises(SpecError, match="spec"):
        znn.torch.from_torch(renamed)
    with pytest.raises(DataError, match="expected the"):
        znn.torch.from_torch(dict(list(renamed.items())[1:]), spec)
    key = next(iter(renamed))
    with pytest.raises(DataError, match="has shape"):
        znn.torch.from_torch(renamed | {key: renamed[key][:1]}, spec)


# ---- znn convert ------------------------------------------------------------------------------------------
def convert(*words):
    return cli.main(["convert", *map(str, words)])


def test_convert_reads_and_writes_pytorchs_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(sequential(), "model.pt")
    assert convert("model.pt", "net.toml") == 0 and convert("model.pt", "start.npz") == 0
    spec, parameters = znn.torch.from_torch(sequential())
    assert znn.spec.load("net.toml").edges == spec.edges
    kept = znn.load_checkpoint("start.npz").parameters
    assert all(np.array_equal(kept[name], value) for name, value in parameters.items())
    assert convert("start.npz", "weights.pt") == 0 and convert("weights.pt", "again.npz", "--state-of", "net.toml") == 0
    again = znn.load_checkpoint("again.npz").parameters
    assert all(np.array_equal(again[name], value) for name, value in parameters.items())
    assert convert("net.toml", "initial.pt") == 0
    assert files.read("initial.pt", spec)[0] == spec
    capsys.readouterr()
    assert convert("weights.pt", "x.npz") == 2  # a state dict alone
    Path("torn.pt").write_bytes(Path("model.pt").read_bytes()[:300])
    torch.save(nn.Linear(2, 2), "other.pt")
    for name in ("torn.pt", "missing.pt", "other.pt"):
        assert convert(name, "x.npz") == 2
        assert not Path("x.npz").exists()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and "torn.pt" in lines[1] and "missing.pt" in lines[2]


def test_reading_a_file_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "broken-in"),)

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(DataError, match="evil.pt"):
        files.read(tmp_path / "evil.pt")
    assert not (tmp_path / "broken-in").exists()


def test_the_reference_holds_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert all(f"::: znn.torch.{name}\n" in text for name in znn.torch.__all__)


# ---- the examples -----------------------------------------------------------------------------------------
def example(name, *words):
    done = subprocess.run([sys.executable, ROOT / "examples" / name, *words], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_processes_end_as_one():
    out = example("ddp.py", "--width", "3", "--extent", "8", "--steps", "3")
    assert "differ by" in out


def test_a_large_kernel_net_trains_with_both():
    out = example("large_kernel_net.py", "--width", "4", "--blocks", "1", "--extent", "10", "--steps", "3")
    losses = [line.split() for line in out.splitlines() if line.strip()[:1].isdigit() and len(line.split()) == 5]
    assert len(losses) == 3 and all(float(a[1]) == pytest.approx(float(a[3]), abs=2e-3) for a in losses)
    assert "4 groups" in out and "times faster" in out
