// Direct convolution of a single map: registers hold voxels of a row side by side, not maps, so that none of their lanes is empty
// whatever the number of maps that go out. The rows of a plane are taken as one long row, whose outputs between the ends of rows
// and the beginnings of the next are left out (forward) or multiplied by zeros (update). A pooled gradient is one voxel of every
// window: the update walks those alone, with taps side by side.
#include <algorithm>
#include <cstring>

#include "tiled/variant.hpp"

namespace znn::tiled::ZNN_VARIANT {
namespace {

// How many vectors registers sum at once, and of how many maps at most.
#if defined(__AVX512F__)
constexpr int kSums = 24, kMaps = 8;
#elif defined(__AVX2__)
constexpr int kSums = kV == 8 ? 12 : 6, kMaps = kV == 8 ? 4 : 2;
#else
constexpr int kSums = kV == 8 ? 6 : 4, kMaps = 2;
#endif
static_assert(kX <= kSingleLanes);

ZNN_INLINE X load(const float* p) { return *reinterpret_cast<const Anywhere*>(p); }

// Vectors of a row that are summed together for so many maps.
constexpr int vectors_of(int maps) { return std::min(8, kSums / maps); }
constexpr int kTaps = 3;  // whose kernel gradients are summed together

// The input of a run of windows, packed, and for the bundle in hand `pitch` floats of sums, or gradients, of every map.
struct Work {
    SingleSizes sizes;
    float *input, *planar, *sums;
    V *rows, *maxima;
    int* taps;  // where in `input` each is met, beginning with the first output's

    Work(const LayerPlan& p, float* scratch, bool update)
        : sizes(p, update), input(scratch), planar(input + sizes.input), sums(planar + sizes.planar), rows(vec(sums + sizes.sums)),
          maxima(rows + sizes.rows), taps(reinterpret_cast<int*>(maxima + sizes.maxima)) {}
};

// Windows of the pooling (without one: voxels) in rows: those of a run lie in one plane of windows.
struct Run {
    int z, y, count;  // window rows y to y + count - 1 of plane z
};

template <class Each>
void each_run(const SingleSizes& sizes, int first, int last, Each each) {
    for (int i = first; i < last;) {
        const int z = i / sizes.down, y = i % sizes.down, count = std::min({sizes.run, sizes.down - y, last - i});
        each(Run{z, y, count});
        i += count;
    }
}

// Outputs: `rows` from row y on of each of `planes` from plane z on.
struct Outputs {
    int z, y, planes, rows;
};

// Those of disjoint windows.
Outputs outputs_of(const LayerPlan& p, const Run& run) {
    const Extent w = p.filters() ? Extent{1, 1, 1} : p.problem.pool;
    return {run.z * w.z, run.y * w.y, w.z, run.count * w.y};
}

// Floats from plane to plane of what outputs are made of.
long plane_of(const LayerPlan& p, const Outputs& outputs) {
    return long(outputs.rows + p.problem.sparsity.y * (p.problem.kernel.y - 1)) * p.problem.input.x;
}

// The voxels that outputs are made of, with zeros beyond, where whole vectors end; and where the taps are.
void pack_input(const LayerPlan& p, const Buffers& b, const Work& w, const Outputs& outputs) {
    const Extent n = p.problem.input, k = p.problem.kernel, s = p.problem.sparsity;
    const int planes = outputs.planes + s.z * (k.z - 1);
    const long voxels = plane_of(p, outputs);
    float* to = w.input;
    for (int z = 0; z < planes; ++z, to += voxels) {
        const long from = (long(outputs.z + z) * n.y + outputs.y) * n.x;
        if (b.packed_input)
            std::memcpy(to, b.input + from, voxels * sizeof(float));
        else
            for (long i = 0; i < voxels; ++i) to[i] = b.input[(from + i) * kV];
    }
    std::fill_n(to, kX, 0.0f);
    int* tap = w.taps;
    for (int z = 0; z < k.z; ++z)
        for (int y = 0; y < k.y; ++y)
            for (int x = 0; x < k.x; ++x) *tap++ = int(s.z * z * voxels) + s.y * y * n.x + s.x * x;
}

// R vectors of a row, O maps. w: a tap's weights of all maps, kV floats apart.
template <int O, int R>
void convolve_block(const int* taps, const int* end, const float* in, const float* w, float* out, long pitch) {
    X sum[O][R];
    clear(sum);
    do {
        const float* at = in + *taps;
        X x[R];
        for (int r = 0; r < R; ++r) x[r] = load(at + r * kX);
        for (int o = 0; o < O; ++o)
            for (int r = 0; r < R; ++r) sum[o][r] += w[o] * x[r];
        w += kV;
    } while (++taps < end);
    for (int o = 0; o < O; ++o)
        for (int r = 0; r < R; ++r) reinterpret_cast<X*>(out + o * pitch)[r] = sum[o][r];
}

template <int O, int R = vectors_of(O)>
void convolve_rest(int vectors, const int* taps, const int* end, const float* in, const float* w, float* out, long pitch) {
    if (vectors == R) return convolve_block<O, R>(taps, end, in, w, out, pitch);
    if constexpr (R > 1) convolve_rest<O, R - 1>(vectors, taps, end, in, w, out, pitch);
}

template <int O = kMaps>
void convolve(int maps, int vectors, const int* taps, const int* end, const float* in, const float* w, float* out, long pitch) {
    if constexpr (O > 1) {
        if (maps < O) return convolve<O - 1>(maps, vectors, taps, end, in, w, out, pitch);
    }
    constexpr int R = vectors_of(O);
    for (; vectors > 0; vectors -= R, in += R * kX, out += R * kX)
        convolve_rest<O>(std::min(R, vectors), taps, end, in, w, out, pitch);
}

// wide[tap][map] += over a row: vectors, whose lanes are summed at the end. O maps, R taps.
template <int O, int R>
[[gnu::noinline]] void correlate_block(const int* taps, int vectors, const float* in, const float* g, long pitch, float* wide) {
    X sum[R][O];
    clear(sum);
    const float* at[R];
    for (int r = 0; r < R; ++r) at[r] = in + taps[r];
    long i = 0;
    do {
        X x[R];
        for (int r = 0; r < R; ++r) x[r] = load(at[r] + i * kX);
        for (int o = 0; o < O; ++o) {
            const X value = reinterpret_cast<const X*>(g + o * pitch)[i];
            for (int r = 0; r < R; ++r) sum[r][o] += x[r] * value;
        }
    } while (++i < vectors);
    for (int r = 0; r < R; ++r)
        for (int o = 0; o < O; ++o) reinterpret_cast<X*>(wide)[r * kV + o] += sum[r][o];
}

template <int O = kMaps>
void correlate(int maps, const int* taps, const int* end, int vectors, const float* in, const float* g, long pitch, float* wide) {
    if constexpr (O > 1) {
        if (maps < O) return correlate<O - 1>(maps, taps, end, vectors, in, g, pitch, wide);
    }
    for (; taps < end; taps += kTaps, wide += kTaps * kV * kX) {
        if (end - taps >= 3) correlate_block<O, 3>(taps, vectors, in, g, pitch, wide);
        if (end - taps == 2) correlate_block<O, 2>(taps, vectors, in, g, pitch, wide);
        if (end - taps == 1) correlate_block<O, 1>(taps, vectors, in, g, pitch, wide);
    }
}
static_assert(kTaps == 3 && kTaps * kMaps <= kSums);

// each(first, count): the maps of a bundle that exist, in nearly equal groups.
template <class Each>
void each_group(int maps, Each each) {
    for (int i = 0; i < group_count(maps, kMaps); ++i) {
        const GroupRange group = group_range(maps, kMaps, i);
        each(group.first, group.last - group.first);
    }
}

int maps_of(const LayerPlan& p, int bundle) { return std::min(kV, p.problem.out_maps - bundle * kV); }
// Of so many rows of outputs in a plane taken as one.
int vectors_in(const LayerPlan& p, int rows) { return ceil_div((rows - 1) * p.problem.input.x + p.output.x, kX); }

void finish_run(const LayerPlan& p, const Buffers& b, const Work& w, int bundle, const Run& run) {
    const int across = p.output.x / p.problem.pool.x;
    const long start = (long(run.z) * w.sizes.down + run.y) * across, voxels = long(run.count) * across;
    float* out = b.output + bundle * b.output_stride;
    if (p.pools()) take_maxima(w.maxima, voxels, w.rows, notes_at(b.largest, out - b.output + start * kV));
    finish_forward(w.rows, vec(out) + start, 1, voxels, b.bias ? b.bias + bundle * kV : nullptr, b.transfer, b.accumulate_output);
}

// One plane of outputs, map by map.
void convolve_plane(const LayerPlan& p, const Buffers& b, const Work& w, int bundle, const Outputs& outputs, int plane) {
    const int taps = int(p.problem.kernel.volume());
    const float* kernels = b.kernels + long(bundle) * taps * kV;
    each_group(maps_of(p, bundle), [&](int first, int maps) {
        convolve(maps, vectors_in(p, outputs.rows), w.taps, w.taps + taps, w.input + plane * plane_of(p, outputs), kernels + first,
                 w.planar + first * w.sizes.pitch, w.sizes.pitch);
    });
}

void forward_run(const LayerPlan& p, const Buffers& b, const Work& w, int bundle, const Run& run) {
    const Extent n = p.problem.input, m = p.output, pool = p.problem.pool;
    const Outputs outputs = outputs_of(p, run);
    for (int plane = 0; plane < pool.z; ++plane) {
        convolve_plane(p, b, w, bundle, outputs, plane);
        if (!p.pools()) {
            for (int y = 0; y < outputs.rows; ++y) bundle_row(w.planar + long(y) * n.x, w.sizes.pitch, m.x, w.rows + long(y) * m.x);
            continue;
        }
        for (int i = 0; i < run.count; ++i) {
            for (int y = 0; y < pool.y; ++y)
                bundle_row(w.planar + long(i * pool.y + y) * n.x, w.sizes.pitch, m.x, w.rows + long(y) * m.x);
            pool_row(w.rows, m.x, pool.y, pool.x, plane * pool.y * pool.x, m.x / pool.x, w.maxima + 2L * i * (m.x / pool.x));
        }
    }
    finish_run(p, b, w, bundle, run);
}

// Filtered: a run of rows of windows through planes z to end - 1 of them. Planes of outputs that windows of the next plane share are
// still there.
void filter_run(const LayerPlan& p, const Buffers& b, const Work& w, int bundle, const Run& run, int end) {
    const Extent n = p.problem.input, m = p.output, pool = p.problem.pool, left = p.problem.pooled(m);
    float* out = b.output + bundle * b.output_stride;
    const float* bias = b.bias ? b.bias + bundle * kV : nullptr;
    const V shift = bias ? *vec(bias) : V{};
    for (int z = run.z; z < end + pool.z - 1; ++z) {
        const Outputs outputs{z, run.y, 1, run.count + pool.y - 1};
        pack_input(p, b, w, outputs);
        convolve_plane(p, b, w, bundle, outputs, 0);
        V* const plane = w.rows + z % pool.z * w.sizes.plane;
        for (int y = 0; y < outputs.rows; ++y) bundle_row(w.planar + long(y) * n.x, w.sizes.pitch, m.x, plane + long(y) * m.x);
        const int first = z - pool.z + 1;
        if (first < run.z) continue;
        const V* rows[most_filtered];
        for (int i = 0; i < pool.z; ++i)
            for (int j = 0; j < pool.y; ++j) rows[i * pool.y + j] = w.rows + (first + i) % pool.z * w.sizes.plane + long(j) * m.x;
        const long start = (long(first) * left.y + run.y) * left.x;
        std::int8_t* const largest = notes_at(b.largest, out - b.output + start * kV);
        for (int y = 0; y < run.count; ++y) {
            filter_row(rows, pool.z * pool.y, pool.x, left.x, w.maxima + long(y) * left.x,
                       {notes_at(largest, long(y) * left.x * kV), 1, b.note_positive ? &shift : nullptr});
            for (int i = 0; i < pool.z * pool.y; ++i) rows[i] += m.x;
        }
        finish_forward(w.maxima, vec(out) + start, 1, long(run.count) * left.x, bias, b.transfer, b.accumulate_output);
    }
}

void filter_piece(const LayerPlan& p, int index, const Buffers& b, const Work& w) {
    const int run = index / p.filter_parts, part = index % p.filter_parts, planes = w.sizes.count / w.sizes.down;
    const int y = run * w.sizes.down / p.filter_runs, rows = (run + 1) * w.sizes.down / p.filter_runs - y;
    const int z = part * planes / p.filter_parts, end = (part + 1) * planes / p.filter_parts;
    for (int bundle = 0; bundle < p.out_bundles; ++bundle) filter_run(p, b, w, bundle, {z, y, rows}, end);
}

// The gradient of a run, map by map, zero between the rows; filtered, added to the sums of its maps.
void unbundle_gradient(const LayerPlan& p, const Buffers& b, const Work& w, int bundle, const Run& run, double* bias_sums) {
    const long width = p.output.x;
    const V* g = vec(b.output_gradient + bundle * b.output_gradient_stride) + (long(run.z) * w.sizes.down + run.y) * width;
    const FilteredGradient filtered = filtered_gradient(p, b, bundle);
    std::fill_n(w.planar, kV * w.sizes.pitch, 0.0f);
    for (int y = 0; y < run.count; ++y) {
        if (p.filters()) collect_row(filtered, run.z, run.y + y, w.rows, bias_sums);
        unbundle_row(p.filters() ? w.rows : g + y * width, int(width), w.planar + long(y) * p.problem.input.x, w.sizes.pitch);
    }
}

// Sums of the lanes of all taps: kernel gradients of a chunk.
void update_voxels(const LayerPlan& p, const Buffers& b, const Work& w, int bundle, int first, int last, V* sums, double* bias_sums) {
    const int taps = int(p.problem.kernel.volume());
    std::fill_n(w.sums, long(taps) * kV * kX, 0.0f);
    each_run(w.sizes, first, last, [&](const Run& run) {
        pack_input(p, b, w, outputs_of(p, run));
        unbundle_gradient(p, b, w, bundle, run, bias_sums);
        each_group(maps_of(p, bundle), [&](int map, int maps) {
            correlate(maps, w.taps, w.taps + taps, vectors_in(p, run.count), w.input, w.planar + map * w.sizes.pitch,
                      w.sizes.pitch, w.sums + map * kX);
        });
    });
    for (long j = 0; j < taps; ++j) sums[j] = sum_lanes(w.sums + j * kV * kX);
}

// A run of windows of one map: their gradients kV floats apart, as bytes are that name voxels; `where` these lie in `input`.
struct Windows {
    int rows, across;
    const float *g, *input;
    const std::int8_t* largest;
    int row_step, step;  // floats of `input` from row to row of windows, and from window to window
    const int* where;
};

// sums[r] += over windows: L adjacent taps, of R rows that begin `taps[r * kernel_x]` after a window's voxel.
template <int L, int R>
[[gnu::noinline]] void correlate_windows(const Windows& k, const int* taps, int kernel_x, float* sums, int stride) {
    typedef float Lanes __attribute__((vector_size(L * 4), may_alias, aligned(4)));
    const float* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = k.input + taps[long(r) * kernel_x];
    Lanes sum[R];
    clear(sum);
    const float* g = k.g;
    const std::int8_t* largest = k.largest;
    for (int y = 0; y < k.rows; ++y)
        for (long x = 0, at = long(y) * k.row_step; x < k.across; ++x, at += k.step, g += kV, largest += kV) {
            const long voxel = at + k.where[*largest];
            for (int r = 0; r < R; ++r) sum[r] += *g * *reinterpret_cast<const Lanes*>(rows[r] + voxel);
        }
    for (int r = 0; r < R; ++r) *reinterpret_cast<Lanes*>(sums + long(r) * stride) += sum[r];
}

constexpr int kTapRows = 9;

template <int L, int R = 1>
void correlate_rows(const Windows& k, int count, const int* taps, int kernel_x, float* sums, int stride) {
    if constexpr (R < kTapRows) {
        if (count > R) return correlate_rows<L, R + 1>(k, count, taps, kernel_x, sums, stride);
    }
    correlate_windows<L, R>(k, taps, kernel_x, sums, stride);
}

// All rows of taps in nearly equal groups, as many taps of a row at once as fit a vector.
template <int L>
void correlate_all(const Windows& k, Extent kernel, const int* taps, float* sums, int stride) {
    const int rows = kernel.z * kernel.y;
    for (int i = 0; i < group_count(rows, kTapRows); ++i) {
        const auto [first, last] = group_range(rows, kTapRows, i);
        for (int x = 0; x < kernel.x; x += L)
            correlate_rows<L>(k, last - first, taps + long(first) * kernel.x + x, kernel.x, sums + long(first) * stride + x, stride);
    }
}

void correlate_all(const Windows& k, Extent kernel, const int* taps, float* sums, int stride) {
    if (kernel.x <= 4) return correlate_all<4>(k, kernel, taps, sums, stride);
    if (kernel.x <= 8) return correlate_all<8>(k, kernel, taps, sums, stride);
    correlate_all<kX>(k, kernel, taps, sums, stride);
}

// The same where gradients are pooled.
void update_windows(const LayerPlan& p, const Buffers& b, const Work& w, int bundle, int first, int last, V* sums) {
    const Extent n = p.problem.input, k = p.problem.kernel, pool = p.problem.pool;
    const int across = p.output.x / pool.x, stride = ceil_div(k.x, kX) * kX;
    const long rows = long(k.z) * k.y;
    std::fill_n(w.sums, kV * rows * stride, 0.0f);
    each_run(w.sizes, first, last, [&](const Run& run) {
        const Outputs outputs = outputs_of(p, run);
        pack_input(p, b, w, outputs);
        int where[128];
        for (int i = 0; i < int(pool.volume()); ++i)
            where[i] = int(i / (pool.y * pool.x) * plane_of(p, outputs)) + i / pool.x % pool.y * n.x + i % pool.x;
        const std::size_t start = bundle * b.output_gradient_stride + (std::size_t(run.z) * w.sizes.down + run.y) * across * kV;
        for (int lane = 0; lane < maps_of(p, bundle); ++lane)
            correlate_all({run.count, across, b.output_gradient + start + lane, w.input, b.largest + start + lane,
                           pool.y * n.x, pool.x, where},
                          k, w.taps, w.sums + lane * rows * stride, stride);
    });
    for (long row = 0; row < rows; ++row)
        for (int x = 0; x < k.x; ++x) {
            V sum{};
            for (int lane = 0; lane < kV; ++lane) sum[lane] = w.sums[(lane * rows + row) * stride + x];
            sums[row * k.x + x] = sum;
        }
}

}  // namespace

void forward_single(const LayerPlan& p, int index, const Buffers& b, float* scratch) {
    const Work w(p, scratch, false);
    const int maps = maps_of(p, 0);
    std::fill_n(w.planar + maps * w.sizes.pitch, (kV - maps) * w.sizes.pitch, 0.0f);  // lanes without a map, where a bundle has some
    if (p.filters()) return filter_piece(p, index, b, w);
    const int first = index * p.rows_forward, last = std::min(w.sizes.count, first + p.rows_forward);
    each_run(w.sizes, first, last, [&](const Run& run) {
        pack_input(p, b, w, outputs_of(p, run));
        for (int bundle = 0; bundle < p.out_bundles; ++bundle) forward_run(p, b, w, bundle, run);
    });
}

void update_single(const LayerPlan& p, int index, const Buffers& b, float* scratch) {
    const Work w(p, scratch, true);
    const int bundle = index % p.out_bundles, chunk = index / p.out_bundles;
    const int first = int(long(chunk) * w.sizes.count / p.update_chunks), last = int(long(chunk + 1) * w.sizes.count / p.update_chunks);
    V* sums = vec(b.at(Buffer::update_spectra)) + chunk * update_chunk_vectors(p) + bundle * long(p.problem.kernel.volume());
    if (p.pools() && !p.filters()) return update_windows(p, b, w, bundle, first, last, sums);
    double* const bias_sums = b.bias_sums ? b.bias_sums + (long(bundle) * p.update_chunks + chunk) * kV : nullptr;
    if (bias_sums) std::fill_n(bias_sums, kV, 0.0);
    update_voxels(p, b, w, bundle, first, last, sums, bias_sums);
}

}  // namespace znn::tiled::ZNN_VARIANT
