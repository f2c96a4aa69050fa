#include "tasks/concurrent_sum.hpp"

namespace znn {

namespace {

// Adds the time until destruction to the worker's time in locks.
class LockClock {
public:
    explicit LockClock(Worker& worker) : worker_(worker), start_(worker.tracing() ? now_ns() : 0) {}
    ~LockClock() {
        if (start_) worker_.counters.lock_ns += now_ns() - start_;
    }

private:
    Worker& worker_;
    std::int64_t start_;
};

}  // namespace

void ConcurrentSum::configure(SumKind kind, int contributions, std::size_t floats, Add add) {
    kind_ = kind;
    contributions_ = contributions;
    floats_ = floats;
    add_ = add;
    std::size_t slots = 0;
    for (int n = contributions; n > 1; n = (n + 1) / 2) slots += std::size_t(n / 2);
    tree_ = std::vector<Buffer>(kind == SumKind::ordered ? slots : 0);
}

Buffer ConcurrentSum::take(Worker& worker) {
    if (kind_ != SumKind::wait_free || contributions_ == 1) return {};
    LockClock clock(worker);
    std::lock_guard guard(pointer_lock_);
    return std::move(stored_);
}

Buffer ConcurrentSum::give(Buffer mine, int index, Worker& worker) {
    if (contributions_ == 1) return mine;
    switch (kind_) {
        case SumKind::wait_free: return give_wait_free(std::move(mine), worker);
        case SumKind::locked: return give_locked(std::move(mine), worker);
        case SumKind::ordered: return give_ordered(std::move(mine), index, worker);
    }
    return {};
}

Buffer ConcurrentSum::give_wait_free(Buffer mine, Worker& worker) {
    for (;;) {
        Buffer other;
        {
            LockClock clock(worker);
            std::lock_guard guard(pointer_lock_);
            if (!stored_) {
                // Whoever holds a part of the sum has not been counted yet, so the last one counted holds all of it.
                if (++given_ == contributions_) {
                    given_ = 0;
                    return mine;
                }
                stored_ = std::move(mine);
                return {};
            }
            other = std::move(stored_);
        }
        add_(mine.data(), other.data(), floats_);
    }
}

Buffer ConcurrentSum::give_locked(Buffer mine, Worker& worker) {
    LockClock clock(worker);
    std::lock_guard guard(whole_lock_);
    if (stored_)
        add_(stored_.data(), mine.data(), floats_);
    else
        stored_ = std::move(mine);
    if (++given_ < contributions_) return {};
    given_ = 0;
    return std::move(stored_);
}

Buffer ConcurrentSum::give_ordered(Buffer mine, int index, Worker& worker) {
    std::size_t level = 0;
    for (int n = contributions_; n > 1; n = (n + 1) / 2) {
        const int pair = index / 2;
        if (pair < n / 2) {  // an odd one out moves up alone
            Buffer other;
            {
                LockClock clock(worker);
                std::lock_guard guard(pointer_lock_);
                Buffer& slot = tree_[level + std::size_t(pair)];
                if (!slot) {
                    slot = std::move(mine);
                    return {};
                }
                other = std::move(slot);
            }
            add_(mine.data(), other.data(), floats_);  // a + b and b + a are the same float
        }
        level += std::size_t(n / 2);
        index = pair;
    }
    return mine;
}

void ConcurrentSum::clear() {
    stored_.reset();
    given_ = 0;
    for (Buffer& slot : tree_) slot.reset();
}

}  // namespace znn
