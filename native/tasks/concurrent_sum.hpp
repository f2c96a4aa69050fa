// Sums of images to which many workers contribute.
#pragma once
#include <mutex>
#include <vector>

#include "base/pool.hpp"
#include "base/spin_lock.hpp"
#include "tasks/executor.hpp"

namespace znn {

enum class SumKind { wait_free, locked, ordered };

// Collects a known number of contributions, each a buffer of equal size, and ends with one buffer holding their sum.
//  wait_free  the paper's almost wait-free sum: only pointers move inside the lock, additions happen outside it
//  locked     one lock held during the addition
//  ordered    a fixed binary tree: the result does not depend on who came when, so it is bit-identical for any number
//             of workers
class ConcurrentSum {
public:
    using Add = void (*)(float* destination, const float* source, std::size_t floats);

    void configure(SumKind kind, int contributions, std::size_t floats, Add add);
    int contributions() const { return contributions_; }

    // A partial sum to which the caller may add its own contribution in place, or none. Saves the caller a temporary
    // image and a pass over memory: the "otherwise take the stored image out" step, done before computing.
    Buffer take(Worker& worker);
    // Hands in one contribution (`index` < contributions). The last one receives the whole sum, the others nothing.
    Buffer give(Buffer mine, int index, Worker& worker);
    // Drops everything (after a failed round).
    void clear();

private:
    Buffer give_wait_free(Buffer mine, Worker& worker);
    Buffer give_locked(Buffer mine, Worker& worker);
    Buffer give_ordered(Buffer mine, int index, Worker& worker);

    SumKind kind_ = SumKind::wait_free;
    int contributions_ = 1;
    std::size_t floats_ = 0;
    Add add_ = nullptr;

    SpinLock pointer_lock_;
    std::mutex whole_lock_;
    Buffer stored_;
    int given_ = 0;
    std::vector<Buffer> tree_;  // ordered: one slot per inner node, level by level
};

}  // namespace znn
