// Moving boxes of images: crop, pad, split into sub-lattices and back.
#include "kernels/isa.hpp"

namespace znn::kernels::ZNN_ISA {
namespace {

ZNN_INLINE void copy(float* dst, const float* src, std::size_t n) { __builtin_memcpy(dst, src, n * sizeof(float)); }
ZNN_INLINE void zero(float* dst, std::size_t n) { __builtin_memset(dst, 0, n * sizeof(float)); }

ZNN_INLINE void add_to(float* dst, const float* src, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) dst[i] += src[i];
}

void embed(const float* src, Extent ns, float* dst, Extent nd, Extent offset, int bundle) {
    const std::size_t row = std::size_t(nd.x) * bundle, plane = row * nd.y, length = std::size_t(ns.x) * bundle;
    const std::size_t before = std::size_t(offset.x) * bundle, after = row - before - length;
    for (int z = 0; z < nd.z; ++z, dst += plane) {
        if (z < offset.z || z >= offset.z + ns.z) {
            zero(dst, plane);
            continue;
        }
        float* p = dst;
        zero(p, offset.y * row);
        p += offset.y * row;
        for (int y = 0; y < ns.y; ++y, p += row, src += length) {
            zero(p, before);
            copy(p + before, src, length);
            zero(p + before + length, after);
        }
        zero(p, std::size_t(nd.y - offset.y - ns.y) * row);
    }
}

void extract(const float* src, Extent ns, float* dst, Extent nd, Extent offset, int bundle, bool accumulate) {
    const std::size_t row = std::size_t(ns.x) * bundle, length = std::size_t(nd.x) * bundle;
    for (int z = 0; z < nd.z; ++z)
        for (int y = 0; y < nd.y; ++y, dst += length) {
            const float* p = src + (std::size_t(z + offset.z) * ns.y + y + offset.y) * row + std::size_t(offset.x) * bundle;
            if (accumulate)
                add_to(dst, p, length);
            else
                copy(dst, p, length);
        }
}

template <int S>
ZNN_INLINE void gather(float* dst, const float* src, int count, int stride) {
    const int s = S > 0 ? S : stride;
    for (int i = 0; i < count; ++i) dst[i] = src[std::ptrdiff_t(i) * s];
}

// Every s-th element of src; strides of two and three are compiled apart so that they vectorise.
void gather(float* dst, const float* src, int count, int stride) {
    switch (stride) {
        case 1: copy(dst, src, std::size_t(count)); return;
        case 2: gather<2>(dst, src, count, 0); return;
        case 3: gather<3>(dst, src, count, 0); return;
        case 4: gather<4>(dst, src, count, 0); return;
        default: gather<0>(dst, src, count, stride);
    }
}

// Number of elements of an axis of n that lie on the sub-lattice `phase` of spacing s.
ZNN_INLINE int on_lattice(int n, int phase, int s) { return phase < n ? int(ceil_div(n - phase, s)) : 0; }

void split_sublattices(const float* in, Extent n, Extent s, float* out, Extent t, int row, std::size_t block) {
    const std::size_t gap = block - std::size_t(t.z) * t.y * row;
    for (int rz = 0; rz < s.z; ++rz)
        for (int ry = 0; ry < s.y; ++ry)
            for (int rx = 0; rx < s.x; ++rx, out += gap) {
                const int depth = on_lattice(n.z, rz, s.z), height = on_lattice(n.y, ry, s.y), width = on_lattice(n.x, rx, s.x);
                for (int z = 0; z < t.z; ++z)
                    for (int y = 0; y < t.y; ++y, out += row) {
                        if (z >= depth || y >= height) {
                            zero(out, std::size_t(t.x));
                            continue;
                        }
                        const float* p = in + (std::size_t(z * s.z + rz) * n.y + std::size_t(y * s.y + ry)) * n.x + rx;
                        gather(out, p, width, s.x);
                        zero(out + width, std::size_t(t.x - width));
                    }
            }
}

template <bool Accumulate, int S>
ZNN_INLINE void scatter(float* dst, const float* src, int count, int stride, float scale) {
    const std::ptrdiff_t s = S > 0 ? S : stride;
    for (int i = 0; i < count; ++i) dst[i * s] = scale * src[i] + (Accumulate ? dst[i * s] : 0.0f);
}

template <bool Accumulate>
void scatter(float* dst, const float* src, int count, int stride, float scale) {
    switch (stride) {
        case 1: scatter<Accumulate, 1>(dst, src, count, 0, scale); return;
        case 2: scatter<Accumulate, 2>(dst, src, count, 0, scale); return;
        default: scatter<Accumulate, 0>(dst, src, count, stride, scale);
    }
}

// Output rows are written one after the other, each from its s.x sub-lattices, so that they are in cache meanwhile.
void merge_sublattices(const float* in, Extent t, int row, std::size_t block, Extent s, float* out, Extent n, float scale,
                       bool accumulate) {
    for (int z = 0; z < n.z; ++z)
        for (int y = 0; y < n.y; ++y, out += n.x) {
            const float* rows = in + std::size_t(z % s.z * s.y + y % s.y) * s.x * block +
                                (std::size_t(z / s.z) * t.y + std::size_t(y / s.y)) * row;
            for (int rx = 0; rx < s.x; ++rx) {
                const int width = on_lattice(n.x, rx, s.x);
                if (width == 0) continue;
                if (accumulate)
                    scatter<true>(out + rx, rows + rx * block, width, s.x, scale);
                else
                    scatter<false>(out + rx, rows + rx * block, width, s.x, scale);
            }
        }
}

}  // namespace

void fill_boxes(Table& table) {
    table.embed = embed;
    table.extract = extract;
    table.split_sublattices = split_sublattices;
    table.merge_sublattices = merge_sublattices;
}

}  // namespace znn::kernels::ZNN_ISA
