// Depthwise convolution on bundles, map i to map i: one multiply-add of vectors per voxel and tap does all lanes. Blocks of a
// row's voxels (kernel gradient: of taps) stay in registers; what they are multiplied with is loaded once for all of them.
//
// The forward pass reads the parameters where they are, [bundle][tap][V]; the backward pass has a copy with x reversed.
#include <algorithm>

#include "tiled/layout.hpp"
#include "tiled/variant.hpp"

namespace znn::tiled::ZNN_VARIANT {
namespace {

#if defined(__AVX2__)
constexpr int kTaps = 14;  // of a block; with a gradient, all 16 registers but one
// The same of voxels, by the number of x taps that a block is made for (0: any). Short ones leave registers to the weights.
constexpr int most_voxels(int nx) { return nx == 0 ? 14 : nx == 7 ? 12 : 8; }
#else
constexpr int kTaps = 6;   // a vector takes two registers
constexpr int most_voxels(int) { return 6; }
#endif
constexpr int kTapsAcross = 7;  // most x taps of a block

// The taps that a row of voxels sees; steps in vectors. A kernel's x taps are consecutive.
struct Walk {
    int nz, ny, nx;
    long z, y, x;   // steps of the image
    long w_z, w_y;  // steps of the kernel
};

// NX: the x taps, a voxel apart, so that voxels loaded for one serve the next; 0: any number and sparsity.
template <int R, int NX>
void convolve_block(const Walk& k, const V* in, const V* kernel, V* out) {
    V sum[R];
    clear(sum);
    for (int jz = 0; jz < k.nz; ++jz)
        for (int jy = 0; jy < k.ny; ++jy) {
            const V* at = in + jz * k.z + jy * k.y;
            const V* w = kernel + jz * k.w_z + jy * k.w_y;
            const auto add = [&](const V* voxels, V weight) {
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) sum[r] += voxels[r] * weight;
            };
            if constexpr (NX > 0) {
#pragma GCC unroll 8
                for (int jx = 0; jx < NX; ++jx) add(at + jx, w[jx]);
            } else {
                for (int jx = 0; jx < k.nx; ++jx, at += k.x) add(at, w[jx]);
            }
        }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) out[r] = sum[r];
}

using RowBlock = void (*)(const Walk&, const V*, const V*, V*);

template <int NX, int R = 1>
RowBlock row_block(int voxels) {
    if constexpr (R < most_voxels(NX)) {
        if (voxels > R) return row_block<NX, R + 1>(voxels);
    }
    return convolve_block<R, NX>;
}

// A row of voxels in nearly equal blocks.
template <int NX>
void convolve_blocks(const Walk& k, const V* in, const V* kernel, int voxels, V* out) {
    const int blocks = ceil_div(voxels, most_voxels(NX)), each = voxels / blocks, larger = voxels % blocks;
    const RowBlock even = row_block<NX>(each), more = row_block<NX>(each + (larger > 0));
    for (int i = 0; i < blocks; ++i) {
        const int r = i < larger ? each + 1 : each;
        (i < larger ? more : even)(k, in, kernel, out);
        in += r, out += r;
    }
}

void convolve_row(const Walk& k, const V* in, const V* kernel, int voxels, V* out) {
    switch (k.x == 1 ? k.nx : 0) {
        case 3: return convolve_blocks<3>(k, in, kernel, voxels, out);
        case 5: return convolve_blocks<5>(k, in, kernel, voxels, out);
        case 7: return convolve_blocks<7>(k, in, kernel, voxels, out);
        default: return convolve_blocks<0>(k, in, kernel, voxels, out);
    }
}

// Where a row of an image begins, in voxels, and how long it is.
struct Row {
    long start;
    int voxels;
    Row(const LayerPlan& p, Extent image, int row)
        : start(long(row) * (is_pointwise(p) ? kRowVoxels : image.x)),
          voxels(is_pointwise(p) ? int(std::min<long>(kRowVoxels, long(image.volume()) - start)) : image.x) {}
};

void forward(const LayerPlan& p, int index, const Buffers& b, float* scratch) {
    const Extent n = p.problem.input, k = p.problem.kernel, s = p.problem.sparsity, m = p.output;
    const int bundle = index % p.out_bundles, first = index / p.out_bundles * p.rows_forward;
    const int last = std::min(row_count(p, m), first + p.rows_forward);
    const Walk walk{k.z, k.y, k.x, long(s.z) * n.y * n.x, long(s.y) * n.x, s.x, long(k.y) * k.x, k.x};
    const V* image = vec(b.input + bundle * b.input_stride);
    const V* kernel = vec(b.kernels) + bundle * long(k.volume());
    V* output = vec(b.output + bundle * b.output_stride);
    V* sums = vec(scratch);
    for (int i = first; i < last; ++i) {
        const Row row(p, m, i);
        const long from = is_pointwise(p) ? row.start : (long(i / m.y) * n.y + i % m.y) * n.x;
        convolve_row(walk, image + from, kernel, row.voxels, sums);
        finish_forward(sums, output + row.start, 1, row.voxels, b.bias ? b.bias + bundle * kV : nullptr, b.transfer,
                       b.accumulate_output);
    }
}

// The gradient's rows have zeros on both sides where the kernel is wider than a voxel: see pad_gradient in direct.cpp.
void backward(const LayerPlan& p, int index, const Buffers& b, float* scratch) {
    const Extent n = p.problem.input, k = p.problem.kernel, s = p.problem.sparsity, m = p.output;
    const int bundle = index % p.in_bundles, first = index / p.in_bundles * p.rows_backward;
    const int last = std::min(row_count(p, n), first + p.rows_backward);
    const bool pointwise = is_pointwise(p);
    const long length = padded_row(p);
    const V* gradient = k.x > 1 ? vec(b.at(Buffer::gradient_spectra)) + bundle * (long(m.z) * m.y * length)
                                : vec(b.output_gradient + bundle * b.output_gradient_stride);
    const V* kernel = vec(b.at(Buffer::kernels_backward)) + bundle * long(k.volume());
    V* output = vec(b.input_gradient + bundle * b.input_gradient_stride);
    V* sums = vec(scratch);
    for (int i = first; i < last; ++i) {
        const Row row(p, n, i);
        const int z = pointwise ? 0 : i / n.y, y = pointwise ? 0 : i % n.y;
        const TapRange tz(z, m.z, k.z, s.z), ty(y, m.y, k.y, s.y);
        const long from = pointwise ? row.start : (long(z - s.z * tz.first) * m.y + (y - s.y * ty.first)) * length;
        if (tz.count > 0 && ty.count > 0) {
            const Walk walk{tz.count, ty.count, k.x, -long(s.z) * m.y * length, -long(s.y) * length, s.x, long(k.y) * k.x, k.x};
            convolve_row(walk, gradient + from, kernel + (long(tz.first) * k.y + ty.first) * k.x, row.voxels, sums);
        } else {
            std::fill(sums, sums + row.voxels, V{});
        }
        V* out = output + row.start;
        finish_forward(sums, out, 1, row.voxels, nullptr, Transfer::linear, b.accumulate_input_gradient);
        if (b.activation)
            apply_derivative(out, vec(b.activation + bundle * b.input_stride) + row.start, 1, row.voxels, b.activation_transfer);
    }
}

void reverse_rows(const LayerPlan& p, int bundle, const Buffers& b) {
    const long taps = long(p.problem.kernel.volume()), across = p.problem.kernel.x;
    const V* from = vec(b.kernels) + bundle * taps;
    V* to = vec(b.at(Buffer::kernels_backward)) + bundle * taps;
    for (long j = 0; j < taps; j += across) std::reverse_copy(from + j, from + j + across, to + j);
}

// sums[jy][jx] += over rows and columns of in[. + jy, . + jx] g[.]; steps in vectors.
struct Patch {
    int rows, columns;
    const V* in;
    long in_row, tap_y, tap_x;
    const V* g;
    long g_row;
    V* sums;
    long sums_y;
};

template <int NY, int NX>
void update_block(const Patch& k) {
    V sum[NY * NX];  // a patch is summed by itself first: fewer roundings of the large total
    clear(sum);
    for (int y = 0; y < k.rows; ++y) {
        const V* in = k.in + y * k.in_row;
        const V* g = k.g + y * k.g_row;
        for (int x = 0; x < k.columns; ++x) {
            const V value = g[x];
            for (int j = 0; j < NY * NX; ++j) sum[j] += in[x + j / NX * k.tap_y + j % NX * k.tap_x] * value;
        }
    }
    for (int j = 0; j < NY * NX; ++j) k.sums[j / NX * k.sums_y + j % NX] += sum[j];
}

using TapBlock = void (*)(const Patch&);

template <int NX, int NY = 1>
TapBlock tap_block_down(int down) {
    if constexpr ((NY + 1) * NX <= kTaps) {
        if (down > NY) return tap_block_down<NX, NY + 1>(down);
    }
    return update_block<NY, NX>;
}

template <int NX = 1>
TapBlock tap_block(int down, int across) {
    if constexpr (NX < std::min(kTaps, kTapsAcross)) {
        if (across > NX) return tap_block<NX + 1>(down, across);
    }
    return tap_block_down<NX>(down);
}

// All taps of one z of a patch, in nearly equal blocks.
void update_plane(const Extent& kernel, Patch k) {
    const int across = ceil_div(kernel.x, std::min(kTaps, kTapsAcross));
    const int down = ceil_div(kernel.y, kTaps / ceil_div(kernel.x, across));
    const Patch origin = k;
    for (int i = 0; i < across; ++i) {
        const int x = i * kernel.x / across, nx = (i + 1) * kernel.x / across - x;
        for (int j = 0; j < down; ++j) {
            const int y = j * kernel.y / down, ny = (j + 1) * kernel.y / down - y;
            k.in = origin.in + y * k.tap_y + x * k.tap_x;
            k.sums = origin.sums + y * k.sums_y + x;
            tap_block(ny, nx)(k);
        }
    }
}

// Partial sums of one chunk of the output and one bundle, laid out as kernels.
void update_partial(const LayerPlan& p, int index, const Buffers& b) {
    const Extent n = p.problem.input, k = p.problem.kernel, s = p.problem.sparsity;
    const int bundle = index % p.out_bundles, chunk = index / p.out_bundles;
    const long taps = long(k.volume());
    V* sums = vec(b.at(Buffer::update_spectra)) + (long(chunk) * p.out_bundles + bundle) * taps;
    std::fill_n(sums, taps, V{});
    const bool pointwise = is_pointwise(p);
    const Extent m = pointwise ? Extent{1, 1, int(p.output.volume())} : p.output, from = pointwise ? m : n;
    const V* image = vec(b.input + bundle * b.input_stride);
    const V* gradient = vec(b.output_gradient + bundle * b.output_gradient_stride);
    const PatchGrid grid(p);
    Patch patch{};
    patch.in_row = from.x, patch.g_row = m.x, patch.sums_y = k.x;
    patch.tap_y = long(s.y) * from.x, patch.tap_x = s.x;
    const int first = int(long(chunk) * grid.count() / p.update_chunks);
    const int last = int(long(chunk + 1) * grid.count() / p.update_chunks);
    for (int i = first; i < last; ++i) {
        const int z = i / (grid.down * grid.across), y = i / grid.across % grid.down * grid.rows, x = i % grid.across * grid.columns;
        patch.rows = std::min(grid.rows, m.y - y), patch.columns = std::min(grid.columns, m.x - x);
        patch.g = gradient + (long(z) * m.y + y) * m.x + x;
        for (int jz = 0; jz < k.z; ++jz) {
            patch.in = image + (long(z + s.z * jz) * from.y + y) * from.x + x;
            patch.sums = sums + long(jz) * k.y * k.x;
            update_plane(k, patch);
        }
    }
}

// The sum of the chunks' partial sums, then the update.
void update(const LayerPlan& p, int bundle, const Buffers& b, float* scratch) {
    const long taps = long(p.problem.kernel.volume());
    V* total = vec(scratch);
    std::fill_n(total, taps, V{});
    for (int chunk = 0; chunk < p.update_chunks; ++chunk) {
        const V* part = vec(b.at(Buffer::update_spectra)) + (long(chunk) * p.out_bundles + bundle) * taps;
        for (long j = 0; j < taps; ++j) total[j] += part[j];
    }
    finish_update(p, b, bundle, 0, total);
}

}  // namespace

void run_depthwise(const LayerPlan& p, Phase phase, int index, const Buffers& b, float* scratch) {
    switch (phase) {
        case Phase::kernels_backward: return reverse_rows(p, index, b);
        case Phase::forward_inverse: return forward(p, index, b, scratch);
        case Phase::backward_inverse: return backward(p, index, b, scratch);
        case Phase::update_product: return update_partial(p, index, b);
        case Phase::update_inverse: return update(p, index, b, scratch);
        default: return;  // these phases have no pieces
    }
}

}  // namespace znn::tiled::ZNN_VARIANT
