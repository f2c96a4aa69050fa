#include "tasks/executor.hpp"

#include <algorithm>
#include <optional>
#include <utility>

#include "base/spin_lock.hpp"
#include "base/topology.hpp"

namespace znn {

namespace {

constexpr std::int64_t kShortCallNs = 1'000'000;

}  // namespace

// ---------------------------------------------------------------- Worker

void Worker::begin_event(TaskLabel label) {
    label_ = label;
    in_event_ = true;
    event_start_ = now_ns();
}

void Worker::end_event() {
    const std::int64_t end = now_ns();
    counters.task_ns += end - event_start_;
    events_.push_back({index, label_, event_start_, end});
    in_event_ = false;
}

void Worker::relabel(TaskLabel label) {
    if (!tracing()) return;
    end_event();
    label_ = label;
    in_event_ = true;
    event_start_ = events_.back().end_ns;
}

void Worker::begin_piece(TaskLabel label) {
    ++counters.tasks;
    if (!tracing()) return;
    begin_event(label);
    path_start_ = event_start_;  // pieces done one after the other do not depend on one another
}

void Worker::end_piece() {
    if (in_event_) end_event();
}

void Worker::join_path(std::int64_t path_ns) {
    if (!tracing()) return;
    const std::int64_t now = now_ns();
    path_base_ = std::max(path_base_ + (now - path_start_), path_ns);
    path_start_ = now;
}

// ---------------------------------------------------------------- Executor

Executor::Executor(const ExecutorOptions& options)
    : looks_(options.looks), offers_(options.policy == Policy::priority),
      queue_(make_queue(options.policy, options.threads, options.priorities)) {
    if (options.pin) {
        // More workers than cores are left to the system.
        processors_ = usable_physical_cores();
        if (int(processors_.size()) < options.threads) processors_ = usable_processors();
        if (int(processors_.size()) < options.threads) processors_.clear();
    }
    for (int i = 0; i < options.threads; ++i) workers_.push_back(std::make_unique<Worker>(*this, i));
    set_trace(options.trace);
    try {
        for (int i = 1; i < options.threads; ++i)
            threads_.emplace_back([this, i] { work(*workers_[i], processors_.empty() ? -1 : processors_[i]); });
    } catch (...) {  // the system refused a thread: end those that run
        {
            std::lock_guard guard(sleep_mutex_);
            stop_.store(true);
        }
        work_arrived_.notify_all();
        for (std::thread& thread : threads_) thread.join();
        throw;
    }
}

Executor::~Executor() {
    drain();
    {
        std::lock_guard guard(sleep_mutex_);
        stop_.store(true);
    }
    work_arrived_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

void Executor::submit(std::span<Task* const> tasks, Worker* worker) {
    if (tasks.empty()) return;
    outstanding_.fetch_add(std::int64_t(tasks.size()), std::memory_order_relaxed);
    for (Task* task : tasks) add_path(*task, worker);
    push(tasks, worker ? worker->index : -1);
}

void Executor::open(Task& task, int shares, Worker* worker, bool last) {
    outstanding_.fetch_add(1, std::memory_order_relaxed);
    add_path(task, worker);
    if (offers_ && last && worker && !worker->next_) {
        worker->next_ = &task;
        if (--shares == 0) return;
    }
    offer(task, shares);
}

// Of this task and what is offered already the more urgent one is offered, the other one queued.
void Executor::offer(Task& task, int shares) {
    Task* const given = &task;
    if (!offers_) return push({&given, 1}, -1, shares);
    {
        std::lock_guard guard(offer_lock_);
        const std::uint64_t before = offer_.exchange(Offer::none, std::memory_order_acq_rel);
        Task *offered = given, *other = Offer::task(before);
        int left = shares, others = std::max(0, Offer::shares(before));
        if (others > 0 && other == given) left += std::exchange(others, 0);
        if (others > 0 && other->priority > task.priority) std::swap(offered, other), std::swap(left, others);
        if (others > 0) push({&other, 1}, -1, others);
        offer_priority_.store(offered->priority, std::memory_order_relaxed);
        offer_.store(Offer::word(offered, left), std::memory_order_seq_cst);
    }
    wake_workers(shares);
}

int Executor::withdraw(Task& task) {
    const auto offered = [&] {
        const std::uint64_t word = offer_.load(std::memory_order_relaxed);
        return Offer::task(word) == &task && Offer::shares(word) > 0;
    };
    if (!task.queued() && !offered()) return 0;
    std::lock_guard guard(offer_lock_);
    const int queued = queue_->remove(&task);
    available_.fetch_sub(queued, std::memory_order_relaxed);
    return queued + (offered() ? std::max(0, Offer::shares(offer_.exchange(Offer::none, std::memory_order_acq_rel))) : 0);
}

Task* Executor::take_offered() {
    if (queue_->most_urgent() > offered_priority()) return nullptr;
    const std::uint64_t word = offer_.fetch_sub(1, std::memory_order_acq_rel);
    return Offer::shares(word) > 0 ? Offer::task(word) : nullptr;
}

bool Executor::has_work() const {
    return available_.load(std::memory_order_seq_cst) > 0 || Offer::shares(offer_.load(std::memory_order_seq_cst)) > 0;
}

// Several predecessors may hand over a path; the longest counts.
void Executor::add_path(Task& task, const Worker* worker) {
    if (!worker || !worker->tracing()) return;
    const std::int64_t path = worker->path_now();
    if (task.path_ns.load(std::memory_order_relaxed) < path) task.path_ns.store(path);
}

void Executor::push(std::span<Task* const> tasks, int worker, int shares) {
    queue_->push(tasks, worker, shares);
    const int more = int(tasks.size()) * shares;
    available_.fetch_add(more, std::memory_order_seq_cst);
    wake_workers(more);
}

void Executor::wake_workers(int tasks) {
    const int sleepers = sleepers_.load(std::memory_order_seq_cst);
    const bool caller_too = caller_sleeps_.load(std::memory_order_seq_cst) && tasks > sleepers;
    if (sleepers == 0 && !caller_too) return;
    { std::lock_guard guard(sleep_mutex_); }
    if (sleepers > 0) tasks == 1 ? work_arrived_.notify_one() : work_arrived_.notify_all();
    if (caller_too) something_done_.notify_all();
}

Task* Executor::next_task(Worker& worker) {
    if (Offer::shares(offer_.load(std::memory_order_relaxed)) > 0)
        if (Task* task = take_offered()) return task;
    if (available_.load(std::memory_order_relaxed) <= 0) return nullptr;
    Task* task = queue_->pop(worker.index);
    if (!task) return nullptr;
    const int rest = offers_ && task->in_pieces ? queue_->remove(task) : 0;  // for the others
    available_.fetch_sub(1 + rest, std::memory_order_relaxed);
    if (rest > 0) offer(*task, rest);
    return task;
}

Task* Executor::look_for_task(Worker& worker, const std::function<bool()>& enough) {
    for (int i = 0; i < looks_ && !enough(); ++i) {
        if (Task* task = next_task(worker)) return task;
        cpu_relax();
    }
    return nullptr;
}

bool Executor::run_next(Worker& worker, const std::function<bool()>& enough) {
    const bool waited = worker.looking_since_ != 0;
    // Tracing may be switched on while this worker looks for a task: then there is no time since when.
    if (!waited && worker.tracing()) worker.looking_since_ = now_ns();
    Task* task = next_task(worker);
    const auto spent = task && !waited ? &WorkerCounters::queue_ns : &WorkerCounters::idle_ns;
    if (!task) task = look_for_task(worker, enough);
    if (!task) return false;  // and nothing is counted: others may read the counters while nothing runs
    const std::int64_t since = std::exchange(worker.looking_since_, 0);
    if (worker.tracing() && since) worker.counters.*spent += now_ns() - since;
    execute(task, worker);
    return true;
}

void Executor::work(Worker& worker, int processor) {
    if (processor >= 0) pin_this_thread(processor);
    const std::function<bool()> stopped = [this] { return stop_.load(std::memory_order_relaxed); };
    while (!stopped()) {
        if (run_next(worker, stopped)) continue;
        std::unique_lock lock(sleep_mutex_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        if (!has_work() && !stop_.load()) work_arrived_.wait(lock);
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
    }
}

// The calling thread is worker 0 until `over()`: nobody has to be woken for the first task or the last.
void Executor::work_until(const std::function<bool()>& over) {
    if (over()) return;
    std::unique_lock seat(seat_, std::defer_lock);  // another caller may have it: then this one only waits
    std::optional<PinnedThread> pinned;
    // One who is there already and soon gone again is not worth the system calls: they are felt beside a round of a small network.
    const bool pins = !processors_.empty(), there = pins && runs_on(processors_[0]);
    const std::int64_t start = there ? now_ns() : 0;
    while (!over()) {
        if (seat.owns_lock() || seat.try_lock()) {
            if (pins && !pinned && (!there || now_ns() - start > kShortCallNs)) pinned.emplace(processors_[0]);
            workers_[0]->over_ = &over;
            if (run_next(*workers_[0], over) || over()) continue;
        }
        std::unique_lock lock(sleep_mutex_);
        if (seat.owns_lock()) caller_sleeps_.store(true, std::memory_order_seq_cst);
        const bool work = seat.owns_lock() && has_work();
        if (!work && !over()) something_done_.wait_for(lock, std::chrono::milliseconds(100));
        if (seat.owns_lock()) caller_sleeps_.store(false, std::memory_order_relaxed);
    }
    if (!seat.owns_lock()) return;
    workers_[0]->looking_since_ = 0;  // the time between calls is not the engine's
    workers_[0]->over_ = nullptr;
}

void Executor::run_body(Task& task, Worker& worker) {
    if (!task.in_pieces) ++worker.counters.tasks;
    if (failed() && !task.essential) return;
    if (worker.tracing() && !task.in_pieces) worker.begin_event(task.label);
    try {
        task.run(worker);
    } catch (...) {
        fail(std::current_exception());
    }
    worker.end_piece();
}

void Executor::fail(std::exception_ptr failure) {
    {
        std::lock_guard guard(failure_mutex_);
        if (!failure_) failure_ = std::move(failure);
    }
    failed_.store(true, std::memory_order_release);
    wake();
}

void Executor::execute(Task* task, Worker& worker) {
    // Tasks delegated to one another form a chain: run it as a loop, never by recursion.
    while (task) {
        if (worker.tracing()) {
            worker.path_start_ = now_ns();
            worker.path_base_ = task->path_ns.load(std::memory_order_relaxed);
            if (!task->in_pieces) task->path_ns.store(0, std::memory_order_relaxed);
        }
        bool ready = true;
        if (!failed() || task->essential) ready = task->prepare(worker);
        if (!ready) return;  // still outstanding: whoever completes the forced task goes on with this one
        const bool in_pieces = task->in_pieces;
        run_body(*task, worker);
        const std::int64_t path = worker.path_now();
        Task* follower = nullptr;
        if (!in_pieces) {  // else others may have closed it by now
            follower = task->complete();
            finish(1);
        }
        task = own_next(worker);
        while (follower && follower != Task::complete_mark()) {
            Task* after = follower->take_follower();
            if (worker.tracing()) follower->path_ns.store(path, std::memory_order_relaxed);
            if (!task) {
                task = follower;
            } else {
                push(std::span<Task* const>(&follower, 1), worker.index);
            }
            follower = after;
        }
    }
}

// The share that this worker has kept for itself, unless it had better give it back.
Task* Executor::own_next(Worker& worker) {
    Task* task = std::exchange(worker.next_, nullptr);
    if (!task || !wanted_elsewhere(worker, task->priority)) return task;
    give_back(*task);
    return nullptr;
}

bool Executor::force(Task& task, Task& follower, Worker& worker) {
    if (task.is_complete()) return true;
    if (queue_->remove(&task)) {
        available_.fetch_sub(1, std::memory_order_relaxed);
        ++worker.counters.forced;
        if (worker.tracing()) worker.join_path(task.path_ns.exchange(0, std::memory_order_relaxed));
        run_body(task, worker);
        // Others may have delegated to it meanwhile: they go back to the queue.
        Task* other = task.complete();
        finish(1);
        while (other && other != Task::complete_mark()) {
            Task* after = other->take_follower();
            outstanding_.fetch_sub(1, std::memory_order_relaxed);  // submit counts it again
            submit(other, &worker);
            other = after;
        }
        return true;
    }
    ++worker.counters.delegated;  // before: once delegated, the follower may end before this worker goes on
    if (task.delegate(&follower)) return false;
    --worker.counters.delegated;
    return true;
}

void Executor::finish(std::int64_t count) {
    if (outstanding_.fetch_sub(count, std::memory_order_acq_rel) == count) wake();
}

void Executor::wake() {
    { std::lock_guard guard(sleep_mutex_); }
    something_done_.notify_all();
}

void Executor::wait(const std::function<bool()>& done) {
    // A single worker would only put off what else is queued: it does it now, while the operands are in the cache.
    work_until([&] {
        return failed() || (done() && (threads() > 1 || outstanding_.load(std::memory_order_acquire) == 0));
    });
}

void Executor::drain() {
    work_until([this] { return outstanding_.load(std::memory_order_acquire) == 0; });
}

void Executor::rethrow_failure() {
    if (!failed()) return;
    drain();
    std::exception_ptr failure;
    {
        std::lock_guard guard(failure_mutex_);
        failure = std::exchange(failure_, nullptr);
    }
    failed_.store(false, std::memory_order_release);
    if (failure) std::rethrow_exception(failure);
}

void Executor::set_trace(bool on) {
    for (auto& worker : workers_) worker->tracing_.store(on, std::memory_order_relaxed);
}

std::vector<TraceEvent> Executor::take_events() {
    std::vector<TraceEvent> all;
    for (auto& worker : workers_) {
        all.insert(all.end(), worker->events_.begin(), worker->events_.end());
        worker->events_.clear();
    }
    return all;
}

std::vector<WorkerCounters> Executor::counters() const {
    std::vector<WorkerCounters> all;
    for (const auto& worker : workers_) all.push_back(worker->counters);
    return all;
}

void Executor::reset_counters() {
    for (auto& worker : workers_) worker->counters = {};
}

}  // namespace znn
