// Extents of images, kernels and windows: three ints, slowest axis first.
#pragma once
#include <cstddef>
#include <string>

namespace znn {

struct Extent {
    int z = 0, y = 0, x = 0;

    std::size_t volume() const { return std::size_t(z) * std::size_t(y) * std::size_t(x); }
    bool operator==(const Extent&) const = default;
};

inline Extent operator+(Extent a, Extent b) { return {a.z + b.z, a.y + b.y, a.x + b.x}; }
inline Extent operator-(Extent a, Extent b) { return {a.z - b.z, a.y - b.y, a.x - b.x}; }
inline Extent operator*(Extent a, Extent b) { return {a.z * b.z, a.y * b.y, a.x * b.x}; }

// Extent of a valid convolution or filter: n - s (k - 1).
inline Extent valid_extent(Extent n, Extent k, Extent s) {
    return {n.z - s.z * (k.z - 1), n.y - s.y * (k.y - 1), n.x - s.x * (k.x - 1)};
}

// ceil(n / s) per axis: the extent of the largest sub-lattice of n with spacing s.
inline Extent sublattice_extent(Extent n, Extent s) {
    return {(n.z + s.z - 1) / s.z, (n.y + s.y - 1) / s.y, (n.x + s.x - 1) / s.x};
}

inline std::string to_string(Extent e) {
    return "(" + std::to_string(e.z) + ", " + std::to_string(e.y) + ", " + std::to_string(e.x) + ")";
}

}  // namespace znn
