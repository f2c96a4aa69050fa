// Transforms too long to be worth straight-line code: n = 4 q by one step of radix 4 around the generated ones of q.
//
// Decimation in time (in frequency where the result is real): with x_r[j] = x[4 j + r] and X_r its transform,
// X[f + k q] = sum_r w^(r f) (-i)^(r k) X_r[f], w = exp(-2 pi i / n).
#include <array>
#include <cmath>
#include <numbers>

#include "tiled/vectors.hpp"

namespace znn::tiled::ZNN_VARIANT {
namespace {

constexpr int kFirst = 18, kLast = 32;  // q, by twos

struct Complex {
    V re, im;
};

ZNN_INLINE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
ZNN_INLINE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
ZNN_INLINE Complex times_i(Complex a) { return {-a.im, a.re}; }
ZNN_INLINE Complex conj(Complex a) { return {a.re, -a.im}; }

// cos and sin of 2 pi r f / (4 q), r = 1, 2, 3, for every f < q.
struct Turn {
    float cosine, sine;
};
ZNN_INLINE Complex back(Complex a, Turn t) { return {a.re * t.cosine + a.im * t.sine, a.im * t.cosine - a.re * t.sine}; }
ZNN_INLINE Complex forth(Complex a, Turn t) { return {a.re * t.cosine - a.im * t.sine, a.im * t.cosine + a.re * t.sine}; }

template <int Q>
const std::array<std::array<Turn, 3>, Q>& turns() {
    static const auto table = [] {
        std::array<std::array<Turn, 3>, Q> t;
        for (int f = 0; f < Q; ++f)
            for (int r = 1; r < 4; ++r) {
                const double angle = 2 * std::numbers::pi * r * f / (4 * Q);
                t[f][r - 1] = {float(std::cos(angle)), float(std::sin(angle))};
            }
        return t;
    }();
    return table;
}

struct Four {
    Complex x[4];
};

// X[f], X[f + q], X[f + 2 q], X[f + 3 q] from the four parts' X_r[f], `next` vectors apart.
ZNN_INLINE Four join(const V* part, long next, const std::array<Turn, 3>& t) {
    const auto at = [&](int r) { return Complex{part[r * next], part[r * next + 1]}; };
    const Complex a = at(0), b = back(at(1), t[0]), c = back(at(2), t[1]), d = back(at(3), t[2]);
    const Complex even = a + c, odd = b + d, even2 = a - c, odd2 = times_i(b - d);
    return {{even + odd, even2 - odd2, even - odd, even2 + odd2}};
}

// BACK: the inverse, which is the forward transform with its frequencies taken backwards.
template <int Q, bool BACK>
void c2c(const V* x, long is, long in_line, V* y, long os, long out_line, long lines) {
    const auto& t = turns<Q>();
    V parts[4 * 2 * Q];
    for (; lines > 0; --lines, x += in_line, y += out_line) {
        codelets(Q).forward(x, 4 * is, is, parts, 2 * Q, 4);
        for (int f = 0; f < Q; ++f) {
            const Four found = join(parts + 2 * f, 2 * Q, t[f]);
            for (int k = 0; k < 4; ++k) {
                V* to = y + (BACK ? (4 * Q - f - k * Q) % (4 * Q) : f + k * Q) * os;
                to[0] = found.x[k].re, to[1] = found.x[k].im;
            }
        }
    }
}

template <int Q>
void forward(const V* x, long is, long in_line, V* y, long out_line, long lines) {
    c2c<Q, false>(x, is, in_line, y, 2, out_line, lines);
}
template <int Q>
void inverse(const V* x, long in_line, V* y, long os, long out_line, long lines) {
    c2c<Q, true>(x, 2, in_line, y, os, out_line, lines);
}

template <int Q>
void r2c(const V* x, long is, long in_line, V* y, long out_line, long lines) {
    constexpr long half = 2 * (Q / 2 + 1);
    const auto& t = turns<Q>();
    V parts[4 * half];
    for (; lines > 0; --lines, x += in_line, y += out_line) {
        codelets(Q).r2c(x, 4 * is, is, parts, half, 4);
        for (int f = 0; f <= Q / 2; ++f) {
            const Four found = join(parts + 2 * f, half, t[f]);
            const auto put = [&](int at, Complex value) { y[2 * at] = value.re, y[2 * at + 1] = value.im; };
            put(f, found.x[0]), put(f + Q, found.x[1]);
            put(2 * Q - f, conj(found.x[2]));  // the upper half is the lower one's mirror image
            if (f > 0) put(Q - f, conj(found.x[3]));
        }
    }
}

template <int Q>
void c2r(const V* x, long in_line, V* y, long out_line, long lines) {
    constexpr long half = 2 * (Q / 2 + 1);
    const auto& t = turns<Q>();
    V parts[4 * half], found[4 * Q];
    for (; lines > 0; --lines, x += in_line, y += out_line) {
        for (int f = 0; f <= Q / 2; ++f) {
            const auto at = [&](int i) { return Complex{x[2 * i], x[2 * i + 1]}; };
            Complex a = at(f), c = conj(at(2 * Q - f));
            if (f == 0) a.im = c.im = V{};  // of the first and the last nobody writes an imaginary part
            const Complex b = at(f + Q), d = conj(at(Q - f));
            const Complex even = a + c, odd = b + d, even2 = a - c, odd2 = times_i(b - d);
            const Complex rows[4] = {even + odd, forth(even2 + odd2, t[f][0]), forth(even - odd, t[f][1]),
                                     forth(even2 - odd2, t[f][2])};
            for (int r = 0; r < 4; ++r) parts[r * half + 2 * f] = rows[r].re, parts[r * half + 2 * f + 1] = rows[r].im;
        }
        codelets(Q).c2r(parts, half, found, Q, 4);
        for (int j = 0; j < Q; ++j)
            for (int r = 0; r < 4; ++r) y[4 * j + r] = found[r * Q + j];
    }
}

// Vector operations as generate_codelets.py counts them: a step joins four numbers by 16 sums and 12 products.
template <int Q>
Codelets make() {
    const TransformOps part = transform_ops(Q);
    const int all = 28 * Q, half = 28 * (Q / 2 + 1);
    return {4 * Q, r2c<Q>, forward<Q>, inverse<Q>, c2r<Q>, 4 * part.real + half, 4 * part.complex + all, 4 * part.inverse + half};
}

template <int... I>
std::array<Codelets, sizeof...(I)> make_all(std::integer_sequence<int, I...>) {
    return {make<kFirst + 2 * I>()...};
}

}  // namespace

const Codelets& long_codelets(int extent) {
    static const auto table = make_all(std::make_integer_sequence<int, (kLast - kFirst) / 2 + 1>());
    return table[std::size_t(extent / 4 - kFirst) / 2];
}

}  // namespace znn::tiled::ZNN_VARIANT
