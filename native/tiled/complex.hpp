// Complex numbers of one bundle, in memory [re V, im V], and sums of products x w, or x conj(w), with numbers x of one map.
#pragma once
#include "tiled/vectors.hpp"

namespace znn::tiled::ZNN_VARIANT {

#if defined(__AVX512F__) && ZNN_V == 8
// Both parts fill a register. What re and im of x are multiplied with is summed apart, and put together at the end.
typedef float Complex __attribute__((vector_size(64)));
typedef float ComplexInMemory __attribute__((vector_size(64), may_alias, aligned(32)));
typedef int Lanes __attribute__((vector_size(64)));
ZNN_INLINE Complex load(const V* p) { return *reinterpret_cast<const ComplexInMemory*>(p); }
ZNN_INLINE void store(V* p, Complex c) { *reinterpret_cast<ComplexInMemory*>(p) = c; }
ZNN_INLINE void stream(V* p, Complex c) { _mm512_stream_ps(reinterpret_cast<float*>(p), reinterpret_cast<__m512>(c)); }
template <bool CONJ>
struct Sum {
    Complex by_re, by_im;
    ZNN_INLINE void add(float re, float im, Complex w) { by_re += re * w, by_im += im * w; }
    ZNN_INLINE Complex value() const {
        const Complex sign = {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1};
        const Complex turned = __builtin_shuffle(by_im, Lanes{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
        return CONJ ? by_re * sign + turned : by_re - turned * sign;
    }
};
template <bool CONJ>
ZNN_INLINE void clear(Sum<CONJ>& s) { s.by_re = s.by_im = Complex{}; }
#else
struct Complex {
    V re, im;
};
ZNN_INLINE Complex load(const V* p) { return {p[0], p[1]}; }
ZNN_INLINE void store(V* p, Complex c) { p[0] = c.re, p[1] = c.im; }
ZNN_INLINE void stream(V* p, Complex c) { ZNN_VARIANT::stream(p, c.re), ZNN_VARIANT::stream(p + 1, c.im); }
ZNN_INLINE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
ZNN_INLINE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
ZNN_INLINE Complex operator*(float a, Complex b) { return {a * b.re, a * b.im}; }
template <bool CONJ>
struct Sum {
    V re, im;
    ZNN_INLINE void add(float xr, float xi, Complex w) {
        re += xr * w.re, im += xi * w.re;
        if constexpr (CONJ)
            re += xi * w.im, im -= xr * w.im;
        else
            re -= xi * w.im, im += xr * w.im;
    }
    ZNN_INLINE Complex value() const { return {re, im}; }
};
template <bool CONJ>
ZNN_INLINE void clear(Sum<CONJ>& s) { s.re = s.im = V{}; }
#endif

}  // namespace znn::tiled::ZNN_VARIANT
