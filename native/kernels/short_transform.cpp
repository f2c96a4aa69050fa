#include "kernels/short_transform.hpp"

#include <cmath>
#include <numbers>

#include "kernels/kernels.hpp"

namespace znn::kernels {

namespace {

// Angle of exp(2 pi i f j / t), reduced before the conversion to floating point.
double angle(int f, int j, int t) { return 2 * std::numbers::pi * double((long(f) * j) % t) / t; }

std::vector<float> complex_table(int k, int t) {
    std::vector<float> table;
    for (int f = 0; 2 * f <= t; ++f)
        for (int j = 0; j < k; ++j) {
            table.push_back(float(std::cos(angle(f, j, t))));
            table.push_back(float(std::sin(angle(f, j, t))));
        }
    return table;
}

}  // namespace

ShortTransform::ShortTransform(Extent k, Extent t)
    : k_(k), t_(t), half_(t.x / 2 + 1), plane_(half_ * t.y), z_table_(complex_table(k.z, t.z)),
      y_table_(complex_table(k.y, t.y)) {
    for (int j = 0; j < k.x; ++j)
        for (int f = 0; f < int(half_); ++f) {
            const double cosine = std::cos(angle(f, j, t.x)), sine = std::sin(angle(f, j, t.x));
            // A real image's other half of the spectrum is the mirror image: it counts twice but for f = 0 and t/2.
            const double weight = (f == 0 || 2 * f == t.x ? 1.0 : 2.0) / double(t.volume());
            x_forward_.push_back(float(cosine));
            x_forward_.push_back(float(-sine));
            x_inverse_.push_back(float(weight * cosine));
            x_inverse_.push_back(float(-weight * sine));
        }
}

std::size_t ShortTransform::scratch_floats() const {
    return 2 * std::size_t(k_.z) * (std::size_t(k_.y) * half_ + plane_);
}

void ShortTransform::forward(const float* w, float* spectrum, float* scratch) const {
    const Table& f = table();
    const std::size_t row = 2 * half_, plane = 2 * plane_;
    float* rows = scratch;                          // [k.z][k.y][half]
    float* planes = rows + k_.z * k_.y * row;       // [k.z][t.y][half]
    if (t_.z == 1) planes = spectrum;
    f.rows_expand(w, std::size_t(k_.z) * k_.y, k_.x, x_forward_.data(), row, rows);
    for (int z = 0; z < k_.z; ++z)
        f.dft_expand(rows + z * k_.y * row, row, k_.y, half_, planes + z * plane, row, t_.y, y_table_.data());
    if (t_.z > 1) f.dft_expand(planes, plane, k_.z, plane_, spectrum, plane, t_.z, z_table_.data());
}

void ShortTransform::inverse(const float* spectrum, float* w, float* scratch) const {
    const Table& f = table();
    const std::size_t row = 2 * half_, plane = 2 * plane_;
    float* rows = scratch;
    float* planes = rows + k_.z * k_.y * row;
    if (t_.z > 1) f.dft_reduce(spectrum, plane, t_.z, plane_, planes, plane, k_.z, z_table_.data());
    const float* source = t_.z > 1 ? planes : spectrum;
    for (int z = 0; z < k_.z; ++z)
        f.dft_reduce(source + z * plane, row, t_.y, half_, rows + z * k_.y * row, row, k_.y, y_table_.data());
    f.rows_reduce(rows, std::size_t(k_.z) * k_.y, row, x_inverse_.data(), k_.x, w);
}

}  // namespace znn::kernels
