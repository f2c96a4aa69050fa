#include "engine/exchange.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <system_error>
#include <thread>
#include <vector>

#include "base/spin_lock.hpp"
#include "base/topology.hpp"
#include "engine/tiled_probe.hpp"

namespace znn {
namespace {

using tiled::Buffer;
using tiled::Phase;
using Clock = std::chrono::steady_clock;

constexpr Phase kRound[] = {Phase::input_transform, Phase::forward_product, Phase::forward_inverse, Phase::gradient_transform,
                            Phase::backward_product, Phase::backward_inverse, Phase::backward_join, Phase::update_product};
constexpr Buffer kSpectra[] = {Buffer::input_spectra, Buffer::output_spectra, Buffer::gradient_spectra,
                               Buffer::input_gradient_spectra};
constexpr int kTurns = 25, kRepeats = 2, kSpins = 2000;  // of the repeats the first, which meets the other way's caches, is not kept

// Where two wait for each other. Who waits long lets others have the core.
class Meeting {
public:
    void meet(long& times) {
        arrived_.fetch_add(1, std::memory_order_acq_rel);
        ++times;
        for (int spins = 0; arrived_.load(std::memory_order_acquire) < 2 * times; ++spins) {
            if (spins < kSpins)
                cpu_relax();
            else
                std::this_thread::yield();
        }
    }

private:
    std::atomic<long> arrived_{0};
};

struct Layer {
    TiledProbe probe;
    Meeting meeting;

    // Seconds in which one of `workers` does its share of a round, without those of waiting for the other.
    double round(int worker, int workers, float* scratch, long& times) {
        Clock::duration busy{};
        for (const Phase phase : kRound) {
            const auto start = Clock::now();
            probe.run_share(phase, worker, workers, scratch);
            busy += Clock::now() - start;
            if (workers > 1) meeting.meet(times);
        }
        return std::chrono::duration<double>(busy).count();
    }
};

double median(std::vector<double>& values) {
    std::nth_element(values.begin(), values.begin() + std::ptrdiff_t(values.size() / 2), values.end());
    return values[values.size() / 2];
}

// Small enough that one core's second cache holds it all.
tiled::LayerPlan small_layer(int bundle) {
    return tiled::plan_tiled({16, 16, {10, 10, 26}, {3, 3, 3}}, bundle, {10, 10, 10});
}

}  // namespace

double exchange_rate(int bundle) {
    const std::vector<int> cores = usable_physical_cores();
    if (cores.size() < 2) return 0;
    const tiled::LayerPlan plan = small_layer(bundle);
    Layer layer{TiledProbe(plan, {}, 1.0), {}};
    Arena arena;
    const std::size_t room = tiled::scratch_bytes(plan) / sizeof(float) + 1;
    float* scratch[] = {arena.floats(room).data(), arena.floats(room).data()};
    std::vector<double> other(kTurns), alone(kTurns), together(kTurns);
    std::thread second;
    try {
        second = std::thread([&] {
            const PinnedThread pinned(cores[1]);
            long times = 0;
            for (double& seconds : other) {
                layer.meeting.meet(times);
                for (int i = 0; i < kRepeats; ++i) seconds = layer.round(1, 2, scratch[1], times);
            }
        });
    } catch (const std::system_error&) {
        return 0;  // no second thread is to be had
    }
    const PinnedThread pinned(cores[0]);
    long times = 0;
    for (int turn = 0; turn < kTurns; ++turn) {
        for (int i = 0; i < kRepeats; ++i) alone[turn] = layer.round(0, 1, scratch[0], times);
        layer.meeting.meet(times);
        for (int i = 0; i < kRepeats; ++i) together[turn] = layer.round(0, 2, scratch[0], times);
    }
    second.join();
    std::transform(together.begin(), together.end(), other.begin(), together.begin(), std::plus<>());
    double bytes = 0;
    for (const Buffer buffer : kSpectra) bytes += double(tiled::buffer_bytes(plan, buffer));
    return bytes / 2 / std::max(median(together) - median(alone), 1e-9);
}

}  // namespace znn
