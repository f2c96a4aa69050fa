// Stages: sets of equal pieces of work with what must come before and what follows. The bundled engine's task graph.
// Every worker has its part of a stage's pieces, the same share of every stage, and takes others' only when its own are gone:
// neighbouring stages cut the same image, so it mostly reads what it wrote itself, which is still in its own cache.
// What all workers share is met once per worker and stage: with many workers and short pieces it would be what all wait for.
#pragma once
#include <atomic>
#include <cstdint>
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

    void set_executor(Executor* executor);
    // All that is said of a stage (priority, predecessors, what it awaits) is said before set_executor.
    void set_priority(int priority) { priority_ = priority; }
    // It starts only after `arrivals` more, from gates or from the caller.
    void await(int arrivals) { predecessors_ += arrivals; }
    // `last`: the worker's own task ends with this.
    void arrive(Worker* worker, bool last = false);

    int pieces() const { return pieces_; }
    const TaskLabel label;

private:
    // The right to run pieces until none is left or something more urgent comes up, shared by the workers that could help.
    class Ticket final : public Task {
    public:
        explicit Ticket(Stage& stage) : stage_(stage) { essential = in_pieces = true; }
        void run(Worker& worker) override { stage_.work(worker); }

    private:
        Stage& stage_;
    };

    // The pieces of one worker that nobody has begun. They are stamped with their round: those of an earlier one are all there
    // again, so that a round begins without a visit to every worker's cache.
    struct Pieces {
        static constexpr int most = (1 << 24) - 1;
        std::uint64_t round : 16, first : 24, end : 24;
        bool empty() const { return first == end; }
    };
    struct alignas(64) Range {
        std::atomic<Pieces> pieces{Pieces{}};
    };

    void work(Worker& worker);
    void run(int piece, Worker& worker);
    Pieces left(Pieces found, int worker) const;
    int take(int worker, bool from_end);  // -1: none is left
    int next_piece(int worker);           // the same
    bool has_pieces() const;
    void leave(Worker& worker);
    void arm();
    void complete(Worker* worker, bool last);

    Body body_;
    Executor* executor_ = nullptr;
    int pieces_, workers_ = 0, shares_ = 0, priority_ = 0;
    Ticket ticket_{*this};
    std::unique_ptr<Range[]> ranges_;  // one per worker
    std::vector<Stage*> followers_;
    std::vector<std::function<void(Worker*)>> done_actions_;
    int predecessors_ = 0;
    std::uint32_t round_ = 0;  // of 1 to 65535, then again: in each every worker's pieces are all taken, and so stamped
    std::atomic<int> waiting_{0};
    alignas(64) std::atomic<int> open_{0};  // shares of the ticket whose holders may still run a piece
};

// Lets stages of the next round wait for a stage of this one: FORCE at the granularity of layers. Closed when the work it
// guards begins, opened when that is done.
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
