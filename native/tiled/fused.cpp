// Layers with few input maps: a few tiles at a time go through transform, product and inverse (or through both transforms
// and into the sums of the kernel gradient) without leaving the caches. Spectra of the whole layer never exist.
//
// The lanes of a vector that would hold maps hold tiles where the input is transformed, so that one map fills them. What
// is then needed of a tile's spectrum are single numbers, broadcast, as in the product of the tiled method.
#include <algorithm>

#include "tiled/layout.hpp"
#include "tiled/short_transforms.hpp"
#include "tiled/variant.hpp"

namespace znn::tiled::ZNN_VARIANT {
namespace {

struct FusedScratch {
    FusedSizes sizes;
    V *box, *inputs, *sums, *lines;
    float* rest;

    FusedScratch(const LayerPlan& p, float* scratch) : sizes(p) {
        box = vec(scratch);
        inputs = box + sizes.box;
        sums = inputs + sizes.inputs;
        lines = sums + sizes.sums;
        rest = reinterpret_cast<float*>(lines + sizes.lines);
    }
};

// One map of `tiles` tiles, tile by lane; voxels beyond the image are zero. Row by row, so that all lanes of one meet in L1.
void gather_tiles(const LayerPlan& p, const float* image, long voxel_floats, int first, int tiles, V* box) {
    const int T0 = p.axis[0].T, T1 = p.axis[1].T, T2 = p.axis[2].T;
    Box from[kV];
    for (int lane = 0; lane < tiles; ++lane) from[lane] = input_box(p, tile_place(p, first + lane), image, voxel_floats);
    for (int z = 0; z < T0; ++z)
        for (int y = 0; y < T1; ++y, box += T2) {
            std::fill_n(box, T2, V{});
            for (int lane = 0; lane < tiles; ++lane) {
                const Box& b = from[lane];
                if (z >= b.count[0] || y >= b.count[1]) continue;
                const float* in = b.origin + (z * b.step[0] + y * b.step[1]) * voxel_floats;
                const long step = b.step[2] * voxel_floats;
                float* out = reinterpret_cast<float*>(box) + lane;
                for (int x = 0; x < b.count[2]; ++x) out[x * kV] = in[x * step];
            }
        }
}

// Spectra [pencil][map][line], lanes are tiles.
void transform_inputs(const LayerPlan& p, const Buffers& b, const FusedScratch& f, int first, int tiles) {
    const int T0 = p.axis[0].T, T1 = p.axis[1].T, T2 = p.axis[2].T;
    const Box whole{reinterpret_cast<const float*>(f.box), {long(T1) * T2, T2, 1}, {T0, T1, T2}, {0, 0, 0}};
    for (int i = 0; i < p.problem.in_maps; ++i) {
        gather_tiles(p, b.input + i / kV * b.input_stride + i % kV, input_step(b), first, tiles, f.box);
        forward_tile(p, whole, f.inputs + i * 2 * p.line, f.sizes.pencil, f.rest);
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

}  // namespace

void forward_fused(const LayerPlan& p, int index, const Buffers& b, float* scratch) {
    const FusedScratch f(p, scratch);
    const int maps = p.problem.in_maps, T = p.axis[0].T, group = index / p.fused_parts, part = index % p.fused_parts;
    const int first = group * p.fused_tiles, tiles = std::min(p.fused_tiles, p.tiles - first);
    const long line = 2 * p.line, kernel = kernel_pencil(p, maps);
    const auto multiply = choose(maps, multiply_line<1>, multiply_line<2>, multiply_line<3>, multiply_line<4>);
    V* planes = vec(f.rest);
    transform_inputs(p, b, f, first, tiles);
    for (int o = part * p.out_bundles / p.fused_parts; o < (part + 1) * p.out_bundles / p.fused_parts; ++o) {
        const V* kernels = vec(b.at(Buffer::kernels_forward)) + long(o) * p.pencils * kernel;
        for (int pencil = 0; pencil < p.pencils; ++pencil)
            kernel_line(p.axis[0], kernels + pencil * kernel, 2, 2 * p.axis[0].k, f.sums + pencil * f.sizes.pencil, 2, line,
                        maps, f.lines);
        for (int t = 0; t < tiles; ++t) {
            for (int p0 = 0; p0 < p.pencils; p0 += kFusedBlock) {
                const int count = std::min(kFusedBlock, p.pencils - p0);
                for (int j = 0; j < count; ++j) {
                    const long at = (p0 + j) * f.sizes.pencil;
                    multiply(reinterpret_cast<const float*>(f.inputs + at) + t, f.sums + at, line, T, f.lines + j * line);
                }
                codelets(T).c2c(f.lines + 1, f.lines, 2, line, planes + 2 * p0 + 1, planes + 2 * p0, 2 * p.plane, 2, count);
            }
            finish_output_tile(p, tile_place(p, first + t), b, o, f.rest);
        }
    }
}

// One chunk of the tiles and some bundles of outputs: sums[out bundle][pencil][map][line], at the end inverted along axis 0.
void update_fused(const LayerPlan& p, int index, const Buffers& b, float* scratch) {
    const FusedScratch f(p, scratch);
    const int maps = p.problem.in_maps, T = p.axis[0].T, groups = ceil_div(p.tiles, p.fused_tiles);
    const int chunk = index / p.update_parts, part = index % p.update_parts;
    const int begin = int(long(chunk) * groups / p.update_chunks), end = int(long(chunk + 1) * groups / p.update_chunks);
    const int bundles[2] = {part * p.out_bundles / p.update_parts, (part + 1) * p.out_bundles / p.update_parts};
    const long line = 2 * p.line, bundle = p.pencils * f.sizes.pencil, kernel = kernel_pencil(p, maps);
    const auto add = choose(maps, add_line<1>, add_line<2>, add_line<3>, add_line<4>);
    const V* planes = vec(f.rest);
    std::fill_n(f.sums + bundles[0] * bundle, (bundles[1] - bundles[0]) * bundle, V{});
    for (int group = begin; group < end; ++group) {
        const int first = group * p.fused_tiles, tiles = std::min(p.fused_tiles, p.tiles - first);
        transform_inputs(p, b, f, first, tiles);
        for (int o = bundles[0]; o < bundles[1]; ++o)
            for (int t = 0; t < tiles; ++t) {
                forward_planes(p, gradient_box(p, tile_place(p, first + t), b, o), f.rest);
                for (int p0 = 0; p0 < p.pencils; p0 += kFusedBlock) {
                    const int count = std::min(kFusedBlock, p.pencils - p0);
                    codelets(T).c2c(planes + 2 * p0, planes + 2 * p0 + 1, 2 * p.plane, 2, f.lines, f.lines + 1, 2, line, count);
                    for (int j = 0; j < count; ++j) {
                        const long at = (p0 + j) * f.sizes.pencil;
                        add(reinterpret_cast<const float*>(f.inputs + at) + t, f.lines + j * line, line, T,
                            f.sums + o * bundle + at);
                    }
                }
            }
    }
    V* out = vec(b.at(Buffer::update_spectra)) + long(chunk) * p.out_bundles * p.pencils * kernel;
    for (long i = long(bundles[0]) * p.pencils; i < long(bundles[1]) * p.pencils; ++i)
        kernel_line_inverse(p.axis[0], f.sums + i * f.sizes.pencil, 2, line, out + i * kernel, 2, 2 * p.axis[0].k, maps, f.lines);
}

}  // namespace znn::tiled::ZNN_VARIANT
