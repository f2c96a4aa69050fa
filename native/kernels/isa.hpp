// Vectors of the instruction set a file is compiled for, and the functions each file adds to that set's table.
//
// Every per-ISA source is compiled once per instruction set with -DZNN_ISA=<name>. Only names inside
// znn::kernels::ZNN_ISA or with internal linkage may be emitted from it: a weak symbol (std:: templates, inline members
// of Extent) could be merged across instruction sets by the linker and crash older processors.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/kernels.hpp"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef ZNN_ISA
#error "compile the per-ISA sources with -DZNN_ISA=<name>"
#endif

#define ZNN_INLINE inline __attribute__((always_inline))
#define ZNN_UNROLL _Pragma("GCC unroll 16")

namespace znn::kernels::ZNN_ISA {

void fill_convolve(Table& table);
void fill_boxes(Table& table);
void fill_spectral(Table& table);
void fill_pointwise(Table& table);
void fill_pooling(Table& table);
void fill_small_windows(Table& table);
void fill_losses(Table& table);
void fill_short_dft(Table& table);
Table make_table();

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef std::int32_t vi __attribute__((vector_size(4 * W)));
typedef float vf_half __attribute__((vector_size(2 * W)));
typedef double vd_half __attribute__((vector_size(4 * W)));
typedef float vf_unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef std::int32_t vi_unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef double vd_half_unaligned __attribute__((vector_size(4 * W), aligned(8), may_alias));

// Keeps a loaded vector in a register: the compiler would load it again for every use.
#if defined(__AVX512F__)
#define ZNN_KEEP(vector) asm("" : "+v"(vector))
#elif defined(__x86_64__)
#define ZNN_KEEP(vector) asm("" : "+x"(vector))
#else
#define ZNN_KEEP(vector) ((void)0)
#endif

ZNN_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
ZNN_INLINE vi load(const std::int32_t* p) { return *reinterpret_cast<const vi_unaligned*>(p); }
ZNN_INLINE void store(float* p, vf v) { *reinterpret_cast<vf_unaligned*>(p) = v; }
ZNN_INLINE void store(std::int32_t* p, vi v) { *reinterpret_cast<vi_unaligned*>(p) = v; }
ZNN_INLINE vf splat(float x) { return x - vf{}; }  // x - 0 keeps -0 and NaN
ZNN_INLINE vi splat(std::int32_t x) { return x - vi{}; }
ZNN_INLINE vi bits(vf v) { return (vi)v; }
ZNN_INLINE vf from_bits(vi v) { return (vf)v; }

// The lanes of a vf as doubles.
struct Wide {
    vd_half low{}, high{};
    ZNN_INLINE void add(vf v) {
        union {
            vf whole;
            vf_half halves[2];
        } u = {v};
        low += __builtin_convertvector(u.halves[0], vd_half);
        high += __builtin_convertvector(u.halves[1], vd_half);
    }
    ZNN_INLINE double lane(int i) const { return i < W / 2 ? low[i] : high[i - W / 2]; }
    ZNN_INLINE double sum() const {
        const vd_half both = low + high;
        double s = 0;
        ZNN_UNROLL
        for (int i = 0; i < W / 2; ++i) s += both[i];
        return s;
    }
};
ZNN_INLINE Wide load_wide(const double* p) {
    return {*reinterpret_cast<const vd_half_unaligned*>(p), *reinterpret_cast<const vd_half_unaligned*>(p + W / 2)};
}
ZNN_INLINE void store(double* p, const Wide& v) {
    *reinterpret_cast<vd_half_unaligned*>(p) = v.low;
    *reinterpret_cast<vd_half_unaligned*>(p + W / 2) = v.high;
}

// The first `count` lanes of a vector, for the ends of rows: lanes beyond are neither read nor written.
#if defined(__AVX512F__)
struct Part {
    __mmask16 mask;
    explicit Part(int count) : mask(static_cast<__mmask16>((1u << count) - 1u)) {}
};
ZNN_INLINE vf load(const float* p, Part part) { return (vf)_mm512_maskz_loadu_ps(part.mask, p); }
ZNN_INLINE void store(float* p, vf v, Part part) { _mm512_mask_storeu_ps(p, part.mask, (__m512)v); }
#elif defined(__AVX2__)
struct Part {
    int count;
    vi mask;
    explicit Part(int n) : count(n), mask(vi{0, 1, 2, 3, 4, 5, 6, 7} < splat(n)) {}
};
ZNN_INLINE vf load(const float* p, Part part) { return (vf)_mm256_maskload_ps(p, (__m256i)part.mask); }
ZNN_INLINE void store(float* p, vf v, Part part) {  // a masked store costs more than these on AMD processors
    for (int i = 0; i < part.count; ++i) p[i] = v[i];
}
#else
struct Part {
    int count;
    explicit Part(int n) : count(n) {}
};
ZNN_INLINE vf load(const float* p, Part part) {
    vf v{};
    for (int i = 0; i < part.count; ++i) v[i] = p[i];
    return v;
}
ZNN_INLINE void store(float* p, vf v, Part part) {
    for (int i = 0; i < part.count; ++i) p[i] = v[i];
}
#endif

// Of maxima: whether the later of two values is greater, or the first that is not a number.
ZNN_INLINE bool replaces(float later, float earlier) { return !(later <= earlier) && earlier == earlier; }

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
constexpr int smaller(int a, int b) { return a < b ? a : b; }
constexpr int larger(int a, int b) { return a > b ? a : b; }

// Extent's own members are inline functions, which the linker could merge across instruction sets.
ZNN_INLINE std::size_t volume(Extent e) { return std::size_t(e.z) * std::size_t(e.y) * std::size_t(e.x); }
ZNN_INLINE Extent valid(Extent n, Extent k, Extent s) {
    return Extent{n.z - s.z * (k.z - 1), n.y - s.y * (k.y - 1), n.x - s.x * (k.x - 1)};
}

}  // namespace
}  // namespace znn::kernels::ZNN_ISA
