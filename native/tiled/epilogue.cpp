// What is done to values on their way out: bias and transfer function, its derivative, the weight update.
#include <algorithm>
#include <cmath>
#include <utility>

#include "tiled/variant.hpp"

namespace znn::tiled::ZNN_VARIANT {
namespace {

ZNN_INLINE V maximum(V a, V b) { return a > b ? a : b; }
ZNN_INLINE V minimum(V a, V b) { return a < b ? a : b; }

// exp(x): 2^n by the exponent bits times a polynomial of degree 6 on [-ln2/2, ln2/2]; relative error below 2e-7.
ZNN_INLINE V exponential(V x) {
    x = minimum(maximum(x, V{} - 87.0f), V{} + 88.0f);
    const VI n = __builtin_convertvector(x * 1.44269504f + (x < 0.0f ? V{} - 0.5f : V{} + 0.5f), VI);
    const V m = __builtin_convertvector(n, V);
    const V r = (x - m * 0.693359375f) + m * 2.12194440e-4f;
    const V p = 1.0f + r * (1.0f + r * (0.5f + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720))))));
    return p * reinterpret_cast<V>((n + 127) << 23);
}

// tanh(x): an odd polynomial near zero, where 1 - 2 / (exp(2x) + 1) would cancel.
ZNN_INLINE V hyperbolic_tangent(V x) {
    const V s = x * x;
    const V small = x * (1.0f + s * (-1.0f / 3 + s * (2.0f / 15 + s * (-17.0f / 315 + s * (62.0f / 2835)))));
    const V large = 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f);
    return s < 0.0625f ? small : large;
}

template <Transfer F>
ZNN_INLINE V transfer_of(V x) {
    if constexpr (F == Transfer::relu) return x < 0.0f ? V{} : x;  // a NaN stays
    if constexpr (F == Transfer::tanh) return hyperbolic_tangent(x);
    if constexpr (F == Transfer::logistic) return 1.0f / (1.0f + exponential(-x));
    return x;
}

template <Transfer F>
ZNN_INLINE V derivative_of(V y) {
    if constexpr (F == Transfer::relu) return y > 0.0f ? V{} + 1.0f : V{};
    if constexpr (F == Transfer::tanh) return 1.0f - y * y;
    if constexpr (F == Transfer::logistic) return y * (1.0f - y);
    return V{} + 1.0f;
}

template <Transfer F>
void finish(const V* src, V* dst, long step, long count, V bias, bool accumulate) {
    if (accumulate)
        for (long i = 0; i < count; ++i, dst += step) *dst = transfer_of<F>(src[i] + bias + *dst);
    else
        for (long i = 0; i < count; ++i, dst += step) *dst = transfer_of<F>(src[i] + bias);
}

template <Transfer F>
void derive(V* g, const V* y, long step, long count) {
    for (long i = 0; i < count; ++i, g += step, y += step) *g *= derivative_of<F>(*y);
}

}  // namespace

void finish_forward(const V* src, V* dst, long step, long count, const float* bias, Transfer f, bool accumulate) {
    const V shift = bias ? *vec(bias) : V{};
    switch (f) {
        case Transfer::linear: return finish<Transfer::linear>(src, dst, step, count, shift, accumulate);
        case Transfer::relu: return finish<Transfer::relu>(src, dst, step, count, shift, accumulate);
        case Transfer::tanh: return finish<Transfer::tanh>(src, dst, step, count, shift, accumulate);
        case Transfer::logistic: return finish<Transfer::logistic>(src, dst, step, count, shift, accumulate);
    }
}

void apply_derivative(V* g, const V* y, long step, long count, Transfer f) {
    switch (f) {
        case Transfer::linear: return;
        case Transfer::relu: return derive<Transfer::relu>(g, y, step, count);
        case Transfer::tanh: return derive<Transfer::tanh>(g, y, step, count);
        case Transfer::logistic: return derive<Transfer::logistic>(g, y, step, count);
    }
}

namespace {

ZNN_INLINE V square_root(V x) {
    for (int l = 0; l < kV; ++l) x[l] = std::sqrt(x[l]);
    return x;
}

}  // namespace

void finish_update(const LayerPlan& plan, const Buffers& b, int o, int i, const V* g) {
    const long taps = long(plan.problem.kernel.volume());
    const long at = (long(o) * plan.problem.fan_in() + i) * taps;
    VI lane;
    for (int l = 0; l < kV; ++l) lane[l] = o * kV + l < plan.problem.out_maps ? -1 : 0;
    const UpdateStep s = b.step;
    for (long j = 0; j < taps; ++j) {
        const V gradient = lane ? g[j] : V{};
        if (b.kernel_gradient) vec(b.kernel_gradient)[at + j] = gradient;
        if (!b.update) continue;
        V& w = vec(b.kernels)[at + j];
        V v = s.scale * gradient + s.decay * w;
        if (b.second_moments) {
            V &m = vec(b.momenta)[at + j], &square = vec(b.second_moments)[at + j];
            m = s.momentum * m + (1.0f - s.momentum) * v;
            square = s.square_momentum * square + (1.0f - s.square_momentum) * v * v;
            w -= s.rate * m / (square_root(square) * s.correction + s.epsilon);
            continue;
        }
        if (b.momenta) {
            v += s.momentum * vec(b.momenta)[at + j];
            vec(b.momenta)[at + j] = v;
        }
        w -= s.rate * v;
    }
}

// The lanes of a whose numbers have bit H change places with those of b whose numbers have not.
template <int H, class W, std::size_t... LANE>
ZNN_INLINE void exchange(W& a, W& b, std::index_sequence<LANE...> lanes) {
    const W first = __builtin_shufflevector(a, b, (LANE & H ? lanes.size() + LANE - H : LANE)...);
    b = __builtin_shufflevector(a, b, (LANE & H ? lanes.size() + LANE : LANE + H)...);
    a = first;
}

// Eklundh's transposition: blocks of H by H, of twice that side, and so on; of each kV lanes of wider vectors by themselves.
template <int H = 1, class W>
ZNN_INLINE void transpose(W (&rows)[kV]) {
    for (int i = 0; i < kV; ++i)
        if (!(i & H)) exchange<H>(rows[i], rows[i + H], std::make_index_sequence<sizeof(W) / sizeof(float)>());
    if constexpr (2 * H < kV) transpose<2 * H>(rows);
}

void transpose_block(const V* in, long in_step, V* out, long out_step) {
    V rows[kV];
    for (int i = 0; i < kV; ++i) rows[i] = in[i * in_step];
    transpose(rows);
    for (int i = 0; i < kV; ++i) out[i * out_step] = rows[i];
}

namespace {

static_assert(kX == kV || kX == 2 * kV);

// As many vectors as one of kX lanes holds, `step` apart, as one, and the first `count` back.
template <class NARROW>
ZNN_INLINE auto gather(const NARROW* from, long step) {
    if constexpr (kX == kV)
        return *from;
    else
        return __builtin_shufflevector(from[0], from[step], 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
template <class NARROW, class WIDE>
ZNN_INLINE void scatter(WIDE x, NARROW* to, long step, int count = kX / kV) {
    if constexpr (kX == kV) {
        *to = x;
    } else {
        *to = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7);
        if (count > 1) to[step] = __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    }
}

ZNN_INLINE bool has_nan(X x) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(x), _CMP_UNORD_Q);
#else
    float sum = 0;
    for (int l = 0; l < kX; ++l) sum += x[l];
    return sum != sum;
#endif
}

// Whether a value takes the place of the maximum so far. NANS: not all may be numbers, and the first that is none stays.
template <bool NANS>
ZNN_INLINE XI replaces(X value, X most) {
    return NANS ? ~(value <= most) & (most == most) : value > most;
}

// W: both extents of the window where they are known to the compiler, else 0. NANS: not all may be numbers; else whether one was
// not is returned, and then all is to be done once more, from what has become of `maxima`.
template <int W, bool NANS>
bool pool(const V* in, long row, int w1, int w2, int first, int count, V* maxima) {
    w1 = W ? W : w1, w2 = W ? W : w2;
    constexpr int kWindows = kX / kV;
    X sums{};
    for (int x = 0; x < count; x += kWindows, in += kWindows * w2, maxima += 2 * kWindows) {
        const int windows = std::min(kWindows, count - x);
        const long step = windows == kWindows ? w2 : 0;  // a last one alone is taken twice
        VI* const voxel = reinterpret_cast<VI*>(maxima) + 1;
        X most = first ? X(gather(maxima, step ? 2 : 0)) : X(gather(in, step));
        XI where = first ? XI(gather(voxel, step ? 2 : 0)) : XI{};
        X sum{};
        for (int j = 0; j < w1; ++j)
            for (int i = 0; i < w2; ++i) {
                const X value = gather(in + j * row + i, step);
                const XI more = replaces<NANS>(value, most);
                sum += value;
                where = more ? XI{} + (first + j * w2 + i) : where;
                most = more ? value : most;
            }
        sums += sum;
        scatter(most, maxima, 2, windows);
        scatter(where, voxel, 2, windows);
    }
    return !NANS && has_nan(sums);
}

template <int W>
void spread(const V* g, long step, const std::int8_t* largest, long note_step, int count, int w1, int w2, int first, V* out, long row) {
    w1 = W ? W : w1, w2 = W ? W : w2;
    for (int x = 0; x < count; ++x, out += w2, g += step, largest += note_step * kV) {
        const VI voxel = load_bytes(largest) - first;
        const V value = *g;
        for (int j = 0; j < w1; ++j)
            for (int i = 0; i < w2; ++i) out[j * row + i] = voxel == j * w2 + i ? value : V{};
    }
}

struct Largest {
    X value, sum;  // the sum of all is not a number where one of them is not
    XI voxel;
};

// The first of the larger ones of two parts of a window.
template <bool NANS>
ZNN_INLINE Largest larger(Largest a, Largest b) {
    const XI more = replaces<NANS>(b.value, a.value);
    return {more ? b.value : a.value, a.sum + b.sum, more ? b.voxel : a.voxel};
}

// Of COUNT voxels from FIRST on: of each half, then of both, which depend on one another less than one after the other.
template <bool NANS, int FIRST, int COUNT>
ZNN_INLINE Largest largest_of(const X* values) {
    if constexpr (COUNT == 1)
        return {values[FIRST], values[FIRST], XI{} + FIRST};
    else
        return larger<NANS>(largest_of<NANS, FIRST, (COUNT + 1) / 2>(values),
                            largest_of<NANS, FIRST + (COUNT + 1) / 2, COUNT / 2>(values));
}

// R rows and W voxels of each, where they are known to the compiler. NANS: not all may be numbers; else whether all were is
// returned. NOTES: they are wanted, if there is a place for them.
template <int R, int W, bool NANS, bool NOTES>
bool filter(const V* const* rows, int row_count, int w2, int count, V* maxima, Notes notes) {
    row_count = R ? R : row_count, w2 = W ? W : w2;
    constexpr int kWindows = kX / kV;
    const V* from[most_filtered];
    for (int r = 0; r < row_count; ++r) from[r] = rows[r];  // for all that the compiler knows, `maxima` might overwrite them
    X sums{};
    const X bias = NOTES && notes.bias ? X(gather(notes.bias, 0)) : X{};
    for (long x = 0; x < count; x += kWindows) {
        const bool whole = x + kWindows <= count;  // a last one alone is taken twice
        const auto load = [&](const V* p) { return whole ? X(*reinterpret_cast<const Anywhere*>(p)) : X(gather(p, 0)); };
        Largest most;
        if constexpr (R > 0) {
            X values[R * W];
            for (int i = 0; i < R * W; ++i) values[i] = load(from[i / W] + x + i % W);
            most = largest_of<NANS, 0, R * W>(values);
        } else {
            const X first = load(from[0] + x);
            most = {first, first, XI{}};
            for (int r = 0, i = 0; r < row_count; ++r)
                for (int w = 0; w < w2; ++w, ++i) {
                    const X value = load(from[r] + x + w);
                    if (i) most = larger<NANS>(most, {value, value, XI{} + i});
                }
        }
        sums += most.sum;
        const int windows = whole ? kWindows : 1;
        scatter(most.value, maxima + x, 1, windows);
        if (!NOTES || !notes.largest) continue;
        if (notes.bias) most.voxel = most.value + bias > 0.0f ? most.voxel : XI{} - 1;
        if (whole && notes.step == 1) {
            store_bytes(most.voxel, notes.largest + x * kV);
            continue;
        }
        VI voxels[kWindows];
        scatter(most.voxel, voxels, 1);
        for (int i = 0; i < windows; ++i) store_bytes(voxels[i], notes.largest + (x + i) * notes.step * kV);
    }
    return NANS || !has_nan(sums);
}

// A row of windows that has voxels in a row of outputs, beginning with voxel `first` of each window.
struct WindowRow {
    const V* g;
    const std::int8_t* largest;
    int first;
};

// Of windows of two voxels; R: rows, where they are known to the compiler. Returns the sum of all.
template <int R>
V collect_pairs(const WindowRow* rows, int row_count, long step, long note_step, int count, V* out) {
    WindowRow from[most_filtered];
    for (int r = 0; r < row_count; ++r) from[r] = rows[r];  // for all that the compiler knows, `out` might overwrite them
    V last{}, sum{};
    for (long x = 0; x < count; ++x) {
        V here = last, next{};
        for (int r = 0; r < (R ? R : row_count); ++r) {
            const VI voxel = load_bytes(from[r].largest + x * note_step * kV);
            const V value = from[r].g[x * step];
            here += voxel == from[r].first ? value : V{};
            next += voxel == from[r].first + 1 ? value : V{};
        }
        out[x] = here;
        sum += here;
        last = next;
    }
    out[count] = last;
    return sum + last;
}

V collect_any(const WindowRow* rows, int row_count, long step, long note_step, int count, int w2, V* out) {
    std::fill_n(out, count + w2 - 1, V{});
    for (int r = 0; r < row_count; ++r)
        for (long x = 0; x < count; ++x) {
            const VI voxel = load_bytes(rows[r].largest + x * note_step * kV) - rows[r].first;
            for (int i = 0; i < w2; ++i) out[x + i] += voxel == i ? rows[r].g[x * step] : V{};
        }
    V sum{};
    for (int x = 0; x < count + w2 - 1; ++x) sum += out[x];
    return sum;
}

}  // namespace

void pool_row(const V* in, long row, int w1, int w2, int first, int count, V* maxima) {
    const bool pairs = w1 == 2 && w2 == 2;
    if ((pairs ? pool<2, false> : pool<0, false>)(in, row, w1, w2, first, count, maxima))
        (pairs ? pool<2, true> : pool<0, true>)(in, row, w1, w2, first, count, maxima);
}

void filter_row(const V* const* rows, int row_count, int w2, int count, V* maxima, Notes notes) {
    const auto choose = [&](auto pairs, auto any) { return w2 == 2 && row_count == 4 ? pairs : any; };
    const auto filtered = notes.largest ? choose(filter<4, 2, false, true>, filter<0, 0, false, true>)
                                        : choose(filter<4, 2, false, false>, filter<0, 0, false, false>);
    if (!filtered(rows, row_count, w2, count, maxima, notes)) filter<0, 0, true, true>(rows, row_count, w2, count, maxima, notes);
}

void collect_row(const FilteredGradient& f, int z, int y, V* out, double* sums) {
    const int *w = f.window, across = f.count[2];
    WindowRow rows[most_filtered];
    int row_count = 0;
    for (int i = std::max(0, z - f.count[0] + 1); i < std::min(w[0], z + 1); ++i)
        for (int j = std::max(0, y - f.count[1] + 1); j < std::min(w[1], y + 1); ++j)
            rows[row_count++] = {f.g + (z - i) * f.step[0] + (y - j) * f.step[1],
                                 f.largest + ((z - i) * f.note_step[0] + (y - j) * f.note_step[1]) * kV, (i * w[1] + j) * w[2]};
    const long step = f.step[2], note_step = f.note_step[2];
    const V sum = w[2] != 2        ? collect_any(rows, row_count, step, note_step, across, w[2], out)
                  : row_count == 4 ? collect_pairs<4>(rows, row_count, step, note_step, across, out)
                                   : collect_pairs<0>(rows, row_count, step, note_step, across, out);
    for (int lane = 0; sums && lane < kV; ++lane) sums[lane] += double(sum[lane]);
}

void spread_row(const V* g, long step, const std::int8_t* largest, long note_step, int count, int w1, int w2, int first, V* out, long row) {
    (w1 == 2 && w2 == 2 ? spread<2> : spread<0>)(g, step, largest, note_step, count, w1, w2, first, out, row);
}

void take_maxima(const V* pairs, long count, V* maxima, std::int8_t* largest, long step) {
    for (long x = 0; x < count; ++x) {
        maxima[x] = pairs[2 * x];
        if (largest) store_bytes(reinterpret_cast<const VI*>(pairs)[2 * x + 1], largest + x * step * kV);
    }
}

void bundle_row(const float* maps, long pitch, int count, V* out) {
    for (int x = 0; x < count; x += kX) {
        X rows[kV];
        for (int i = 0; i < kV; ++i) rows[i] = *reinterpret_cast<const Anywhere*>(maps + i * pitch + x);
        transpose(rows);
        for (int i = 0; i < kV; ++i) scatter(rows[i], out + x + i, kV);
    }
}

void unbundle_row(const V* in, int count, float* maps, long pitch) {
    for (int x = 0; x < count; x += kX) {
        V rest[kX];
        const V* from = in + x;
        if (count - x < kX) {
            std::fill(std::copy(from, in + count, rest), rest + kX, V{});
            from = rest;
        }
        X rows[kV];
        for (int i = 0; i < kV; ++i) rows[i] = gather(from + i, kV);
        transpose(rows);
        for (int i = 0; i < kV; ++i) *reinterpret_cast<Anywhere*>(maps + i * pitch + x) = rows[i];
    }
}

V sum_lanes(const float* rows) {
    X sums[kV];
    for (int i = 0; i < kV; ++i) sums[i] = reinterpret_cast<const X*>(rows)[i];
    transpose(sums);
    for (int i = 1; i < kV; ++i) sums[0] += sums[i];
    V parts[kX / kV];
    scatter(sums[0], parts, 1);
    for (int i = 1; i < kX / kV; ++i) parts[0] += parts[i];
    return parts[0];
}

}  // namespace znn::tiled::ZNN_VARIANT
