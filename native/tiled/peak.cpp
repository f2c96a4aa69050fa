// The highest rate of arithmetic a core can reach on this code path: what "peak" means in the roofline.
#include "tiled/variant.hpp"

namespace znn::tiled::ZNN_VARIANT {

// 12 independent chains hide the latency of two pipelines. 2 * 12 * kV operations a step. Where they start is hidden from the
// compiler: a chain that starts where it stays (1, here) would be left out.
float multiply_add(long steps) {
    const volatile float start = 2.0f;
    V sums[12];
    for (int i = 0; i < 12; ++i) sums[i] = V{} + (start + float(i));
    const V factor = V{} + 0.999f, term = V{} + 1e-3f;
    for (long step = 0; step < steps; ++step)
        for (int i = 0; i < 12; ++i) sums[i] = sums[i] * factor + term;
    V sum = sums[0];
    for (int i = 1; i < 12; ++i) sum += sums[i];
    float total = 0;
    for (int lane = 0; lane < kV; ++lane) total += sum[lane];
    return total;
}

}  // namespace znn::tiled::ZNN_VARIANT
