// Transforms of lines with few taps, by tables: k taps at positions -k/2 ... around zero of a cyclic line of T. The taps at
// +j and -j meet the frequencies +f and -f in sums and differences, so a quarter of the plain products is left; for short
// kernels this is fewer operations than a full transform of T and needs no code per (T, k).
#pragma once
#include <algorithm>

#include "tiled/variant.hpp"

namespace znn::tiled::ZNN_VARIANT {

inline constexpr int kMaxHalf = 4;  // kernels up to 9 taps

namespace shorts {

// Sum and difference of tap pairs (j, -j), j = 1..H; an even kernel has no tap at +H.
template <int H>
struct Pairs {
    V sum[H], difference[H];
};

template <int H>
ZNN_INLINE Pairs<H> load_pairs(const V* x, long is, bool even, V& middle) {
    Pairs<H> p;
    middle = x[H * is];
    for (int j = 1; j <= H; ++j) {
        const V below = x[(H - j) * is];
        const V above = (even && j == H) ? V{} : x[(H + j) * is];
        p.sum[j - 1] = above + below;
        p.difference[j - 1] = above - below;
    }
    return p;
}

template <int H>
void forward_complex(const Axis& a, const V* x, long is, long in_line, V* y, long os, long out_line, long lines) {
    const int T = a.T, last = (T - 1) / 2;
    const bool even = a.k % 2 == 0;
    const float* cosines = a.cosines.data();
    const float* sines = a.sines.data();
    for (; lines > 0; --lines, x += in_line, y += out_line) {
        V mr, mi;
        const Pairs<H> r = load_pairs<H>(x, is, even, mr), i = load_pairs<H>(x + 1, is, even, mi);
        V dr = mr, di = mi;
        for (int j = 0; j < H; ++j) dr += r.sum[j], di += i.sum[j];
        y[0] = dr, y[1] = di;
        for (int f = 1; f <= last; ++f) {
            const float *c = cosines + f * H, *s = sines + f * H;
            V ar = mr + c[0] * r.sum[0], ai = mi + c[0] * i.sum[0];
            for (int j = 1; j < H; ++j) ar += c[j] * r.sum[j], ai += c[j] * i.sum[j];
            V* up = y + f * os;
            V* down = y + (T - f) * os;
            if constexpr (H == 1) {
                up[0] = ar + s[0] * i.difference[0], up[1] = ai - s[0] * r.difference[0];
                down[0] = ar - s[0] * i.difference[0], down[1] = ai + s[0] * r.difference[0];
            } else {
                V br = s[0] * i.difference[0], bi = s[0] * r.difference[0];
                for (int j = 1; j < H; ++j) br += s[j] * i.difference[j], bi += s[j] * r.difference[j];
                up[0] = ar + br, up[1] = ai - bi;
                down[0] = ar - br, down[1] = ai + bi;
            }
        }
        if (T % 2 == 0) {
            V ar = mr, ai = mi;
            for (int j = 0; j < H; ++j) {
                const float sign = cosines[T / 2 * H + j];
                ar += sign * r.sum[j], ai += sign * i.sum[j];
            }
            y[T / 2 * os] = ar, y[T / 2 * os + 1] = ai;
        }
    }
}

// Real taps times `scale` to T/2 + 1 frequencies.
template <int H>
void forward_real(const Axis& a, float scale, const V* x, long is, long in_line, V* y, long os, long out_line, long lines) {
    const bool even = a.k % 2 == 0;
    for (; lines > 0; --lines, x += in_line, y += out_line) {
        V middle;
        Pairs<H> p = load_pairs<H>(x, is, even, middle);
        middle *= scale;
        for (int j = 0; j < H; ++j) p.sum[j] *= scale, p.difference[j] *= scale;
        for (int f = 0; f <= a.T / 2; ++f) {
            const float *c = a.cosines.data() + f * H, *s = a.sines.data() + f * H;
            V re = middle, im{};
            for (int j = 0; j < H; ++j) re += c[j] * p.sum[j], im -= s[j] * p.difference[j];
            y[f * os] = re, y[f * os + 1] = im;
        }
    }
}

// Frequencies to taps [first, first + N) of the pairs; N pairs at a time keep the sums in registers.
template <int N>
ZNN_INLINE void inverse_pairs(const Axis& a, int half, int first, const V* x, long is, V* y, long os) {
    const int T = a.T;
    const bool even = a.k % 2 == 0;
    V cr[N], ci[N], sr[N], si[N];
    clear(cr), clear(ci), clear(sr), clear(si);
    for (int f = 1; f <= (T - 1) / 2; ++f) {
        const V *up = x + f * is, *down = x + (T - f) * is;
        const V pr = up[0] + down[0], pi = up[1] + down[1], dr = up[0] - down[0], di = up[1] - down[1];
        const float *c = a.cosines.data() + f * half + first, *s = a.sines.data() + f * half + first;
        for (int j = 0; j < N; ++j) cr[j] += c[j] * pr, ci[j] += c[j] * pi, sr[j] += s[j] * dr, si[j] += s[j] * di;
    }
    for (int j = 0; j < N; ++j) {
        V r = cr[j] + x[0], i = ci[j] + x[1];
        if (T % 2 == 0) {
            const float sign = a.cosines[T / 2 * half + first + j];
            r += sign * x[T / 2 * is], i += sign * x[T / 2 * is + 1];
        }
        const int tap = first + j + 1;
        V* below = y + (half - tap) * os;
        below[0] = r + si[j], below[1] = i - sr[j];
        if (!(even && tap == half)) {
            V* above = y + (half + tap) * os;
            above[0] = r - si[j], above[1] = i + sr[j];
        }
    }
}

template <int H>
void inverse_complex(const Axis& a, const V* x, long is, long in_line, V* y, long os, long out_line, long lines) {
    for (; lines > 0; --lines, x += in_line, y += out_line) {
        V r{}, i{};
        for (int f = 0; f < a.T; ++f) r += x[f * is], i += x[f * is + 1];
        y[H * os] = r, y[H * os + 1] = i;
        constexpr int kFirst = H > 2 ? 2 : H;
        inverse_pairs<kFirst>(a, H, 0, x, is, y, os);
        if constexpr (H > kFirst) inverse_pairs<H - kFirst>(a, H, kFirst, x, is, y, os);
    }
}

// T/2 + 1 frequencies of a Hermitian line to real taps.
template <int H>
void inverse_real(const Axis& a, const V* x, long is, long in_line, V* y, long os, long out_line, long lines) {
    const int T = a.T;
    const bool even = a.k % 2 == 0;
    for (; lines > 0; --lines, x += in_line, y += out_line) {
        V middle{}, c[H], s[H];
        clear(c), clear(s);
        for (int f = 1; f <= (T - 1) / 2; ++f) {
            const V re = x[f * is], im = x[f * is + 1];
            middle += re;
            for (int j = 0; j < H; ++j) c[j] += a.cosines[f * H + j] * re, s[j] += a.sines[f * H + j] * im;
        }
        const V ends = T % 2 == 0 ? x[T / 2 * is] : V{};
        y[H * os] = x[0] + 2.f * middle + ends;
        for (int j = 0; j < H; ++j) {
            const V even_part = x[0] + 2.f * c[j] + (T % 2 == 0 ? a.cosines[T / 2 * H + j] * ends : V{});
            y[(H - j - 1) * os] = even_part + 2.f * s[j];
            if (!(even && j + 1 == H)) y[(H + j + 1) * os] = even_part - 2.f * s[j];
        }
    }
}

}  // namespace shorts

// ---- kernel lines along one axis, short or not. Complex numbers are pairs of vectors; `buffer` holds T + 1 pairs.

// Positions of the taps without a table are 0..k-1 (Axis::center is 0).
inline void kernel_line_real(const Axis& a, float scale, const V* x, long is, long in_line, V* y, long os, long out_line,
                             long lines, V* buffer) {
    if (a.table()) switch (a.k / 2) {
        case 1: return shorts::forward_real<1>(a, scale, x, is, in_line, y, os, out_line, lines);
        case 2: return shorts::forward_real<2>(a, scale, x, is, in_line, y, os, out_line, lines);
        case 3: return shorts::forward_real<3>(a, scale, x, is, in_line, y, os, out_line, lines);
        default: return shorts::forward_real<4>(a, scale, x, is, in_line, y, os, out_line, lines);
    }
    const Codelets& c = codelets(a.T);
    for (int j = a.k; j < a.T; ++j) buffer[j] = V{};
    for (; lines > 0; --lines, x += in_line, y += out_line) {
        for (int j = 0; j < a.k; ++j) buffer[j] = scale * x[j * is];
        V* found = buffer + a.T;
        c.r2c(buffer, 1, 0, found, 0, 1);
        for (int f = 0; f <= a.T / 2; ++f) y[f * os] = found[2 * f], y[f * os + 1] = found[2 * f + 1];
    }
}

inline void kernel_line(const Axis& a, const V* x, long is, long in_line, V* y, long os, long out_line, long lines,
                        V* buffer) {
    if (a.table()) switch (a.k / 2) {
        case 1: return shorts::forward_complex<1>(a, x, is, in_line, y, os, out_line, lines);
        case 2: return shorts::forward_complex<2>(a, x, is, in_line, y, os, out_line, lines);
        case 3: return shorts::forward_complex<3>(a, x, is, in_line, y, os, out_line, lines);
        default: return shorts::forward_complex<4>(a, x, is, in_line, y, os, out_line, lines);
    }
    const Codelets& c = codelets(a.T);
    // Of a line taken backwards the inverse is the forward transform, and has the stride where it is wanted.
    std::fill(buffer + 2, buffer + 2 * (a.T - a.k + 1), V{});
    for (; lines > 0; --lines, x += in_line, y += out_line) {
        buffer[0] = x[0], buffer[1] = x[1];
        for (int j = 1; j < a.k; ++j) buffer[2 * (a.T - j)] = x[j * is], buffer[2 * (a.T - j) + 1] = x[j * is + 1];
        c.inverse(buffer, 0, y, os, 0, 1);
    }
}

inline void kernel_line_inverse(const Axis& a, const V* x, long is, long in_line, V* y, long os, long out_line, long lines,
                                V* buffer) {
    if (a.table()) switch (a.k / 2) {
        case 1: return shorts::inverse_complex<1>(a, x, is, in_line, y, os, out_line, lines);
        case 2: return shorts::inverse_complex<2>(a, x, is, in_line, y, os, out_line, lines);
        case 3: return shorts::inverse_complex<3>(a, x, is, in_line, y, os, out_line, lines);
        default: return shorts::inverse_complex<4>(a, x, is, in_line, y, os, out_line, lines);
    }
    const Codelets& c = codelets(a.T);
    for (; lines > 0; --lines, x += in_line, y += out_line) {
        c.forward(x, is, 0, buffer, 0, 1);  // the inverse, taken backwards
        y[0] = buffer[0], y[1] = buffer[1];
        for (int j = 1; j < a.k; ++j) y[j * os] = buffer[2 * (a.T - j)], y[j * os + 1] = buffer[2 * (a.T - j) + 1];
    }
}

inline void kernel_line_inverse_real(const Axis& a, const V* x, long is, long in_line, V* y, long os, long out_line,
                                     long lines, V* buffer) {
    if (a.table()) switch (a.k / 2) {
        case 1: return shorts::inverse_real<1>(a, x, is, in_line, y, os, out_line, lines);
        case 2: return shorts::inverse_real<2>(a, x, is, in_line, y, os, out_line, lines);
        case 3: return shorts::inverse_real<3>(a, x, is, in_line, y, os, out_line, lines);
        default: return shorts::inverse_real<4>(a, x, is, in_line, y, os, out_line, lines);
    }
    const Codelets& c = codelets(a.T);
    for (; lines > 0; --lines, x += in_line, y += out_line) {
        V* found = buffer + 2 * (a.T / 2 + 1);
        for (int f = 0; f <= a.T / 2; ++f) buffer[2 * f] = x[f * is], buffer[2 * f + 1] = x[f * is + 1];
        c.c2r(buffer, 0, found, 0, 1);
        for (int j = 0; j < a.k; ++j) y[j * os] = found[j];
    }
}

}  // namespace znn::tiled::ZNN_VARIANT
