"""The float64 reference: against numerical gradients, against PyTorch, and against answers known by hand."""
from __future__ import annotations

import itertools

import numpy as np
import pytest

from checks import (NETWORKS, OPTIMISER, assert_close, kink_distance, numerical_gradient, random_inputs,
                    random_parameters, random_targets, random_weights, small_graph, smooth_inputs,
                    train_alike)
from znn import reference as ref
from znn.graph import Graph
from znn.spec import NetworkSpec

try:
    import torch
    import torch_oracle
except ImportError:
    torch = None
needs_torch = pytest.mark.skipif(torch is None, reason="PyTorch is not installed")

# (image, kernel or window, sparsity): 3D and 2D, odd and even, anisotropic, sparse.
SHAPES = [
    ((5, 5, 5), (3, 3, 3), (1, 1, 1)),
    ((4, 6, 5), (2, 3, 1), (1, 2, 3)),
    ((1, 7, 8), (1, 4, 3), (1, 1, 2)),
    ((6, 5, 4), (1, 1, 1), (2, 2, 2)),
    ((7, 4, 6), (3, 2, 2), (3, 2, 4)),
    ((3, 4, 5), (3, 4, 5), (1, 1, 1)),
]
shapes = pytest.mark.parametrize("extent, kernel, sparsity", SHAPES)
depthwise_or_not = pytest.mark.parametrize("depthwise", [False, True])


def conv_data(rng, extent, kernel, sparsity, depthwise, maps=2, out_maps=3):
    image = rng.standard_normal((maps, *extent))
    weights = rng.standard_normal((maps, 1, *kernel) if depthwise else (out_maps, maps, *kernel))
    gradient = rng.standard_normal((weights.shape[0], *ref.valid_extent(extent, kernel, sparsity)))
    return image, weights, gradient


# ---- convolution ----------------------------------------------------------------------------------
def test_convolution_is_the_definition_voxel_by_voxel(rng):
    sparsity = (1, 2, 1)
    image, kernel, _ = conv_data(rng, (3, 6, 4), (2, 3, 2), sparsity, False)
    out = ref.convolve(image, kernel, sparsity)
    assert out.shape == (3, 2, 2, 3)
    for o, *p in np.ndindex(out.shape):
        expected = sum(kernel[(o, i, *j)] * image[(i, *(a + s * (k - 1 - b) for a, s, k, b in
                                                        zip(p, sparsity, kernel.shape[2:], j)))]
                       for i in range(2) for j in np.ndindex(*kernel.shape[2:]))
        assert out[(o, *p)] == pytest.approx(expected, rel=1e-12)


def test_convolution_in_one_dimension_is_numpys():
    image, kernel = np.arange(1.0, 8.0)**2, np.array([1.0, 10.0, 100.0])
    out = ref.convolve(image.reshape(1, 1, 1, -1), kernel.reshape(1, 1, 1, 1, -1))
    np.testing.assert_allclose(out.ravel(), np.convolve(image, kernel, "valid"))


@shapes
def test_sparse_convolution_is_that_with_a_kernel_holed_by_zeros(rng, extent, kernel, sparsity):
    image, weights, _ = conv_data(rng, extent, kernel, sparsity, False)
    holed = np.zeros((*weights.shape[:2], *(s * (k - 1) + 1 for s, k in zip(sparsity, kernel))))
    holed[:, :, ::sparsity[0], ::sparsity[1], ::sparsity[2]] = weights
    assert_close(ref.convolve(image, weights, sparsity), ref.convolve(image, holed), 1e-13)


@depthwise_or_not
@shapes
def test_convolution_gradients_are_numerical_ones(rng, extent, kernel, sparsity, depthwise):
    image, weights, gradient = conv_data(rng, extent, kernel, sparsity, depthwise)
    def objective(x, w):
        return np.sum(gradient * ref.convolve(x, w, sparsity, depthwise))

    assert_close(ref.convolve_backward(gradient, weights, sparsity, depthwise),
                 numerical_gradient(lambda x: objective(x, weights), image), 1e-7)
    assert_close(ref.convolve_kernel_gradient(image, gradient, sparsity, depthwise),
                 numerical_gradient(lambda w: objective(image, w), weights), 1e-7)


@needs_torch
@depthwise_or_not
@shapes
def test_convolution_is_pytorchs(rng, extent, kernel, sparsity, depthwise):
    image, weights, gradient = conv_data(rng, extent, kernel, sparsity, depthwise, maps=3, out_maps=4)
    x, w = (torch.tensor(a, requires_grad=True) for a in (image[None], weights))
    out = torch_oracle.conv(x, w, sparsity, depthwise)
    out.backward(torch.tensor(gradient[None]))
    assert_close(ref.convolve(image, weights, sparsity, depthwise), out[0].detach().numpy(), 1e-12)
    assert_close(ref.convolve_backward(gradient, weights, sparsity, depthwise), x.grad[0].numpy(), 1e-12)
    assert_close(ref.convolve_kernel_gradient(image, gradient, sparsity, depthwise), w.grad.numpy(), 1e-12)


def test_kernel_larger_than_the_image_is_refused_with_both_extents():
    with pytest.raises(ValueError, match=r"\(1, 3, 1\).*sparsity \(1, 2, 1\).*\(4, 4, 4\)"):
        ref.convolve(np.zeros((1, 4, 4, 4)), np.zeros((1, 1, 1, 3, 1)), (1, 2, 1))


# ---- max-filter and max-pool ----------------------------------------------------------------------
def naive_max(image, window, sparsity, stride, out):
    values, argmax = np.zeros((len(image), *out)), np.zeros((len(image), *out), int)
    for m, *p in np.ndindex(values.shape):
        best = None
        for j in np.ndindex(*window):
            voxel = tuple(d * a + s * b for d, a, s, b in zip(stride, p, sparsity, j))
            if best is None or image[(m, *voxel)] > image[(m, *best)]:
                best = voxel
        values[(m, *p)], argmax[(m, *p)] = image[(m, *best)], np.ravel_multi_index(best, image.shape[1:])
    return values, argmax


@shapes
@pytest.mark.parametrize("ties", [False, True])
def test_max_filter_and_its_first_maximum(rng, extent, kernel, sparsity, ties):
    image = rng.integers(0, 3, (2, *extent)).astype(float) if ties else rng.standard_normal((2, *extent))
    values, argmax = ref.max_filter(image, kernel, sparsity)
    expected = naive_max(image, kernel, sparsity, (1, 1, 1), ref.valid_extent(extent, kernel, sparsity))
    np.testing.assert_array_equal(values, expected[0])
    np.testing.assert_array_equal(argmax, expected[1])


@pytest.mark.parametrize("extent, window, stride", [
    ((6, 6, 6), (2, 2, 2), None), ((7, 5, 9), (2, 3, 2), (2, 1, 3)), ((1, 9, 8), (1, 3, 3), (1, 2, 2)),
    ((5, 5, 5), (1, 1, 1), (2, 2, 2))])
def test_max_pool_and_its_first_maximum(rng, extent, window, stride):
    image = rng.integers(0, 4, (3, *extent)).astype(float)
    values, argmax = ref.max_pool(image, window, stride)
    out = tuple((n - w) // d + 1 for n, w, d in zip(extent, window, stride or window))
    expected = naive_max(image, window, (1, 1, 1), stride or window, out)
    np.testing.assert_array_equal(values, expected[0])
    np.testing.assert_array_equal(argmax, expected[1])


@pytest.mark.parametrize("filtering", [True, False])
def test_max_backward_is_the_numerical_gradient(rng, filtering):
    image = rng.permutation(2 * 4 * 5 * 6).reshape(2, 4, 5, 6).astype(float)  # no two alike: differentiable
    forward = (lambda x: ref.max_filter(x, (2, 2, 3), (1, 2, 1))) if filtering else (
        lambda x: ref.max_pool(x, (2, 2, 3), (1, 2, 1)))
    values, argmax = forward(image)
    gradient = rng.standard_normal(values.shape)
    assert_close(ref.max_backward(gradient, argmax, image.shape[1:]),
                 numerical_gradient(lambda x: np.sum(gradient * forward(x)[0]), image, 1e-3), 1e-7)


def test_nan_is_the_maximum_of_its_windows():
    image = np.zeros((1, 1, 1, 6))
    image[..., 3] = np.nan
    values, argmax = ref.max_filter(image, (1, 1, 2))
    np.testing.assert_array_equal(np.isnan(values).ravel(), [False, False, True, True, False])
    np.testing.assert_array_equal(argmax.ravel(), [0, 1, 3, 3, 4])


@needs_torch
@shapes
def test_max_filter_is_pytorchs(rng, extent, kernel, sparsity):
    image = rng.integers(0, 3, (2, *extent)).astype(float)
    values, index = torch.nn.functional.max_pool3d(torch.tensor(image), kernel, stride=1, dilation=sparsity,
                                                   return_indices=True)
    mine = ref.max_filter(image, kernel, sparsity)
    np.testing.assert_array_equal(mine[0], values.numpy())
    np.testing.assert_array_equal(mine[1], index.numpy())


# ---- pointwise ------------------------------------------------------------------------------------
@pytest.mark.parametrize("function", list(ref.TRANSFER))
def test_transfer_derivatives_are_numerical_ones(rng, function):
    image, gradient = rng.standard_normal((2, 2, 2, 3, 4))
    bias = rng.standard_normal(2)

    def objective(x, b):
        return np.sum(gradient * ref.transfer(x, function, b))

    back = ref.transfer_backward(gradient, ref.transfer(image, function, bias), function)
    assert_close(back, numerical_gradient(lambda x: objective(x, bias), image), 1e-7)
    assert_close(back.sum(axis=(1, 2, 3)), numerical_gradient(lambda b: objective(image, b), bias), 1e-7)


def test_transfer_functions_at_known_and_extreme_points():
    x = np.array([-1e4, -1.0, 0.0, 1.0, 1e4]).reshape(1, 1, 1, 5)
    with np.errstate(all="raise"):
        assert ref.transfer(x, "relu").ravel().tolist() == [0, 0, 0, 1, 1e4]
        assert ref.transfer(x, "linear").ravel().tolist() == x.ravel().tolist()
        np.testing.assert_allclose(ref.transfer(x, "tanh").ravel()[[0, 2, 3]], [-1, 0, np.tanh(1)])
        np.testing.assert_allclose(ref.transfer(x, "logistic").ravel(),
                                   [0, 1 / (1 + np.e), 0.5, np.e / (1 + np.e), 1], atol=1e-15)


def test_dropout_keeps_scales_and_drops():
    image, mask = np.full((1, 1, 1, 4), 3.0), np.array([1.0, 0, 1, 0]).reshape(1, 1, 1, 4)
    assert ref.dropout(image, mask, 0.25).ravel().tolist() == [4, 0, 4, 0]


def test_crop_and_its_transpose(rng):
    image, gradient = rng.standard_normal((2, 4, 5, 6)), rng.standard_normal((2, 2, 5, 3))
    cropped = ref.crop(image, (1, 0, 2), (2, 5, 3))
    np.testing.assert_array_equal(cropped, image[:, 1:3, :, 2:5])
    transposed = ref.crop_backward(gradient, (1, 0, 2), (4, 5, 6))
    assert np.sum(cropped * gradient) == pytest.approx(np.sum(image * transposed))


# ---- losses and the optimiser ---------------------------------------------------------------------
def loss_data(rng, kind, weighted):
    output, target = rng.standard_normal((3, 2, 3, 2)), rng.uniform(0, 1, (3, 2, 3, 2))
    if kind == "softmax":
        target /= target.sum(axis=0)
    return output, target, rng.uniform(0, 2, (2, 3, 2)) if weighted else None


@pytest.mark.parametrize("kind, weighted", list(itertools.product(ref.LOSS, [False, True])))
def test_loss_gradients_are_numerical_ones(rng, kind, weighted):
    output, target, weights = loss_data(rng, kind, weighted)
    _, gradient = ref.LOSS[kind](output, target, weights)
    assert_close(gradient, numerical_gradient(lambda y: ref.LOSS[kind](y, target, weights)[0], output), 1e-7)


@needs_torch
@pytest.mark.parametrize("kind, weighted", list(itertools.product(ref.LOSS, [False, True])))
def test_losses_are_pytorchs(rng, kind, weighted):
    output, target, weights = loss_data(rng, kind, weighted)
    theirs = torch_oracle.loss(kind, torch.tensor(output[None]), torch.tensor(target[None]),
                               torch.tensor(weights if weighted else 1.0))
    assert ref.LOSS[kind](output, target, weights)[0] / 12 == pytest.approx(float(theirs), rel=1e-12)


def test_losses_by_hand():
    y, t = np.array([2.0, -1.0]).reshape(2, 1, 1, 1), np.array([1.0, 0.0]).reshape(2, 1, 1, 1)
    assert ref.squared_loss(y, t)[0] == pytest.approx(0.5 * (1 + 1))
    assert ref.binomial_loss(y, t)[0] == pytest.approx(np.log1p(np.exp(-2)) + np.log1p(np.exp(-1)))
    assert ref.softmax_loss(y, t)[0] == pytest.approx(np.log1p(np.exp(-3)))
    for loss in ref.LOSS.values():
        assert loss(y, t, np.zeros((1, 1, 1)))[0] == 0 and not loss(y, t, np.zeros((1, 1, 1)))[1].any()


@pytest.mark.parametrize("kind", ["binomial", "softmax"])
def test_cross_entropies_do_not_overflow(kind):
    y, t = np.array([1e4, -1e4]).reshape(2, 1, 1, 1), np.array([0.0, 1.0]).reshape(2, 1, 1, 1)
    loss, gradient = ref.LOSS[kind](y, t)
    assert loss == pytest.approx(2e4) and np.all(np.isfinite(gradient))


def test_two_steps_of_sgd_by_hand():
    w, v = np.array([1.0]), np.array([0.0])
    w, v = ref.sgd_step(w, v, np.array([2.0]), rate=0.1, momentum=0.5, weight_decay=0.25)
    assert v == pytest.approx(2.25) and w == pytest.approx(1 - 0.225)
    w, v = ref.sgd_step(w, v, np.array([0.0]), rate=0.1, momentum=0.5, weight_decay=0.25)
    expected = 1.125 + 0.25 * 0.775
    assert v == pytest.approx(expected) and w == pytest.approx(0.775 - 0.1 * expected)


# ---- whole networks ---------------------------------------------------------------------------------
def reference_network(name, seed=1, **options):
    graph = small_graph(name)
    return ref.ReferenceNetwork(graph, random_parameters(graph, seed), **options)


@pytest.mark.parametrize("patches, weighted", [(None, False), (3, True)])
@pytest.mark.parametrize("name", NETWORKS)
def test_network_gradients_are_numerical_ones(rng, name, patches, weighted):
    """Along a random direction in all inputs and parameters at once, by the loss that train_step returns."""
    net = reference_network(name)
    inputs = smooth_inputs(net, rng, patches)
    targets = random_targets(net.graph, rng, patches)
    weights = random_weights(net.graph, rng, patches) if weighted else None
    before = net.parameters()
    net.train_step(inputs, targets, weights)
    gradients, input_gradients = net.gradients(), named(net.graph.inputs, net.input_gradient())
    along = {key: rng.standard_normal(value.shape) for key, value in before.items()}
    across = {key: rng.standard_normal(value.shape) for key, value in input_gradients.items()}
    expected = sum(np.sum(gradients[k] * along[k]) for k in along) + sum(
        np.sum(input_gradients[k] * across[k]) for k in across)

    def loss(step):
        net.set_parameters({key: before[key] + step * along[key] for key in before})
        moved = {key: value + step * across[key] for key, value in named(net.graph.inputs, inputs).items()}
        return net.train_step(moved, targets, weights)

    assert (loss(1e-7) - loss(-1e-7)) / 2e-7 == pytest.approx(expected, rel=1e-5)


def named(names, arrays):
    return arrays if isinstance(arrays, dict) else {names[0]: arrays}


@pytest.mark.parametrize("patches", [None, 2])
@pytest.mark.parametrize("name", ["dense_3d", "several_ends"])
def test_backward_takes_the_gradient_before_the_division_by_voxels(rng, name, patches):
    one, other = (reference_network(name, rate=0.1, weight_decay=0.01) for _ in range(2))
    inputs, targets = random_inputs(one.graph, rng, patches), random_targets(one.graph, rng, patches)
    one.train_step(inputs, targets)
    outputs, targets = (named(one.graph.outputs, arrays) for arrays in (other.forward(inputs), targets))
    other.backward({key: outputs[key] - targets[key] for key in outputs})
    assert_close(one.parameters(), other.parameters(), 1e-13)
    assert_close(one.input_gradient(), other.input_gradient(), 1e-13)


def test_a_minibatch_is_the_mean_of_its_patches(rng):
    net = reference_network("dense_3d", momentum=0.0)
    before = net.parameters()
    inputs, targets = random_inputs(net.graph, rng, 3), random_targets(net.graph, rng, 3)
    losses, gradients = [], []
    for x, t in zip(inputs, targets):
        net.set_parameters(before)
        losses.append(net.train_step(x, t))
        gradients.append(net.gradients())
    net.set_parameters(before)
    assert net.train_step(inputs, targets) == pytest.approx(np.mean(losses), rel=1e-13)
    assert_close(net.gradients(), {name: sum(g[name] for g in gradients) / 3 for name in before}, 1e-13)


def test_learning_rates_and_weight_decays_of_groups(rng):
    net = reference_network("groups", rate=0.1, momentum=0.5, weight_decay=0.01)
    before = net.parameters()
    net.train_step(random_inputs(net.graph, rng), random_targets(net.graph, rng))
    gradients, after = net.gradients(), net.parameters()
    for name, rate, decay in [("conv1", 0.05, 0.0), ("nconv1", 0.1, 0.0), ("conv2", 0.2, 0.01),
                              ("conv3", 0.1, 0.03), ("output", 0.0, 0.0)]:
        step = gradients[name] + decay * before[name]
        assert_close(net.momenta()[name], step, 1e-13, name)
        assert_close(after[name], before[name] - rate * step, 1e-13, name)
    assert "nconv2" not in after, "a node without bias has no parameter"


def test_dropout_of_a_network_uses_the_given_mask_in_the_train_phase_only(rng):
    spec = NetworkSpec.layered("d", 2, [{"dropout": 0.5}, {"conv": 1, "kernel": 1}])
    graph = Graph.build(spec, output=3)
    net = ref.ReferenceNetwork(graph, random_parameters(graph, 1))
    x, mask = random_inputs(graph, rng), rng.integers(0, 2, (2, 3, 3, 3)).astype(float)
    trained = net.forward(x, "train", masks={"dropout1": mask})
    assert_close(trained, net.forward(2 * mask * x, "infer"), 1e-13)
    net.forward(x, "train", masks={"dropout1": mask})
    net.backward(np.ones((1, 3, 3, 3)))
    assert not np.any(net.input_gradient()[mask == 0]) and np.all(net.input_gradient()[mask == 1])
    with pytest.raises(ValueError, match="dropout1"):
        net.forward(x, "train")


@pytest.mark.parametrize("call, match", [
    (lambda net: net.forward(np.zeros((1, 4, 4, 4))), "input.*shape"),
    (lambda net: net.forward({"nobody": np.zeros((1, 4, 4, 4))}), "nobody"),
    (lambda net: net.forward(np.zeros((2, 10, 8, 14)), "test"), "phase is 'test'"),
    (lambda net: net.set_parameters({"nobody": np.zeros(1)}), "nobody"),
    (lambda net: net.set_momenta({"conv1": np.zeros(1)}), "conv1"),
])
def test_bad_arguments_are_named(call, match):
    with pytest.raises(ValueError, match=match):
        call(reference_network("dense_3d"))


@needs_torch
@pytest.mark.parametrize("patches, weighted", [(None, True), (2, False)])
@pytest.mark.parametrize("name", NETWORKS)
def test_training_is_pytorchs(rng, name, patches, weighted):
    net = reference_network(name, **OPTIMISER)
    train_alike(torch_oracle.TorchNetwork(net.graph, net.parameters(), **OPTIMISER), net, rng, rounds=4,
                patches=patches, weighted=weighted, tolerance=1e-10)


def test_kink_distance_sees_ties_and_zeros_but_not_copies(rng):
    layers = [{"conv": 1, "kernel": 1}, {"max_pool": 2}, {"max_filter": 2}]
    graph = Graph.build(NetworkSpec.layered("k", 1, layers, dims=2), output=2)
    net = ref.ReferenceNetwork(graph, {"conv1": np.ones((1, 1, 1, 1, 1)), "nconv1": np.zeros(1)})
    x = rng.permutation(36).astype(float).reshape(1, 1, 6, 6)
    net.forward(x)
    assert kink_distance(net) >= 1 / 36  # the filter meets each pooled maximum several times: harmless
    x[0, 0, 0, 0] = x[0, 0, 0, 1] = 99
    net.forward(x)
    assert kink_distance(net) == 0
