// The vectors of a code path and the transforms made for it: all that the generated code needs to know.
#pragma once
#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "tiled/transform_ops.hpp"

namespace znn::tiled::ZNN_VARIANT {

inline constexpr int kV = ZNN_V;
typedef float V __attribute__((vector_size(ZNN_V * 4), may_alias));
typedef int VI __attribute__((vector_size(ZNN_V * 4), may_alias));
typedef short VS __attribute__((vector_size(ZNN_V * 2)));
typedef signed char VB __attribute__((vector_size(ZNN_V), may_alias, aligned(1)));

// Vectors as wide as registers, where these hold more than one bundle of maps; anywhere in memory.
#if defined(__AVX512F__)
inline constexpr int kX = 16;
#else
inline constexpr int kX = kV;
#endif
typedef float X __attribute__((vector_size(kX * 4), may_alias));
typedef int XI __attribute__((vector_size(kX * 4), may_alias));
typedef float Anywhere __attribute__((vector_size(kX * 4), may_alias, aligned(4)));

inline V* vec(float* p) { return reinterpret_cast<V*>(p); }
inline const V* vec(const float* p) { return reinterpret_cast<const V*>(p); }

#define ZNN_INLINE inline __attribute__((always_inline))

// Sums begin here: of an array's own `= {}` GCC keeps the clearing of memory, though the sums live in registers.
template <class T>
ZNN_INLINE void clear(T& sum) { sum = T{}; }
template <class T, int N>
ZNN_INLINE void clear(T (&sums)[N]) {
    for (T& sum : sums) clear(sum);
}

// Stores past the caches: what will not be read before it has left them anyway is not fetched first. In whole lines of cache,
// one after the other; before others may read them, finish_streams().
ZNN_INLINE void stream(V* p, V x) {
#if defined(__AVX__)
    float* to = reinterpret_cast<float*>(p);
#if defined(__AVX512F__) && ZNN_V == 16
    _mm512_stream_ps(to, reinterpret_cast<__m512>(x));
#else
    const __m256* part = reinterpret_cast<const __m256*>(&x);
    for (int i = 0; i < kV / 8; ++i) _mm256_stream_ps(to + 8 * i, part[i]);
#endif
#else
    *p = x;
#endif
}
ZNN_INLINE void finish_streams() {
#if defined(__AVX__)
    _mm_sfence();
#endif
}

// Strides are in vectors. `in_line`, `out_line`: from line to line. Complex numbers are pairs of vectors, real parts first, of
// which those without a stride follow each other; so do real numbers.
struct Codelets {
    int n;
    void (*r2c)(const V* x, long is, long in_line, V* y, long out_line, long lines);
    void (*forward)(const V* x, long is, long in_line, V* y, long out_line, long lines);
    void (*inverse)(const V* x, long in_line, V* y, long os, long out_line, long lines);
    void (*c2r)(const V* x, long in_line, V* y, long out_line, long lines);
    int r2c_ops, c2c_ops, c2r_ops;
};
const Codelets& codelets(int extent);
const Codelets& long_codelets(int extent);  // those beyond 64
TransformOps transform_ops(int extent);

}  // namespace znn::tiled::ZNN_VARIANT
