// Convolution layers on bundles of maps: tiled FFT (overlap-save) and register-blocked direct methods. Fully connected, or
// depthwise (map i to map i), which is direct only.
//
// Stateless: a LayerPlan is worked out once from the layer's shape; a round is then a number of *pieces* per phase, each a
// plain function call on raw buffers. Pieces of one phase own disjoint outputs, so they run in any order on any threads;
// the phases of one layer depend on each other as listed at Phase. No threads, no allocation, no locks in here.
//
// Layouts, all float32, V = plan.bundle maps innermost:
//   image            [bundle][z][y][x][V], no gaps inside a bundle; bundles `*_stride` floats apart; 64-byte aligned.
//                    Lanes beyond the last map must hold finite numbers; they are never mixed into others.
//   kernels          [out bundle][in map][kz][ky][kx][V]   lanes are output maps, zero beyond the last one;
//                    depthwise: one input map each
//   bias             [out bundle][V]
// The layer cross-correlates: out[p] = sum_j x[p + s j] w[j] (docs/design.md). Method: overlap-save convolution (Stockham
// 1966) with the maps as the inner index of a complex matrix product per frequency.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/extent.hpp"
#include "base/update_step.hpp"

namespace znn::tiled {

enum class Method { tiled, direct };
enum class Transfer : int { linear, relu, tanh, logistic };  // the same values as kernels::Transfer

struct Problem {
    int in_maps = 0, out_maps = 0;
    Extent input, kernel, sparsity{1, 1, 1};
    // Max-pooling of the output by disjoint windows, or max-filtering (`filter`) by one at every voxel, of the same sparsity, done
    // where the output is written: of it exist only the maxima, and which voxel of a window was the largest. Monotone transfer
    // functions and biases may as well come after it.
    Extent pool{1, 1, 1};
    bool depthwise = false, filter = false;

    int fan_in() const { return depthwise ? 1 : in_maps; }  // maps that one output map is made of
    int fan_out() const { return depthwise ? 1 : out_maps; }
    // What is left of an output.
    Extent pooled(Extent m) const {
        return filter ? valid_extent(m, pool, sparsity) : Extent{m.z / pool.z, m.y / pool.y, m.x / pool.x};
    }
};

// What must be complete before a phase's pieces may start: all pieces of the phases named, of the same slab.
//
// Slabs. Layers whose spectra outgrow L3 are cut into slabs of tiles; a phase's pieces are numbered slab by slab
// (first_piece) and are best run so: transform, product, inverse of slab 0, then of slab 1. There is room for the spectra of
// plan.passing_slabs slabs, where slab i overwrites slab i - passing_slabs; so the update_product of a slab comes before the
// gradient_transform of the one that takes its place. Only the spectra of inputs are kept from forward to update: there is
// room for plan.kept_slabs of them. With kept_slabs < slabs they are not memoized; run the input_transform pieces of a slab
// again before its update_product.
enum class Phase : int {
    kernels_forward,     // weights -> Buffer::kernels_forward
    kernels_backward,    // weights -> Buffer::kernels_backward (maps exchanged)
    input_transform,     // input -> input_spectra
    forward_product,     // input_transform, kernels_forward -> output_spectra
    forward_inverse,     // forward_product -> output (+ bias, transfer function)
    gradient_transform,  // output_gradient -> gradient_spectra
    backward_product,    // gradient_transform, kernels_backward -> input_gradient_spectra
    backward_inverse,    // backward_product -> input_gradient, halo
    backward_join,       // all of backward_inverse -> input_gradient (adds the overlaps, applies the derivative)
    update_product,      // input_transform, gradient_transform, update_product of the slab before -> update_spectra
    update_inverse,      // all of update_product -> kernel_gradient and / or weights (whose phases above must be over)
};
inline constexpr int kPhases = 11;

// Work space. A buffer may be shared by layers or phases whose lives do not overlap; output_spectra and
// input_gradient_spectra live only from product to inverse.
enum class Buffer : int {
    kernels_forward, kernels_backward, input_spectra, output_spectra, gradient_spectra, input_gradient_spectra, halo,
    update_spectra,
};
inline constexpr int kBuffers = 8;
inline constexpr std::size_t shared_sums_bytes = std::size_t{4} << 20;  // update_spectra from here on are shared by layers

struct Buffers {
    const float* input = nullptr;
    std::size_t input_stride = 0;  // floats from bundle to bundle
    bool packed_input = false;         // [z][y][x], one map without the rest of its bundle; only where packs_input(plan)
    float* output = nullptr;           // pooled where the problem pools, and so is output_gradient
    std::size_t output_stride = 0;
    std::int8_t* largest = nullptr;    // pooled: voxel of each window, as many bytes as output has floats; written forward, read
                                       // backward, in an order of the method's own; may be null for inference
    // Filtered, and f a ReLU of the maxima and biases alone: maxima that it makes zero have no voxel, so that their gradient goes
    // nowhere and need not be multiplied with the derivative.
    bool note_positive = false;
    // Then the sums of the gradients that do go somewhere, [out bundle][part][V], bias_parts of them: by gradient_transform, or by
    // update_product of the direct method. May be null.
    double* bias_sums = nullptr;
    const float* output_gradient = nullptr;
    std::size_t output_gradient_stride = 0;
    float* input_gradient = nullptr;
    std::size_t input_gradient_stride = 0;

    float* kernels = nullptr;          // changed only by update_inverse, and only where `update` is set
    float* momenta = nullptr;          // as kernels; may be null where step.momentum is 0
    float* second_moments = nullptr;   // as kernels; Adam's, null: SGD
    float* kernel_gradient = nullptr;  // as kernels; written by update_inverse where not null
    bool update = false;
    UpdateStep step;

    // Forward: output = f(convolution + bias [+ output]).
    const float* bias = nullptr;
    Transfer transfer = Transfer::linear;
    bool accumulate_output = false;
    // Backward: input_gradient = (transposed convolution [+ input_gradient]) * f'(activation), where `activation` is the
    // input node's image (stride input_stride) and f its transfer function; null: no derivative.
    const float* activation = nullptr;
    Transfer activation_transfer = Transfer::linear;
    bool accumulate_input_gradient = false;

    bool keep = true;            // the input's spectra, for the update; false: they pass like the others

    float* work[kBuffers] = {};  // each 64-byte aligned, buffer_bytes() long
    float* at(Buffer b) const { return work[int(b)]; }
};

// One axis of a tiled layer, in the plan's order (0: lines inside a pencil, 1: middle, 2: real-to-complex).
struct Axis {
    int n = 1, m = 1, k = 1, s = 1;              // input, output, kernel extents, sparsity
    int T = 1, M = 1;                            // tile extent, outputs per tile
    int residues = 1, tiles = 1;                 // sub-lattices that have outputs, tiles of each
    int center = 0;                              // position of kernel tap 0 is -center
    int pool = 1, pool_step = 1;                 // window of the pooling of the output, and from one to the next
    long in_step = 1, out_step = 1, kernel_step = 1;  // voxels from one index to the next (output: after pooling)
    std::vector<float> cosines, sines;           // [T/2+1][k/2] for kernels short enough to be table-driven, else empty

    int outputs(int residue) const { return residue < m ? (m - residue + s - 1) / s : 0; }
    int inputs(int residue) const { return residue < n ? (n - residue + s - 1) / s : 0; }
    bool table() const { return !cosines.empty(); }
    int frequencies() const { return T / 2 + 1; }
    // Windows among so many outputs.
    int windows(int outputs) const { return outputs < pool ? 0 : (outputs - pool) / pool_step + 1; }
    // Where a sub-lattice's windows begin, one sub-lattice after the other.
    int windows_before(int residue) const {
        int count = 0;
        for (int r = 0; r < residue; ++r) count += windows(outputs(r));
        return count;
    }
    // Windows of `length` outputs: none lies in two tiles.
    void pool_by(int length, bool filter) {
        pool = length;
        pool_step = filter ? 1 : length;
        if (tiles == 1 || filter) return;
        M -= M % length;
        tiles = (outputs(0) + M - 1) / M;
    }
};

struct LayerPlan {
    Problem problem;
    Method method = Method::direct;
    Extent tile;                                 // {0,0,0} for direct
    Extent output;
    int bundle = 8, in_bundles = 0, out_bundles = 0;

    // ---- tiled
    Axis axis[3];
    int order[3] = {0, 1, 2};                    // axis a of the plan is axis order[a] of (z, y, x)
    int tiles = 0, tiles_per_slab = 0, slabs = 1;
    int kept_slabs = 1, passing_slabs = 1;       // slabs there is room for, see Phase
    int tiles_per_strip = 0, strips = 0, split = 0;  // a strip: one sub-lattice, one tile index along axis `split`
    int pencils = 0;                             // (f2, f1) pairs kept; the rest follow by symmetry
    long line = 0;                               // complex vectors from tile to tile in spectra (odd, >= T0)
    long in_pencil = 0, out_pencil = 0;          // floats from pencil to pencil
    std::size_t in_slab = 0, out_slab = 0;       // floats from slab to slab
    bool streams = false;                        // a slab's spectra outgrow L3, with kernels': they are written past it
    long plane = 0;                              // complex vectors of a plane of pencils in scratch
    int transform_tiles = 1, product_pencils = 1, kernel_maps_in = 1, kernel_maps_out = 1;
    // Into how many pieces the products of one pencil are cut, by bundles of what comes out.
    int forward_parts = 1, backward_parts = 1, sums_parts = 1;
    bool fused = false;                          // few input maps: their spectra are the only ones in forward and update
    // Tiles taken together; pieces of one such group (in the update: of a chunk), by output bundles and (only forward) by tiles.
    int fused_tiles = 1, fused_parts = 1, update_parts = 1;
    bool shares_inputs = false;                  // fused: spectra of inputs are in memory for all parts and the update
    int input_parts = 1;                         // pieces of their transform for one group of tiles, by planes
    int chunk_out = 1, chunk_in = 1;             // bundles whose expanded kernels fit in L2 together

    // ---- direct
    int rows_forward = 1, rows_backward = 1;     // (z, y) rows per piece
    int group_out = 1, group_in = 1;             // bundles per register block
    int group_sums = 1;                          // and of outputs (few outputs: of inputs) per piece of the update
    int update_chunks = 1;                       // parts of the output whose kernel gradients are summed apart
    int filter_runs = 1, filter_parts = 1;       // of a filtered single map: runs of rows, and parts of the planes of each
    int patch_voxels = 192;                      // of the output, in L1 while kernel gradients are summed over them
    bool few_outputs = false;                    // lanes are input maps, sums taken across them

    int pieces[kPhases] = {};                    // of all slabs together, slab by slab
    std::size_t scratch = 0;

    int first_pencil(int f2) const {             // of frequency f2 of axis 2
        return f2 == 0 ? 0 : axis[1].T / 2 + 1 + (f2 - 1) * axis[1].T;
    }
    bool pools() const { return problem.pool.volume() > 1; }
    bool filters() const { return pools() && problem.filter; }
    // Whether the update needs no images of the input, once all input_transforms are kept.
    bool updates_from_spectra() const { return method == Method::tiled && (!fused || shares_inputs); }
    bool self_conjugate(int f2) const { return f2 == 0 || 2 * f2 == axis[2].T; }
    // Where a slab's spectra begin, floats.
    std::size_t input_place(int slab, bool keep) const {
        return std::size_t(slab % (keep ? kept_slabs : passing_slabs)) * in_slab;
    }
    std::size_t passing_in(int slab) const { return std::size_t(slab % passing_slabs) * in_slab; }
    std::size_t passing_out(int slab) const { return std::size_t(slab % passing_slabs) * out_slab; }
    int slab_tiles(int slab) const {
        const int left = tiles - slab * tiles_per_slab;
        return left < tiles_per_slab ? left : tiles_per_slab;
    }
};

// Bytes of L2 as the system tells, kept within what one core has to itself on the processors there are; else a guess.
std::size_t l2_cache_bytes();

struct Machine {
    std::size_t l2_bytes = l2_cache_bytes();
    std::size_t l3_bytes = 32 << 20;  // that count on: others share it
    double piece_s = 1e-4;  // aimed-at duration of a piece
    int workers = 2;        // that share a layer: the more, the smaller its pieces
    // Constants of the cost model, see machine.hpp. Operations per second: of products, of direct convolution, of tiles'
    // transforms, of kernels' short lines by table and of their longer ones by codelet.
    double product_flops = 75e9, direct_flops = 75e9, transform_flops = 60e9, expand_flops = 45e9, line_flops = 20e9;
    // Bytes per second: of images from memory, of spectra between transforms and L3, of expanded kernels from L2.
    double memory_bytes = 12e9, spectra_bytes = 10e9, expanded_bytes = 40e9;
    double spill = 1.35;  // how much longer transforms take whose scratch outgrows L2
    double fused = 1.5;   // and the fused pipeline than its parts by themselves
    double gather = 3e-9;  // seconds in which a vector of tiles' voxels is put together for that pipeline, and turned back
};

// Bundle widths this processor's code path has (8; on AVX-512 also 16), and its name: baseline | avx2 | avx512.
// ZNN_ISA forces the path; std::runtime_error where its value is unknown or cannot run here.
const char* isa();
bool has_bundle(int bundle);

// Whether run_piece takes the input packed: a single map, as data comes.
bool packs_input(const LayerPlan& plan);

// Extents that have a codelet: 1 to 32, 40, 48, ..., 128.
bool has_transform(int extent);
// Tile extents worth a trial per axis (kernel < T <= codelet limit, nothing larger than the image needs), cheapest first by
// the cost model; at most `count`, none for depthwise layers. `backward`: the input's gradient is wanted; `fused`: for plan_fused.
std::vector<Extent> candidate_tiles(const Problem& problem, int bundle, const Machine& machine, int count,
                                    bool backward = true, bool fused = false);

// std::invalid_argument where the problem is empty, the kernel does not fit, the bundle is not supported or a tile extent
// has no transform or is smaller than the kernel, or where a depthwise layer is not to be direct or changes its maps.
// `memoize`: keep all spectra of inputs and output gradients for the update, else those of two slabs.
LayerPlan plan_tiled(const Problem& problem, int bundle, Extent tile, const Machine& machine = {}, bool memoize = true);
LayerPlan plan_direct(const Problem& problem, int bundle, const Machine& machine = {});

// The same for few input maps (at most 4), with tiles taken through all of forward (or update) at once: forward_product has
// no pieces, and neither has input_transform, unless more workers share the layer than it has groups of tiles for and
// `memoize` allows to keep the input's spectra: then parts of a group, and the update, find them there. The backward phases
// are as in plan_tiled; a layer that needs no input gradient does without their buffers.
LayerPlan plan_fused(const Problem& problem, int bundle, Extent tile, const Machine& machine = {}, bool memoize = true);

// Whether a layer planned without pooling could pool or filter its output by these windows (Problem::pool): no window may be cut
// by a tile's border, and every voxel must lie in one. Depthwise layers cannot. Fused ones do not filter, nor direct ones but those of
// a single map; and windows may have so many voxels at most: of larger ones the axes are better filtered one after the other.
inline constexpr int most_filtered = 8;
bool can_pool(const LayerPlan& plan, Extent window, bool filter = false);
// In how many parts it sums the gradients of a bundle of biases: see Buffers::bias_sums.
int bias_parts(const LayerPlan& plan);

std::size_t buffer_bytes(const LayerPlan& plan, Buffer buffer);
inline std::size_t scratch_bytes(const LayerPlan& plan) { return plan.scratch; }  // per worker, 64-byte aligned
std::size_t kernel_floats(const LayerPlan& plan);
inline int piece_count(const LayerPlan& plan, Phase phase) { return plan.pieces[int(phase)]; }
// The first piece of a slab (slab == plan.slabs: the end). Kernel phases, joins and update_inverse are not cut: all of
// their pieces count as slab 0.
int first_piece(const LayerPlan& plan, Phase phase, int slab);

// Carries out one piece. Arguments are trusted.
void run_piece(const LayerPlan& plan, Phase phase, int index, const Buffers& buffers, float* scratch);

// Predicted seconds on one core per phase, kernel transforms included.
struct Cost {
    double phase[kPhases] = {};
    double forward() const, backward() const, update() const;
    double total() const { return forward() + backward() + update(); }
};
Cost predict(const LayerPlan& plan, const Machine& machine);
// The same for a layer whose input's gradient may not be wanted: phases that do not take part cost nothing.
Cost predict(const LayerPlan& plan, const Machine& machine, bool backward);
bool takes_part(const LayerPlan& plan, Phase phase, bool backward);

}  // namespace znn::tiled
