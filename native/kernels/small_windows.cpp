// Max-filter by windows of few voxels. All voxels of a window are compared in one step, a byte per voxel keeps which of them
// was the largest, and the backward pass collects for every input voxel the gradients of the windows it won: any range of
// rows can be done by itself, and each image is read or written once.
#include "kernels/isa.hpp"

namespace znn::kernels::ZNN_ISA {
namespace {

typedef signed char vb __attribute__((vector_size(W), aligned(1), may_alias));
typedef short vs __attribute__((vector_size(2 * W)));

// By way of shorts: compilers take the direct way element by element.
ZNN_INLINE vi load_bytes(const std::int8_t* p) {
    return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const vb*>(p), vs), vi);
}
ZNN_INLINE void store_bytes(std::int8_t* p, vi x) {
    *reinterpret_cast<vb*>(p) = __builtin_convertvector(__builtin_convertvector(x, vs), vb);
}

// Calls vector(i) for vectors that cover [begin, end), the last overlapping the one before, or scalar(i) where none fits.
template <class Vector, class Scalar>
ZNN_INLINE void each_vector(std::ptrdiff_t begin, std::ptrdiff_t end, const Vector& vector, const Scalar& scalar) {
    if (end - begin < W) {
        for (std::ptrdiff_t i = begin; i < end; ++i) scalar(i);
        return;
    }
    for (std::ptrdiff_t i = begin; i < end - W; i += W) vector(i);
    vector(end - W);
}

// The first maximum of in[i + offset[k]], k < K, for i < count; as in pooling.cpp, the first NaN of a window wins.
template <int K>
void maxima(const float* in, const std::ptrdiff_t* offset, std::ptrdiff_t count, float* out, std::int8_t* place) {
    each_vector(
        0, count,
        [&](std::ptrdiff_t i) {
            vf best = load(in + offset[0] + i);
            vi best_at{};
            ZNN_UNROLL
            for (int k = 1; k < K; ++k) {
                const vf value = load(in + offset[k] + i);
                const vi take = ~(vi)(value <= best) & (vi)(best == best);
                best = take ? value : best;
                best_at = take ? splat(k) : best_at;
            }
            store(out + i, best);
            store_bytes(place + i, best_at);
        },
        [&](std::ptrdiff_t i) {
            float best = in[offset[0] + i];
            int best_at = 0;
            for (int k = 1; k < K; ++k) {
                const float value = in[offset[k] + i];
                if (!(value <= best) && best == best) best = value, best_at = k;
            }
            out[i] = best;
            place[i] = std::int8_t(best_at);
        });
}

// A window that input float i lies in, as voxel `place` of it: the window's result is float i + offset.
struct Window {
    std::ptrdiff_t offset;
    int place;
};

// gin[i] = sum of the gradients of those of K windows in which i was the largest, begin <= i < end.
template <int K>
void collect(const float* g, const std::int8_t* place, const Window* windows, std::ptrdiff_t begin, std::ptrdiff_t end,
             float* gin) {
    each_vector(
        begin, end,
        [&](std::ptrdiff_t i) {
            vf sum{};
            ZNN_UNROLL
            for (int k = 0; k < K; ++k) {
                const std::ptrdiff_t at = i + windows[k].offset;
                sum += from_bits((vi)(load_bytes(place + at) == splat(windows[k].place)) & bits(load(g + at)));
            }
            store(gin + i, sum);
        },
        [&](std::ptrdiff_t i) {
            float sum = 0;
            for (int k = 0; k < K; ++k) {
                const std::ptrdiff_t at = i + windows[k].offset;
                if (place[at] == windows[k].place) sum += g[at];
            }
            gin[i] = sum;
        });
}

using Maxima = void (*)(const float*, const std::ptrdiff_t*, std::ptrdiff_t, float*, std::int8_t*);
constexpr Maxima maxima_of[small_window + 1] = {nullptr,   maxima<1>, maxima<2>, maxima<3>, maxima<4>,
                                                maxima<5>, maxima<6>, maxima<7>, maxima<8>};
using Collect = void (*)(const float*, const std::int8_t*, const Window*, std::ptrdiff_t, std::ptrdiff_t, float*);
constexpr Collect collect_of[small_window + 1] = {collect<0>, collect<1>, collect<2>, collect<3>, collect<4>,
                                                  collect<5>, collect<6>, collect<7>, collect<8>};

void small_max_filter(const float* in, Extent n, Extent w, Extent s, int bundle, int first_row, int last_row, float* out,
                      std::int8_t* place) {
    const Extent m = valid(n, w, s);
    std::ptrdiff_t offset[small_window];
    int count = 0;
    for (int z = 0; z < w.z; ++z)
        for (int y = 0; y < w.y; ++y)
            for (int x = 0; x < w.x; ++x)
                offset[count++] = ((std::ptrdiff_t(z) * s.z * n.y + y * s.y) * n.x + x * s.x) * bundle;
    const std::ptrdiff_t length = std::ptrdiff_t(m.x) * bundle;
    for (int row = first_row; row < last_row; ++row, out += length, place += length) {
        const std::ptrdiff_t from = (std::ptrdiff_t(row / m.y) * n.y + row % m.y) * n.x * bundle;
        maxima_of[count](in + from, offset, length, out, place);
    }
}

// Positions [begin, end) of an axis that lie in the same windows: as their voxels first .. last - 1.
struct Segment {
    int begin, end, first, last;
};

// Of an axis of n positions, m of them windows' beginnings. Returns how many.
int segments_of(int n, int m, int w, int s, Segment* segments) {
    int count = 0;
    for (int x = 0; x < n; ++x) {
        const int first = x < m ? 0 : int(ceil_div(x - m + 1, s)), last = smaller(w, x / s + 1);
        if (count && segments[count - 1].first == first && segments[count - 1].last == last)
            segments[count - 1].end = x + 1;
        else
            segments[count++] = {x, x + 1, first, last};
    }
    return count;
}

void small_max_filter_backward(const float* g, const std::int8_t* place, Extent n, Extent w, Extent s, int bundle,
                               int first_row, int last_row, float* gin) {
    const Extent m = valid(n, w, s);
    Segment segments[2 * small_window + 1];
    const int count = segments_of(n.x, m.x, w.x, s.x, segments);
    for (int row = first_row; row < last_row; ++row, gin += std::ptrdiff_t(n.x) * bundle) {
        for (int i = 0; i < count; ++i) {
            const Segment& part = segments[i];
            Window windows[small_window];
            int found = 0;
            for (int jz = 0; jz < w.z; ++jz) {
                for (int jy = 0; jy < w.y; ++jy) {
                    const int z = row / n.y - jz * s.z, y = row % n.y - jy * s.y;
                    if (z < 0 || z >= m.z || y < 0 || y >= m.y) continue;
                    for (int jx = part.first; jx < part.last; ++jx)
                        windows[found++] = {((std::ptrdiff_t(z) * m.y + y) * m.x - jx * s.x) * bundle,
                                            (jz * w.y + jy) * w.x + jx};
                }
            }
            collect_of[found](g, place, windows, std::ptrdiff_t(part.begin) * bundle, std::ptrdiff_t(part.end) * bundle, gin);
        }
    }
}

}  // namespace

void fill_small_windows(Table& table) {
    table.small_max_filter = small_max_filter;
    table.small_max_filter_backward = small_max_filter_backward;
}

}  // namespace znn::kernels::ZNN_ISA
