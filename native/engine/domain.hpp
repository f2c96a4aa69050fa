// Representations of a node's image that convolution methods work on, and the conversions to and from them.
#pragma once
#include <cstddef>

#include "base/extent.hpp"

namespace znn {

struct Domain {
    enum class Kind { image, padded, spectrum };
    Kind kind = Kind::image;
    Extent transform{0, 0, 0};  // spectrum: extent of the transform of one sub-lattice
    Extent sparsity{1, 1, 1};   // spectrum: spacing of the sub-lattices
    Extent border{0, 0, 0};     // padded: zeros on either side of each axis

    bool operator==(const Domain&) const = default;
};

// Converts images of one extent (with `patches` images in a row) to a domain and back.
//
// A spectrum is [patch][sub-lattice][block], a block the transform [t.z][t.y][t.x/2+1] of one zero-padded sub-lattice as
// interleaved complex, padded to whole cache lines. A convolution of sparsity s never mixes sub-lattices, so it is an
// ordinary convolution of each with the same small kernel: no zeros between kernel taps are ever transformed.
class Codec {
public:
    Codec(const Domain& domain, Extent n, int patches);

    std::size_t floats() const { return floats_; }
    std::size_t transforms() const { return domain_.kind == Domain::Kind::spectrum ? std::size_t(patches_) : 0; }

    void encode(const float* image, float* out) const;
    // Overwrites `in` (a spectrum is transformed in place) and writes the image.
    void decode(float* in, float* image) const;

private:
    Domain domain_;
    Extent n_;
    int patches_;
    std::size_t floats_;
};

// Complex numbers in a block of a spectrum without and with padding.
std::size_t spectrum_numbers(Extent transform);
std::size_t spectrum_block(Extent transform);

}  // namespace znn
