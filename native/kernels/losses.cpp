// Loss functions and their gradients with respect to the network's output. Sums are taken in double.
#include "kernels/math.hpp"

namespace znn::kernels::ZNN_ISA {
namespace {

struct Term {
    vf loss, gradient;
};

// Calls f(i, load, store) for each vector of [0, n); the last one touches only what is left of the array.
template <class F>
ZNN_INLINE void each_vector(std::size_t n, const F& f) {
    std::size_t i = 0;
    for (; i + W <= n; i += W)
        f([i](const float* p) { return load(p + i); }, [i](float* p, vf v) { store(p + i, v); });
    if (i == n) return;
    const Part part(int(n - i));
    f([i, part](const float* p) { return load(p + i, part); }, [i, part](float* p, vf v) { store(p + i, v, part); });
}

// The lanes beyond the end are loaded as y = target = 0 with weight 1: `beyond` is what each of them adds.
template <class F>
ZNN_INLINE double pointwise_loss(const float* y, const float* target, const float* weight, float* gradient, std::size_t n,
                                 double beyond, const F& term) {
    Wide total;
    each_vector(n, [&](auto get, auto put) {
        const vf w = weight != nullptr ? get(weight) : splat(1.0f);
        const Term t = term(get(y), get(target));
        put(gradient, w * t.gradient);
        total.add(w * t.loss);
    });
    const std::size_t lanes = weight == nullptr && n % W != 0 ? W - n % W : 0;
    return total.sum() - beyond * double(lanes);
}

double loss_squared(const float* y, const float* target, const float* weight, float* gradient, std::size_t n) {
    return pointwise_loss(y, target, weight, gradient, n, 0.0, [](vf a, vf t) {
        const vf d = a - t;
        return Term{splat(0.5f) * d * d, d};
    });
}

// Cross-entropy of p = logistic(y): max(y, 0) - y t + log(1 + exp(-|y|)), gradient p - t.
ZNN_INLINE Term binomial(vf y, vf t) {
    const vf e = exponential(-absolute(y));
    const vf reciprocal = splat(1.0f) / (splat(1.0f) + e);
    const vf p = y < splat(0.0f) ? e * reciprocal : reciprocal;
    return {maximum(y, 0.0f) - y * t + log1p_unit(e), p - t};
}

double loss_binomial(const float* y, const float* target, const float* weight, float* gradient, std::size_t n) {
    const double beyond = binomial(vf{}, vf{}).loss[0];
    return pointwise_loss(y, target, weight, gradient, n, beyond, [](vf a, vf t) { return binomial(a, t); });
}

// -sum_m t_m log softmax(y)_m = sum_m t_m (log Z - (y_m - max)), gradient softmax(y)_m sum(t) - t_m. Exponentials are kept in
// the gradient arrays meanwhile. Lanes beyond the end have t = 0 and add nothing.
double loss_softmax(const float* const* y, const float* const* target, const float* weight, float* const* gradient,
                    int maps, std::size_t n) {
    Wide total;
    each_vector(n, [&](auto get, auto put) {
        vf top = get(y[0]);
        for (int m = 1; m < maps; ++m) {
            const vf v = get(y[m]);
            top = v > top ? v : top;
        }
        vf z{}, mass{};
        for (int m = 0; m < maps; ++m) {
            const vf e = exponential(get(y[m]) - top);
            put(gradient[m], e);
            z += e;
            mass += get(target[m]);
        }
        const vf w = weight != nullptr ? get(weight) : splat(1.0f);
        const vf log_z = logarithm(z), share = mass / z;
        vf loss{};
        for (int m = 0; m < maps; ++m) {
            const vf t = get(target[m]);
            loss += t * (log_z - (get(y[m]) - top));
            put(gradient[m], w * (get(gradient[m]) * share - t));
        }
        total.add(w * loss);
    });
    return total.sum();
}

}  // namespace

void fill_losses(Table& table) {
    table.loss_squared = loss_squared;
    table.loss_binomial = loss_binomial;
    table.loss_softmax = loss_softmax;
}

}  // namespace znn::kernels::ZNN_ISA
