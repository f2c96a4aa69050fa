// One step of the optimiser, as the loops over weights take it.
#pragma once
#include <cmath>
#include <cstdint>

namespace znn {

// g' = scale * g + decay * w, then
// SGD (no second moments):  m = momentum * m + g' ; w -= rate * m
// Adam (Kingma and Ba 2015): m = momentum * m + (1 - momentum) * g' ; s = square_momentum * s + (1 - square_momentum) * g'^2 ;
//                            w -= rate * m / (sqrt(s) * correction + epsilon)
struct UpdateStep {
    float rate = 0, momentum = 0, decay = 0, scale = 1;
    float square_momentum = 0, epsilon = 1, correction = 1;  // Adam's

    // Step number t, from 1, of a run of Adam that began with moments of 0: rate and correction make up for that.
    UpdateStep adam(std::uint64_t t) const {
        UpdateStep step = *this;
        step.rate = float(double(rate) / (1.0 - std::pow(double(momentum), double(t))));
        step.correction = float(1.0 / std::sqrt(1.0 - std::pow(double(square_momentum), double(t))));
        return step;
    }
    // For a group of weights with multipliers of its own.
    UpdateStep of_group(float rate_factor, float decay_factor) const {
        UpdateStep step = *this;
        step.rate *= rate_factor;
        step.decay *= decay_factor;
        return step;
    }
};

}  // namespace znn
