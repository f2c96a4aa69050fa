#include "engine/method.hpp"

#include <algorithm>
#include <stdexcept>

#include "kernels/kernels.hpp"
#include "kernels/short_transform.hpp"

namespace znn {

void ConvMethod::transform_kernel(const float*, float*, Scratch&) const {}

namespace {

// Direct convolution in the image domain. Backward is a valid correlation of the zero-bordered gradient with the kernel
// flipped once more; the border is added once per node, not once per edge.
class DirectMethod final : public ConvMethod {
public:
    explicit DirectMethod(const ConvShape& shape) : shape_(shape) {
        const Extent one{1, 1, 1};
        backward_domain.kind = Domain::Kind::padded;
        backward_domain.border = shape.sparsity * (shape.kernel - one);
        padded_ = shape.out + backward_domain.border + backward_domain.border;
    }

    void forward(const float* image, const float* kernel, float* sum, bool accumulate, Scratch&) const override {
        const std::size_t in = shape_.in.volume(), out = shape_.out.volume();
        for (int patch = 0; patch < shape_.patches; ++patch)
            kernels::table().correlate(image + patch * in, shape_.in, kernel, shape_.kernel, shape_.sparsity,
                                       sum + patch * out, accumulate);
    }

    void backward(const float* gradient, const float* kernel, float* sum, bool accumulate, Scratch& scratch) const override {
        const std::size_t taps = shape_.kernel.volume();
        float* flipped = scratch.get(taps, 0);
        std::reverse_copy(kernel, kernel + taps, flipped);
        const std::size_t in = padded_.volume(), out = shape_.in.volume();
        for (int patch = 0; patch < shape_.patches; ++patch)
            kernels::table().correlate(gradient + patch * in, padded_, flipped, shape_.kernel, shape_.sparsity,
                                       sum + patch * out, accumulate);
    }

    void update(const float* image, const float* gradient, float* kernel_gradient, Scratch&) const override {
        const std::size_t in = shape_.in.volume(), out = shape_.out.volume();
        for (int patch = 0; patch < shape_.patches; ++patch)
            kernels::table().correlate_gradient(image + patch * in, shape_.in, gradient + patch * out, shape_.kernel,
                                                shape_.sparsity, kernel_gradient, patch > 0);
    }

private:
    ConvShape shape_;
    Extent padded_;
};

// Whole-image FFT convolution (the paper's method), sub-lattice by sub-lattice. With the kernel flipped, all three
// phases are products of spectra whose wanted part begins at index 0 of the inverse transform:
// forward X conj(W), backward G W, kernel gradient X conj(G).
class FftMethod final : public ConvMethod {
public:
    FftMethod(const ConvShape& shape, Extent t)
        : kernel_transform_(shape.kernel, t), block_(spectrum_block(t)), numbers_(spectrum_numbers(t)),
          blocks_(shape.sparsity.volume() * shape.patches) {
        const Extent needed = sublattice_extent(shape.in, shape.sparsity);
        if (t.z < needed.z || t.y < needed.y || t.x < needed.x)
            throw std::runtime_error("transform extent " + to_string(t) + " is smaller than the sub-lattice " +
                                     to_string(needed) + " of an image of extent " + to_string(shape.in));
        Domain spectrum;
        spectrum.kind = Domain::Kind::spectrum;
        spectrum.transform = t;
        spectrum.sparsity = shape.sparsity;
        image_domain = backward_domain = update_domain = forward_sum = backward_sum = spectrum;
    }

    std::size_t kernel_floats() const override { return 2 * block_; }

    void transform_kernel(const float* kernel, float* out, Scratch& scratch) const override {
        kernel_transform_.forward(kernel, out, scratch.get(kernel_transform_.scratch_floats(), 0));
        std::fill(out + 2 * numbers_, out + 2 * block_, 0.0f);
    }

    void forward(const float* image, const float* kernel, float* sum, bool accumulate, Scratch&) const override {
        kernels::table().spectral_multiply_conj(image, kernel, sum, blocks_, block_, accumulate);
    }

    void backward(const float* gradient, const float* kernel, float* sum, bool accumulate, Scratch&) const override {
        kernels::table().spectral_multiply(gradient, kernel, sum, blocks_, block_, accumulate);
    }

    void update(const float* image, const float* gradient, float* kernel_gradient, Scratch& scratch) const override {
        float* product = scratch.get(2 * block_, 1);
        kernels::table().spectral_correlate(image, gradient, product, blocks_, block_);
        kernel_transform_.inverse(product, kernel_gradient, scratch.get(kernel_transform_.scratch_floats(), 0));
    }

private:
    kernels::ShortTransform kernel_transform_;
    std::size_t block_, numbers_, blocks_;
};

}  // namespace

std::unique_ptr<ConvMethod> make_method(Method method, const ConvShape& shape, Extent transform) {
    switch (method) {
        case Method::direct: return std::make_unique<DirectMethod>(shape);
        case Method::fft: return std::make_unique<FftMethod>(shape, transform);
        case Method::tiled:
        case Method::fused: break;
    }
    throw std::runtime_error("the tiled and fused methods work on bundles of maps, not on single ones");
}

}  // namespace znn
