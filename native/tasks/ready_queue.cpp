#include "tasks/ready_queue.hpp"

#include <algorithm>

#include "base/spin_lock.hpp"

namespace znn {

void TaskList::push_front(Task* task) {
    task->queued = true;
    task->previous = nullptr;
    task->next = first_;
    (first_ ? first_->previous : last_) = task;
    first_ = task;
}

void TaskList::push_back(Task* task) {
    task->queued = true;
    task->next = nullptr;
    task->previous = last_;
    (last_ ? last_->next : first_) = task;
    last_ = task;
}

void TaskList::unlink(Task* task) {
    (task->previous ? task->previous->next : first_) = task->next;
    (task->next ? task->next->previous : last_) = task->previous;
    task->queued = false;
}

Task* TaskList::pop_front() {
    Task* task = first_;
    if (task) unlink(task);
    return task;
}

Task* TaskList::pop_back() {
    Task* task = last_;
    if (task) unlink(task);
    return task;
}

void HeapOfLists::push(Task* task) {
    const int priority = task->priority;
    lists_[priority].push_front(task);
    if (in_heap_[priority]) return;
    in_heap_[priority] = true;
    heap_.push_back(priority);
    std::push_heap(heap_.begin(), heap_.end());
    most_urgent_.store(heap_.front(), std::memory_order_relaxed);
}

Task* HeapOfLists::pop() {
    if (heap_.empty()) return nullptr;
    Task* task = lists_[heap_.front()].pop_front();
    drop_empty();
    return task;
}

void HeapOfLists::unlink(Task* task) {
    lists_[task->priority].unlink(task);
    drop_empty();
}

void HeapOfLists::drop_empty() {
    while (!heap_.empty() && lists_[heap_.front()].empty()) {
        in_heap_[heap_.front()] = false;
        std::pop_heap(heap_.begin(), heap_.end());
        heap_.pop_back();
    }
    most_urgent_.store(heap_.empty() ? -1 : heap_.front(), std::memory_order_relaxed);
}

namespace {

// One lock around one container: the paper's queue, and the two plain orders it is compared with.
template <class Container>
class SharedQueue final : public ReadyQueue {
public:
    template <class... Arguments>
    explicit SharedQueue(Arguments... arguments) : container_(arguments...) {}

    void push(std::span<Task* const> tasks, int) override {
        std::lock_guard guard(lock_);
        for (Task* task : tasks) container_.push(task);
    }
    Task* pop(int) override {
        std::lock_guard guard(lock_);
        return container_.pop();
    }
    bool remove(Task* task) override {
        std::lock_guard guard(lock_);
        if (!task->queued) return false;
        container_.unlink(task);
        return true;
    }
    int most_urgent() const override { return container_.most_urgent(); }

private:
    SpinLock lock_;  // held for so short that who waits should not sleep
    Container container_;
};

struct PlainList : TaskList {
    Task* pop() { return pop_front(); }
    int most_urgent() const { return -1; }
};

struct FifoList : PlainList {
    void push(Task* task) { push_back(task); }
};

struct LifoList : PlainList {
    void push(Task* task) { push_front(task); }
};

// Each worker runs its own newest task; one with nothing to do takes the oldest task of another.
class StealingQueue final : public ReadyQueue {
public:
    explicit StealingQueue(int workers) : count_(workers), queues_(std::make_unique<Local[]>(workers)) {}

    void push(std::span<Task* const> tasks, int worker) override {
        const int home = worker < 0 ? 0 : worker;
        Local& local = queues_[home];
        std::lock_guard guard(local.lock);
        for (Task* task : tasks) {
            local.list.push_front(task);
            task->home.store(home, std::memory_order_relaxed);
        }
    }
    Task* pop(int worker) override {
        {
            std::lock_guard guard(queues_[worker].lock);
            if (Task* task = queues_[worker].list.pop_front()) return at_home_no_more(task);
        }
        for (int i = 1; i < count_; ++i) {
            Local& victim = queues_[(worker + i) % count_];
            std::lock_guard guard(victim.lock);
            if (Task* task = victim.list.pop_back()) return at_home_no_more(task);
        }
        return nullptr;
    }
    bool remove(Task* task) override {
        for (int home; (home = task->home.load(std::memory_order_relaxed)) >= 0;) {
            Local& local = queues_[home];
            std::lock_guard guard(local.lock);
            // It may have been taken, and even queued elsewhere, before the lock was ours.
            if (task->home.load(std::memory_order_relaxed) != home) continue;
            local.list.unlink(at_home_no_more(task));
            return true;
        }
        return false;
    }

private:
    struct alignas(64) Local {
        SpinLock lock;
        TaskList list;
    };
    static Task* at_home_no_more(Task* task) {
        task->home.store(-1, std::memory_order_relaxed);
        return task;
    }
    int count_;
    std::unique_ptr<Local[]> queues_;
};

}  // namespace

std::unique_ptr<ReadyQueue> make_queue(Policy policy, int workers, int priorities) {
    switch (policy) {
        case Policy::priority: return std::make_unique<SharedQueue<HeapOfLists>>(priorities);
        case Policy::fifo: return std::make_unique<SharedQueue<FifoList>>();
        case Policy::lifo: return std::make_unique<SharedQueue<LifoList>>();
        case Policy::stealing: return std::make_unique<StealingQueue>(workers);
    }
    return nullptr;
}

}  // namespace znn
