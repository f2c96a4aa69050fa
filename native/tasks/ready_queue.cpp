#include "tasks/ready_queue.hpp"

#include <algorithm>
#include <utility>

#include "base/spin_lock.hpp"

namespace znn {

void TaskList::push_front(Task* task) {
    task->previous = nullptr;
    task->next = first_;
    (first_ ? first_->previous : last_) = task;
    first_ = task;
}

void TaskList::push_back(Task* task) {
    task->next = nullptr;
    task->previous = last_;
    (last_ ? last_->next : first_) = task;
    last_ = task;
}

void TaskList::unlink(Task* task) {
    (task->previous ? task->previous->next : first_) = task->next;
    (task->next ? task->next->previous : last_) = task->previous;
}

void HeapOfLists::push(Task* task) {
    const int priority = task->priority;
    lists_[priority].push_front(task);
    if (!in_heap_[priority]) {
        in_heap_[priority] = true;
        heap_.push_back(priority);
        std::push_heap(heap_.begin(), heap_.end());
    }
    if (first_ && first_->priority > priority) return;
    first_ = task;
    most_urgent_.store(priority, std::memory_order_relaxed);
}

void HeapOfLists::unlink(Task* task) {
    lists_[task->priority].unlink(task);
    if (task == first_) find_first();
}

void HeapOfLists::find_first() {
    while (!heap_.empty() && !lists_[heap_.front()].first()) {
        in_heap_[heap_.front()] = false;
        std::pop_heap(heap_.begin(), heap_.end());
        heap_.pop_back();
    }
    first_ = heap_.empty() ? nullptr : lists_[heap_.front()].first();
    most_urgent_.store(first_ ? first_->priority : -1, std::memory_order_relaxed);
}

namespace {

// One lock around one container: the paper's queue, and the two plain orders it is compared with.
template <class Container>
class SharedQueue final : public ReadyQueue {
public:
    template <class... Arguments>
    explicit SharedQueue(Arguments... arguments) : container_(arguments...) {}

    void push(std::span<Task* const> tasks, int, int shares) override {
        std::lock_guard guard(lock_);
        for (Task* task : tasks) {
            if (!task->queued()) container_.push(task);
            task->shares += shares;
        }
    }
    Task* pop(int) override {
        std::lock_guard guard(lock_);
        Task* task = container_.first();
        if (task && --task->shares == 0) container_.unlink(task);
        return task;
    }
    int remove(Task* task) override {
        std::lock_guard guard(lock_);
        if (task->queued()) container_.unlink(task);
        return task->shares.exchange(0);
    }
    int most_urgent() const override { return container_.most_urgent(); }

private:
    alignas(64) SpinLock lock_;  // held for so short that who waits should not sleep
    Container container_;
};

struct PlainList : TaskList {
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

    void push(std::span<Task* const> tasks, int worker, int shares) override {
        for (Task* task : tasks)
            while (!add_share(task, shares) && !give_home(task, worker < 0 ? 0 : worker, shares)) {
            }
    }
    Task* pop(int worker) override {
        {
            std::lock_guard guard(queues_[worker].lock);
            if (Task* task = queues_[worker].list.first()) return take_share(queues_[worker], task);
        }
        for (int i = 1; i < count_; ++i) {
            Local& victim = queues_[(worker + i) % count_];
            std::lock_guard guard(victim.lock);
            if (Task* task = victim.list.last()) return take_share(victim, task);
        }
        return nullptr;
    }
    int remove(Task* task) override {
        return shares_at_home(task, [&](Local& local) {
            const int shares = task->shares.exchange(0);
            leave_home(local, task);
            return shares;
        });
    }

private:
    struct alignas(64) Local {
        SpinLock lock;
        TaskList list;
    };
    // What `change` makes of the shares of a task in the list where it is, under that list's lock; 0 if it is in none.
    template <class Change>
    int shares_at_home(Task* task, Change change) {
        for (int home; (home = task->home.load(std::memory_order_relaxed)) >= 0;) {
            Local& local = queues_[home];
            std::lock_guard guard(local.lock);
            // It may have been taken, and even queued elsewhere, before the lock was ours.
            if (task->home.load(std::memory_order_relaxed) == home) return change(local);
        }
        return 0;
    }
    bool add_share(Task* task, int shares) {
        return shares_at_home(task, [&](Local&) { return task->shares += shares; }) > 0;
    }
    // False: another worker has just done so.
    bool give_home(Task* task, int home, int shares) {
        std::lock_guard guard(queues_[home].lock);
        int none = -1;
        if (!task->home.compare_exchange_strong(none, home, std::memory_order_acquire)) return false;
        queues_[home].list.push_front(task);
        task->shares = shares;
        return true;
    }
    static Task* take_share(Local& local, Task* task) {
        if (--task->shares == 0) leave_home(local, task);
        return task;
    }
    static void leave_home(Local& local, Task* task) {
        local.list.unlink(task);
        task->home.store(-1, std::memory_order_release);  // whoever gives it another home need not hold this lock
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
