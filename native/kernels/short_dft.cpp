// Short transforms as products with tables. The values at +f and -f share their products: with C = sum x cos, S = sum x sin
// (both complex), out[f] = C - iS and out[t-f] = C + iS, so an output costs k complex-by-real products.
#include "kernels/isa.hpp"

namespace znn::kernels::ZNN_ISA {

namespace {

// (re, im) -> (im, -re) in every complex lane: multiplication by -i.
inline vf times_minus_i(vf v) {
    vi swap;
    vf sign;
    for (int i = 0; i < W; ++i) {
        swap[i] = i ^ 1;
        sign[i] = i & 1 ? -1.0f : 1.0f;
    }
    return __builtin_shuffle(v, swap) * sign;
}

// One strip of N vectors of the axis that is not transformed.
template <int N>
inline void expand_strip(const float* in, std::size_t in_stride, int k, float* out, std::size_t out_stride, int t,
                         const float* table) {
    for (int f = 0; 2 * f <= t; ++f, table += 2 * k) {
        vf c[N], s[N];
        for (int v = 0; v < N; ++v) c[v] = s[v] = vf{};
        for (int j = 0; j < k; ++j) {
            const float cosine = table[2 * j], sine = table[2 * j + 1];
            const float* x = in + j * in_stride;
            for (int v = 0; v < N; ++v) {
                const vf value = load(x + v * W);
                c[v] += value * cosine;
                s[v] += value * sine;
            }
        }
        float* positive = out + f * out_stride;
        for (int v = 0; v < N; ++v) store(positive + v * W, c[v] + times_minus_i(s[v]));
        if (f == 0 || 2 * f == t) continue;
        float* negative = out + (t - f) * out_stride;
        for (int v = 0; v < N; ++v) store(negative + v * W, c[v] - times_minus_i(s[v]));
    }
}

// J outputs of one strip: out_j = sum_f cos (P[f] + P[t-f]) + i sin (P[f] - P[t-f]).
template <int J, int N>
inline void reduce_strip(const float* in, std::size_t in_stride, int t, float* out, std::size_t out_stride, int k,
                         const float* table) {
    vf even[J][N], odd[J][N];
    for (int v = 0; v < N; ++v)
        for (int j = 0; j < J; ++j) {
            even[j][v] = load(in + v * W);  // f = 0
            odd[j][v] = vf{};
        }
    for (int f = 1; 2 * f <= t; ++f) {
        const float* row = table + std::size_t(2) * k * f;
        const float* positive = in + f * in_stride;
        const float* negative = in + (t - f) * in_stride;
        vf sum[N], difference[N];
        for (int v = 0; v < N; ++v) {
            const vf p = load(positive + v * W);
            const vf n = 2 * f == t ? vf{} : load(negative + v * W);
            sum[v] = p + n;
            difference[v] = p - n;
        }
        for (int j = 0; j < J; ++j)
            for (int v = 0; v < N; ++v) {
                even[j][v] += sum[v] * row[2 * j];
                odd[j][v] += difference[v] * row[2 * j + 1];
            }
    }
    for (int j = 0; j < J; ++j)
        for (int v = 0; v < N; ++v) store(out + j * out_stride + v * W, even[j][v] - times_minus_i(odd[j][v]));
}

template <int N>
inline void reduce_all(const float* in, std::size_t in_stride, int t, float* out, std::size_t out_stride, int k,
                       const float* table) {
    int j = 0;
    for (; j + 3 <= k; j += 3) reduce_strip<3, N>(in, in_stride, t, out + j * out_stride, out_stride, k, table + 2 * j);
    if (k - j == 2) reduce_strip<2, N>(in, in_stride, t, out + j * out_stride, out_stride, k, table + 2 * j);
    if (k - j == 1) reduce_strip<1, N>(in, in_stride, t, out + j * out_stride, out_stride, k, table + 2 * j);
}

void dft_expand(const float* in, std::size_t in_stride, int k, std::size_t m, float* out, std::size_t out_stride, int t,
                const float* table) {
    const std::size_t floats = 2 * m;
    std::size_t i = 0;
    for (; i + 4 * W <= floats; i += 4 * W) expand_strip<4>(in + i, in_stride, k, out + i, out_stride, t, table);
    for (; i + W <= floats; i += W) expand_strip<1>(in + i, in_stride, k, out + i, out_stride, t, table);
    if (i == floats) return;
    if (floats >= W) return expand_strip<1>(in + floats - W, in_stride, k, out + floats - W, out_stride, t, table);
    // Fewer numbers than one vector: plain arithmetic.
    for (int f = 0; f < t; ++f)
        for (std::size_t c = 0; c < m; ++c) {
            const int g = 2 * f <= t ? f : t - f;
            const float direction = 2 * f <= t ? 1.0f : -1.0f;
            float re = 0, im = 0;
            for (int j = 0; j < k; ++j) {
                const float cosine = table[2 * (g * k + j)], sine = direction * table[2 * (g * k + j) + 1];
                const float* x = in + j * in_stride + 2 * c;
                re += x[0] * cosine + x[1] * sine;
                im += x[1] * cosine - x[0] * sine;
            }
            out[f * out_stride + 2 * c] = re;
            out[f * out_stride + 2 * c + 1] = im;
        }
}

void dft_reduce(const float* in, std::size_t in_stride, int t, std::size_t m, float* out, std::size_t out_stride, int k,
                const float* table) {
    const std::size_t floats = 2 * m;
    std::size_t i = 0;
    for (; i + 2 * W <= floats; i += 2 * W) reduce_all<2>(in + i, in_stride, t, out + i, out_stride, k, table);
    for (; i + W <= floats; i += W) reduce_all<1>(in + i, in_stride, t, out + i, out_stride, k, table);
    if (i == floats) return;
    if (floats >= W) return reduce_all<1>(in + floats - W, in_stride, t, out + floats - W, out_stride, k, table);
    for (int j = 0; j < k; ++j)
        for (std::size_t c = 0; c < m; ++c) {
            float re = 0, im = 0;
            for (int f = 0; f < t; ++f) {
                const int g = 2 * f <= t ? f : t - f;
                const float direction = 2 * f <= t ? 1.0f : -1.0f;
                const float cosine = table[2 * (g * k + j)], sine = direction * table[2 * (g * k + j) + 1];
                const float* x = in + f * in_stride + 2 * c;
                re += x[0] * cosine - x[1] * sine;
                im += x[1] * cosine + x[0] * sine;
            }
            out[j * out_stride + 2 * c] = re;
            out[j * out_stride + 2 * c + 1] = im;
        }
}

void rows_expand(const float* in, std::size_t rows, int k, const float* basis, std::size_t floats, float* out) {
    for (std::size_t r = 0; r < rows; ++r, in += k, out += floats) {
        std::size_t i = 0;
        for (; i + W <= floats; i += W) {
            vf sum{};
            for (int j = 0; j < k; ++j) sum += load(basis + j * floats + i) * in[j];
            store(out + i, sum);
        }
        for (; i < floats; ++i) {
            float sum = 0;
            for (int j = 0; j < k; ++j) sum += basis[j * floats + i] * in[j];
            out[i] = sum;
        }
    }
}

void rows_reduce(const float* in, std::size_t rows, std::size_t floats, const float* basis, int k, float* out) {
    for (std::size_t r = 0; r < rows; ++r, in += floats, out += k)
        for (int j = 0; j < k; ++j) {
            const float* b = basis + j * floats;
            vf sums{};
            std::size_t i = 0;
            for (; i + W <= floats; i += W) sums += load(in + i) * load(b + i);
            float sum = 0;
            for (int v = 0; v < W; ++v) sum += sums[v];
            for (; i < floats; ++i) sum += in[i] * b[i];
            out[j] = sum;
        }
}

}  // namespace

void fill_short_dft(Table& table) {
    table.dft_expand = dft_expand;
    table.dft_reduce = dft_reduce;
    table.rows_expand = rows_expand;
    table.rows_reduce = rows_reduce;
}

}  // namespace znn::kernels::ZNN_ISA
