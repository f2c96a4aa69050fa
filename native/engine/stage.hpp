// Stages: sets of equal tasks ("pieces") with what must come before and what follows. The bundled engine's task graph.
#pragma once
#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/spin_lock.hpp"
#include "tasks/executor.hpp"

namespace znn {

class Stage {
public:
    using Body = std::function<void(int piece, Worker& worker)>;

    Stage(TaskLabel label, int pieces, Body body);

    // `later` starts only when this stage is complete (within one round).
    void before(Stage& later);
    // Run by the worker that finishes the last piece, before the followers start.
    void when_done(std::function<void(Worker*)> action) { done_actions_.push_back(std::move(action)); }

    void set_executor(Executor* executor) { executor_ = executor; }
    void set_priority(int priority);
    // It starts only after `arrivals` more, from gates or from the caller.
    void await(int arrivals) { predecessors_ += arrivals; }
    // Before a round, and before anything arrives.
    void arm();
    void arrive(Worker* worker);

    int pieces() const { return int(pieces_.size()); }
    const TaskLabel label;

private:
    class Piece final : public Task {
    public:
        Piece(Stage& stage, int index) : stage_(stage), index_(index) { essential = true; }
        void run(Worker& worker) override;

    private:
        Stage& stage_;
        int index_;
    };

    void complete(Worker* worker);

    Body body_;
    Executor* executor_ = nullptr;
    std::vector<std::unique_ptr<Piece>> pieces_;
    std::vector<Task*> tasks_;
    std::vector<Stage*> followers_;
    std::vector<std::function<void(Worker*)>> done_actions_;
    int predecessors_ = 0;
    std::atomic<int> waiting_{0}, left_{0};
};

// Lets stages of the next round wait for a stage of this one: FORCE at the granularity of layers. Closed when the work it
// guards is armed, opened when that is done.
class Gate {
public:
    void close() { open_ = false; }  // only while nobody waits
    void open(Worker* worker);
    // True if it is open; otherwise `stage` will arrive once more when it opens.
    bool pass(Stage& stage);

private:
    SpinLock lock_;
    bool open_ = true;
    std::vector<Stage*> waiting_;
};

}  // namespace znn
