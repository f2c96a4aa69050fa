"""znn.torch's convolutions against PyTorch's in float64: values and gradients, options, errors, threads and memory."""
from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import znn.torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from znn.errors import DataError, SpecError
from znn.torch import functional, layers
from znn.torch.layers import Method, Problem
from znn.torch.measure import Case, measure

F = torch.nn.functional
OURS, THEIRS = {2: znn.torch.conv2d, 3: znn.torch.conv3d}, {2: F.conv2d, 3: F.conv3d}
LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
TOLERANCE = 5e-6  # of the largest value; float32 against float64
RELAXED = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def two_threads():
    znn.torch.set_threads(2)
    yield
    znn.torch.set_threads(None)


def close(got, want):
    scale = max(want.abs().max().item(), 1e-6)
    assert got.shape == want.shape
    assert (got.double() - want.double()).abs().max().item() <= TOLERANCE * scale


def run(function, tensors, dtype, **options):
    """Output, then gradients of the tensors for a gradient of random numbers."""
    leaves = [t if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
    output = function(*leaves, **options)
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    output.backward(noise.to(dtype))
    return [output.detach(), *(t.grad for t in leaves if t is not None)]


def compare(dims, tensors, **options):
    got = run(OURS[dims], tensors, torch.float32, **options)
    for ours, theirs in zip(got, run(THEIRS[dims], tensors, torch.float64, **options), strict=True):
        close(ours, theirs)
    return got


def tensors(dims, batch, maps, extent, kernel, groups=1, bias=True, seed=0, channels_last=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((batch, maps[0], *extent), generator=generator)
    if channels_last:
        x = x.contiguous(memory_format=LAST[dims])
    return (x, torch.randn((maps[1], maps[0] // groups, *kernel), generator=generator),
            torch.randn(maps[1], generator=generator) if bias else None)


# ---- values and gradients ---------------------------------------------------------------------------------
@st.composite
def cases(draw):
    dims = draw(st.sampled_from([2, 3]))
    small = st.integers(1, 3)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    maps = [groups * draw(st.integers(1, 9)) for _ in range(2)]
    if draw(st.integers(0, 5)) == 0:  # depthwise, with a multiplier
        groups, maps = maps[0], [maps[0], maps[0] * draw(st.integers(1, 2))]
    kernel = [draw(st.integers(1, 5)) for _ in range(dims)]
    dilation = [draw(st.integers(1, 2)) for _ in range(dims)]
    extent = [d * (k - 1) + 1 + draw(st.integers(0, 9)) for d, k in zip(dilation, kernel)]
    padding = draw(st.sampled_from(["same", "valid", 0, 1, None]))
    if padding is None:
        padding = tuple(draw(st.integers(0, 3)) for _ in range(dims))
    seed = draw(st.integers(0, 1000))
    made = tensors(dims, draw(small), maps, extent, kernel, groups, draw(st.booleans()), seed, draw(st.booleans()))
    return dims, made, {"padding": padding, "dilation": tuple(dilation), "groups": groups}


@RELAXED
@given(cases())
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_random_shapes_are_pytorchs(case):
    dims, made, options = case
    compare(dims, made, **options)


@pytest.mark.parametrize("method", [Method("tiled", 8, (10, 9, 12)), Method("direct", 8), Method("fused", 8, (8, 8, 8))])
@pytest.mark.parametrize("limit", [None, 0], ids=["kept", "recomputed"])
def test_every_method_is_right_with_and_without_kept_spectra(method, limit):
    znn.torch.set_memory_limit(limit)
    try:
        maps = (3 if method.name == "fused" else 11, 10)
        made = tensors(3, 2, maps, (13, 17, 15), (3, 4, 3))
        problem = Problem(*maps, 1, (13, 17, 15), (3, 4, 3), (1, 1, 1), (1, 0, 2), (1, 0, 2))
        got = run(lambda *t: functional.run(problem, 3, *t, method), made, torch.float32)
        for ours, theirs in zip(got, run(F.conv3d, made, torch.float64, padding=(1, 0, 2)), strict=True):
            close(ours, theirs)
    finally:
        znn.torch.set_memory_limit(None)


def test_a_layer_of_many_slabs_is_right(monkeypatch):
    """Spectra larger than the cache are worked on slab by slab, kept or not."""
    made = tensors(3, 1, (40, 40), (40, 40, 40), (5, 5, 5))
    problem = Problem(40, 40, 1, (40, 40, 40), (5, 5, 5), (1, 1, 1), (2, 2, 2), (2, 2, 2))
    want = run(F.conv3d, made, torch.float32, padding=2)
    for limit in (None, 0):
        znn.torch.set_memory_limit(limit)
        try:
            got = run(lambda *t: functional.run(problem, 3, *t, Method("tiled", 8, (10, 10, 10))), made, torch.float32)
        finally:
            znn.torch.set_memory_limit(None)
        for ours, theirs in zip(got, want, strict=True):
            assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("dims", [2, 3])
def test_gradcheck(dims):
    """Finite differences of the float32 kernels behind a float64 face. The operator is linear in each argument, so large
    steps have no error of their own and float32's rounding stays small against them."""
    x, w, b = (t.double().requires_grad_() for t in tensors(dims, 1, (2, 3), (5,) * dims, (3,) * dims))

    def ours(x, w, b):
        return OURS[dims](x.float(), w.float(), b.float(), padding=1).double()

    assert torch.autograd.gradcheck(ours, (x, w, b), eps=0.5, atol=1e-4, rtol=1e-4, nondet_tol=0.0)

    def wrong(x, w, b):
        return ours(x, w, b) + 0.01 * (x.float() ** 2).sum().detach().double()

    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(wrong, (x, w, b), eps=0.5, atol=1e-4, rtol=1e-4)


def test_gradients_only_where_wanted():
    x, w, b = tensors(3, 1, (9, 8), (8, 8, 8), (3, 3, 3))
    full = run(znn.torch.conv3d, (x, w, b), torch.float32)
    for wanted in ([True, False, False], [False, True, False], [False, False, True], [True, False, True]):
        leaves = [t.clone().requires_grad_(on) for t, on in zip((x, w, b), wanted)]
        out = znn.torch.conv3d(*leaves)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float())
        for leaf, on, gradient in zip(leaves, wanted, full[1:]):
            assert (leaf.grad is not None) == on
            assert not on or torch.equal(leaf.grad, gradient)
    with torch.no_grad():
        assert not znn.torch.conv3d(x.requires_grad_(), w, b).requires_grad


def test_one_shape_twice_before_backward():
    """Calls in flight of the same shape do not share what they keep."""
    x, w, _ = tensors(3, 1, (8, 8), (12, 12, 12), (3, 3, 3), bias=False)
    results = []
    for dtype, conv in ((torch.float32, znn.torch.conv3d), (torch.float64, F.conv3d)):
        a, k = (t.detach().clone().to(dtype).requires_grad_() for t in (x, w))
        y = conv(conv(a, k, padding=1), k, padding=1)
        z = conv(a * 2, k, padding=1)
        (y * z).sum().backward()
        results.append((y.detach(), a.grad, k.grad))
    for ours, theirs in zip(*results):
        close(ours, theirs)


def test_odd_memory_layouts():
    x, w, b = tensors(3, 2, (8, 8), (9, 8, 7), (3, 2, 3))
    views = (x.transpose(2, 4).contiguous().transpose(2, 4), w.flip(2).flip(2).transpose(0, 1).contiguous().transpose(0, 1),
             torch.stack([b, b], 1)[:, 0])
    assert not any(view.is_contiguous() for view in views)
    got, want = (run(znn.torch.conv3d, t, torch.float32) for t in (views, (x, w, b)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want))
    # The gradient of a sum is one number seen everywhere: strides of 0.
    leaf = x.clone().requires_grad_()
    znn.torch.conv3d(leaf, w, b).sum().backward()
    double = x.double().requires_grad_()
    F.conv3d(double, w.double(), b.double()).sum().backward()
    close(leaf.grad, double.grad)


@pytest.mark.parametrize("dims", [2, 3])
def test_channels_last_stays_channels_last(dims):
    made = tensors(dims, 2, (16, 16), (9,) * dims, (3,) * dims, channels_last=True)
    out, of_input, *_ = compare(dims, made, padding=1)
    assert out.is_contiguous(memory_format=LAST[dims])
    assert of_input.is_contiguous(memory_format=LAST[dims])


def test_inputs_without_a_batch():
    x, w, b = tensors(3, 1, (4, 5), (8, 8, 8), (3, 3, 3))
    assert torch.equal(znn.torch.conv3d(x[0], w, b), znn.torch.conv3d(x, w, b)[0])
    x, w, b = tensors(2, 1, (4, 5), (8, 8), (3, 3))
    assert torch.equal(znn.torch.conv2d(x[0], w, b), znn.torch.conv2d(x, w, b)[0])


def test_no_copy_of_contiguous_tensors(monkeypatch):
    """The native layer sees the tensors' own memory."""
    seen = []
    problem = Problem(8, 8, 1, (8, 8, 8), (3, 3, 3), (1, 1, 1), (0, 0, 0), (0, 0, 0))
    layer = layers.native(problem, False)

    class Watched:
        def forward(self, batch, x, w, b, y, keep):
            seen.extend(t.data_ptr() for t in (x, w, b))
            return layer.forward(batch, x, w, b, y, keep)

    monkeypatch.setattr(layers, "native", lambda *_: Watched())
    made = tensors(3, 1, (8, 8), (8, 8, 8), (3, 3, 3))
    znn.torch.conv3d(*made)
    assert seen == [t.data_ptr() for t in made]


def test_other_libraries_tensors_reach_the_native_layer():
    """NumPy speaks DLPack as well: nothing in the layer is PyTorch's."""
    x, w, b = tensors(3, 1, (8, 8), (8, 8, 8), (3, 3, 3))
    problem = Problem(8, 8, 1, (8, 8, 8), (3, 3, 3), (1, 1, 1), (0, 0, 0), (0, 0, 0))
    out = np.zeros((1, 8, 6, 6, 6), np.float32)
    layers.native(problem, False).forward(1, x.numpy(), w.numpy(), b.numpy(), out, False)
    assert np.array_equal(out, znn.torch.conv3d(x, w, b).numpy())


# ---- what is PyTorch's, and errors ------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_what_the_kernels_do_not_do_is_pytorchs():
    x, w, b = tensors(3, 1, (4, 4), (9, 9, 9), (3, 3, 3))
    assert torch.equal(znn.torch.conv3d(x, w, b, stride=2), F.conv3d(x, w, b, stride=2))
    double = [t.double() for t in (x, w, b)]
    assert torch.equal(znn.torch.conv3d(*double), F.conv3d(*double))
    assert znn.torch.conv3d(*(t.to("meta") for t in (x, w, b))).shape == (1, 4, 7, 7, 7)
    assert znn.torch.conv3d(x[:0], w, b).shape == (0, 4, 7, 7, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert znn.torch.conv3d(x, w, b).dtype == torch.bfloat16
    traced = torch.jit.trace(lambda t: znn.torch.conv3d(t, w, b), x)
    assert "_convolution" in str(traced.graph)


def test_transforms_and_export_are_pytorchs():
    x, w, b = tensors(3, 4, (2, 3), (6, 6, 6), (3, 3, 3))
    mapped = torch.func.vmap(lambda t: znn.torch.conv3d(t, w, b))(x)
    assert torch.allclose(mapped, F.conv3d(x, w, b), atol=1e-5)
    value, tangent = torch.func.jvp(lambda t: znn.torch.conv3d(t, w, b), (x,), (x,))
    assert torch.allclose(tangent, F.conv3d(x, w), atol=1e-5)
    with torch.autograd.forward_ad.dual_level():
        dual = znn.torch.conv3d(torch.autograd.forward_ad.make_dual(x, x), w, b)
        assert torch.allclose(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent)
    exported = torch.export.export(torch.nn.Sequential(znn.torch.Conv3d(2, 3, 3)), (x,))
    assert any("conv3d" in str(node.target) for node in exported.graph.nodes)


@pytest.mark.parametrize("change, words", [
    ({"input": torch.zeros(2, 2)}, "input has shape"),
    ({"input": torch.zeros(1, 5, 9, 9, 9)}, "5 maps, expected 4"),
    ({"input": np.zeros(3)}, "ndarray"),
    ({"weight": torch.zeros(4, 4, 3, 3)}, "weight has shape"),
    ({"weight": torch.zeros(4, 4, 10, 3, 3)}, "does not fit"),
    ({"bias": torch.zeros(3)}, "bias has shape"),
    ({"groups": 3}, "groups is 3"),
    ({"groups": 0}, "groups is 0"),
    ({"padding": -1}, "padding is -1"),
    ({"padding": "full"}, "padding is 'full'"),
    ({"padding": (1, 1)}, "padding is (1, 1)"),
    ({"dilation": 0}, "dilation is 0"),
    ({"dilation": 1.5}, "dilation is 1.5"),
    ({"stride": 0}, "stride is 0"),
])
def test_what_does_not_fit_is_one_sentence(change, words):
    x, w, b = tensors(3, 1, (4, 4), (9, 9, 9), (3, 3, 3))
    with pytest.raises(DataError) as error:
        znn.torch.conv3d(**({"input": x, "weight": w, "bias": b} | change))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_native_layer_trusts_nobody():
    problem = Problem(8, 8, 1, (8, 8, 8), (3, 3, 3), (1, 1, 1), (0, 0, 0), (0, 0, 0))
    layer = layers.native(problem, True, Method("tiled", 8, (8, 8, 8)))
    x, w, b = tensors(3, 1, (8, 8), (8, 8, 8), (3, 3, 3))
    out = torch.empty(1, 8, 6, 6, 6)
    with pytest.raises(ValueError, match="input: expected shape"):
        layer.forward(2, x, w, b, out, False)
    with pytest.raises(TypeError, match="weight: expected float32"):
        layer.forward(1, x, w.double(), b, out, False)
    with pytest.raises(TypeError, match="__dlpack__"):
        layer.forward(1, "x", w, b, out, False)
    with pytest.raises(ValueError, match="kept spectra"):
        layer.backward(1, None, torch.zeros(3), w, out, None, torch.empty_like(w), None)
    with pytest.raises(ValueError, match="no spectra are kept"):
        layer.backward(1, None, None, w, out, None, torch.empty_like(w), None)


def test_twice_differentiating_is_refused():
    x, w, b = (t.requires_grad_() for t in tensors(3, 1, (2, 2), (5, 5, 5), (3, 3, 3)))
    gradient, = torch.autograd.grad(znn.torch.conv3d(x, w, b).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice|does not require grad"):
        gradient.sum().backward()


# ---- threads, memory, processes ---------------------------------------------------------------------------
def test_results_do_not_depend_on_the_threads():
    made = tensors(3, 2, (12, 10), (12, 11, 10), (3, 3, 3))
    results = []
    for threads in (1, 2, 5):
        znn.torch.set_threads(threads)
        results.append(run(znn.torch.conv3d, made, torch.float32, padding=1))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
    with pytest.raises(SpecError, match="threads is 0"):
        znn.torch.set_threads(0)


def test_calls_of_many_python_threads_are_right():
    made = [tensors(3, 1, (8, 8), (10, 10, 10), (3, 3, 3), seed=seed) for seed in range(4)]
    want = [run(znn.torch.conv3d, t, torch.float32) for t in made]
    wrong = []

    def work(index):
        for _ in range(10):
            got = run(znn.torch.conv3d, made[index], torch.float32)
            if not all(torch.equal(a, b) for a, b in zip(got, want[index])):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)


def test_spectra_are_freed_after_backward():
    gc.collect()
    before = znn.torch.memory()["kept"]
    problem = Problem(16, 16, 1, (20, 20, 20), (5, 5, 5), (1, 1, 1), (0, 0, 0), (0, 0, 0))
    x, w, b = (t.requires_grad_() for t in tensors(3, 1, (16, 16), (20, 20, 20), (5, 5, 5)))
    loss = functional.run(problem, 3, x, w, b, Method("tiled", 8, (12, 12, 12))).sum()
    assert znn.torch.memory()["kept"] > before
    loss.backward()
    assert znn.torch.memory()["kept"] == before  # although `loss` is still there
    znn.torch.free_memory()
    assert znn.torch.memory()["idle"] == 0


def test_the_memory_limit_holds():
    znn.torch.set_memory_limit(0)
    try:
        problem = Problem(16, 16, 1, (20, 20, 20), (5, 5, 5), (1, 1, 1), (0, 0, 0), (0, 0, 0))
        x, w, b = (t.requires_grad_() for t in tensors(3, 1, (16, 16), (20, 20, 20), (5, 5, 5)))
        before = znn.torch.memory()["kept"]
        out = functional.run(problem, 3, x, w, b, Method("tiled", 8, (12, 12, 12)))
        assert znn.torch.memory()["kept"] == before and out.requires_grad
        with pytest.raises(SpecError, match="limit"):
            znn.torch.set_memory_limit(-1)
    finally:
        znn.torch.set_memory_limit(None)


def test_layers_are_bounded(monkeypatch):
    znn.torch.free_memory()
    monkeypatch.setattr(layers, "LAYERS_KEPT", 3)
    for extent in range(6, 14):
        znn.torch.conv2d(*tensors(2, 1, (2, 2), (extent, extent), (3, 3)))
    assert len(layers._layers) == 3


def test_a_forked_child_has_threads_of_its_own():
    made = tensors(3, 1, (8, 8), (10, 10, 10), (3, 3, 3))
    want = znn.torch.conv3d(*made)  # starts the parent's threads
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(znn.torch.conv3d(*made), want) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_importing_znn_does_not_import_torch():
    code = "import sys, znn; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("version", [None, "2.3.1"])
def test_without_torch_one_sentence_says_what_to_do(tmp_path, version):
    fake = "raise ImportError('no torch here')" if version is None else f"__version__ = {version!r}"
    (tmp_path / "torch.py").write_text(fake)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import znn.torch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode and "pip install 'znn[torch]'" in done.stderr.splitlines()[-1]


# ---- measuring --------------------------------------------------------------------------------------------
def test_measure_times_both_in_turns():
    problem = Problem(8, 8, 1, (10, 10, 10), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1))
    timing = measure(Case(problem), budget_s=1.0)
    assert len(timing.torch_s) >= 3 and timing.best in timing.methods
    assert all(len(samples) == len(timing.torch_s) for samples in timing.methods.values())
    assert timing.ratio == pytest.approx(timing.theirs / timing.ours)


def test_the_command_prints_medians(capsys):
    from znn.torch.__main__ import main

    assert main(["--maps", "8", "--kernel", "3", "--extent", "8", "--seconds", "0.05"]) == 0
    out = capsys.readouterr().out
    assert "8->8 maps" in out and "ratio" in out
    assert main(["--maps", "8", "--kernel", "9", "--extent", "8", "--seconds", "0.05"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
