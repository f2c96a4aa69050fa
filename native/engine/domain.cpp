#include "engine/domain.hpp"

#include <cstring>

#include "fft/fftw.hpp"
#include "kernels/kernels.hpp"

namespace znn {

std::size_t spectrum_numbers(Extent t) { return std::size_t(t.z) * t.y * (t.x / 2 + 1); }

std::size_t spectrum_block(Extent t) { return (spectrum_numbers(t) + 7) / 8 * 8; }

Codec::Codec(const Domain& domain, Extent n, int patches) : domain_(domain), n_(n), patches_(patches) {
    switch (domain.kind) {
        case Domain::Kind::image: floats_ = n.volume() * patches; break;
        case Domain::Kind::padded: floats_ = (n + domain.border + domain.border).volume() * patches; break;
        case Domain::Kind::spectrum:
            floats_ = 2 * spectrum_block(domain.transform) * domain.sparsity.volume() * patches;
            RealTransform::of(domain.transform);  // planned now, not in the middle of a round
            break;
    }
}

void Codec::encode(const float* image, float* out) const {
    const kernels::Table& f = kernels::table();
    const std::size_t volume = n_.volume(), each = floats_ / patches_;
    for (int patch = 0; patch < patches_; ++patch, image += volume, out += each) {
        if (domain_.kind == Domain::Kind::image) {
            std::memcpy(out, image, volume * sizeof(float));
        } else if (domain_.kind == Domain::Kind::padded) {
            f.embed(image, n_, out, n_ + domain_.border + domain_.border, domain_.border, 1);
        } else {
            const Extent t = domain_.transform;
            const RealTransform& transform = RealTransform::of(t);
            const std::size_t numbers = spectrum_numbers(t), block = spectrum_block(t);
            f.split_sublattices(image, n_, domain_.sparsity, out, t, 2 * (t.x / 2 + 1), 2 * block);
            for (std::size_t sub = 0; sub < domain_.sparsity.volume(); ++sub) {
                float* data = out + sub * 2 * block;
                transform.forward(data);
                std::memset(data + 2 * numbers, 0, 2 * (block - numbers) * sizeof(float));
            }
        }
    }
}

void Codec::decode(float* in, float* image) const {
    const kernels::Table& f = kernels::table();
    const std::size_t volume = n_.volume(), each = floats_ / patches_;
    for (int patch = 0; patch < patches_; ++patch, image += volume, in += each) {
        if (domain_.kind == Domain::Kind::image) {
            std::memcpy(image, in, volume * sizeof(float));
        } else if (domain_.kind == Domain::Kind::padded) {
            f.extract(in, n_ + domain_.border + domain_.border, image, n_, domain_.border, 1, false);
        } else {
            const Extent t = domain_.transform;
            const RealTransform& transform = RealTransform::of(t);
            const std::size_t block = spectrum_block(t);
            for (std::size_t sub = 0; sub < domain_.sparsity.volume(); ++sub) transform.inverse(in + sub * 2 * block);
            f.merge_sublattices(in, t, 2 * (t.x / 2 + 1), 2 * block, domain_.sparsity, image, n_,
                                1.0f / float(t.volume()), false);
        }
    }
}

}  // namespace znn
