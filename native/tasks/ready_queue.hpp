// The queues of ready tasks, one per scheduling policy.
#pragma once
#include <atomic>
#include <cstddef>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "tasks/task.hpp"

namespace znn {

enum class Policy { priority, fifo, lifo, stealing };

class ReadyQueue {
public:
    virtual ~ReadyQueue() = default;
    // Each may be popped `shares` times; a single task may be queued already.
    virtual void push(std::span<Task* const> tasks, int worker, int shares = 1) = 0;
    virtual Task* pop(int worker) = 0;  // null when there is nothing
    // Takes a task out if it is still queued (how FORCE steals an update) and returns its shares, else 0.
    virtual int remove(Task* task) = 0;
    // The priority that work in hand should give way to, -1: none. Any thread may ask at any time.
    virtual int most_urgent() const { return -1; }
};

// `priorities`: the number of distinct priorities tasks may carry.
std::unique_ptr<ReadyQueue> make_queue(Policy policy, int workers, int priorities);

// Intrusive list of tasks.
class TaskList {
public:
    Task* first() const { return first_; }
    Task* last() const { return last_; }
    void push_front(Task* task);
    void push_back(Task* task);
    void unlink(Task* task);

private:
    Task* first_ = nullptr;
    Task* last_ = nullptr;
};

// The paper's queue: a heap over the distinct priorities, each holding a list of tasks, so that an operation costs
// O(log #priorities). Highest priority first, newest first within a list.
class HeapOfLists {
public:
    explicit HeapOfLists(int priorities) : lists_(priorities), in_heap_(priorities, false) { heap_.reserve(priorities); }
    void push(Task* task);
    Task* first() const { return first_; }
    void unlink(Task* task);
    int most_urgent() const { return most_urgent_.load(std::memory_order_relaxed); }

private:
    void find_first();

    std::vector<TaskList> lists_;
    std::vector<int> heap_;  // priorities as a max-heap; the first one's list holds tasks, others' may have been emptied
    std::vector<bool> in_heap_;
    Task* first_ = nullptr;  // what is popped next
    std::atomic<int> most_urgent_{-1};  // its priority
};

}  // namespace znn
