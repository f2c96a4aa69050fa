// The memory pools under many threads: no block has two owners, and nothing grows once the largest need has been met. And the
// arena of arrays that live together.
// usage: pool_test [rounds [seed]]
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "base/aligned.hpp"
#include "base/pool.hpp"
#include "tests/check.hpp"

using namespace znn;
using namespace znn::tests;

namespace {

constexpr int threads = 8, held = 6;
const std::vector<std::size_t> sizes{1, 15, 16, 17, 100, 1000, 5000};

// A buffer whose every float carries its owner's mark.
struct Marked {
    Buffer buffer;
    std::size_t floats = 0;
    float mark = 0;

    void write(float value) {
        mark = value;
        std::fill_n(buffer.data(), floats, value);
    }
    bool intact() const {
        for (std::size_t i = 0; i < floats; ++i)
            if (buffer.data()[i] != mark) return false;
        return true;
    }
};

Marked take(Pool& pool, std::size_t floats, float mark) {
    Marked marked{pool.allocate(floats), floats, 0};
    marked.write(mark);
    return marked;
}

void run_threads(const auto& body) {
    std::vector<std::thread> all;
    for (int t = 0; t < threads; ++t) all.emplace_back([&body, t] { body(t); });
    for (std::thread& thread : all) thread.join();
}

// Every thread holds some buffers, replaces them at random and passes some on to others.
void churn(Pool& pool, int rounds, unsigned seed, const char* mode) {
    std::mutex exchange_mutex;
    std::vector<Marked> exchange(threads);
    run_threads([&](int t) {
        Random random(seed * 100 + unsigned(t));
        std::vector<Marked> mine(held);
        bool whole = true, aligned = true, counted = true;
        for (int round = 0; round < rounds; ++round) {
            Marked& slot = mine[std::size_t(random.pick(0, held - 1))];
            whole &= !slot.buffer || slot.intact();
            if (random.pick(0, 3) == 0) {  // swap with whatever another thread left
                std::lock_guard guard(exchange_mutex);
                std::swap(slot, exchange[std::size_t(random.pick(0, threads - 1))]);
                continue;
            }
            slot = {};
            const std::size_t floats = sizes[std::size_t(random.pick(0, int(sizes.size()) - 1))];
            slot = take(pool, floats, float(t * rounds + round));
            aligned &= reinterpret_cast<std::uintptr_t>(slot.buffer.data()) % 64 == 0;
            const Buffer second = slot.buffer;  // the copy goes first, the block stays
            counted &= !slot.buffer.unique() && second.data() == slot.buffer.data();
        }
        for (const Marked& marked : mine) counted &= !marked.buffer || marked.buffer.unique();
        expect(whole, std::string(mode) + ": another owner wrote into a buffer");
        expect(aligned, std::string(mode) + ": a buffer is not aligned to a cache line");
        expect(counted, std::string(mode) + ": a reference count is wrong");
    });
}

void test_steady_state(int rounds, unsigned seed) {
    Pool pool;
    {  // as much of every size as can be held at once
        std::vector<Buffer> most;
        for (std::size_t floats : sizes)
            for (int i = 0; i < threads * (held + 1); ++i) most.push_back(pool.allocate(floats));
    }
    const std::size_t bytes = pool.bytes_from_system(), blocks = pool.blocks_from_system();
    for (unsigned i = 0; i < 3; ++i) {
        churn(pool, rounds, seed + i, "pools");
        expect(pool.bytes_from_system() == bytes, "the pool grew in the steady state");
        expect(pool.blocks_from_system() == blocks, "the pool took more blocks in the steady state");
    }
}

void test_growth_at_once(int rounds, unsigned seed) {
    for (int i = 0; i < 5; ++i) {
        Pool pool;  // empty: all threads grow it together, over several chunks of headers
        churn(pool, rounds / 5, seed + unsigned(i), "growing pools");
        run_threads([&](int t) {
            std::vector<Marked> many;
            for (int k = 0; k < 400; ++k) many.push_back(take(pool, 20, float(t * 1000 + k)));
            bool whole = true;
            for (const Marked& marked : many) whole &= marked.intact();
            expect(whole, "a block was handed out twice while the pool grew");
        });
    }
}

void test_reuse() {
    Pool pool;
    const float* first = pool.allocate(100).data();
    expect(pool.allocate(70).data() == first, "a block of the same power of two must be reused");
    const Buffer larger = pool.allocate(200);
    expect(larger.data() != first && pool.blocks_from_system() == 2, "a larger buffer needs a block of its own");
}

bool is_refused(const auto& request) {
    try {
        request();
    } catch (const std::bad_alloc&) {
        return true;
    }
    return false;
}

void test_too_much(Allocator allocator) {
    Pool pool(allocator);
    expect(is_refused([&] { pool.allocate(std::size_t{1} << 50); }), "a request beyond all memory must throw std::bad_alloc");
    expect(take(pool, 50, 3).intact(), "a pool must be usable after a refused request");
}

void test_arena(unsigned seed) {
    Arena arena;
    Random random(seed);
    std::vector<AlignedFloats> arrays;
    bool aligned = true, zeroed = true;
    for (int i = 0; i < 300; ++i) {
        const bool large = i % 100 == 50;  // longer than what the arena takes from the system at once
        arrays.push_back(arena.floats(std::size_t(large ? 20'000'000 + i : random.pick(1, 200'000))));
        AlignedFloats& array = arrays.back();
        aligned &= reinterpret_cast<std::uintptr_t>(array.data()) % 64 == 0;
        const std::size_t seen = large ? 1000 : array.size();
        for (std::size_t k = 0; k < seen; ++k) zeroed &= array[k] == 0 && array[array.size() - 1 - k] == 0;
        std::fill_n(array.data(), seen, float(i));
        std::fill_n(array.data() + array.size() - seen, seen, float(i));
    }
    const auto whole = [&] {
        bool own = true;
        for (int i = 0; i < int(arrays.size()); ++i) own &= arrays[i][0] == float(i) && arrays[i][arrays[i].size() - 1] == float(i);
        return own;
    };
    expect(aligned, "an array of an arena is not aligned to a cache line");
    expect(zeroed, "an array of an arena is not zeroed");
    expect(whole(), "two arrays of an arena overlap");
    expect(arena.floats(0).size() == 0 && !arena.floats(0).data(), "an empty array has no memory");
    expect(is_refused([&] { arena.floats(std::size_t{1} << 48); }), "an arena's request beyond all memory must throw std::bad_alloc");
    AlignedFloats after = arena.floats(1 << 20);
    std::fill_n(after.data(), after.size(), -1.0f);
    expect(whole(), "an array of an arena after a refused request overlaps another");
}

}  // namespace

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 20000;
    const unsigned seed = argc > 2 ? unsigned(std::atol(argv[2])) : 1;
    test_steady_state(rounds, seed);
    test_growth_at_once(rounds, seed);
    Pool malloc_pool(Allocator::malloc);
    churn(malloc_pool, rounds, seed, "malloc");
    test_reuse();
    test_arena(seed);
    test_too_much(Allocator::pools);
    test_too_much(Allocator::malloc);
    return report();
}
