// Exponential, logarithm and the transfer functions, on vectors.
#pragma once
#include "kernels/isa.hpp"

namespace znn::kernels::ZNN_ISA {
namespace {

ZNN_INLINE vf minimum(vf a, float limit) { return a > splat(limit) ? splat(limit) : a; }  // NaN stays
ZNN_INLINE vf maximum(vf a, float limit) { return a < splat(limit) ? splat(limit) : a; }
ZNN_INLINE vf absolute(vf a) { return from_bits(bits(a) & splat(std::int32_t(0x7fffffff))); }
ZNN_INLINE vf with_sign(vf magnitude, vf sign) {
    return from_bits(bits(magnitude) | (bits(sign) & splat(std::int32_t(0x80000000u))));
}

// exp(x) for x in [-87, 88], clamped there. Cody-Waite: x = n ln2 + r, |r| <= ln2 / 2, ln2 in two parts of which the
// first has zeros enough at its end for n times it to be exact; then the Taylor series (remainder 5e-9).
ZNN_INLINE vf exponential(vf x) {
    x = maximum(minimum(x, 88.0f), -87.0f);
    constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    const vf shifted = x * splat(1.44269504088896341f) + splat(magic);
    const vf n = shifted - splat(magic);
    const vf r = (x - n * splat(0.693359375f)) + n * splat(2.12194440054690583e-4f);
    vf p = splat(1.0f / 5040);
    p = p * r + splat(1.0f / 720);
    p = p * r + splat(1.0f / 120);
    p = p * r + splat(1.0f / 24);
    p = p * r + splat(1.0f / 6);
    p = p * r + splat(0.5f);
    p = (p * r) * r + r;
    const vf power = from_bits((bits(shifted) + splat(std::int32_t(127))) << 23);
    return p * power + power;
}

// 2 atanh(s) = log((1 + s) / (1 - s)) for |s| <= 1/3: its series in s^2 (remainder 3e-9 relative).
ZNN_INLINE vf twice_atanh(vf s) {
    const vf u = s * s;
    vf p = splat(2.0f / 15);
    p = p * u + splat(2.0f / 13);
    p = p * u + splat(2.0f / 11);
    p = p * u + splat(2.0f / 9);
    p = p * u + splat(2.0f / 7);
    p = p * u + splat(2.0f / 5);
    p = p * u + splat(2.0f / 3);
    return s * u * p + (s + s);
}

ZNN_INLINE vf log1p_unit(vf u) { return twice_atanh(u / (u + splat(2.0f))); }  // u in [0, 1]

// log(x) for normal x > 0: x = 2^e m with m in [sqrt(1/2), sqrt(2)).
ZNN_INLINE vf logarithm(vf x) {
    const std::int32_t root_half = 0x3f3504f3;
    const vi e = (bits(x) - splat(root_half)) >> 23;
    const vf m = from_bits(bits(x) - (e << 23));
    const vf n = __builtin_convertvector(e, vf);
    const vf s = (m - splat(1.0f)) / (m + splat(1.0f));
    return n * splat(0.693359375f) + (twice_atanh(s) - n * splat(2.12194440054690583e-4f));
}

ZNN_INLINE vf logistic(vf x) { return splat(1.0f) / (splat(1.0f) + exponential(-x)); }

// Near zero x + x^3 q(x^2), q fitted at Chebyshev points of [0, 0.65^2] (error 1e-9), elsewhere 1 - 2 / (exp(2 |x|) + 1).
ZNN_INLINE vf hyperbolic_tangent(vf x) {
    const vf a = absolute(x), u = x * x;
    vf q = splat(0.0022183604063498092f);
    q = q * u + splat(-0.008276127514402848f);
    q = q * u + splat(0.021747553016794083f);
    q = q * u + splat(-0.053956557349552764f);
    q = q * u + splat(0.13333291859145455f);
    q = q * u + splat(-0.33333333093734124f);
    const vf near = (x * u) * q + x;
    const vf clamped = minimum(a, 10.0f);
    const vf far = splat(1.0f) - splat(2.0f) / (exponential(clamped + clamped) + splat(1.0f));
    return a < splat(0.65f) ? near : with_sign(far, x);
}

// f(x)
template <Transfer F>
ZNN_INLINE vf transfer(vf x) {
    if constexpr (F == Transfer::relu) return x < splat(0.0f) ? splat(0.0f) : x;  // keeps NaN
    if constexpr (F == Transfer::tanh) return hyperbolic_tangent(x);
    if constexpr (F == Transfer::logistic) return logistic(x);
    return x;
}

// g f'(x), from y = f(x)
template <Transfer F>
ZNN_INLINE vf transfer_gradient(vf g, vf y) {
    if constexpr (F == Transfer::relu) return y > splat(0.0f) ? g : splat(0.0f);
    if constexpr (F == Transfer::tanh) return g * ((splat(1.0f) - y) * (splat(1.0f) + y));
    if constexpr (F == Transfer::logistic) return g * (y * (splat(1.0f) - y));
    return g;
}

}  // namespace
}  // namespace znn::kernels::ZNN_ISA
