#include "engine/team.hpp"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <utility>

#include <unistd.h>

#include "base/topology.hpp"

namespace znn {

Team::Team(int threads) : process_(getpid()), threads_(threads) {}

Team& Team::of_process() {
    static std::atomic<Team*> current{nullptr};
    Team* team = current.load(std::memory_order_acquire);
    // Threads do not survive a fork: the child begins anew and leaves the parent's memory alone.
    if (team && team->process_ == getpid()) return *team;
    auto fresh = std::make_unique<Team>(int(usable_processors().size()));
    if (current.compare_exchange_strong(team, fresh.get(), std::memory_order_acq_rel)) return *fresh.release();
    return *team;  // another thread was faster
}

int Team::threads() const {
    std::lock_guard guard(mutex_);
    return threads_;
}

void Team::set_threads(int threads) {
    if (threads < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
    std::lock_guard guard(mutex_);
    if (threads == threads_) return;
    threads_ = threads;
    executor_.reset();
}

Team::Turn::Turn(Team& team) : team_(team.process_ == getpid() ? team : throw std::runtime_error(
                                         "a convolution layer made before a fork cannot be used after it")),
                               lock_(team.mutex_) {
    // Not pinned, and soon asleep: the cores are shared with the caller's own threads.
    if (!team.executor_)
        team.executor_ = std::make_unique<Executor>(ExecutorOptions{team.threads_, Policy::fifo, 1, false, false, 2000});
}

float* Team::Turn::space(std::size_t floats) {
    if (team_.space_.size() < floats) {
        team_.space_ = {};  // before, not while, the larger one is there
        team_.space_ = AlignedFloats(floats);
    }
    return team_.space_.data();
}

void Team::Turn::wait(const std::function<bool()>& done) {
    Executor& executor = *team_.executor_;
    executor.wait(done);
    if (!executor.failed()) return;
    executor.drain();
    executor.rethrow_failure();
}

AlignedFloats Team::take(std::size_t floats) {
    std::vector<AlignedFloats> freed;  // after the lock
    std::lock_guard guard(blocks_mutex_);
    AlignedFloats block;
    const auto found = std::find_if(idle_.begin(), idle_.end(), [&](const auto& b) { return b.size() == floats; });
    if (found != idle_.end()) {
        block = std::move(*found);
        idle_.erase(found);
        idle_bytes_ -= floats * sizeof(float);
    } else {
        block = AlignedFloats(floats);
    }
    bytes_in_use_ += floats * sizeof(float);
    peak_bytes_ = std::max(peak_bytes_, bytes_in_use_);
    while (!idle_.empty() && idle_bytes_ + bytes_in_use_ > peak_bytes_) {
        idle_bytes_ -= idle_.front().size() * sizeof(float);
        freed.push_back(std::move(idle_.front()));
        idle_.erase(idle_.begin());
    }
    return block;
}

void Team::give_back(AlignedFloats block) {
    std::lock_guard guard(blocks_mutex_);
    bytes_in_use_ -= block.size() * sizeof(float);
    idle_bytes_ += block.size() * sizeof(float);
    idle_.push_back(std::move(block));
}

std::size_t Team::bytes_in_use() const {
    std::lock_guard guard(blocks_mutex_);
    return bytes_in_use_;
}

void Team::free_idle_memory() {
    {
        std::lock_guard guard(mutex_);
        space_ = {};
        executor_.reset();  // and the workers' scratch
    }
    std::lock_guard guard(blocks_mutex_);
    idle_.clear();
    idle_bytes_ = 0;
    peak_bytes_ = bytes_in_use_;
}

std::size_t Team::idle_bytes() const {
    std::size_t space = 0;
    {
        std::lock_guard guard(mutex_);
        space = space_.size() * sizeof(float);
    }
    std::lock_guard guard(blocks_mutex_);
    return idle_bytes_ + space;
}

}  // namespace znn
