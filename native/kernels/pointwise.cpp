// Loops over single arrays: sums, transfer functions with their biases, dropout masks, and the optimiser's step.
#include <bit>
#include <cmath>
#include <cstdint>

#include "kernels/math.hpp"

namespace znn::kernels::ZNN_ISA {
namespace {

// Calls f(start, part or nothing) so that [0, n) is covered by whole vectors and one partial one.
template <class Whole, class Rest>
ZNN_INLINE void over(std::size_t n, const Whole& whole, const Rest& rest) {
    std::size_t i = 0;
    for (; i + W <= n; i += W) whole(i);
    if (i < n) rest(i, Part(int(n - i)));
}

void add(float* dst, const float* src, std::size_t n) {
    over(n, [&](std::size_t i) { store(dst + i, load(dst + i) + load(src + i)); },
         [&](std::size_t i, Part p) { store(dst + i, load(dst + i, p) + load(src + i, p), p); });
}

// A plain loop of whole numbers, which the compiler turns into vectors.
bool all_finite(const float* x, std::size_t n) {
    std::uint32_t beyond = 0;
    for (std::size_t i = 0; i < n; ++i) beyond |= (std::bit_cast<std::uint32_t>(x[i]) & 0x7f800000u) == 0x7f800000u;
    return !beyond;
}

void scale(float* dst, float factor, std::size_t n) {
    const vf f = splat(factor);
    over(n, [&](std::size_t i) { store(dst + i, load(dst + i) * f); },
         [&](std::size_t i, Part p) { store(dst + i, load(dst + i, p) * f, p); });
}

void multiply(float* x, const float* mask, std::size_t n) {
    over(n, [&](std::size_t i) { store(x + i, load(x + i) * load(mask + i)); },
         [&](std::size_t i, Part p) { store(x + i, load(x + i, p) * load(mask + i, p), p); });
}

void sgd(float* w, float* v, const float* g, std::size_t n, const UpdateStep& step) {
    const vf rate = splat(step.rate), momentum = splat(step.momentum), decay = splat(step.decay), factor = splat(step.scale);
    const auto velocity = [&](vf wi, vf vi_, vf gi) { return momentum * vi_ + (factor * gi + decay * wi); };
    over(n,
         [&](std::size_t i) {
             const vf wi = load(w + i), next = velocity(wi, load(v + i), load(g + i));
             store(v + i, next);
             store(w + i, wi - rate * next);
         },
         [&](std::size_t i, Part p) {
             const vf wi = load(w + i, p), next = velocity(wi, load(v + i, p), load(g + i, p));
             store(v + i, next, p);
             store(w + i, wi - rate * next, p);
         });
}

// Plain loops, which the compiler turns into vectors: the square root has no vector notation.
void adam(float* w, float* m, float* s, const float* g, std::size_t n, const UpdateStep& step) {
    for (std::size_t i = 0; i < n; ++i) {
        const float gradient = step.scale * g[i] + step.decay * w[i];
        m[i] = step.momentum * m[i] + (1.0f - step.momentum) * gradient;
        s[i] = step.square_momentum * s[i] + (1.0f - step.square_momentum) * gradient * gradient;
        w[i] -= step.rate * m[i] / (std::sqrt(s[i]) * step.correction + step.epsilon);
    }
}

void update(float* w, float* momenta, float* second_moments, const float* g, std::size_t n, UpdateStep step) {
    if (second_moments)
        adam(w, momenta, second_moments, g, n, step);
    else
        sgd(w, momenta, g, n, step);
}

// A bundle that divides the vector gives every vector the same biases; otherwise each voxel is a row of its own.
template <Transfer F>
void forward(float* x, std::size_t n, const float* bias, int bundle) {
    if (W % bundle == 0) {
        vf b{};
        for (int lane = 0; lane < W; ++lane) b[lane] = bias[lane % bundle];
        over(n, [&](std::size_t i) { store(x + i, transfer<F>(load(x + i) + b)); },
             [&](std::size_t i, Part p) { store(x + i, transfer<F>(load(x + i, p) + b), p); });
        return;
    }
    for (float* end = x + n; x < end; x += bundle)
        over(std::size_t(bundle), [&](std::size_t i) { store(x + i, transfer<F>(load(x + i) + load(bias + i))); },
             [&](std::size_t i, Part p) { store(x + i, transfer<F>(load(x + i, p) + load(bias + i, p)), p); });
}

void transfer_forward(float* x, std::size_t n, const float* bias, int bundle, Transfer f) {
    switch (f) {
        case Transfer::linear: forward<Transfer::linear>(x, n, bias, bundle); return;
        case Transfer::relu: forward<Transfer::relu>(x, n, bias, bundle); return;
        case Transfer::tanh: forward<Transfer::tanh>(x, n, bias, bundle); return;
        case Transfer::logistic: forward<Transfer::logistic>(x, n, bias, bundle); return;
    }
}

template <Transfer F>
void backward(float* g, const float* y, std::size_t n, int bundle, double* sums) {
    for (int i = 0; i < bundle; ++i) sums[i] = 0;
    if (W % bundle == 0) {
        Wide total;
        over(n,
             [&](std::size_t i) {
                 const vf v = transfer_gradient<F>(load(g + i), load(y + i));
                 if (F != Transfer::linear) store(g + i, v);  // others may be reading it
                 total.add(v);
             },
             [&](std::size_t i, Part p) {
                 const vf v = transfer_gradient<F>(load(g + i, p), load(y + i, p));  // 0 in the lanes beyond
                 if (F != Transfer::linear) store(g + i, v, p);
                 total.add(v);
             });
        for (int lane = 0; lane < W; ++lane) sums[lane % bundle] += total.lane(lane);
        return;
    }
    for (float* end = g + n; g < end; g += bundle, y += bundle)
        over(std::size_t(bundle),
             [&](std::size_t i) {
                 const vf v = transfer_gradient<F>(load(g + i), load(y + i));
                 if (F != Transfer::linear) store(g + i, v);
                 Wide s = load_wide(sums + i);
                 s.add(v);
                 store(sums + i, s);
             },
             [&](std::size_t i, Part p) {
                 const vf v = transfer_gradient<F>(load(g + i, p), load(y + i, p));
                 if (F != Transfer::linear) store(g + i, v, p);
                 for (int lane = 0; i + lane < std::size_t(bundle); ++lane) sums[i + lane] += v[lane];
             });
}

void transfer_backward(float* g, const float* y, std::size_t n, int bundle, Transfer f, double* bias_gradient) {
    switch (f) {
        case Transfer::linear: backward<Transfer::linear>(g, y, n, bundle, bias_gradient); return;
        case Transfer::relu: backward<Transfer::relu>(g, y, n, bundle, bias_gradient); return;
        case Transfer::tanh: backward<Transfer::tanh>(g, y, n, bundle, bias_gradient); return;
        case Transfer::logistic: backward<Transfer::logistic>(g, y, n, bundle, bias_gradient); return;
    }
}

}  // namespace

void fill_pointwise(Table& table) {
    table.all_finite = all_finite;
    table.add = add;
    table.scale = scale;
    table.transfer_forward = transfer_forward;
    table.transfer_backward = transfer_backward;
    table.multiply = multiply;
    table.update = update;
}

}  // namespace znn::kernels::ZNN_ISA
