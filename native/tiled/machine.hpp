// What this machine can do: the constants of the cost model, the walls of the roofline, and what a layer asks of them.
#pragma once
#include <algorithm>

#include "tiled/tiled.hpp"

namespace znn::tiled {

// One core's walls: operations per second (one code path's vectors), bytes per second copied in L3 and in memory.
struct Peaks {
    double flops = 0, cache_bytes = 0, memory_bytes = 0;
};
Peaks measure_peaks();

// Seconds that so many operations take this thread where it waits for nothing but its own arithmetic.
double peak_seconds(double operations);

// Measures the constants of the cost model for bundles of one width with a few small layers (about 0.5 s): each is the least of
// several runs, and kept within what `peaks` allow, so that a disturbed calibration cannot mislead by more than a small factor.
Machine calibrate(const Peaks& peaks, int bundle);

// What a round of a layer takes at least with its method: operations, and bytes that every phase reads and writes once.
struct Work {
    double flops[kPhases] = {}, bytes[kPhases] = {};
};
Work work(const LayerPlan& plan);

// The same layer cut to as much of its image as a measurement needs: a slab of tiles, or about `seconds` of work.
// Times of a phase scale as their predictions do. A fused one stays as it is.
LayerPlan representative(const LayerPlan& plan, const Machine& machine, double seconds);

// Seconds this thread has had on a core: other programs on the machine disturb it least.
double thread_seconds();
// The shortest of `repeats` runs, by that clock.
template <class Run>
double shortest(int repeats, Run run) {
    double best = 1e9;
    for (int repeat = 0; repeat < repeats; ++repeat) {
        const double start = thread_seconds();
        run();
        best = std::min(best, thread_seconds() - start);
    }
    return best;
}

}  // namespace znn::tiled
