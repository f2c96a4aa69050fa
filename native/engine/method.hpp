// Convolution methods behind one interface. A method says in which domains it wants images and gradients and in which
// domain its results may be summed; the engine does the rest (conversions, memoization, sums, tasks). To add a method:
// derive from ConvMethod, add a name to Method, and a line to make_method.
#pragma once
#include <memory>

#include "base/scratch.hpp"
#include "engine/description.hpp"
#include "engine/domain.hpp"

namespace znn {

struct ConvShape {
    Extent in, kernel, sparsity, out;  // out = in - sparsity * (kernel - 1)
    int patches = 1;
};

// One edge: one image, one kernel. Kernels are held flipped (cross-correlation, see docs/design.md). `sum` is in the
// domain named; with `accumulate` the result is added to it, else it is overwritten.
class ConvMethod {
public:
    virtual ~ConvMethod() = default;

    Domain image_domain;     // the source's image, for forward and update
    Domain backward_domain;  // the target's gradient, for backward
    Domain update_domain;    // the target's gradient, for update
    Domain forward_sum, backward_sum;

    // Floats of a kernel transformed for use in forward and backward; 0: the kernel is used as it is.
    virtual std::size_t kernel_floats() const { return 0; }
    virtual void transform_kernel(const float* kernel, float* out, Scratch& scratch) const;

    virtual void forward(const float* image, const float* kernel, float* sum, bool accumulate, Scratch& scratch) const = 0;
    virtual void backward(const float* gradient, const float* kernel, float* sum, bool accumulate,
                          Scratch& scratch) const = 0;
    // Gradient of the kernel, summed over the patches.
    virtual void update(const float* image, const float* gradient, float* kernel_gradient, Scratch& scratch) const = 0;
};

// Throws std::runtime_error when the method cannot serve this shape (naming what was expected).
std::unique_ptr<ConvMethod> make_method(Method method, const ConvShape& shape, Extent transform);

}  // namespace znn
