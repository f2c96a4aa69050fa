// The workers and the memory that single layers share (layer.hpp): one call runs at a time, on all of them.
#pragma once
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "base/aligned.hpp"
#include "tasks/executor.hpp"

namespace znn {

// Workers, work space and a store of blocks, shared by layers. Thread-safe.
class Team {
public:
    explicit Team(int threads);

    // The team of this process; a fork gets one of its own. It ends with the process.
    static Team& of_process();

    int threads() const;
    void set_threads(int threads);  // from the next call on

    // A turn: nobody else runs while it lasts.
    class Turn {
    public:
        explicit Turn(Team& team);
        Executor& executor() { return *team_.executor_; }
        float* space(std::size_t floats);  // the shared work space, contents undefined, at least this large
        void wait(const std::function<bool()>& done);  // rethrows what a task threw

    private:
        Team& team_;
        std::lock_guard<std::mutex> lock_;
    };

    // Blocks that outlive a turn. Those given back are kept for the next request of the same size, up to as many bytes as
    // are then in use.
    AlignedFloats take(std::size_t floats);
    void give_back(AlignedFloats block);
    std::size_t bytes_in_use() const;

    void free_idle_memory();      // work space, scratch and blocks that nobody uses
    std::size_t idle_bytes() const;

private:
    mutable std::mutex mutex_;         // held for a turn: workers and work space
    mutable std::mutex blocks_mutex_;  // the store
    const int process_;  // whose threads these are: a fork has none of them
    int threads_;
    std::unique_ptr<Executor> executor_;
    AlignedFloats space_;
    std::vector<AlignedFloats> idle_;
    std::size_t idle_bytes_ = 0, bytes_in_use_ = 0, peak_bytes_ = 0;
};

}  // namespace znn
