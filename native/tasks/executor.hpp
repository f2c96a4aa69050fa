// Workers that run ready tasks, FORCE, and the measurement of what they did. Knows nothing of networks.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "base/scratch.hpp"
#include "base/spin_lock.hpp"
#include "tasks/ready_queue.hpp"
#include "tasks/task.hpp"

namespace znn {

inline std::int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

struct TraceEvent {
    std::int32_t worker;
    TaskLabel label;
    std::int64_t start_ns, end_ns;
};

struct WorkerCounters {
    std::int64_t tasks = 0, forced = 0, delegated = 0;
    std::int64_t task_ns = 0, queue_ns = 0, idle_ns = 0, lock_ns = 0;  // kept only while tracing
};

class Executor;

// One worker: its index, its scratch memory and what it has measured. Only its own thread writes to it.
class Worker {
public:
    Worker(Executor& executor, int index) : executor(executor), index(index) {}

    bool tracing() const { return tracing_.load(std::memory_order_relaxed); }
    // Ends the event in hand and begins one with another label (a task whose tail is another kind of work).
    void relabel(TaskLabel label);
    // Around every piece of a task that counts and traces its pieces itself.
    void begin_piece(TaskLabel label);
    void end_piece();
    // Time that preceded this moment on the longest path through the tasks that led here.
    std::int64_t path_now() const { return tracing() ? path_base_ + (now_ns() - path_start_) : 0; }
    // A predecessor with a longer path has been met (the other contributions of a sum).
    void join_path(std::int64_t path_ns);

    Executor& executor;
    const int index;
    WorkerCounters counters;
    Scratch scratch;

private:
    friend class Executor;
    void begin_event(TaskLabel label);
    void end_event();

    std::atomic<bool> tracing_{false};  // idle workers look at it while it is set
    bool in_event_ = false;
    std::int64_t looking_since_ = 0;  // for a task; 0: not, or not traced
    const std::function<bool()>* over_ = nullptr;  // where a caller sits in for this worker: when it wants to go on
    Task* next_ = nullptr;                         // a share to go on with, which was not queued
    TaskLabel label_;
    std::int64_t event_start_ = 0, path_base_ = 0, path_start_ = 0;
    std::vector<TraceEvent> events_;
};

struct ExecutorOptions {
    int threads = 1;
    Policy policy = Policy::priority;
    int priorities = 1;
    bool pin = true;
    bool trace = false;
    int looks = 8000;  // for a task before a worker sleeps, about 25 ns each: rounds follow one another within microseconds
};

// `threads` workers: threads of its own, and in place of worker 0 whichever thread waits for the work. So one worker runs only
// while somebody waits, and a round needs no other thread to be woken before its first task and after its last.
class Executor {
public:
    explicit Executor(const ExecutorOptions& options);
    ~Executor();  // drains the queue
    Executor(const Executor&) = delete;
    Executor& operator=(const Executor&) = delete;

    int threads() const { return int(workers_.size()); }
    const std::vector<int>& processors() const { return processors_; }  // where workers are pinned, empty: nowhere

    // Hands ready tasks to the queue. `worker` is the caller's own worker, null outside.
    void submit(std::span<Task* const> tasks, Worker* worker);
    void submit(Task* task, Worker* worker) { submit(std::span<Task* const>(&task, 1), worker); }

    // A task in pieces, which so many workers may run at once: each takes a share. `last`: the worker's own task ends with this, and
    // it goes on with a share itself. Whoever finishes the last piece closes it, when nothing will touch the task any more.
    void open(Task& task, int shares, Worker* worker, bool last);
    void give_back(Task& task) { offer(task, 1); }  // a share of one with pieces left
    // Takes back the shares that nobody has taken, and returns how many.
    int withdraw(Task& task);
    void close() { finish(1); }

    // FORCE (the paper's section on scheduling): `task` must be complete before `follower` may go on.
    // True: it is complete now, because it was, or because it was stolen from the queue and run here.
    // False: another worker is running it (or it is not ready yet) and will run `follower` when it completes.
    bool force(Task& task, Task& follower, Worker& worker);

    // Whether a worker with several pieces of work of this priority in hand should leave the rest: something more urgent is
    // queued or offered (where priorities decide), or its caller need not wait any more.
    bool wanted_elsewhere(const Worker& worker, int priority) const {
        return queue_->most_urgent() > priority || offered_priority() > priority || (worker.over_ && (*worker.over_)());
    }
    // The first failure is kept, for rethrow_failure(); tasks that are not essential are not run any more.
    void fail(std::exception_ptr failure);

    // Runs tasks as worker 0 until `done()` holds or a task failed. `done` is re-evaluated after every task, after every call of
    // wake() and now and then. A second thread that waits meanwhile only waits. With one worker everything queued is done then.
    void wait(const std::function<bool()>& done);
    void wake();
    // The same until no task is queued or running.
    void drain();
    // Rethrows what a task threw (after draining) and forgets it.
    void rethrow_failure();
    bool failed() const { return failed_.load(std::memory_order_acquire); }

    // Only while no task is queued or running.
    void set_trace(bool on);
    std::vector<TraceEvent> take_events();
    std::vector<WorkerCounters> counters() const;
    void reset_counters();

private:
    void add_path(Task& task, const Worker* worker);
    void push(std::span<Task* const> tasks, int worker, int shares = 1);
    void wake_workers(int tasks);
    void offer(Task& task, int shares);
    Task* take_offered();
    bool has_work() const;
    void work(Worker& worker, int processor);
    void work_until(const std::function<bool()>& over);
    bool run_next(Worker& worker, const std::function<bool()>& enough);
    Task* next_task(Worker& worker);
    Task* look_for_task(Worker& worker, const std::function<bool()>& enough);
    void execute(Task* task, Worker& worker);
    Task* own_next(Worker& worker);
    void run_body(Task& task, Worker& worker);
    void finish(std::int64_t count);

    // What is offered to all: a task in pieces and how many of its shares are left, in one word, as it is all that workers may look
    // at until they have a share; below `none` there are no more, only workers that came too late.
    struct Offer {
        static constexpr std::uint64_t none = 1 << 13;
        static std::uint64_t word(Task* task, int shares) {
            return std::uint64_t(reinterpret_cast<std::uintptr_t>(task)) << 16 | (none + std::uint64_t(shares));
        }
        static int shares(std::uint64_t word) { return int(word & 0xffff) - int(none); }
        static Task* task(std::uint64_t word) { return reinterpret_cast<Task*>(std::uintptr_t(word >> 16)); }
    };
    int offered_priority() const {
        return Offer::shares(offer_.load(std::memory_order_relaxed)) > 0 ? offer_priority_.load(std::memory_order_relaxed) : -1;
    }

    const int looks_;
    const bool offers_;  // the most urgent task in pieces; other policies than by priority queue them all
    std::unique_ptr<ReadyQueue> queue_;
    std::vector<std::unique_ptr<Worker>> workers_;
    std::vector<int> processors_;
    std::vector<std::thread> threads_;

    alignas(64) std::atomic<std::uint64_t> offer_{Offer::none};
    std::atomic<int> offer_priority_{-1};
    SpinLock offer_lock_;  // of who changes the task that is offered; not of who takes a share
    alignas(64) std::atomic<std::int64_t> available_{0};    // tasks in the queue
    alignas(64) std::atomic<std::int64_t> outstanding_{0};  // tasks queued, running or delegated
    alignas(64) std::atomic<int> sleepers_{0};              // of the executor's own threads
    std::atomic<bool> caller_sleeps_{false};
    std::atomic<bool> stop_{false}, failed_{false};
    std::mutex sleep_mutex_, seat_;  // seat_: of worker 0
    std::condition_variable work_arrived_, something_done_;
    std::mutex failure_mutex_;
    std::exception_ptr failure_;
};

}  // namespace znn
