// What the native test programs share: counting checks, random numbers.
#pragma once
#include <atomic>
#include <cstdio>
#include <random>
#include <string>

namespace znn::tests {

inline std::atomic<long> passed{0}, failed{0};

inline void expect(bool ok, const std::string& what) {
    if (ok)
        ++passed;
    else if (++failed <= 50)
        std::printf("FAILED %s\n", what.c_str());
}

// Prints the result as the last line; the exit status of main.
inline int report() {
    std::printf("%ld passed, %ld failed\n", passed.load(), failed.load());
    return failed == 0 && passed > 0 ? 0 : 1;
}

class Random {
public:
    explicit Random(unsigned seed) : engine_(seed) {}
    int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine_); }
    bool coin() { return pick(0, 1) == 1; }
    float normal() { return std::normal_distribution<float>()(engine_); }
    std::mt19937& engine() { return engine_; }

private:
    std::mt19937 engine_;
};

}  // namespace znn::tests
