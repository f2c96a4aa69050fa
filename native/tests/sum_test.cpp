// Sums to which many workers contribute: correct for every kind, and bit-identical for the ordered one.
// usage: sum_test [rounds [seed]]
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <vector>

#include "tasks/concurrent_sum.hpp"
#include "tests/check.hpp"

using namespace znn;
using namespace znn::tests;

namespace {

using Values = std::vector<std::vector<float>>;  // one array per contribution

void add(float* destination, const float* source, std::size_t floats) {
    for (std::size_t i = 0; i < floats; ++i) destination[i] += source[i];
}

// One sum with its contributing tasks.
struct Bench {
    class Contribution final : public Task {
    public:
        Contribution(Bench& bench, int index) : bench_(bench), index_(index) {}
        void run(Worker& worker) override { bench_.contribute(index_, worker); }

    private:
        Bench& bench_;
        const int index_;
    };

    Bench(SumKind kind, int contributions, std::size_t floats) : floats(floats) {
        sum.configure(kind, contributions, floats, add);
        for (int i = 0; i < contributions; ++i) tasks.emplace_back(*this, i);
    }

    void contribute(int index, Worker& worker) {
        Buffer mine = with_take ? sum.take(worker) : Buffer();
        const float* own = (*values)[std::size_t(index)].data();
        if (mine) {
            add(mine.data(), own, floats);
        } else {
            mine = pool.allocate(floats);
            std::copy_n(own, floats, mine.data());
        }
        if (Buffer whole = sum.give(std::move(mine), index, worker)) {
            result.assign(whole.data(), whole.data() + floats);
            ++results;
        }
        left.fetch_sub(1);
    }

    // All contributions in a random order; the sum.
    const std::vector<float>& run(const Values& all, Executor& executor, Random& random) {
        values = &all;
        results = 0;
        with_take = random.coin();
        left = int(tasks.size());
        std::vector<Task*> order;
        for (Task& task : tasks) order.push_back(&task);
        std::shuffle(order.begin(), order.end(), random.engine());
        executor.submit(order, nullptr);
        executor.drain();
        return result;
    }

    const std::size_t floats;
    Pool pool;
    ConcurrentSum sum;
    std::deque<Contribution> tasks;
    const Values* values = nullptr;
    bool with_take = false;
    std::atomic<int> left{0}, results{0};
    std::vector<float> result;
};

Values random_values(int contributions, std::size_t floats, bool whole_numbers, Random& random) {
    Values values(static_cast<std::size_t>(contributions), std::vector<float>(floats));
    for (auto& array : values)
        for (float& x : array) x = whole_numbers ? float(random.pick(-1000, 1000)) : random.normal();
    return values;
}

const char* name_of(SumKind kind) {
    return kind == SumKind::wait_free ? "wait-free" : kind == SumKind::locked ? "locked" : "ordered";
}

// Sums of whole numbers are exact in any order.
void test_exact(SumKind kind, int threads, int rounds, Random& random) {
    Executor executor({.threads = threads, .policy = Policy(random.pick(0, 3)), .pin = false, .trace = random.coin()});
    for (int contributions : {1, 2, 3, 5, 8, 17}) {
        const std::size_t floats = std::size_t(random.pick(1, 300));
        Bench bench(kind, contributions, floats);
        const Values values = random_values(contributions, floats, true, random);
        std::vector<float> wanted(floats, 0.0f);
        for (const auto& array : values) add(wanted.data(), array.data(), floats);
        bool right = true, once = true;
        for (int round = 0; round < rounds; ++round) {
            right &= bench.run(values, executor, random) == wanted;
            once &= bench.results == 1 && bench.left == 0;
        }
        const std::string what =
            std::string(name_of(kind)) + " sum of " + std::to_string(contributions) + ", " + std::to_string(threads) + " threads";
        expect(right, what + " is wrong");
        expect(once, what + " was not handed out exactly once");
    }
}

void test_bit_identical(int threads, int rounds, Random& random) {
    Executor one({.threads = 1, .pin = false}), many({.threads = threads, .pin = false});
    for (int contributions : {2, 3, 7, 16, 33}) {
        Bench bench(SumKind::ordered, contributions, 50);
        const Values values = random_values(contributions, 50, false, random);
        const std::vector<float> wanted = bench.run(values, one, random);
        bool same = true;
        for (int round = 0; round < rounds; ++round)
            same &= std::memcmp(bench.run(values, round % 4 ? many : one, random).data(), wanted.data(), 50 * sizeof(float)) == 0;
        expect(same, "the ordered sum of " + std::to_string(contributions) + " differs with " + std::to_string(threads) + " threads");
    }
}

// A sum that was left half way can be dropped and used again.
void test_clear(SumKind kind, Random& random) {
    Executor executor({.threads = 2, .pin = false});
    Bench bench(kind, 5, 20);
    const Values values = random_values(5, 20, true, random);
    const std::vector<float> wanted = bench.run(values, executor, random);
    bench.left = 3;
    for (int i = 0; i < 3; ++i) executor.submit(&bench.tasks[std::size_t(i)], nullptr);
    executor.drain();
    bench.sum.clear();
    bench.result.clear();
    expect(bench.run(values, executor, random) == wanted && bench.results == 1,
           std::string(name_of(kind)) + " sum is wrong after clear()");
}

}  // namespace

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 300;
    Random random(argc > 2 ? unsigned(std::atol(argv[2])) : 1);
    for (int threads : {1, 2, 3, 8}) {
        for (SumKind kind : {SumKind::wait_free, SumKind::locked, SumKind::ordered}) test_exact(kind, threads, rounds, random);
        test_bit_identical(threads, rounds, random);
    }
    for (SumKind kind : {SumKind::wait_free, SumKind::locked, SumKind::ordered}) test_clear(kind, random);
    return report();
}
