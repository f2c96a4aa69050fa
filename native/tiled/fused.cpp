// Layers with few input maps: a few tiles at a time go through transform, product and inverse (or through both transforms
// and into the sums of the kernel gradient) without leaving the caches. Spectra of the whole layer never exist.
//
// The lanes of a vector that would hold maps hold tiles where the input is transformed, so that one map fills them. What
// is then needed of a tile's spectrum are single numbers, broadcast, as in the product of the tiled method.
//
// Short kernels in 3D are transformed along two axes only (sums_taps): along axis 0 the taps are summed one by one, plane by
// plane of spectra. That takes about as many operations as transforms of so few maps would, but products and sums fused, of
// spectra that stay in L1; and tiles need not overlap there for the inverse's sake.
#include <algorithm>
#include <cstring>

#include "tiled/complex.hpp"
#include "tiled/layout.hpp"
#include "tiled/short_transforms.hpp"
#include "tiled/variant.hpp"

namespace znn::tiled::ZNN_VARIANT {
namespace {

struct FusedScratch {
    FusedSizes sizes;
    V *box, *inputs, *sums, *lines;  // inputs: spectra of the group in hand
    float* rest;

    FusedScratch(const LayerPlan& p, float* scratch) : sizes(p) {
        box = vec(scratch);
        inputs = box + sizes.box;
        sums = inputs + sizes.inputs;
        lines = sums + sizes.sums;
        rest = reinterpret_cast<float*>(lines + sizes.lines);
    }
};

// Tiles [first, first + tiles) that are taken together.
struct Group {
    int index, first, tiles;

    Group(const LayerPlan& p, int i) : index(i), first(i * p.fused_tiles), tiles(std::min(p.fused_tiles, p.tiles - first)) {}
};

// `count` floats, and zeros up to a vector.
ZNN_INLINE V load_some(const float* from, int count) {
    V x{};
    if (count >= kV)
        std::memcpy(&x, from, sizeof x);
    else if (count > 0)
        std::memcpy(&x, from, count * sizeof(float));
    return x;
}

// A row of every tile, tile by lane; in[lane] are `counts[lane]` floats, of T voxels. Vectors beyond the row, up to a block, are
// overwritten.
void gather_packed_row(const float* const* in, const int* counts, int tiles, int T, V* row) {
    for (int x = 0; x < T; x += kV) {
        V block[kV];
        for (int lane = 0; lane < kV; ++lane) block[lane] = lane < tiles ? load_some(in[lane] + x, counts[lane] - x) : V{};
        transpose_block(block, 1, row + x, 1);
    }
}

void gather_row(const float* const* in, long step, const int* counts, int tiles, int T, V* row) {
    std::fill_n(row, T, V{});
    for (int lane = 0; lane < tiles; ++lane) {
        float* out = reinterpret_cast<float*>(row) + lane;
        for (int x = 0; x < counts[lane]; ++x) out[x * kV] = in[lane][x * step];
    }
}

// One map of up to kV tiles, of which some planes at a time are put together, tile by lane; voxels beyond the image are zero.
class Gathered {
public:
    Gathered(const LayerPlan& p, const Buffers& b, int map, Group group) : p_(p), tiles_(group.tiles), voxel_(input_step(b)) {
        const float* image = b.input + map / kV * b.input_stride + map % kV;
        for (int lane = 0; lane < tiles_; ++lane) from_[lane] = input_box(p, tile_place(p, group.first + lane), image, voxel_);
    }

    // Planes [z, z + count), row by row, so that all lanes of one meet in L1.
    Box planes(int z, int count, V* box) const {
        const int T1 = p_.axis[1].T, T2 = p_.axis[2].T;
        V* row = box;
        for (int plane = z; plane < z + count; ++plane)
            for (int y = 0; y < T1; ++y, row += T2) gather(plane, y, row);
        return {reinterpret_cast<const float*>(box), {long(T1) * T2, T2, 1}, {count, T1, T2}, {0, 0, 0}};
    }

private:
    void gather(int z, int y, V* row) const {
        const float* in[kV];
        int counts[kV];
        for (int lane = 0; lane < tiles_; ++lane) {
            const Box& b = from_[lane];
            counts[lane] = z < b.count[0] && y < b.count[1] ? b.count[2] : 0;
            in[lane] = b.origin + (z * b.step[0] + y * b.step[1]) * voxel_;
        }
        const long step = from_[0].step[2] * voxel_;
        if (step == 1)
            gather_packed_row(in, counts, tiles_, p_.axis[2].T, row);
        else
            gather_row(in, step, counts, tiles_, p_.axis[2].T, row);
    }

    const LayerPlan& p_;
    const int tiles_;
    const long voxel_;  // floats from one to the next
    Box from_[kV];
};

// Spectra [pencil][map][line], lanes are tiles.
void transform_input_lines(const LayerPlan& p, const Buffers& b, const FusedScratch& f, Group group) {
    for (int i = 0; i < p.problem.in_maps; ++i) {
        const Box box = Gathered(p, b, i, group).planes(0, p.axis[0].T, f.box);
        forward_tile(p, box, f.inputs + i * 2 * p.line, f.sizes.pencil, f.rest);
    }
}

// out = sum over maps of x conj(w), one line; x is one lane.
template <int MAPS>
void multiply_line(const float* x, const V* w, long map, int T, V* out) {
    for (int f = 0; f < T; ++f) {
        V re{}, im{};
        for (int i = 0; i < MAPS; ++i) {
            const float xr = x[(i * map + 2 * f) * kV], xi = x[(i * map + 2 * f + 1) * kV];
            const V wr = w[i * map + 2 * f], wi = w[i * map + 2 * f + 1];
            re += xr * wr, re += xi * wi;
            im += xi * wr, im -= xr * wi;
        }
        out[2 * f] = re, out[2 * f + 1] = im;
    }
}

// sums += x conj(g), one line of every map.
template <int MAPS>
void add_line(const float* x, const V* g, long map, int T, V* sums) {
    for (int f = 0; f < T; ++f) {
        const V gr = g[2 * f], gi = g[2 * f + 1];
        for (int i = 0; i < MAPS; ++i) {
            const float xr = x[(i * map + 2 * f) * kV], xi = x[(i * map + 2 * f + 1) * kV];
            V &re = sums[i * map + 2 * f], &im = sums[i * map + 2 * f + 1];
            re += xr * gr, re += xi * gi;
            im += xi * gr, im -= xr * gi;
        }
    }
}

template <class Function>
Function choose(int maps, Function one, Function two, Function three, Function four) {
    return maps == 1 ? one : maps == 2 ? two : maps == 3 ? three : four;
}

// ---- taps along axis 0 summed one by one

// Spectra [tile][map][i0][pencil] of single numbers, re and im: planes [begin, end). Plane by plane: all would not fit L2.
void transform_input_planes(const LayerPlan& p, const Buffers& b, const FusedScratch& f, Group group, int begin, int end) {
    const long plane = f.sizes.input_plane / kV, map = plane * p.axis[0].T, tile = map * p.problem.in_maps;  // vectors
    for (int i = 0; i < p.problem.in_maps; ++i) {
        const Gathered gathered(p, b, i, group);
        for (int i0 = begin; i0 < end; ++i0) {
            forward_planes(p, gathered.planes(i0, 1, f.box), 1, f.rest);
            const V* pencils = vec(f.rest);
            for (long at = 0; at * kV < 2 * p.pencils; ++at)  // what lies beyond the last pencil is never read
                transpose_block(pencils + at * kV, 1, f.inputs + i * map + i0 * plane + at, tile);
        }
    }
}

// Steps in floats: of x from plane to plane of the tile and from map to map.
struct Inputs {
    const float* x;
    long plane, map;
};

// R planes of sums over taps and maps of x conj(w), all pencils; kernels [pencil][map][tap].
template <int R>
void filter_planes(const LayerPlan& p, Inputs in, const V* kernels, long kernel, V* out, long out_plane) {
    const int maps = p.problem.in_maps, taps = p.axis[0].k;
    for (int pencil = 0; pencil < p.pencils; ++pencil, in.x += 2, kernels += kernel, out += 2) {
        Sum<true> sum[R];
        clear(sum);
        const float* x = in.x;
        const V* w = kernels;
        for (int i = 0; i < maps; ++i, x += in.map)
            for (int j = 0; j < taps; ++j, w += 2) {
                const Complex at = load(w);
                for (int r = 0; r < R; ++r) sum[r].add(x[(j + r) * in.plane], x[(j + r) * in.plane + 1], at);
            }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) store(out + r * out_plane, sum[r].value());
    }
}

// sums[pencil][map][tap] += sums over `planes` of x conj(g): N taps of so many.
template <int N>
void add_planes(const LayerPlan& p, Inputs in, const V* gradient, long g_plane, int planes, V* sums, long kernel) {
    const int maps = p.problem.in_maps, taps = p.axis[0].k;
    for (int pencil = 0; pencil < p.pencils; ++pencil, in.x += 2, gradient += 2, sums += kernel)
        for (int i = 0; i < maps; ++i) {
            Sum<true> sum[N];
            clear(sum);
            const float* x = in.x + i * in.map;
            const V* g = gradient;
            for (int left = planes; left > 0; --left, x += in.plane, g += g_plane) {
                const Complex at = load(g);
                for (int j = 0; j < N; ++j) sum[j].add(x[j * in.plane], x[j * in.plane + 1], at);
            }
            V* own = sums + i * 2 * taps;
#pragma GCC unroll 8
            for (int j = 0; j < N; ++j) store(own + 2 * j, load(own + 2 * j) + sum[j].value());
        }
}

// Planes, or taps, whose sums fit the registers.
#if defined(__AVX512F__)
constexpr int kTogether = 8;
#elif defined(__AVX2__)
constexpr int kTogether = 5;
#else
constexpr int kTogether = 3;
#endif

using Filter = void (*)(const LayerPlan&, Inputs, const V*, long, V*, long);
using Add = void (*)(const LayerPlan&, Inputs, const V*, long, int, V*, long);

template <int R = 1>
Filter filter_of(int planes) {
    if constexpr (R < kTogether) {
        if (planes > R) return filter_of<R + 1>(planes);
    }
    return filter_planes<R>;
}
template <int N = 1>
Add add_of(int taps) {
    if constexpr (N < kTogether) {
        if (taps > N) return add_of<N + 1>(taps);
    }
    return add_planes<N>;
}

Inputs inputs_of(const LayerPlan& p, const FusedScratch& f, int tile) {
    const long plane = f.sizes.input_plane, map = plane * p.axis[0].T;
    return {reinterpret_cast<const float*>(f.inputs) + tile * map * p.problem.in_maps, plane, map};
}

void filter_tile(const LayerPlan& p, const FusedScratch& f, int tile, const V* kernels, int planes) {
    const Inputs in = inputs_of(p, f, tile);
    V* out = vec(f.rest) + 2 * p.plane * p.axis[0].center;
    for (int i = 0; i < group_count(planes, kTogether); ++i) {
        const GroupRange some = group_range(planes, kTogether, i);
        filter_of(some.last - some.first)(p, {in.x + some.first * in.plane, in.plane, in.map}, kernels,
                                          kernel_pencil(p, p.problem.in_maps), out + some.first * 2 * p.plane, 2 * p.plane);
    }
}

}  // namespace

// Part of a group's spectra of inputs.
static void transform_inputs(const LayerPlan& p, const Buffers& b, const FusedScratch& f, Group group, int part, int parts) {
    const int T = p.axis[0].T;
    if (sums_taps(p))
        transform_input_planes(p, b, f, group, T * part / parts, T * (part + 1) / parts);
    else
        transform_input_lines(p, b, f, group);
}

static V* shared_inputs(const LayerPlan& p, const Buffers& b, const FusedScratch& f, Group group) {
    return vec(b.at(Buffer::input_spectra)) + group.index * f.sizes.inputs;
}

void transform_fused(const LayerPlan& p, int index, const Buffers& b, float* scratch) {
    FusedScratch f(p, scratch);
    const Group group(p, index / p.input_parts);
    f.inputs = shared_inputs(p, b, f, group);
    transform_inputs(p, b, f, group, index % p.input_parts, p.input_parts);
}

// Finds the group's spectra of inputs, or makes them.
static void take_inputs(const LayerPlan& p, const Buffers& b, FusedScratch& f, Group group) {
    if (p.shares_inputs)
        f.inputs = shared_inputs(p, b, f, group);
    else
        transform_inputs(p, b, f, group, 0, 1);
}

// One bundle of outputs of tiles [first, last) of the group.
static void forward_by_lines(const LayerPlan& p, const Buffers& b, const FusedScratch& f, Group group, int o, int first, int last) {
    const int maps = p.problem.in_maps, T = p.axis[0].T;
    const long line = 2 * p.line, kernel = kernel_pencil(p, maps);
    const auto multiply = choose(maps, multiply_line<1>, multiply_line<2>, multiply_line<3>, multiply_line<4>);
    V* planes = vec(f.rest);
    const V* kernels = vec(b.at(Buffer::kernels_forward)) + long(o) * p.pencils * kernel;
    for (int pencil = 0; pencil < p.pencils; ++pencil)
        kernel_line(p.axis[0], kernels + pencil * kernel, 2, 2 * p.axis[0].k, f.sums + pencil * f.sizes.pencil, 2, line, maps,
                    f.lines);
    for (int t = first; t < last; ++t) {
        for (int p0 = 0; p0 < p.pencils; p0 += kFusedBlock) {
            const int count = std::min(kFusedBlock, p.pencils - p0);
            for (int j = 0; j < count; ++j) {
                const long at = (p0 + j) * f.sizes.pencil;
                multiply(reinterpret_cast<const float*>(f.inputs + at) + t, f.sums + at, line, T, f.lines + j * line);
            }
            codelets(T).inverse(f.lines, line, planes + 2 * p0, 2 * p.plane, 2, count);
        }
        finish_output_tile(p, tile_place(p, group.first + t), b, o, f.rest);
    }
}

static void forward_by_planes(const LayerPlan& p, const Buffers& b, const FusedScratch& f, Group group, int o, int first, int last) {
    const V* kernels = vec(b.at(Buffer::kernels_forward)) + long(o) * p.pencils * kernel_pencil(p, p.problem.in_maps);
    for (int t = first; t < last; ++t) {
        const TilePlace place = tile_place(p, group.first + t);
        filter_tile(p, f, t, kernels, output_box(p, place, b.output).count[0]);
        finish_output_tile(p, place, b, o, f.rest);
    }
}

void forward_fused(const LayerPlan& p, int index, const Buffers& b, float* scratch) {
    FusedScratch f(p, scratch);
    const Group group(p, index / p.fused_parts);
    const int by_tile = parts_by_tile(p, p.fused_parts), by_bundle = p.fused_parts / by_tile;
    const int tiles = index % by_tile, bundles = index % p.fused_parts / by_tile;
    const int first = tiles * group.tiles / by_tile, last = (tiles + 1) * group.tiles / by_tile;
    if (first == last) return;  // the last group may have fewer tiles
    take_inputs(p, b, f, group);
    for (int o = bundles * p.out_bundles / by_bundle; o < (bundles + 1) * p.out_bundles / by_bundle; ++o)
        (sums_taps(p) ? forward_by_planes : forward_by_lines)(p, b, f, group, o, first, last);
}

// One tile's part of the sums of an output bundle: [pencil][map][line], by planes [pencil][map][tap].
static void add_tile_by_lines(const LayerPlan& p, const Buffers& b, const FusedScratch& f, int first, int t, int o, V* sums) {
    const int maps = p.problem.in_maps, T = p.axis[0].T;
    const long line = 2 * p.line;
    const auto add = choose(maps, add_line<1>, add_line<2>, add_line<3>, add_line<4>);
    const V* planes = vec(f.rest);
    forward_planes(p, gradient_box(p, tile_place(p, first + t), b, o), T, f.rest);
    for (int p0 = 0; p0 < p.pencils; p0 += kFusedBlock) {
        const int count = std::min(kFusedBlock, p.pencils - p0);
        codelets(T).forward(planes + 2 * p0, 2 * p.plane, 2, f.lines, line, count);
        for (int j = 0; j < count; ++j) {
            const long at = (p0 + j) * f.sizes.pencil;
            add(reinterpret_cast<const float*>(f.inputs + at) + t, f.lines + j * line, line, T, sums + at);
        }
    }
}

static void add_tile_by_planes(const LayerPlan& p, const Buffers& b, const FusedScratch& f, int first, int t, int o, V* sums) {
    Box box = gradient_box(p, tile_place(p, first + t), b, o);
    box.at[0] = 0;
    const int planes = box.count[0];
    forward_planes(p, box, planes, f.rest);
    const Inputs in = inputs_of(p, f, t);
    for (int i = 0; i < group_count(p.axis[0].k, kTogether); ++i) {
        const GroupRange taps = group_range(p.axis[0].k, kTogether, i);
        add_of(taps.last - taps.first)(p, {in.x + taps.first * in.plane, in.plane, in.map}, vec(f.rest), 2 * p.plane, planes,
                                       sums + 2 * taps.first, kernel_pencil(p, p.problem.in_maps));
    }
}

// One chunk of the tiles and some bundles of outputs.
void update_fused(const LayerPlan& p, int index, const Buffers& b, float* scratch) {
    FusedScratch f(p, scratch);
    const int maps = p.problem.in_maps, groups = fused_groups(p);
    const int chunk = index / p.update_parts, part = index % p.update_parts;
    const int begin = int(long(chunk) * groups / p.update_chunks), end = int(long(chunk + 1) * groups / p.update_chunks);
    const int o0 = part * p.out_bundles / p.update_parts, o1 = (part + 1) * p.out_bundles / p.update_parts;
    const long line = 2 * p.line, kernel = kernel_pencil(p, maps);
    const bool planes = sums_taps(p);
    V* out = vec(b.at(Buffer::update_spectra)) + long(chunk) * p.out_bundles * p.pencils * kernel;
    V* sums = planes ? out : f.sums;
    const long bundle = p.pencils * (planes ? kernel : f.sizes.pencil);
    std::fill(sums + o0 * bundle, sums + o1 * bundle, V{});
    for (int i = begin; i < end; ++i) {
        const Group group(p, i);
        take_inputs(p, b, f, group);
        for (int o = o0; o < o1; ++o)
            for (int t = 0; t < group.tiles; ++t)
                (planes ? add_tile_by_planes : add_tile_by_lines)(p, b, f, group.first, t, o, sums + o * bundle);
    }
    if (planes) return;
    for (long i = long(o0) * p.pencils; i < long(o1) * p.pencils; ++i)
        kernel_line_inverse(p.axis[0], f.sums + i * f.sizes.pencil, 2, line, out + i * kernel, 2, 2 * p.axis[0].k, maps, f.lines);
}

}  // namespace znn::tiled::ZNN_VARIANT
