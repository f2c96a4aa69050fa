// Transform of a kernel of extent k zero-padded to extent t, and the inverse of which only k^3 values are wanted: along each
// axis only the lines that are not zero are transformed (the pruned kernel transforms), each as a small table product.
#pragma once
#include <cstddef>
#include <vector>

#include "base/extent.hpp"

namespace znn::kernels {

class ShortTransform {
public:
    ShortTransform(Extent k, Extent t);

    // Complex numbers of the spectrum: t.z * t.y * (t.x/2 + 1).
    std::size_t spectrum_size() const { return plane_ * std::size_t(t_.z); }
    std::size_t scratch_floats() const;

    // spectrum[fz][fy][fx] of kernel w[k.z][k.y][k.x], interleaved complex.
    void forward(const float* w, float* spectrum, float* scratch) const;
    // The first k values per axis of the inverse transform, divided by the volume of t.
    void inverse(const float* spectrum, float* w, float* scratch) const;

private:
    Extent k_, t_;
    std::size_t half_, plane_;  // complex numbers in a row and in a plane of the spectrum
    std::vector<float> z_table_, y_table_, x_forward_, x_inverse_;
};

}  // namespace znn::kernels
