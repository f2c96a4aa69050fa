// A lock for critical sections of a few instructions (moving pointers, counting).
#pragma once
#include <atomic>
#include <thread>

namespace znn {

inline void cpu_relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class SpinLock {
public:
    void lock() {
        for (int spins = 0; flag_.exchange(true, std::memory_order_acquire); ++spins) {
            while (flag_.load(std::memory_order_relaxed)) {
                cpu_relax();
                // The holder may have been preempted: give it our core rather than burn it.
                if (++spins > 200) {
                    std::this_thread::yield();
                    spins = 0;
                }
            }
        }
    }
    void unlock() { flag_.store(false, std::memory_order_release); }

private:
    std::atomic<bool> flag_{false};
};

}  // namespace znn
