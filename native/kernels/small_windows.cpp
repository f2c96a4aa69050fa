// Max-filter by windows of few voxels. All voxels of a window are compared in one step, a byte per voxel keeps which of them
// was the largest (its place), and the backward pass collects for every input voxel the gradients of the windows it won: any
// range of rows can be done by itself, and each image is read or written once.
#include "kernels/isa.hpp"

namespace znn::kernels::ZNN_ISA {
namespace {

typedef signed char vb __attribute__((vector_size(W), aligned(1), may_alias));
typedef short vs __attribute__((vector_size(2 * W)));

// Vectors of so many floats and of a place for each, and what differs by instruction set.
#if defined(__AVX512F__)
struct Whole {
    static constexpr int lanes = W;
    typedef __m128i Places;
    typedef vf_unaligned F;
    static ZNN_INLINE Places everywhere(int place) { return _mm_set1_epi8(char(place)); }
    static ZNN_INLINE Places places(const std::int8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
    static ZNN_INLINE void store(std::int8_t* p, Places places) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), places); }
    // Of `yes` where a > b, else of `no`.
    static ZNN_INLINE Places where_larger(vf a, vf b, Places yes, Places no) {
        return _mm_mask_mov_epi8(no, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), yes);
    }
    // The sum, with `value` where the place is this one.
    static ZNN_INLINE F add(F sum, Places places, Places place, F value) {
        return _mm512_mask_add_ps(sum, _mm_cmpeq_epi8_mask(places, place), sum, value);
    }
};
struct Half {
    static constexpr int lanes = W / 2;
    typedef __m128i Places;
    typedef float F __attribute__((vector_size(2 * W), aligned(4), may_alias));
    static ZNN_INLINE Places everywhere(int place) { return _mm_set1_epi8(char(place)); }
    static ZNN_INLINE Places places(const std::int8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
    static ZNN_INLINE F add(F sum, Places places, Places place, F value) {
        return _mm256_mask_add_ps(sum, __mmask8(_mm_cmpeq_epi8_mask(places, place)), sum, value);
    }
};
ZNN_INLINE bool any(vi x) { return _mm512_test_epi32_mask((__m512i)x, (__m512i)x); }
#else
struct Whole {
    static constexpr int lanes = W;
    typedef vi Places;
    typedef vf_unaligned F;
    static ZNN_INLINE Places everywhere(int place) { return splat(place); }
    // By way of shorts: compilers take the direct way element by element.
    static ZNN_INLINE Places places(const std::int8_t* p) {
        const vb bytes = *reinterpret_cast<const vb*>(p);
        return __builtin_convertvector(__builtin_convertvector(bytes, vs), vi);
    }
    static ZNN_INLINE void store(std::int8_t* p, Places places) {
        *reinterpret_cast<vb*>(p) = __builtin_convertvector(__builtin_convertvector(places, vs), vb);
    }
    static ZNN_INLINE Places where_larger(vf a, vf b, Places yes, Places no) { return a > b ? yes : no; }
    static ZNN_INLINE F add(F sum, Places places, Places place, F value) {
        return sum + from_bits((vi)(places == place) & bits(value));
    }
};
using Half = Whole;
ZNN_INLINE bool any(vi x) {
    std::int32_t found = 0;
    ZNN_UNROLL
    for (int lane = 0; lane < W; ++lane) found |= x[lane];
    return found;
}
#endif

// What is noted beside the maxima: nothing, their places, or places only of those that are positive and else `nowhere`.
enum Note { nothing, place_of_all, place_of_positive };
constexpr int nowhere = small_window;

template <Note N>
void maxima_one_by_one(const float* const* from, int voxels, std::ptrdiff_t count, float* out, std::int8_t* place) {
    for (std::ptrdiff_t i = 0; i < count; ++i) {
        float best = from[0][i];
        int best_at = 0;
        for (int k = 1; k < voxels; ++k) {
            const float value = from[k][i];
            if (replaces(value, best)) best = value, best_at = k;
        }
        out[i] = best;
        if (N != nothing) place[i] = std::int8_t(N == place_of_all || best > 0 ? best_at : nowhere);
    }
}

struct Best {
    vf value, sum;  // the sum of all is not a number where one of them is not
    Whole::Places at;
};

// Of voxels First to First + Count - 1: of each half, then of both, which depend on one another less than one after the other.
template <int First, int Count>
ZNN_INLINE Best first_maximum(const float* const* from, std::ptrdiff_t i) {
    if constexpr (Count == 1) {
        const vf value = load(from[First] + i);
        return {value, value, Whole::everywhere(First)};
    } else {
        const Best a = first_maximum<First, (Count + 1) / 2>(from, i), b = first_maximum<First + (Count + 1) / 2, Count / 2>(from, i);
        return {b.value > a.value ? b.value : a.value, a.sum + b.sum, Whole::where_larger(b.value, a.value, b.at, a.at)};
    }
}

// The first maximum of in[i + offset[k]], k < K, for i < count.
template <int K, Note N>
void maxima(const float* in, const std::ptrdiff_t* offsets, std::ptrdiff_t count, float* out, std::int8_t* place) {
    const float* from[K];
    for (int k = 0; k < K; ++k) from[k] = in + offsets[k];
    if (count < W) return maxima_one_by_one<N>(from, K, count, out, place);
    vi unordered{};
    const auto vector = [&](std::ptrdiff_t i) {
        const Best best = first_maximum<0, K>(from, i);
        unordered |= (vi)(best.sum != best.sum);
        store(out + i, best.value);
        if (N == place_of_all) Whole::store(place + i, best.at);
        if (N == place_of_positive)
            Whole::store(place + i, Whole::where_larger(best.value, vf{}, best.at, Whole::everywhere(nowhere)));
    };
    for (std::ptrdiff_t i = 0; i + W < count; i += W) vector(i);
    vector(count - W);  // overlaps the one before
    if (any(unordered)) maxima_one_by_one<N>(from, K, count, out, place);
}

// A row of windows that a row of the input lies in: its floats begin at `offset`, and the input is voxels first, first + 1 ...
// of the windows.
struct Row {
    std::ptrdiff_t offset;
    int first;
};

// gin[i + x step] += the gradients of those of R rows' windows i whose voxel first + x was the largest; i < count, x < X.
template <int R, int X, class T>
void collect(const float* g, const std::int8_t* place, const Row* rows, std::ptrdiff_t count, std::ptrdiff_t step, float* gin) {
    using F = typename T::F;
    // Copies: for all that the compiler knows, gin's vectors might overwrite `rows`.
    const float* gradients[R];
    const std::int8_t* places[R];
    typename T::Places voxels[R][X];
    for (int r = 0; r < R; ++r) {
        gradients[r] = g + rows[r].offset, places[r] = place + rows[r].offset;
        for (int x = 0; x < X; ++x) voxels[r][x] = T::everywhere(rows[r].first + x);
    }
    std::ptrdiff_t i = 0;
    for (; i + T::lanes <= count; i += T::lanes) {
        F sum[X];
        ZNN_UNROLL
        for (int x = 0; x < X; ++x) sum[x] = F{};
        ZNN_UNROLL
        for (int r = 0; r < R; ++r) {
            const typename T::Places largest = T::places(places[r] + i);
            const F gradient = *reinterpret_cast<const F*>(gradients[r] + i);
            ZNN_UNROLL
            for (int x = 0; x < X; ++x) sum[x] = T::add(sum[x], largest, voxels[r][x], gradient);
        }
        ZNN_UNROLL
        for (int x = 0; x < X; ++x) *reinterpret_cast<F*>(gin + i + x * step) += sum[x];
    }
    for (; i < count; ++i)
        for (int r = 0; r < R; ++r) {
            const int x = places[r][i] - rows[r].first;
            if (x >= 0 && x < X) gin[i + x * step] += gradients[r][i];
        }
}

using Maxima = void (*)(const float*, const std::ptrdiff_t*, std::ptrdiff_t, float*, std::int8_t*);
template <Note N>
constexpr Maxima maxima_of[small_window + 1] = {nullptr,      maxima<1, N>, maxima<2, N>, maxima<3, N>, maxima<4, N>,
                                                maxima<5, N>, maxima<6, N>, maxima<7, N>, maxima<8, N>};
using Collect = void (*)(const float*, const std::int8_t*, const Row*, std::ptrdiff_t, std::ptrdiff_t, float*);

template <int R, int X, class T>
Collect collect_of(int rows, int across) {
    if constexpr (R == 1 && X < small_window) {
        if (across > X) return collect_of<1, X + 1, T>(rows, across);
    }
    if constexpr ((R + 1) * X <= small_window) {
        if (rows > R) return collect_of<R + 1, X, T>(rows, across);
    }
    return collect<R, X, T>;
}

void small_max_filter(const float* in, Extent n, Extent w, Extent s, int bundle, int first_row, int last_row, float* out,
                      std::int8_t* place, bool positive) {
    const Extent m = valid(n, w, s);
    std::ptrdiff_t offset[small_window];
    int count = 0;
    for (int z = 0; z < w.z; ++z)
        for (int y = 0; y < w.y; ++y)
            for (int x = 0; x < w.x; ++x)
                offset[count++] = ((std::ptrdiff_t(z) * s.z * n.y + y * s.y) * n.x + x * s.x) * bundle;
    const Maxima function = !place     ? maxima_of<nothing>[count]
                            : positive ? maxima_of<place_of_positive>[count]
                                       : maxima_of<place_of_all>[count];
    const std::ptrdiff_t length = std::ptrdiff_t(m.x) * bundle;
    for (int row = first_row; row < last_row; ++row, out += length) {
        const std::ptrdiff_t from = (std::ptrdiff_t(row / m.y) * n.y + row % m.y) * n.x * bundle;
        function(in + from, offset, length, out, place);
        if (place) place += length;
    }
}

void small_max_filter_backward(const float* g, const std::int8_t* place, Extent n, Extent w, Extent s, int bundle,
                               int first_row, int last_row, float* gin) {
    const Extent m = valid(n, w, s);
    const std::ptrdiff_t length = std::ptrdiff_t(n.x) * bundle, windows = std::ptrdiff_t(m.x) * bundle;
    for (int row = first_row; row < last_row; ++row, gin += length) {
        Row rows[small_window];
        int count = 0;
        for (int jz = 0; jz < w.z; ++jz) {
            for (int jy = 0; jy < w.y; ++jy) {
                const int z = row / n.y - jz * s.z, y = row % n.y - jy * s.y;
                if (z >= 0 && z < m.z && y >= 0 && y < m.y)
                    rows[count++] = {(std::ptrdiff_t(z) * m.y + y) * windows, (jz * w.y + jy) * w.x};
            }
        }
        __builtin_memset(gin, 0, length * sizeof(float));
        const std::ptrdiff_t step = std::ptrdiff_t(s.x) * bundle;
        // What is read is what was written just before, and comes faster when it is read in the same pieces.
        const Collect function = step % W ? collect_of<1, 1, Half>(count, w.x) : collect_of<1, 1, Whole>(count, w.x);
        if (count) function(g, place, rows, windows, step, gin);
    }
}

}  // namespace

void fill_small_windows(Table& table) {
    table.small_max_filter = small_max_filter;
    table.small_max_filter_backward = small_max_filter_backward;
}

}  // namespace znn::kernels::ZNN_ISA
