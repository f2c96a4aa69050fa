// Direct convolution of one image with one kernel, register-blocked.
//
// Both loops keep a block of accumulators in registers: R rows (outputs a sparsity apart, so they share input rows) by
// NX vectors. Each input vector loaded serves every row, each broadcast weight every vector, which keeps two
// multiply-adds a cycle fed by two loads a cycle. A kernel K rows high makes R rows meet K + R - 1 input rows, the first
// and last R - 1 of which serve only some of them; step t therefore takes rows 0..t at input row t together with the
// others at input row t + K, so that all the accumulators are busy at every step and none waits for its last sum.
#include "kernels/isa.hpp"

namespace znn::kernels::ZNN_ISA {
namespace {

constexpr int max_rows = 4;
constexpr int max_vectors = W == 16 ? 4 : 3;  // 12 accumulators of 16 registers, 16 of 32

// The taps of an output: outer, shared and inner axis. Outputs of a block lie along the shared axis.
struct Taps {
    int outer, shared, inner;
    std::ptrdiff_t outer_in, outer_w, shared_in, shared_w, inner_in;
};

// Rows FROM..TO-1 of the block take one tap; row r is `r` kernel rows behind row 0.
template <int R, int NX, bool Masked, int FROM, int TO>
ZNN_INLINE void add_tap(vf (&acc)[R][NX], const float* in, const float* w, std::ptrdiff_t w_row, std::ptrdiff_t last,
                        Part part) {
    vf x[NX];
    ZNN_UNROLL
    for (int v = 0; v < NX; ++v) {
        x[v] = Masked ? load(in, part) : load(in + (v == NX - 1 ? last : v * W));
        if constexpr (TO - FROM > 1) ZNN_KEEP(x[v]);
    }
    ZNN_UNROLL
    for (int r = FROM; r < TO; ++r) {
        const vf weight = splat(w[-r * w_row]);
        ZNN_UNROLL
        for (int v = 0; v < NX; ++v) acc[r][v] += x[v] * weight;
    }
}

// The outer and inner taps of one step: the first FIRST rows at input row t, the others at input row t + K.
template <int R, int NX, bool Masked, int FIRST>
ZNN_INLINE void add_step(vf (&acc)[R][NX], const Taps& t, const float* in, const float* w, std::ptrdiff_t last, Part part) {
    const std::ptrdiff_t later_in = t.shared * t.shared_in, later_w = t.shared * t.shared_w;
    for (int o = 0; o < t.outer; ++o, in += t.outer_in, w += t.outer_w) {
        const float* p = in;
        const float* q = w;
        for (int i = 0; i < t.inner; ++i, p += t.inner_in, ++q) {
            add_tap<R, NX, Masked, 0, FIRST>(acc, p, q, t.shared_w, last, part);
            if constexpr (FIRST < R) add_tap<R, NX, Masked, FIRST, R>(acc, p + later_in, q + later_w, t.shared_w, last, part);
        }
    }
}

// R <= K + 1 rows (out_row apart in out) of NX vectors; the last vector begins at `last` and may overlap the one before it.
template <int R, int NX, bool Masked>
void block(const Taps& t, const float* in, const float* w, std::ptrdiff_t last, int count, float* out,
           std::ptrdiff_t out_row, bool accumulate) {
    const Part part(count);
    vf acc[R][NX] = {};
    for (int step = 0; step < t.shared; ++step, in += t.shared_in, w += t.shared_w) {
        if (step >= R - 1) {
            add_step<R, NX, Masked, R>(acc, t, in, w, last, part);
        } else if (step == 0) {
            add_step<R, NX, Masked, 1>(acc, t, in, w, last, part);
        } else if (step == 1) {
            add_step<R, NX, Masked, smaller(2, R)>(acc, t, in, w, last, part);
        } else {
            add_step<R, NX, Masked, smaller(3, R)>(acc, t, in, w, last, part);
        }
    }
    ZNN_UNROLL
    for (int r = 0; r < R; ++r) {
        float* p = out + r * out_row;
        if constexpr (Masked) {
            store(p, accumulate ? load(p, part) + acc[r][0] : acc[r][0], part);
        } else {
            // All are read before any is written: overlapping vectors would otherwise be added twice.
            if (accumulate) {
                ZNN_UNROLL
                for (int v = 0; v < NX; ++v) acc[r][v] += load(p + (v == NX - 1 ? last : v * W));
            }
            ZNN_UNROLL
            for (int v = 0; v < NX; ++v) store(p + (v == NX - 1 ? last : v * W), acc[r][v]);
        }
    }
}

using Block = void (*)(const Taps&, const float*, const float*, std::ptrdiff_t, int, float*, std::ptrdiff_t, bool);

constexpr Block masked_blocks[max_rows] = {block<1, 1, true>, block<2, 1, true>, block<3, 1, true>, block<4, 1, true>};
constexpr Block blocks[max_rows][4] = {
    {block<1, 1, false>, block<1, 2, false>, block<1, 3, false>, block<1, max_vectors, false>},
    {block<2, 1, false>, block<2, 2, false>, block<2, 3, false>, block<2, max_vectors, false>},
    {block<3, 1, false>, block<3, 2, false>, block<3, 3, false>, block<3, max_vectors, false>},
    {block<4, 1, false>, block<4, 2, false>, block<4, 3, false>, block<4, max_vectors, false>},
};

// `count` things in as few parts of at most `most` as possible, as even as possible.
struct Split {
    int parts, small, larger_parts;
    Split(int count, int most)
        : parts(int(ceil_div(count, most))), small(count / parts), larger_parts(count % parts) {}
    int size(int i) const { return small + (i < larger_parts ? 1 : 0); }
};

// The blocks of vectors along a row. Even parts have at least two vectors whenever the row has, so that an overlap never
// crosses a block.
struct RowBlocks {
    int length;
    Split split;
    explicit RowBlocks(int n) : length(n), split(int(ceil_div(n, W)), max_vectors) {}

    // Calls f(start, vectors, offset of the last vector, lanes of a single short vector).
    template <class F>
    ZNN_INLINE void each(const F& f) const {
        if (length < W) {
            f(0, 1, 0, length);
            return;
        }
        for (int i = 0, start = 0; i < split.parts; ++i) {
            const int vectors = split.size(i);
            f(start, vectors, i == split.parts - 1 ? length - W - start : (vectors - 1) * W, W);
            start += vectors * W;
        }
    }
};

// Calls f(first row, rows) for blocks of rows that are `sparsity` apart, for a kernel `taps` rows high.
template <class F>
ZNN_INLINE void along_rows(int count, int sparsity, int taps, const F& f) {
    for (int phase = 0; phase < smaller(sparsity, count); ++phase) {
        const Split split(int(ceil_div(count - phase, sparsity)), smaller(max_rows, taps + 1));
        for (int i = 0, first = phase; i < split.parts; ++i) {
            f(first, split.size(i));
            first += split.size(i) * sparsity;
        }
    }
}

ZNN_INLINE Block choose_block(int rows, int vectors, int count) {
    return count < W ? masked_blocks[rows - 1] : blocks[rows - 1][vectors - 1];
}

void correlate_rows(const float* in, Extent n, const float* w, Extent k, Extent s, float* out, Extent m, bool accumulate) {
    const std::ptrdiff_t plane = std::ptrdiff_t(n.y) * n.x;
    const Taps taps{k.z, k.y, k.x, s.z * plane, std::ptrdiff_t(k.y) * k.x, std::ptrdiff_t(s.y) * n.x, k.x, s.x};
    const RowBlocks columns(m.x);
    for (int z = 0; z < m.z; ++z)
        along_rows(m.y, s.y, k.y, [&](int y, int rows) {
            const float* row = in + z * plane + std::ptrdiff_t(y) * n.x;
            float* out_row = out + (std::ptrdiff_t(z) * m.y + y) * m.x;
            columns.each([&](int x, int vectors, int last, int count) {
                choose_block(rows, vectors, count)(taps, row + x, w, last, count, out_row + x,
                                                   std::ptrdiff_t(s.y) * m.x, accumulate);
            });
        });
}

// Copies flat positions [start, start + count) of a plane with rows `pitch` apart into rows of m.x, leaving out the gaps.
void compact(const float* flat, int start, int count, int pitch, Extent m, float* out, bool accumulate) {
    int y = start / pitch, x = start % pitch;
    for (int i = 0; i < count; ++y, x = 0) {
        const int run = smaller(m.x - x, count - i);
        float* p = out + std::ptrdiff_t(y) * m.x + x;
        for (int j = 0; j < run; ++j) p[j] = flat[i + j] + (accumulate ? p[j] : 0.0f);
        i += pitch - x;
    }
}

// Short rows: whole planes are taken as one row with the input's row pitch; values in the gaps are computed and dropped.
// Rows of a block are planes.
void correlate_planes(const float* in, Extent n, const float* w, Extent k, Extent s, float* out, Extent m,
                      bool accumulate) {
    const std::ptrdiff_t plane = std::ptrdiff_t(n.y) * n.x;
    const Taps taps{k.y, k.z, k.x, std::ptrdiff_t(s.y) * n.x, k.x, s.z * plane, std::ptrdiff_t(k.y) * k.x, s.x};
    const RowBlocks columns((m.y - 1) * n.x + m.x);
    const std::ptrdiff_t out_plane = std::ptrdiff_t(m.y) * m.x;
    along_rows(m.z, s.z, k.z, [&](int z, int rows) {
        columns.each([&](int x, int vectors, int last, int count) {
            float flat[max_rows][max_vectors * W];
            choose_block(rows, vectors, count)(taps, in + z * plane + x, w, last, count, flat[0], max_vectors * W, false);
            const int filled = count < W ? count : last + W;
            for (int r = 0; r < rows; ++r)
                compact(flat[r], x, filled, n.x, m, out + (z + std::ptrdiff_t(r) * s.z) * out_plane, accumulate);
        });
    });
}

ZNN_INLINE std::int64_t vectors_by_rows(Extent m) { return ceil_div(m.x, W) * m.y; }
ZNN_INLINE std::int64_t vectors_by_planes(Extent n, Extent m) { return ceil_div(std::int64_t(m.y - 1) * n.x + m.x, W); }

// ---- single outputs and short rows with wide kernels: each output is a scalar product along the kernel's rows.

ZNN_INLINE float dot(const float* a, std::ptrdiff_t a_plane, std::ptrdiff_t a_row, const float* b, Extent k) {
    vf acc[4] = {};
    for (int z = 0; z < k.z; ++z)
        for (int y = 0; y < k.y; ++y, b += k.x) {
            const float* p = a + z * a_plane + y * a_row;
            int i = 0;
            for (; i + 4 * W <= k.x; i += 4 * W)
                ZNN_UNROLL
                for (int v = 0; v < 4; ++v) acc[v] += load(p + i + v * W) * load(b + i + v * W);
            for (; i + W <= k.x; i += W) acc[0] += load(p + i) * load(b + i);
            if (i < k.x) acc[1] += load(p + i, Part(k.x - i)) * load(b + i, Part(k.x - i));
        }
    const vf total = (acc[0] + acc[1]) + (acc[2] + acc[3]);
    float s = 0;
    ZNN_UNROLL
    for (int lane = 0; lane < W; ++lane) s += total[lane];
    return s;
}

// Extent of the kernel with axes joined that are contiguous in the input too. For s.x == 1.
Extent joined(Extent n, Extent k, Extent s) {
    if (s.y != 1 || n.x != k.x) return k;
    if (s.z != 1 || n.y != k.y) return {k.z, 1, k.y * k.x};
    return {1, 1, k.z * k.y * k.x};
}

void correlate_dots(const float* in, Extent n, const float* w, Extent k, Extent s, float* out, Extent m, bool accumulate) {
    const std::ptrdiff_t plane = std::ptrdiff_t(n.y) * n.x;
    const Extent lines = joined(n, k, s);
    for (int z = 0; z < m.z; ++z)
        for (int y = 0; y < m.y; ++y)
            for (int x = 0; x < m.x; ++x, ++out) {
                const float value = dot(in + z * plane + std::ptrdiff_t(y) * n.x + x, s.z * plane,
                                        std::ptrdiff_t(s.y) * n.x, w, lines);
                *out = accumulate ? *out + value : value;
            }
}

// Rough costs in vector operations: scalar products load two vectors for each multiply-add and sum their lanes at the end.
ZNN_INLINE bool dots_are_cheaper(Extent n, Extent k, Extent s, Extent m, std::int64_t vectors) {
    if (s.x != 1 || m.x >= W) return false;
    const Extent lines = joined(n, k, s);
    const std::int64_t products = std::int64_t(lines.z) * lines.y * ceil_div(lines.x, W);
    const std::int64_t chains = smaller(m.z, max_rows) * smaller(int(vectors), max_vectors);
    const std::int64_t by_blocks = vectors * m.z * std::int64_t(volume(k)) * larger(1, int(8 / chains));
    return std::int64_t(volume(m)) * (3 * products + 2 * W) < by_blocks;
}

void correlate(const float* in, Extent n, const float* w, Extent k, Extent s, float* out, bool accumulate) {
    const Extent m = valid(n, k, s);
    const std::int64_t rows = vectors_by_rows(m), planes = vectors_by_planes(n, m);
    const bool by_planes = 5 * planes < 4 * rows;
    if (dots_are_cheaper(n, k, s, m, by_planes ? planes : rows))
        correlate_dots(in, n, w, k, s, out, m, accumulate);
    else
        (by_planes ? correlate_planes : correlate_rows)(in, n, w, k, s, out, m, accumulate);
}

// ---- kernel gradient: accumulators are taps, KY kernel rows by KX kernel columns; an input vector serves the KY rows of g
// that meet it, a vector of g the KX columns. Step t takes kernel rows 0..t at input row t, with the others at input row
// t + (rows of g), for the same reason as above.

// Kernel rows FROM..TO-1 at one vector of an input row, whole or (lanes: a Part) the end of one.
template <int KY, int KX, int FROM, int TO, class... Lanes>
ZNN_INLINE void gradient_vector(vf (&acc)[KY][KX], const float* in, const float* g, std::ptrdiff_t g_row, int sx,
                                Lanes... lanes) {
    vf x[KX];
    ZNN_UNROLL
    for (int c = 0; c < KX; ++c) {
        x[c] = load(in + c * sx, lanes...);
        if constexpr (TO - FROM > 1) ZNN_KEEP(x[c]);
    }
    ZNN_UNROLL
    for (int r = FROM; r < TO; ++r) {
        const vf gradient = load(g - r * g_row, lanes...);
        ZNN_UNROLL
        for (int c = 0; c < KX; ++c) acc[r][c] += x[c] * gradient;
    }
}

// One step: in and g point at row t, those of the later rows are later_in and later_g further on.
template <int KY, int KX, int FIRST>
ZNN_INLINE void gradient_step(vf (&acc)[KY][KX], const float* in, std::ptrdiff_t later_in, const float* g,
                              std::ptrdiff_t later_g, std::ptrdiff_t g_row, int sx, int length) {
    const auto step = [&](int i, auto... lanes) __attribute__((always_inline)) {
        gradient_vector<KY, KX, 0, FIRST>(acc, in + i, g + i, g_row, sx, lanes...);
        if constexpr (FIRST < KY)
            gradient_vector<KY, KX, FIRST, KY>(acc, in + later_in + i, g + later_g + i, g_row, sx, lanes...);
    };
    int i = 0;
    for (; i + W <= length; i += W) step(i);
    if (i < length) step(i, Part(length - i));
}

// A slab of g (m.y is its plane's height if it has several planes) against the input displaced to the block's first tap.
// Every phase of the slab has at least KY - 1 rows.
template <int KY, int KX>
void gradient_block(const float* in, Extent n, const float* g, Extent m, Extent s, float* dw, std::ptrdiff_t dw_row,
                    bool accumulate) {
    vf acc[KY][KX] = {};
    for (int z = 0; z < m.z; ++z)
        for (int phase = 0; phase < smaller(s.y, m.y); ++phase) {
            const int rows = int(ceil_div(m.y - phase, s.y));
            const float* in_row = in + (std::ptrdiff_t(z) * n.y + phase) * n.x;
            const float* g_row = g + (std::ptrdiff_t(z) * m.y + phase) * m.x;
            const std::ptrdiff_t in_step = std::ptrdiff_t(s.y) * n.x, g_step = std::ptrdiff_t(s.y) * m.x;
            for (int step = 0; step < rows; ++step, in_row += in_step, g_row += g_step) {
                const auto take = [&]<int FIRST>() __attribute__((always_inline)) {
                    gradient_step<KY, KX, FIRST>(acc, in_row, rows * in_step, g_row, rows * g_step, g_step, s.x, m.x);
                };
                if (step >= KY - 1)
                    take.template operator()<KY>();
                else if (step == 0)
                    take.template operator()<1>();
                else if (step == 1)
                    take.template operator()<smaller(2, KY)>();
                else if (step == 2)
                    take.template operator()<smaller(3, KY)>();
                else
                    take.template operator()<smaller(4, KY)>();
            }
        }
    ZNN_UNROLL
    for (int r = 0; r < KY; ++r)
        ZNN_UNROLL
        for (int c = 0; c < KX; ++c) {
            Wide lanes;
            lanes.add(acc[r][c]);
            const float total = float(lanes.sum());
            float& target = dw[r * dw_row + c];
            target = accumulate ? target + total : total;
        }
}

using GradientBlock = void (*)(const float*, Extent, const float*, Extent, Extent, float*, std::ptrdiff_t, bool);
constexpr GradientBlock gradient_blocks[5][3] = {
    {gradient_block<1, 1>, gradient_block<1, 2>, gradient_block<1, 3>},
    {gradient_block<2, 1>, gradient_block<2, 2>, gradient_block<2, 3>},
    {gradient_block<3, 1>, gradient_block<3, 2>, gradient_block<3, 3>},
    {gradient_block<4, 1>, gradient_block<4, 2>, gradient_block<4, 3>},
    {gradient_block<5, 1>, gradient_block<5, 2>, nullptr},
};

// One slab of g, m.z planes of m.y rows, against the input displaced by every tap.
void gradient_slab(const float* in, Extent n, const float* g, Extent m, Extent k, Extent s, float* dw, bool accumulate) {
    // Five rows go best in one piece, with two columns: the number of accumulators ought to be between 8 and 12.
    const int least_rows = m.y / s.y, most_rows = least_rows >= 4 && k.y == 5 ? 5 : smaller(4, least_rows + 1);
    const Split ys(k.y, most_rows), xs(k.x, most_rows == 5 ? 2 : 3);
    for (int kz = 0; kz < k.z; ++kz)
        for (int i = 0, ky = 0; i < ys.parts; ky += ys.size(i++))
            for (int j = 0, kx = 0; j < xs.parts; kx += xs.size(j++)) {
                const float* corner = in + (std::ptrdiff_t(kz) * s.z * n.y + std::ptrdiff_t(ky) * s.y) * n.x +
                                      std::ptrdiff_t(kx) * s.x;
                gradient_blocks[ys.size(i) - 1][xs.size(j) - 1](corner, n, g, m, s,
                                                                dw + (std::ptrdiff_t(kz) * k.y + ky) * k.x + kx, k.x, accumulate);
            }
}

// Slabs are a few planes or a part of one plane, about `slab_voxels` at most: a lane sums no more products than a few thousand
// before they are added to dw, which bounds the rounding error, and a slab stays in cache while all the taps visit it.
void gradient_rows(const float* in, Extent n, const float* g, Extent m, Extent k, Extent s, float* dw, bool accumulate) {
    constexpr std::int64_t slab_voxels = 16384;
    const std::int64_t plane = std::int64_t(m.y) * m.x;
    const int depth = plane < slab_voxels ? smaller(m.z, int(slab_voxels / plane)) : 1;
    const Split rows(m.y, depth > 1 ? m.y : larger(1, int(slab_voxels / m.x)));
    for (int z = 0; z < m.z; z += depth)
        for (int i = 0, y = 0; i < rows.parts; y += rows.size(i++)) {
            const Extent slab{smaller(depth, m.z - z), rows.size(i), m.x};
            gradient_slab(in + (std::ptrdiff_t(z) * n.y + y) * n.x, n, g + (std::ptrdiff_t(z) * m.y + y) * m.x, slab, k, s, dw,
                          accumulate || z > 0 || y > 0);
        }
}

void correlate_gradient(const float* in, Extent n, const float* g, Extent k, Extent s, float* dw, bool accumulate) {
    const Extent m = valid(n, k, s);
    const bool dense = s.z == 1 && s.y == 1 && s.x == 1;
    // Dense, the roles of g and the kernel can be exchanged; worth it when g is the smaller one (and its sum in single precision short).
    if (dense && volume(m) <= 1024) {
        const std::int64_t by_rows = vectors_by_rows(m) * m.z * std::int64_t(volume(k));
        const std::int64_t rows = vectors_by_rows(k), planes = vectors_by_planes(n, k);
        const std::int64_t exchanged = (rows < planes ? rows : planes) * k.z * std::int64_t(volume(m));
        if (exchanged < by_rows) {
            correlate(in, n, g, m, s, dw, accumulate);
            return;
        }
    }
    gradient_rows(in, n, g, m, k, s, dw, accumulate);
}

}  // namespace

void fill_convolve(Table& table) {
    table.correlate = correlate;
    table.correlate_gradient = correlate_gradient;
}

}  // namespace znn::kernels::ZNN_ISA
