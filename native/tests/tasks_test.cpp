// The generic runtime: orders of the ready queues, random task graphs with FORCE on 1 to 8 threads, failing tasks.
// usage: tasks_test [rounds [seed]]
#include <algorithm>
#include <cstdlib>
#include <deque>
#include <list>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "tasks/executor.hpp"
#include "tests/check.hpp"

using namespace znn;
using namespace znn::tests;

namespace {

const std::vector<Policy> policies{Policy::priority, Policy::fifo, Policy::lifo, Policy::stealing};

std::string name_of(Policy policy) {
    const char* names[] = {"priority", "fifo", "lifo", "stealing"};
    return names[int(policy)];
}

// ---------------------------------------------------------------- queues

class Idle final : public Task {
public:
    void run(Worker&) override {}
    std::atomic<int> in_queue{0};  // shares
};

// What a queue should do, as plainly as possible: all tasks in order of arrival.
class QueueModel {
public:
    QueueModel(Policy policy, int workers) : policy_(policy), workers_(workers) {}

    void push(Task* task, int worker, int shares) {
        const auto queued = std::find_if(tasks_.begin(), tasks_.end(), [&](const Entry& entry) { return entry.task == task; });
        if (queued == tasks_.end())
            tasks_.push_back({task, std::max(worker, 0), shares});
        else
            queued->shares += shares;
    }
    Task* pop(int worker) {
        auto chosen = tasks_.end();
        if (policy_ == Policy::priority)
            for (auto i = tasks_.begin(); i != tasks_.end(); ++i)
                if (chosen == tasks_.end() || i->task->priority >= chosen->task->priority) chosen = i;
        if (policy_ == Policy::fifo) chosen = tasks_.begin();
        if (policy_ == Policy::lifo && !tasks_.empty()) chosen = std::prev(tasks_.end());
        if (policy_ == Policy::stealing) chosen = steal(worker);
        if (chosen == tasks_.end()) return nullptr;
        Task* task = chosen->task;
        if (--chosen->shares == 0) tasks_.erase(chosen);
        return task;
    }
    int remove(Task* task) {
        int shares = 0;
        std::erase_if(tasks_, [&](const Entry& entry) { return entry.task == task && (shares = entry.shares); });
        return shares;
    }
    bool holds(Task* task) const {
        return std::any_of(tasks_.begin(), tasks_.end(), [&](const Entry& entry) { return entry.task == task; });
    }

private:
    struct Entry {
        Task* task;
        int home, shares;
    };
    std::list<Entry>::iterator steal(int worker) {
        for (auto i = tasks_.end(); i != tasks_.begin();)  // its own newest
            if ((--i)->home == worker) return i;
        for (int other = 1; other < workers_; ++other)  // the oldest of the next worker that has any
            for (auto i = tasks_.begin(); i != tasks_.end(); ++i)
                if (i->home == (worker + other) % workers_) return i;
        return tasks_.end();
    }

    Policy policy_;
    int workers_;
    std::list<Entry> tasks_;
};

void test_queue_order(Policy policy, int steps, Random& random) {
    const int workers = random.pick(1, 4), priorities = random.pick(1, 6);
    auto queue = make_queue(policy, workers, priorities);
    QueueModel model(policy, workers);
    std::vector<Idle> tasks(40);
    std::vector<Task*> outside;
    for (Idle& task : tasks) outside.push_back(&task);
    std::shuffle(outside.begin(), outside.end(), random.engine());
    bool popped = true, removed = true;
    for (int step = 0; step < steps; ++step) {
        const int what = random.pick(0, 9), worker = random.pick(0, workers - 1);
        if (what < 4) {
            std::vector<Task*> batch;
            for (int i = random.pick(1, 4); i > 0 && !outside.empty(); --i) {
                batch.push_back(outside.back());
                outside.pop_back();
                batch.back()->priority = random.pick(0, priorities - 1);
            }
            const int from = random.pick(-1, workers - 1), shares = random.pick(0, 1) ? 1 : random.pick(2, 4);
            if (Task* queued = &tasks[std::size_t(random.pick(0, int(tasks.size()) - 1))]; model.holds(queued)) batch = {queued};
            queue->push(batch, from, shares);
            for (Task* task : batch) model.push(task, from, shares);
        } else if (what < 8) {
            Task* task = queue->pop(worker);
            popped &= task == model.pop(worker);
            if (task && !model.holds(task)) outside.push_back(task);
        } else {  // queued or not
            Task* task = &tasks[std::size_t(random.pick(0, int(tasks.size()) - 1))];
            const int taken = queue->remove(task);
            removed &= taken == model.remove(task);
            if (taken) outside.push_back(task);
        }
    }
    while (Task* task = queue->pop(0)) popped &= task == model.pop(0);
    popped &= model.pop(0) == nullptr;
    expect(popped, "the " + name_of(policy) + " queue hands out tasks in another order");
    expect(removed, "remove() of the " + name_of(policy) + " queue is wrong");
}

// Threads push, pop and remove the same tasks: each share is popped or removed exactly once.
void test_queue_at_once(Policy policy, int steps, unsigned seed) {
    constexpr int workers = 4;
    auto queue = make_queue(policy, workers, 3);
    std::vector<Idle> tasks(24);
    std::atomic<bool> once{true};
    std::atomic<int> arrived{0};
    Idle shared;  // of which everybody may have shares, and give some back
    std::vector<std::thread> threads;
    for (int worker = 0; worker < workers; ++worker)
        threads.emplace_back([&, worker] {
            Random random(seed * 10 + unsigned(worker));
            std::vector<Idle*> mine;
            for (std::size_t i = std::size_t(worker); i < tasks.size(); i += workers) mine.push_back(&tasks[i]);
            const auto take = [&](Task* task, int shares) {
                Idle* idle = static_cast<Idle*>(task);
                if (idle->in_queue.fetch_sub(shares) < shares || (idle != &shared && shares > 1)) once = false;
                if (idle != &shared) mine.push_back(idle);
            };
            ++arrived;
            while (arrived < workers) std::this_thread::yield();
            for (int step = 0; step < steps; ++step) {
                const int what = random.pick(0, 3);
                if (step % 64 == 0) std::this_thread::yield();  // few cores: change places often
                if (what == 0 && !mine.empty()) {
                    Idle* idle = mine.back();
                    mine.pop_back();
                    idle->priority = random.pick(0, 2);
                    idle->in_queue = 1;
                    Task* const task = idle;
                    queue->push({&task, 1}, worker);
                } else if (what == 1) {
                    if (Task* task = queue->pop(worker)) take(task, 1);
                } else if (what == 2) {
                    Idle* any = random.pick(0, 3) ? &tasks[std::size_t(random.pick(0, int(tasks.size()) - 1))] : &shared;
                    if (const int shares = queue->remove(any)) take(any, shares);
                } else if (shared.in_queue < 8) {
                    const int shares = random.pick(1, 3);
                    shared.in_queue += shares;
                    Task* const task = &shared;
                    queue->push({&task, 1}, worker, shares);
                }
            }
        });
    for (std::thread& thread : threads) thread.join();
    std::size_t left = 0, queued = std::size_t(shared.in_queue.load());
    while (queue->pop(0)) ++left;
    for (Idle& task : tasks) queued += std::size_t(task.in_queue.load());
    expect(once, "the " + name_of(policy) + " queue handed out a task twice");
    expect(left == queued, "the " + name_of(policy) + " queue lost or invented a task");
}

// ---------------------------------------------------------------- task graphs with FORCE

// Rounds as the engine runs them: a graph of steps, each of which FORCEs some updates of the round before; then the
// updates are armed again, and become ready at once or only later, while the next round's steps run.
class Rounds {
public:
    Rounds(Policy policy, int threads, bool trace, Random& random) : policy_(policy), threads_(threads) {
        const int steps = random.pick(1, 25), updates = random.pick(1, 12);
        for (int i = 0; i < updates; ++i) updates_.emplace_back(*this);
        for (int i = 0; i < steps; ++i) {
            Step& step = steps_.emplace_back(*this);
            step.priority = random.pick(2, 5);
            for (int n = random.pick(0, 3); n > 0 && i > 0; --n) {
                Step& before = steps_[std::size_t(random.pick(0, i - 1))];
                before.after.push_back(&step);
                step.before.push_back(&before);
            }
            for (int n = random.pick(0, 3); n > 0; --n) step.needs.push_back(&updates_[std::size_t(random.pick(0, updates - 1))]);
        }
        for (Update& update : updates_) update.opener.update = &update, update.opener.priority = random.pick(0, 1);
        for (Update& update : updates_) update.late = random.coin();
        executor_ = std::make_unique<Executor>(ExecutorOptions{threads, policy, 6, false, trace});
    }

    void run(int rounds) {
        for (int i = 0; i < rounds; ++i) one_round();
        executor_->drain();
        const std::string what = name_of(policy_) + ", " + std::to_string(threads_) + " threads: ";
        bool once = true;
        for (Step& step : steps_) once &= step.runs == round_;
        for (Update& update : updates_) once &= update.runs == round_;
        expect(once, what + "a task did not run exactly once a round");
        expect(in_order_, what + "a step ran before its predecessors");
        expect(forced_, what + "a step ran before the updates it FORCEs");
        std::int64_t tasks = 0, openers = 0;
        for (const WorkerCounters& c : executor_->counters()) tasks += c.tasks, forced += c.forced, delegated += c.delegated;
        for (Update& update : updates_) openers += update.late;
        const std::int64_t each = std::int64_t(steps_.size() + updates_.size()) + openers;
        expect(tasks == each * round_, what + "the workers counted another number of tasks");
        const auto events = std::int64_t(executor_->take_events().size());
        expect(events == 0 || events == tasks, what + "the trace has another number of events");
    }

    std::int64_t forced = 0, delegated = 0;

private:
    class Update final : public Task {
    public:
        explicit Update(Rounds& rounds) : rounds_(rounds) { essential = true; }
        void run(Worker&) override { value = armed_in, ++runs; }

        // Makes the update ready later than the steps of the next round, perhaps.
        class Opener final : public Task {
        public:
            void run(Worker& worker) override { worker.executor.submit(update, &worker); }
            Update* update = nullptr;
        } opener;

        void arm(int round) {
            armed_in = round;
            rearm();
            rounds_.executor_->submit(late ? static_cast<Task*>(&opener) : this, nullptr);
        }

        bool late = false;
        int armed_in = 0, value = 0, runs = 0;  // plain: FORCE must order their uses

    private:
        Rounds& rounds_;
    };

    class Step final : public Task {
    public:
        explicit Step(Rounds& rounds) : rounds_(rounds) {}
        bool prepare(Worker& worker) override {
            for (Update* update : needs)
                if (!worker.executor.force(*update, *this, worker)) return false;
            return true;
        }
        void run(Worker& worker) override {
            const int round = rounds_.round_ + 1;
            for (Step* step : before)
                if (step->runs != round) rounds_.in_order_ = false;
            for (Update* update : needs)
                if (update->value != rounds_.round_) rounds_.forced_ = false;
            ++runs;
            for (Step* step : after)
                if (step->waits.fetch_sub(1) == 1) worker.executor.submit(step, &worker);
            if (rounds_.left_.fetch_sub(1) == 1) worker.executor.wake();
        }

        std::vector<Step*> before, after;
        std::vector<Update*> needs;
        std::atomic<int> waits{0};
        int runs = 0;

    private:
        Rounds& rounds_;
    };

    void one_round() {
        left_ = int(steps_.size());
        std::vector<Task*> roots;
        for (Step& step : steps_) {
            step.waits = int(step.before.size());
            if (step.before.empty()) roots.push_back(&step);
        }
        executor_->submit(roots, nullptr);
        executor_->wait([&] { return left_ == 0; });
        ++round_;
        for (Update& update : updates_) {
            if (!update.is_complete()) executor_->drain();  // no step needed it
            update.arm(round_);
        }
    }

    const Policy policy_;
    const int threads_;
    std::deque<Update> updates_;
    std::deque<Step> steps_;
    int round_ = 0;
    std::atomic<int> left_{0};
    std::atomic<bool> in_order_{true}, forced_{true};
    std::unique_ptr<Executor> executor_;  // last: it stops before the tasks go
};

void test_graphs(int rounds, Random& random) {
    std::int64_t forced = 0, delegated = 0;
    for (int repeat = 0; repeat < 2; ++repeat)
        for (Policy policy : policies)
            for (int threads : {1, 2, 3, 5, 8}) {
                Rounds graph(policy, threads, repeat == 1, random);
                graph.run(rounds);
                forced += graph.forced;
                delegated += graph.delegated;
            }
    expect(forced > 0, "no update was ever stolen from the queue");
    expect(delegated > 0, "no task was ever delegated");
}

// Several followers of one task that runs for a while: all go on when it is complete, each once.
void test_followers(Policy policy, int threads, int rounds) {
    struct Slow final : Task {
        void run(Worker&) override {
            started = true;
            for (int i = 0; i < 200 && waiting < 6; ++i) std::this_thread::sleep_for(std::chrono::microseconds(50));
            ++runs;
        }
        std::atomic<bool> started{false};
        std::atomic<int> waiting{0};
        int runs = 0;
    };
    struct Follower final : Task {
        bool prepare(Worker& worker) override {
            ++slow->waiting;
            return worker.executor.force(*slow, *this, worker);
        }
        void run(Worker&) override { seen = slow->runs, ++runs; }
        Slow* slow = nullptr;
        int seen = 0, runs = 0;
    };
    Slow slow;
    std::vector<Follower> followers(6);
    std::vector<Task*> tasks;
    for (Follower& follower : followers) follower.slow = &slow, tasks.push_back(&follower);
    bool right = true;
    {
        Executor executor({.threads = threads, .policy = policy, .pin = false});
        for (int round = 1; round <= rounds; ++round) {
            slow.started = false, slow.waiting = 0;
            slow.rearm();
            executor.submit(&slow, nullptr);
            while (threads > 1 && !slow.started) std::this_thread::yield();
            executor.submit(tasks, nullptr);
            executor.drain();
            right &= slow.runs == round;
            for (Follower& follower : followers) right &= follower.runs == round && follower.seen == round;
        }
    }
    expect(right, "followers of a running task, " + name_of(policy) + ", " + std::to_string(threads) + " threads");
}

// ---------------------------------------------------------------- failures

struct Counted final : Task {
    void run(Worker&) override {
        ++runs;
        if (throws) throw std::runtime_error("on purpose");
    }
    bool throws = false;
    int runs = 0;
};

// A step that FORCEs a task which may fail, or be skipped because another did.
struct Dependent final : Task {
    bool prepare(Worker& worker) override { return worker.executor.force(*needed, *this, worker); }
    void run(Worker&) override { ++runs; }
    Counted* needed = nullptr;
    int runs = 0;
};

int failures_reported(Executor& executor) {
    try {
        executor.rethrow_failure();
    } catch (const std::runtime_error& error) {
        return std::string(error.what()) == "on purpose" ? 1 : 100;
    }
    return 0;
}

void test_failures(Policy policy, int threads, int rounds, Random& random) {
    std::vector<Counted> tasks(30), essential(10);
    std::vector<Dependent> dependents(10);
    Executor executor({.threads = threads, .policy = policy, .priorities = 2, .pin = false, .trace = random.coin()});
    bool reported = true, forgotten = true, all_essential = true, usable = true;
    for (int round = 1; round <= rounds; ++round) {
        std::vector<Task*> order;
        for (std::size_t i = 0; i < tasks.size(); ++i) {
            tasks[i].throws = i == 0 || random.pick(0, 9) == 0;
            tasks[i].priority = random.pick(0, 1);
            order.push_back(&tasks[i]);
        }
        for (Counted& task : essential) task.essential = true, task.rearm(), order.push_back(&task);
        for (std::size_t i = 0; i < dependents.size(); ++i)
            dependents[i].needed = &essential[i / 2], order.push_back(&dependents[i]);
        std::shuffle(order.begin(), order.end(), random.engine());
        executor.submit(order, nullptr);
        executor.wait([] { return false; });  // ends because a task failed
        reported &= failures_reported(executor) == 1;
        forgotten &= !executor.failed() && failures_reported(executor) == 0;
        executor.set_trace(random.coin());
        for (Counted& task : essential) all_essential &= task.runs == round;

        Counted calm;
        executor.submit(&calm, nullptr);
        executor.drain();
        usable &= calm.runs == 1 && !executor.failed();
    }
    const std::string what = " (" + name_of(policy) + ", " + std::to_string(threads) + " threads)";
    expect(reported, "a failure was not reported exactly once" + what);
    expect(forgotten, "a reported failure was not forgotten" + what);
    expect(all_essential, "an essential task did not run after a failure" + what);
    expect(usable, "the executor is not usable after a failure" + what);
}

// An executor that goes runs what it was given.
void test_end(Policy policy, int threads, int rounds) {
    bool all = true;
    for (int round = 0; round < rounds; ++round) {
        std::vector<Counted> tasks(20);
        std::vector<Task*> order;
        for (Counted& task : tasks) order.push_back(&task);
        {
            Executor executor({.threads = threads, .policy = policy, .pin = round % 2 == 0});
            executor.submit(order, nullptr);
        }
        for (Counted& task : tasks) all &= task.runs == 1;
    }
    expect(all, "tasks were left when an executor of " + std::to_string(threads) + " threads ended");
}

}  // namespace

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 2000;
    const unsigned seed = argc > 2 ? unsigned(std::atol(argv[2])) : 1;
    Random random(seed);
    for (Policy policy : policies) {
        for (int i = 0; i < 20; ++i) test_queue_order(policy, 2000, random);
        test_queue_at_once(policy, 20 * rounds, seed);
        for (int threads : {1, 2, 8}) {
            test_followers(policy, threads, 1 + rounds / 100);
            test_failures(policy, threads, 1 + rounds / 20, random);
            test_end(policy, threads, 1 + rounds / 100);
        }
    }
    test_graphs(rounds, random);
    return report();
}
