// Max-filter and max-pool with the index of the maximum, and their backward pass.
//
// The maximum used throughout is ordered: `later` replaces `earlier` only if it is strictly greater, or if it is the first
// NaN. It is associative and idempotent, so windows may be built from overlapping parts as long as order is kept. Two ways,
// per axis: doubling (ceil(log2 w) comparisons per voxel) for narrow windows, and for wide ones three comparisons whatever
// the window, from maxima of the beginnings and ends of blocks (van Herk 1992; Gil and Werman 1993).
#include "kernels/isa.hpp"

namespace znn::kernels::ZNN_ISA {
namespace {

struct Candidate {
    vf value;
    vi index;
};

ZNN_INLINE Candidate first_maximum(Candidate earlier, Candidate later) {
    const vi take = ~(vi)(later.value <= earlier.value) & (vi)(earlier.value == earlier.value);
    return {take ? later.value : earlier.value, take ? later.index : earlier.index};
}

ZNN_INLINE Candidate load(const float* value, const std::int32_t* index) { return {load(value), load(index)}; }

ZNN_INLINE void store(float* value, std::int32_t* index, Candidate c) {
    store(value, c.value);
    store(index, c.index);
}

// p[i] = first_maximum(p[i], p[i + distance]) for i in [0, count), in place; whole vectors, so up to W - 1 more.
ZNN_INLINE void combine(float* value, std::int32_t* index, std::ptrdiff_t distance, std::ptrdiff_t count) {
    for (std::ptrdiff_t i = 0; i < count; i += W)
        store(value + i, index + i,
              first_maximum(load(value + i, index + i), load(value + i + distance, index + i + distance)));
}

// Calls step(distance, remaining) for the steps that turn an axis of n positions into windows of w with spacing s:
// remaining counts the positions that are still right after the step.
template <class F>
ZNN_INLINE void window_steps(int n, int w, int s, const F& step) {
    int have = 1;
    while (have < w) {
        const int by = 2 * have <= w ? have : w - have;
        have += by;
        step(by * s, n - s * (have - 1));
    }
}

constexpr std::size_t padding = 16;  // floats after each row, read and written by whole vectors
ZNN_INLINE std::size_t pitch_of(std::size_t length) { return (length + 2 * padding - 1) / padding * padding; }

// Values and indices of scratch images, rows `pitch` apart.
struct Scratch {
    float* value;
    std::int32_t* index;
};

// Windows from which blocks beat doubling, as measured by kernels_bench: along y and z, and along x, where rows must be
// transposed.
constexpr int blocks_from = 5, transposed_from = 9;

// N vectors side by side.
template <int N>
struct Strip {
    Candidate of[N];
};

template <int N>
ZNN_INLINE Strip<N> load_strip(const float* value, const std::int32_t* index) {
    Strip<N> strip;
    ZNN_UNROLL
    for (int v = 0; v < N; ++v) strip.of[v] = load(value + v * W, index + v * W);
    return strip;
}

template <int N>
ZNN_INLINE void store(float* value, std::int32_t* index, const Strip<N>& strip) {
    ZNN_UNROLL
    for (int v = 0; v < N; ++v) store(value + v * W, index + v * W, strip.of[v]);
}

template <int N>
ZNN_INLINE Strip<N> first_maximum(const Strip<N>& earlier, const Strip<N>& later) {
    Strip<N> strip;
    ZNN_UNROLL
    for (int v = 0; v < N; ++v) strip.of[v] = first_maximum(earlier.of[v], later.of[v]);
    return strip;
}

// Windows of w on a line of `count` positions `stride` floats apart, N vectors at a time, in place. A window that begins
// within one block of w and ends in the next is the end of the one and the beginning of the other.
template <int N>
ZNN_INLINE void filter_line(float* value, std::int32_t* index, std::ptrdiff_t stride, int count, int w) {
    const auto at = [&](int i) { return load_strip<N>(value + i * stride, index + i * stride); };
    const auto put = [&](int i, const Strip<N>& strip) { store(value + i * stride, index + i * stride, strip); };
    for (int block = 0; block + w <= count; block += w) {
        Strip<N> end = at(block + w - 1);
        for (int i = block + w - 2; i >= block; --i) put(i, end = first_maximum(at(i), end));
        const int last = smaller(block + w - 1, count - w);
        if (last == block) continue;
        Strip<N> begin = at(block + w);
        put(block + 1, first_maximum(at(block + 1), begin));
        for (int i = block + 2; i <= last; ++i) {
            begin = first_maximum(begin, at(i + w - 1));
            put(i, first_maximum(at(i), begin));
        }
    }
}

// The same on each of the s sub-lattices of an axis of n positions.
template <int N>
ZNN_INLINE void filter_lattices(Scratch a, int n, int w, int s, std::ptrdiff_t stride) {
    for (int r = 0; r < s; ++r)
        filter_line<N>(a.value + r * stride, a.index + r * stride, s * stride, int(ceil_div(n - r, s)), w);
}

// Windows along an axis of n positions `stride` floats apart, each of `length` contiguous floats (and padding), in place.
void filter_axis(Scratch a, int n, int w, int s, std::ptrdiff_t stride, std::ptrdiff_t length) {
    if (w < blocks_from)
        return window_steps(n, w, s, [&](int distance, int remaining) {
            for (int i = 0; i < remaining; ++i)
                combine(a.value + i * stride, a.index + i * stride, distance * stride, length);
        });
    for (std::ptrdiff_t i = 0; i < length; i += padding)
        filter_lattices<padding / W>({a.value + i, a.index + i}, n, w, s, stride);
}

// Lanes of (a, b) for one stage of a transpose: those of the low or the high half, `run` lanes of each vector in turn, within
// groups of `group` lanes.
ZNN_INLINE vi interleaved(int run, int group, bool high) {
    vi lanes;
    ZNN_UNROLL
    for (int l = 0; l < W; ++l) {
        const int place = l % group, from_b = place / run % 2;
        lanes[l] = l - place + (high ? group / 2 : 0) + place / (2 * run) * run + place % run + from_b * W;
    }
    return lanes;
}

// The transpose of W vectors, in place: of 4 by 4 lanes each, then of these blocks.
template <class V>
ZNN_INLINE void transpose(V (&rows)[W]) {
    const auto stage = [&](int distance, int run, int group) {
        ZNN_UNROLL
        for (int i = 0; i < W; ++i) {
            if (i & distance) continue;
            const V a = rows[i], b = rows[i + distance];
            rows[i] = __builtin_shuffle(a, b, interleaved(run, group, false));
            rows[i + distance] = __builtin_shuffle(a, b, interleaved(run, group, true));
        }
    };
    stage(1, 1, 4);
    stage(2, 2, 4);
    ZNN_UNROLL
    for (int i = 0; i < W; i += 4) {  // the stages leave the middle two the other way round
        const V swap = rows[i + 1];
        rows[i + 1] = rows[i + 2];
        rows[i + 2] = swap;
    }
    if (W >= 8) stage(4, 4, 8);
    if (W >= 16) stage(8, 8, 16);
}

// from[l][x] -> tile[x][l] for `count` columns of W rows, `pitch` apart; lines beyond the last row repeat it. And back.
template <class T, class V>
ZNN_INLINE void transpose_in(const T* from, std::size_t pitch, int rows, int count, T* tile) {
    for (int x = 0; x < count; x += W) {
        V v[W];
        ZNN_UNROLL
        for (int l = 0; l < W; ++l) v[l] = load(from + smaller(l, rows - 1) * pitch + x);
        transpose(v);
        ZNN_UNROLL
        for (int l = 0; l < W; ++l) store(tile + (x + l) * W, v[l]);
    }
}
template <class T, class V>
ZNN_INLINE void transpose_out(const T* tile, T* to, std::size_t pitch, int rows, int count) {
    for (int x = 0; x < count; x += W) {
        V v[W];
        ZNN_UNROLL
        for (int l = 0; l < W; ++l) v[l] = load(tile + (x + l) * W);
        transpose(v);
        for (int l = 0; l < smaller(W, rows); ++l) store(to + l * pitch + x, v[l]);
    }
}

// Windows along x of images without bundle: W rows at a time side by side in `tile`, so that vectors run across rows.
void filter_rows_transposed(Scratch plane, std::size_t pitch, Extent n, int w, int s, std::int32_t first_voxel, Scratch tile) {
    for (int y = 0; y < n.y; y += W) {
        float* value = plane.value + y * pitch;
        transpose_in<float, vf>(value, pitch, n.y - y, n.x, tile.value);
        vi voxel;
        for (int l = 0; l < W; ++l) voxel[l] = first_voxel + smaller(y + l, n.y - 1) * n.x;
        for (int x = 0; x < n.x; ++x) store(tile.index + x * W, voxel + x);
        filter_lattices<1>(tile, n.x, w, s, W);
        const int width = n.x - s * (w - 1);
        transpose_out<float, vf>(tile.value, value, pitch, n.y - y, width);
        transpose_out<std::int32_t, vi>(tile.index, plane.index + y * pitch, pitch, n.y - y, width);
    }
}

void number_voxels(std::int32_t* index, int count, int bundle, std::int32_t first) {
    if (bundle == 1)
        for (int x = 0; x < count; ++x) index[x] = first + x;
    else
        for (int x = 0; x < count; ++x)
            for (int b = 0; b < bundle; ++b) index[std::ptrdiff_t(x) * bundle + b] = first + x;
}

// Windows along x of one row.
void filter_row(Scratch row, int n, int w, int s, int bundle) {
    if (w >= blocks_from && bundle % W == 0) {
        for (int b = 0; b < bundle; b += W) filter_lattices<1>({row.value + b, row.index + b}, n, w, s, bundle);
        return;
    }
    window_steps(n, w, s, [&](int distance, int remaining) {
        combine(row.value, row.index, std::ptrdiff_t(distance) * bundle, std::ptrdiff_t(remaining) * bundle);
    });
}

// x and y windows of one input plane; the plane's rows [0, m.y) hold the result.
void filter_plane(const float* in, Extent n, Extent w, Extent s, int bundle, std::int32_t first_voxel, Extent m,
                  Scratch plane, std::size_t pitch, Scratch tile) {
    const std::size_t length = std::size_t(n.x) * bundle;
    const bool transposed = bundle == 1 && w.x >= transposed_from;
    for (int y = 0; y < n.y; ++y) {
        const Scratch row{plane.value + y * pitch, plane.index + y * pitch};
        __builtin_memcpy(row.value, in + y * length, length * sizeof(float));
        if (transposed) continue;
        number_voxels(row.index, n.x, bundle, first_voxel + y * n.x);
        filter_row(row, n.x, w.x, s.x, bundle);
    }
    if (transposed) filter_rows_transposed(plane, pitch, n, w.x, s.x, first_voxel, tile);
    filter_axis(plane, n.y, w.y, s.y, std::ptrdiff_t(pitch), std::ptrdiff_t(m.x) * bundle);
}

void copy_rows(Scratch from, std::size_t from_pitch, float* value, std::int32_t* index, std::size_t to_pitch, int rows,
               std::size_t length) {
    for (int y = 0; y < rows; ++y) {
        __builtin_memcpy(value + y * to_pitch, from.value + y * from_pitch, length * sizeof(float));
        __builtin_memcpy(index + y * to_pitch, from.index + y * from_pitch, length * sizeof(std::int32_t));
    }
}

// Windows of two planes along z: of the planes filtered along x and y only those between a window's two are kept, in turn.
void filter_pairs(const float* in, Extent n, Extent w, Extent s, int bundle, float* out, std::int32_t* index, Scratch planes,
                  std::size_t pitch, Scratch tile) {
    const Extent m = valid(n, w, s);
    const std::size_t length = std::size_t(m.x) * bundle, each = pitch * n.y;
    for (int z = 0; z < n.z; ++z) {
        const std::size_t place = z % (s.z + 1) * each, before = (z + 1) % (s.z + 1) * each;
        filter_plane(in + std::size_t(z) * n.y * n.x * bundle, n, w, s, bundle, z * n.y * n.x, m,
                     {planes.value + place, planes.index + place}, pitch, tile);
        if (z < s.z) continue;
        const Scratch first{planes.value + before, planes.index + before};
        const std::ptrdiff_t distance = std::ptrdiff_t(place) - std::ptrdiff_t(before);
        for (int y = 0; y < m.y; ++y) combine(first.value + y * pitch, first.index + y * pitch, distance, length);
        const std::size_t to = (z - s.z) * length * m.y;
        copy_rows(first, pitch, out + to, index + to, length, m.y, length);
    }
}

// Scratch: W rows side by side, input planes (one, or as many as filter_pairs keeps), and for other windows the filtered rows
// [y][z] of all planes, which lie near each other for the windows along z; each as values and indices.
void max_filter(const float* in, Extent n, Extent w, Extent s, int bundle, float* out, std::int32_t* index, void* scratch) {
    const Extent m = valid(n, w, s);
    const std::size_t pitch = pitch_of(std::size_t(n.x) * bundle), length = std::size_t(m.x) * bundle;
    const std::size_t row = pitch_of(length);
    float* memory = static_cast<float*>(scratch);
    const auto take = [&memory](std::size_t floats) {
        const Scratch part{memory, reinterpret_cast<std::int32_t*>(memory + floats)};
        memory += 2 * floats;
        return part;
    };
    const Scratch tile = take(bundle == 1 ? W * pitch : 0), plane = take(pitch * n.y * (w.z == 2 ? s.z + 1 : 1));
    if (w.z == 2) return filter_pairs(in, n, w, s, bundle, out, index, plane, pitch, tile);
    const Scratch stack = take(w.z == 1 ? 0 : row * m.y * n.z);
    for (int z = 0; z < n.z; ++z) {
        filter_plane(in + std::size_t(z) * n.y * n.x * bundle, n, w, s, bundle, z * n.y * n.x, m, plane, pitch, tile);
        if (w.z == 1)
            copy_rows(plane, pitch, out + z * length * m.y, index + z * length * m.y, length, m.y, length);
        else
            copy_rows(plane, pitch, stack.value + z * row, stack.index + z * row, row * n.z, m.y, length);
    }
    if (w.z == 1) return;
    for (int y = 0; y < m.y; ++y) {
        const Scratch rows{stack.value + y * row * n.z, stack.index + y * row * n.z};
        filter_axis(rows, n.z, w.z, s.z, std::ptrdiff_t(row), std::ptrdiff_t(length));
        copy_rows(rows, row, out + y * length, index + y * length, length * m.y, m.z, length);
    }
}

// Vectors of values and indices, and half as long ones: a bundle of eight maps. (As arguments of templates the vectors
// themselves would lose what is said of their alignment.)
struct Whole {
    typedef vf_unaligned F;
    typedef vi_unaligned I;
};
struct Half {
    typedef float F __attribute__((vector_size(2 * W), aligned(4), may_alias));
    typedef std::int32_t I __attribute__((vector_size(2 * W), aligned(4), may_alias));
};

// One output voxel, as many floats of its bundle as a vector has.
template <class T>
ZNN_INLINE void pool_vector(const float* in, Extent n, Extent w, int bundle, std::int32_t voxel, float* out,
                            std::int32_t* index) {
    using F = typename T::F;
    using I = typename T::I;
    F best = *reinterpret_cast<const F*>(in + std::ptrdiff_t(voxel) * bundle);
    I best_at = voxel - I{};
    for (int z = 0; z < w.z; ++z)
        for (int y = 0; y < w.y; ++y)
            for (int x = 0; x < w.x; ++x) {
                const std::int32_t at = voxel + (z * n.y + y) * n.x + x;
                const F value = *reinterpret_cast<const F*>(in + std::ptrdiff_t(at) * bundle);
                const I take = ~(I)(value <= best) & (I)(best == best);
                best = take ? value : best;
                best_at = take ? at - I{} : best_at;
            }
    *reinterpret_cast<F*>(out) = best;
    *reinterpret_cast<I*>(index) = best_at;
}

ZNN_INLINE void pool_scalar(const float* in, Extent n, Extent w, int bundle, std::int32_t voxel, float* out,
                            std::int32_t* index) {
    float best = in[std::ptrdiff_t(voxel) * bundle];
    std::int32_t best_at = voxel;
    for (int z = 0; z < w.z; ++z)
        for (int y = 0; y < w.y; ++y)
            for (int x = 0; x < w.x; ++x) {
                const std::int32_t at = voxel + (z * n.y + y) * n.x + x;
                const float value = in[std::ptrdiff_t(at) * bundle];
                const bool take = replaces(value, best);
                best = take ? value : best;
                best_at = take ? at : best_at;
            }
    *out = best;
    *index = best_at;
}

void max_pool(const float* in, Extent n, Extent w, Extent stride, int bundle, float* out, std::int32_t* index) {
    const Extent m{(n.z - w.z) / stride.z + 1, (n.y - w.y) / stride.y + 1, (n.x - w.x) / stride.x + 1};
    for (int z = 0; z < m.z; ++z)
        for (int y = 0; y < m.y; ++y)
            for (int x = 0; x < m.x; ++x, out += bundle, index += bundle) {
                const std::int32_t voxel = (z * stride.z * n.y + y * stride.y) * n.x + x * stride.x;
                int b = 0;
                for (; b + W <= bundle; b += W)
                    pool_vector<Whole>(in + b, n, w, bundle, voxel, out + b, index + b);
                for (; b + W / 2 <= bundle; b += W / 2)
                    pool_vector<Half>(in + b, n, w, bundle, voxel, out + b, index + b);
                for (; b < bundle; ++b) pool_scalar(in + b, n, w, bundle, voxel, out + b, index + b);
            }
}

void max_backward(const float* g, const std::int32_t* index, std::size_t voxels, int bundle, float* gin) {
    if (bundle == 1) {
        for (std::size_t p = 0; p < voxels; ++p) gin[index[p]] += g[p];
        return;
    }
    for (std::size_t p = 0; p < voxels; ++p, g += bundle, index += bundle)
        for (int b = 0; b < bundle; ++b) gin[std::ptrdiff_t(index[b]) * bundle + b] += g[b];
}

}  // namespace

void fill_pooling(Table& table) {
    table.max_filter = max_filter;
    table.max_pool = max_pool;
    table.max_backward = max_backward;
}

}  // namespace znn::kernels::ZNN_ISA
