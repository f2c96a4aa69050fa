// A task: a piece of work that becomes ready once, is run by one worker, and may be FORCEd by a later task.
#pragma once
#include <atomic>
#include <cstdint>

namespace znn {

class Worker;

// What a task is, for the trace and the statistics. `kind` and `group` are given meaning by whoever creates the task.
struct TaskLabel {
    std::int16_t phase = 0, kind = 0;
    std::int32_t group = 0, a = 0, b = 0;
};

class Task {
public:
    Task() = default;
    Task(const Task&) = delete;
    Task& operator=(const Task&) = delete;
    virtual ~Task() = default;

    // Called before run. A task that must FORCE others first does it here; false means it was delegated and will be
    // executed again, from here, when the task it waits for is complete.
    virtual bool prepare(Worker&) { return true; }
    virtual void run(Worker&) = 0;

    TaskLabel label;
    int priority = 0;       // index into the executor's distinct priorities, larger is more urgent
    bool essential = false; // run even after another task has failed (updates: nothing computed is lost)
    bool in_pieces = false; // its body counts and traces the pieces it does, one by one; no other task FORCEs it

    // Longest measured path of work that had to precede this task, in ns (only kept when tracing).
    std::atomic<std::int64_t> path_ns{0};

    // ---- for the ready queue: an intrusive doubly linked list, guarded by the queue's lock
    Task* previous = nullptr;
    Task* next = nullptr;
    std::atomic<int> shares{0};  // how often it is queued: several workers may run it at once
    bool queued() const { return shares.load(std::memory_order_relaxed) > 0; }
    std::atomic<int> home{-1};  // stealing: the worker in whose list it is, changed under that list's lock; -1: none

    // ---- for FORCE: tasks to go on with when this one completes. `complete` marks the end of the list.
    static Task* complete_mark() { return reinterpret_cast<Task*>(std::uintptr_t{1}); }
    bool is_complete() const { return continuations_.load(std::memory_order_acquire) == complete_mark(); }
    void set_complete() { continuations_.store(complete_mark(), std::memory_order_release); }
    void rearm() { continuations_.store(nullptr, std::memory_order_release); }
    // Leaves `follower` to be run by whoever completes this task; false if it is complete already.
    bool delegate(Task* follower) {
        Task* head = continuations_.load(std::memory_order_acquire);
        do {
            if (head == complete_mark()) return false;
            follower->follower_ = head;
        } while (!continuations_.compare_exchange_weak(head, follower, std::memory_order_acq_rel));
        return true;
    }
    // Marks this task complete and returns the list of followers (linked by `take_follower`).
    Task* complete() { return continuations_.exchange(complete_mark(), std::memory_order_acq_rel); }
    Task* take_follower() {
        Task* follower = follower_;
        follower_ = nullptr;
        return follower;
    }

private:
    std::atomic<Task*> continuations_{complete_mark()};
    Task* follower_ = nullptr;
};

}  // namespace znn
