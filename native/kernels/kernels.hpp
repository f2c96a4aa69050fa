// Stateless loops on raw views, one table of functions per instruction set. No threads, no allocation of images here.
//
// Images are float32 [z][y][x][bundle] without gaps. All convolutions are cross-correlations: the engine stores kernels
// flipped (see docs/design.md). Arguments are validated at the border (bindings, engine), never here.
#pragma once
#include <cstddef>
#include <cstdint>

#include "base/extent.hpp"
#include "base/update_step.hpp"

namespace znn::kernels {

enum class Transfer : int { linear, relu, tanh, logistic };
enum class Loss : int { squared, binomial, softmax };

struct Table {
    const char* isa;  // "baseline" | "avx2" | "avx512"

    // ---- direct convolution of one image with one kernel (bundle 1), sparsity s
    // out[p] (+)= sum_j in[p + s j] w[j], out has extent n - s(k-1).
    void (*correlate)(const float* in, Extent n, const float* w, Extent k, Extent s, float* out, bool accumulate);
    // dw[j] (+)= sum_p in[p + s j] g[p], g has extent n - s(k-1).
    void (*correlate_gradient)(const float* in, Extent n, const float* g, Extent k, Extent s, float* dw, bool accumulate);

    // ---- moving boxes (bundle: floats per voxel)
    // dst (extent nd) at `offset` receives src (extent ns) if the source is the smaller one; the rest of dst is zeroed.
    void (*embed)(const float* src, Extent ns, float* dst, Extent nd, Extent offset, int bundle);
    // dst (extent nd) (+)= the box of src (extent ns) that begins at `offset`.
    void (*extract)(const float* src, Extent ns, float* dst, Extent nd, Extent offset, int bundle, bool accumulate);
    // Split an image into its s.z*s.y*s.x sub-lattices, each zero-padded to extent t (t >= ceil(n/s)):
    // out[(rz*s.y + ry)*s.x + rx][z][y][x] = in[z*s.z+rz][y*s.y+ry][x*s.x+rx].  Rows of out are `row` floats apart
    // (row >= t.x; the floats between t.x and row are left alone), sub-lattices `block` floats (block >= t.z*t.y*row).
    void (*split_sublattices)(const float* in, Extent n, Extent s, float* out, Extent t, int row, std::size_t block);
    // The inverse: out (extent n) (+)= scale * gathered sub-lattices (extent t, rows `row`, sub-lattices `block` floats apart).
    void (*merge_sublattices)(const float* in, Extent t, int row, std::size_t block, Extent s, float* out, Extent n, float scale,
                              bool accumulate);

    // ---- spectra: arrays of interleaved complex floats, `count` complex numbers per block, `blocks` blocks.
    // acc[b][i] (+)= a[b][i] * conj(w[i])          (forward: image times conjugate of the flipped kernel's spectrum)
    void (*spectral_multiply_conj)(const float* a, const float* w, float* acc, std::size_t blocks, std::size_t count, bool accumulate);
    // acc[b][i] (+)= a[b][i] * w[i]                (backward)
    void (*spectral_multiply)(const float* a, const float* w, float* acc, std::size_t blocks, std::size_t count, bool accumulate);
    // acc[i] = sum_b a[b][i] * conj(g[b][i])       (kernel gradient)
    void (*spectral_correlate)(const float* a, const float* g, float* acc, std::size_t blocks, std::size_t count);

    // ---- pointwise, over n floats
    bool (*all_finite)(const float* x, std::size_t n);  // neither NaN nor infinite
    void (*add)(float* dst, const float* src, std::size_t n);
    void (*scale)(float* dst, float factor, std::size_t n);
    // x = f(x + bias[i % bundle])
    void (*transfer_forward)(float* x, std::size_t n, const float* bias, int bundle, Transfer f);
    // g *= f'(y) where y is the transfer function's output; bias_gradient[i % bundle] = sum of g (accumulated in double).
    void (*transfer_backward)(float* g, const float* y, std::size_t n, int bundle, Transfer f, double* bias_gradient);
    // x *= mask (mask holds 0 or 1/(1-ratio))
    void (*multiply)(float* x, const float* mask, std::size_t n);
    // One step of the optimiser on n weights with their momenta and second moments (null: SGD).
    void (*update)(float* w, float* momenta, float* second_moments, const float* g, std::size_t n, UpdateStep step);

    // ---- max-filter and max-pool (bundle: floats per voxel). index[p] = flat voxel index (z*ny+y)*nx+x in the input of the
    // first maximum in z, y, x order, per float. A NaN in the window propagates as in PyTorch.
    // Sliding maximum: separable; per voxel and axis ceil(log2 w) comparisons for narrow windows, three for wide ones whatever
    // w (van Herk, Gil and Werman; the switch-over is measured, see pooling.cpp). out extent n - s(w-1), scratch: see
    // max_filter_scratch_bytes.
    void (*max_filter)(const float* in, Extent n, Extent w, Extent s, int bundle, float* out, std::int32_t* index, void* scratch);
    void (*max_pool)(const float* in, Extent n, Extent w, Extent stride, int bundle, float* out, std::int32_t* index);
    // gin[index[p]] += g[p] for p over `voxels` output voxels (gin zeroed by the caller).
    void (*max_backward)(const float* g, const std::int32_t* index, std::size_t voxels, int bundle, float* gin);
    // The same filter for windows of at most small_window voxels, by rows (z, y), the last fastest. Output rows [first_row,
    // last_row), with which out and place begin; place: the maximum's voxel in its window, in z, y, x order; null: not wanted.
    // `positive`: windows whose maximum is not positive have no place in the input, and small_max_filter_backward passes nothing
    // through them, as a ReLU before the filter would not.
    void (*small_max_filter)(const float* in, Extent n, Extent w, Extent s, int bundle, int first_row, int last_row, float* out,
                             std::int8_t* place, bool positive);
    // Input rows [first_row, last_row) of the gradient, written to gin, which begins with first_row.
    void (*small_max_filter_backward)(const float* g, const std::int8_t* place, Extent n, Extent w, Extent s, int bundle,
                                      int first_row, int last_row, float* gin);

    // ---- losses. Return the loss summed over the voxels (double); y, target, gradient: n floats of one map.
    // weight: n floats or null. gradient = d loss / d y.
    double (*loss_squared)(const float* y, const float* target, const float* weight, float* gradient, std::size_t n);
    double (*loss_binomial)(const float* y, const float* target, const float* weight, float* gradient, std::size_t n);
    // softmax over `maps` images of n voxels each (arrays of pointers), targets are probabilities per map.
    double (*loss_softmax)(const float* const* y, const float* const* target, const float* weight, float* const* gradient,
                           int maps, std::size_t n);

    // ---- short transforms: discrete Fourier transforms along one axis of which only k of t values are given or wanted,
    // as small products with tables of cosines and sines (see short_transform.hpp). m: complex numbers per line.
    // out[f][i] = sum_{j<k} in[j][i] exp(-2 pi i f j / t), f < t.   table[f][j] = {cos, sin}(2 pi f j / t), f <= t/2.
    void (*dft_expand)(const float* in, std::size_t in_stride, int k, std::size_t m, float* out, std::size_t out_stride, int t,
                       const float* table);
    // out[j][i] = sum_{f<t} in[f][i] exp(+2 pi i f j / t), j < k.
    void (*dft_reduce)(const float* in, std::size_t in_stride, int t, std::size_t m, float* out, std::size_t out_stride, int k,
                       const float* table);
    // rows of k reals -> rows of `floats` interleaved floats: out[r] = sum_j in[r][j] basis[j]; and the transpose of it.
    void (*rows_expand)(const float* in, std::size_t rows, int k, const float* basis, std::size_t floats, float* out);
    void (*rows_reduce)(const float* in, std::size_t rows, std::size_t floats, const float* basis, int k, float* out);
};

constexpr int small_window = 8;  // voxels

// Bytes of scratch max_filter needs, aligned like a float.
std::size_t max_filter_scratch_bytes(Extent n, Extent w, Extent s, int bundle);

// The table of one instruction set, or null if it is unknown, not built or cannot run on this processor.
const Table* table_for(const char* isa);

// The table of the best instruction set this processor runs, or the one forced by ZNN_ISA=baseline|avx2|avx512.
// Throws std::runtime_error naming the value when ZNN_ISA is unknown or cannot run here.
const Table& table();

}  // namespace znn::kernels
