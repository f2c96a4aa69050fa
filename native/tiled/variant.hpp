// What every translation unit of one code path shares. A code path (variant) is one instruction set and one bundle width;
// the build compiles the same sources once per variant with ZNN_VARIANT (a namespace name) and ZNN_V (lanes) defined.
#pragma once
#include "tiled/layout.hpp"
#include "tiled/tiled.hpp"
#include "tiled/vectors.hpp"

namespace znn::tiled::ZNN_VARIANT {

// Bytes to integers and back. By way of shorts: compilers take the direct way element by element.
ZNN_INLINE VI load_bytes(const std::int8_t* p) {
    return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const VB*>(p), VS), VI);
}
ZNN_INLINE void store_bytes(VI x, std::int8_t* p) {
    *reinterpret_cast<VB*>(p) = __builtin_convertvector(__builtin_convertvector(x, VS), VB);
}

void run_tiled(const LayerPlan& plan, Phase phase, int index, const Buffers& b, float* scratch);
void run_direct(const LayerPlan& plan, Phase phase, int index, const Buffers& b, float* scratch);

// Floats from voxel to voxel of the input.
inline long input_step(const Buffers& b) { return b.packed_input ? 1 : kV; }

// depthwise.cpp: those phases of the direct method that are its own.
void run_depthwise(const LayerPlan& plan, Phase phase, int index, const Buffers& b, float* scratch);

// transform.cpp
// The box of an image that belongs to a tile: where it begins, how much of it exists, at which tile position it lies.
struct Box {
    const float* origin;
    long step[3];  // vectors
    int count[3], at[3];
    const std::int8_t* largest = nullptr;  // of a pooled gradient: Buffers::largest from the origin on; steps are pooled ones
};
Box input_box(const LayerPlan& plan, const TilePlace& place, const float* image, long voxel_floats = kV);
Box output_box(const LayerPlan& plan, const TilePlace& place, const float* image);
Box gradient_box(const LayerPlan& plan, const TilePlace& place, const Buffers& b, int bundle);
// A tile's spectrum, pencils `pencil` vectors apart, of which a part is fetched into L2 with each plane of `planes` that is worked
// on before it is written or read: its lines are too far apart for the processor to foresee.
struct Ahead {
    const V* spectrum = nullptr;
    long pencil = 0;
    void fetch(const LayerPlan& plan, int plane, int planes) const;
};
// Spectra of one tile: pencils `out_line` vectors apart.
void forward_tile(const LayerPlan& plan, const Box& box, V* out, long out_line, float* scratch);
// All of it but the last transform, that of the lines: [i0][pencil] of the first `planes` at the beginning of scratch, 2 plan.plane
// apart.
void forward_planes(const LayerPlan& plan, const Box& box, int planes, float* scratch, Ahead ahead = {});
// Inverse of a tile whose lines are done, from [i0][pencil] at the beginning of scratch to the output.
void finish_output_tile(const LayerPlan& plan, const TilePlace& place, const Buffers& b, int bundle, float* scratch, Ahead ahead = {});
void write_output_tile(const LayerPlan& plan, const TilePlace& place, const Buffers& b, int bundle, const V* spectra,
                       long in_line, float* scratch);

// fused.cpp
void transform_fused(const LayerPlan& plan, int index, const Buffers& b, float* scratch);
void forward_fused(const LayerPlan& plan, int index, const Buffers& b, float* scratch);
void update_fused(const LayerPlan& plan, int index, const Buffers& b, float* scratch);

// product.cpp
// Pencils [p0, p1) of one slab.
void product(const LayerPlan& plan, bool forward, int index, const Buffers& b, float* scratch);
void update_product(const LayerPlan& plan, int index, const Buffers& b, float* scratch);

// turned[lane of out bundle o][tap], lanes input maps: the kernels between two bundles with their maps exchanged.
void transpose_kernels(const LayerPlan& plan, const Buffers& b, int o, int in_bundle, V* turned);

// epilogue.cpp
// dst[i] = f(src[i] + bias [+ dst[i]]) for `count` voxels `step` vectors apart in dst.
void finish_forward(const V* src, V* dst, long step, long count, const float* bias, Transfer f, bool accumulate);
// g[i] *= f'(y[i]), voxels `step` vectors apart in both.
void apply_derivative(V* g, const V* y, long step, long count, Transfer f);
// Weights of (out bundle o, in map i), all taps: gradient g[taps] -> kernel_gradient and / or SGD. Padded lanes become 0.
void finish_update(const LayerPlan& plan, const Buffers& b, int o, int i, const V* g);
// out[j] lane i = in[i * in_step] lane j.
void transpose_block(const V* in, long in_step, V* out, long out_step);

}  // namespace znn::tiled::ZNN_VARIANT
