// What every translation unit of one code path shares. A code path (variant) is one instruction set and one bundle width;
// the build compiles the same sources once per variant with ZNN_VARIANT (a namespace name) and ZNN_V (lanes) defined.
#pragma once
#include "tiled/layout.hpp"
#include "tiled/tiled.hpp"
#include "tiled/vectors.hpp"

namespace znn::tiled::ZNN_VARIANT {

// Bytes to integers and back: where there are instructions for it, compilers do not find them; else by way of shorts, as they take
// the direct way element by element.
ZNN_INLINE VI load_bytes(const std::int8_t* p) {
#if defined(__AVX512F__) && ZNN_V == 16
    return reinterpret_cast<VI>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__) && ZNN_V == 8
    return reinterpret_cast<VI>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const VB*>(p), VS), VI);
#endif
}
ZNN_INLINE void store_bytes(VI x, std::int8_t* p) {
#if defined(__AVX512F__) && ZNN_V == 16
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(x)));
#elif defined(__AVX512F__) && ZNN_V == 8
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm256_cvtepi32_epi8(reinterpret_cast<__m256i>(x)));
#else
    *reinterpret_cast<VB*>(p) = __builtin_convertvector(__builtin_convertvector(x, VS), VB);
#endif
}
#if defined(__AVX512F__) && ZNN_V == 8
ZNN_INLINE void store_bytes(XI x, std::int8_t* p) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(x)));
}
#endif

void run_tiled(const LayerPlan& plan, Phase phase, int index, const Buffers& b, float* scratch);
void run_direct(const LayerPlan& plan, Phase phase, int index, const Buffers& b, float* scratch);

// Where the bytes of maxima from `at` on go: null for inference.
inline std::int8_t* notes_at(std::int8_t* largest, std::ptrdiff_t at) { return largest ? largest + at : nullptr; }

// Floats from voxel to voxel of the input.
inline long input_step(const Buffers& b) { return b.packed_input ? 1 : kV; }

// depthwise.cpp: those phases of the direct method that are its own.
void run_depthwise(const LayerPlan& plan, Phase phase, int index, const Buffers& b, float* scratch);

// single.cpp: the same of a single map that comes in.
void forward_single(const LayerPlan& plan, int index, const Buffers& b, float* scratch);
void update_single(const LayerPlan& plan, int index, const Buffers& b, float* scratch);

// transform.cpp
// The box of an image that belongs to a tile: where it begins, how much of it exists, at which tile position it lies.
struct Box {
    const float* origin;
    long step[3];  // vectors
    int count[3], at[3];
    // Pooled: where in Buffers::largest its bytes are (sub-lattice after sub-lattice, so that they lie together), vectors of bytes.
    long notes = 0, note_step[3] = {0, 0, 0};
    const std::int8_t* largest = nullptr;  // of a pooled gradient, from there on; steps are pooled ones
    double* sums = nullptr;                // filtered: to which a bundle's gradients are added
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
// A row of `count` voxels of a bundle's maps, each in a row of its own `pitch` floats after the one before, and back. `out` is
// written, and maps' rows are read and, with zeros, written, up to a multiple of kX voxels.
void bundle_row(const float* maps, long pitch, int count, V* out);
void unbundle_row(const V* in, int count, float* maps, long pitch);
// Lane i: the sum of the kX floats from rows + i * kX on.
V sum_lanes(const float* rows);

// A row of windows of w1 rows, `row` vectors apart, by w2 voxels: pairs of their maxima and of which voxel of the window that was,
// as an integer. `first`: the number of the first voxel; other than 0, the maxima so far are there.
void pool_row(const V* in, long row, int w1, int w2, int first, int count, V* maxima);
// The maxima of such pairs, and bytes for their voxels, unless `largest` is null.
void take_maxima(const V* pairs, long count, V* maxima, std::int8_t* largest, long step = 1);
// And back: `count` gradients, `step` vectors apart, to the voxels that were the largest; zero to the others.
// Bytes are `note_step` apart.
void spread_row(const V* g, long step, const std::int8_t* largest, long note_step, int count, int w1, int w2, int first, V* out, long row);
// Where to note which voxel was a window's largest, in bytes `step` vectors apart (null: nowhere); with a bias only where a maximum is
// positive together with that, else -1.
struct Notes {
    std::int8_t* largest;
    long step;
    const V* bias;
};
// A row of windows that begin at every voxel, of all rows given by w2 voxels: their maxima.
void filter_row(const V* const* rows, int row_count, int w2, int count, V* maxima, Notes notes);
// A filtered gradient: `count` windows along each axis, and vectors, of floats and of bytes, from one to the next.
struct FilteredGradient {
    const V* g;
    const std::int8_t* largest;
    int window[3], count[3];
    long step[3], note_step[3];
};
// Row y of plane z of the outputs: what windows of several rows and planes give the voxels that were their largest. Added to `sums`,
// where they are not null, of each map.
void collect_row(const FilteredGradient& gradient, int z, int y, V* out, double* sums);
// That of the direct method.
FilteredGradient filtered_gradient(const LayerPlan& plan, const Buffers& b, int bundle);

}  // namespace znn::tiled::ZNN_VARIANT
