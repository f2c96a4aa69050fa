// Pointwise products of spectra (interleaved complex numbers). Bound by memory: each array is streamed once, the shared
// operand and the accumulator in tiles that stay in the first-level cache while the blocks pass by.
#include "kernels/isa.hpp"

namespace znn::kernels::ZNN_ISA {
namespace {

constexpr std::size_t tile = 1024;  // complex numbers: 8 KiB

// a's lanes in the order given by four indices, the same in every group of four lanes.
#if defined(__AVX512F__)
#define ZNN_LANES(a, i, j, k, l)                                                                                  \
    __builtin_shufflevector(a, a, i, j, k, l, 4 + i, 4 + j, 4 + k, 4 + l, 8 + i, 8 + j, 8 + k, 8 + l, 12 + i, 12 + j, \
                            12 + k, 12 + l)
#elif defined(__AVX2__)
#define ZNN_LANES(a, i, j, k, l) __builtin_shufflevector(a, a, i, j, k, l, 4 + i, 4 + j, 4 + k, 4 + l)
#else
#define ZNN_LANES(a, i, j, k, l) __builtin_shufflevector(a, a, i, j, k, l)
#endif
ZNN_INLINE vf real_parts(vf a) { return ZNN_LANES(a, 0, 0, 2, 2); }
ZNN_INLINE vf imaginary_parts(vf a) { return ZNN_LANES(a, 1, 1, 3, 3); }
ZNN_INLINE vf swapped(vf a) { return ZNN_LANES(a, 1, 0, 3, 2); }

// Flips the sign of the real lanes (First = 0) or of the imaginary ones (First = 1).
template <int First>
ZNN_INLINE vf flip(vf a) {
    vi signs{};
    ZNN_UNROLL
    for (int i = First; i < W; i += 2) signs[i] = std::int32_t(0x80000000u);
    return from_bits(bits(a) ^ signs);
}

// acc + a w, or acc + a conj(w):  (ar wr -+ ai wi, ai wr +- ar wi)
template <bool Conj>
ZNN_INLINE vf multiply_add(vf acc, vf a, vf w) {
    acc += a * real_parts(w);
    acc += swapped(a) * flip<Conj ? 1 : 0>(imaginary_parts(w));
    return acc;
}

// acc[i] (+)= a[i] w[i] over n floats
template <bool Conj, bool Accumulate>
ZNN_INLINE void product(const float* a, const float* w, float* acc, std::size_t n) {
    std::size_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        const vf lower = multiply_add<Conj>(Accumulate ? load(acc + i) : vf{}, load(a + i), load(w + i));
        const vf upper = multiply_add<Conj>(Accumulate ? load(acc + i + W) : vf{}, load(a + i + W), load(w + i + W));
        store(acc + i, lower);
        store(acc + i + W, upper);
    }
    for (; i < n; i += 2) {
        const float ar = a[i], ai = a[i + 1], wr = w[i], wi = Conj ? -w[i + 1] : w[i + 1];
        acc[i] = (Accumulate ? acc[i] : 0.0f) + (ar * wr - ai * wi);
        acc[i + 1] = (Accumulate ? acc[i + 1] : 0.0f) + (ar * wi + ai * wr);
    }
}

template <bool Conj, bool Accumulate>
void multiply_blocks(const float* a, const float* w, float* acc, std::size_t blocks, std::size_t count) {
    for (std::size_t start = 0; start < count; start += tile) {
        const std::size_t n = 2 * (count - start < tile ? count - start : tile);
        for (std::size_t b = 0; b < blocks; ++b) {
            const std::size_t at = 2 * (b * count + start);
            product<Conj, Accumulate>(a + at, w + 2 * start, acc + at, n);
        }
    }
}

void spectral_multiply_conj(const float* a, const float* w, float* acc, std::size_t blocks, std::size_t count,
                            bool accumulate) {
    (accumulate ? multiply_blocks<true, true> : multiply_blocks<true, false>)(a, w, acc, blocks, count);
}

void spectral_multiply(const float* a, const float* w, float* acc, std::size_t blocks, std::size_t count,
                       bool accumulate) {
    (accumulate ? multiply_blocks<false, true> : multiply_blocks<false, false>)(a, w, acc, blocks, count);
}

void spectral_correlate(const float* a, const float* g, float* acc, std::size_t blocks, std::size_t count) {
    if (blocks == 0) __builtin_memset(acc, 0, 2 * count * sizeof(float));
    for (std::size_t start = 0; start < count; start += tile) {
        const std::size_t n = 2 * (count - start < tile ? count - start : tile);
        for (std::size_t b = 0; b < blocks; ++b) {
            const std::size_t at = 2 * (b * count + start);
            if (b == 0)
                product<true, false>(a + at, g + at, acc + 2 * start, n);
            else
                product<true, true>(a + at, g + at, acc + 2 * start, n);
        }
    }
}

}  // namespace

void fill_spectral(Table& table) {
    table.spectral_multiply_conj = spectral_multiply_conj;
    table.spectral_multiply = spectral_multiply;
    table.spectral_correlate = spectral_correlate;
}

}  // namespace znn::kernels::ZNN_ISA
