// Layers with few input maps: a few tiles at a time go through transform, product and inverse (or through both transforms
// and into the sums of the kernel gradient) without leaving the caches. Spectra of the whole layer never exist.
#include <algorithm>

#include "tiled/layout.hpp"
#include "tiled/short_transforms.hpp"
#include "tiled/variant.hpp"

namespace znn::tiled::ZNN_VARIANT {
namespace {

// A group's spectra of its inputs, spectra of one output bundle, and the scratch of whatever works on them.
struct FusedScratch {
    FusedSizes sizes;
    V *inputs, *outputs, *sums;
    float* rest;

    FusedScratch(const LayerPlan& p, float* scratch) : sizes(p) {
        inputs = vec(scratch);
        outputs = inputs + sizes.inputs;
        sums = outputs + sizes.outputs;
        rest = reinterpret_cast<float*>(sums + sizes.sums);
    }
};

void transform_inputs(const LayerPlan& p, const Buffers& b, const FusedScratch& f, int first, int tiles) {
    for (int bundle = 0; bundle < p.in_bundles; ++bundle)
        for (int t = 0; t < tiles; ++t)
            forward_tile(p, input_box(p, tile_place(p, first + t), b.input + bundle * b.input_stride),
                         f.inputs + (bundle * tiles + t) * 2 * p.line, f.sizes.in_pencil, f.rest);
}

}  // namespace

void forward_fused(const LayerPlan& p, int index, const Buffers& b, float* scratch) {
    const FusedScratch f(p, scratch);
    const int last = std::min(p.tiles, (index + 1) * p.fused_tiles);
    for (int first = index * p.fused_tiles; first < last; first += kFusedTiles) {
        const int tiles = std::min(kFusedTiles, last - first);
        transform_inputs(p, b, f, first, tiles);
        for (int o = 0; o < p.out_bundles; ++o) {
            forward_pencils(p, b, tiles, {reinterpret_cast<float*>(f.inputs), f.sizes.in_pencil * kV},
                            {reinterpret_cast<float*>(f.outputs), f.sizes.out_pencil * kV}, 0, p.pencils, o, o + 1, f.rest);
            for (int t = 0; t < tiles; ++t)
                write_output_tile(p, tile_place(p, first + t), b, o, f.outputs + t * 2 * p.line, f.sizes.out_pencil, f.rest);
        }
    }
}

// One chunk of the tiles: sums[out bundle][pencil][map][line], at the end inverted along axis 0.
void update_fused(const LayerPlan& p, int index, const Buffers& b, float* scratch) {
    const FusedScratch f(p, scratch);
    const int maps = p.problem.in_maps, T = p.axis[0].T;
    const int begin = int(long(index) * p.tiles / p.update_chunks), last = int(long(index + 1) * p.tiles / p.update_chunks);
    const long line = 2 * p.line, bundle = p.pencils * maps * line;
    std::fill_n(f.sums, p.out_bundles * bundle, V{});
    for (int first = begin; first < last; first += kFusedTiles) {
        const int tiles = std::min(kFusedTiles, last - first);
        transform_inputs(p, b, f, first, tiles);
        for (int o = 0; o < p.out_bundles; ++o) {
            for (int t = 0; t < tiles; ++t)
                forward_tile(p, output_box(p, tile_place(p, first + t), b.output_gradient + o * b.output_gradient_stride),
                             f.outputs + t * line, f.sizes.out_pencil, f.rest);
            for (int pencil = 0; pencil < p.pencils; ++pencil) {
                const V* g = f.outputs + pencil * f.sizes.out_pencil;
                for (int i = 0; i < maps; ++i) {
                    const float* x = reinterpret_cast<const float*>(f.inputs + pencil * f.sizes.in_pencil +
                                                                    i / kV * tiles * line) + i % kV;
                    V* sum = f.sums + o * bundle + (long(pencil) * maps + i) * line;
                    for (int v = 0; v < T; ++v) {
                        V re = sum[2 * v], im = sum[2 * v + 1];
                        for (int t = 0; t < tiles; ++t) {
                            const V gr = g[t * line + 2 * v], gi = g[t * line + 2 * v + 1];
                            const float xr = x[(t * line + 2 * v) * kV], xi = x[(t * line + 2 * v + 1) * kV];
                            re += xr * gr, re += xi * gi;
                            im += xi * gr, im -= xr * gi;
                        }
                        sum[2 * v] = re, sum[2 * v + 1] = im;
                    }
                }
            }
        }
    }
    const long kernel = kernel_pencil(p, maps);
    V* out = vec(b.at(Buffer::update_spectra)) + long(index) * p.out_bundles * p.pencils * kernel;
    for (long i = 0; i < long(p.out_bundles) * p.pencils; ++i)
        kernel_line_inverse(p.axis[0], f.sums + i * maps * line, 2, line, out + i * kernel, 2, 2 * p.axis[0].k, maps,
                            vec(f.rest));
}

}  // namespace znn::tiled::ZNN_VARIANT
