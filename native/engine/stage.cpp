#include "engine/stage.hpp"

#include <utility>

namespace znn {

Stage::Stage(TaskLabel label, int pieces, Body body) : label(label), body_(std::move(body)), pieces_(pieces) {
    for (int i = 0; i < pieces; ++i) {
        tickets_.push_back(std::make_unique<Ticket>(*this));
        tickets_.back()->label = label;
        tasks_.push_back(tickets_.back().get());
    }
}

void Stage::set_executor(Executor* executor) {
    executor_ = executor;
    if (workers_ == executor->threads()) return;  // a layer's stages get their executor before every call
    workers_ = executor->threads();
    ranges_ = std::make_unique<Range[]>(workers_);
}

int Stage::Range::take(bool from_end) {
    std::uint64_t left = pieces.load(std::memory_order_relaxed);
    for (;;) {
        const std::uint64_t first = left & 0xffffffff, end = left >> 32;
        if (first == end) return -1;
        const std::uint64_t rest = from_end ? (end - 1) << 32 | first : end << 32 | (first + 1);
        if (pieces.compare_exchange_weak(left, rest, std::memory_order_relaxed)) return int(from_end ? end - 1 : first);
    }
}

// There are as many tickets as pieces, so whoever holds one finds a piece.
int Stage::next_piece(int worker) {
    int piece = ranges_[worker].take(false);
    for (int i = 1; piece < 0; ++i) piece = ranges_[(worker + i) % workers_].take(true);
    return piece;
}

void Stage::Ticket::run(Worker& worker) {
    Stage& stage = stage_;
    const int piece = stage.next_piece(worker.index);
    TaskLabel label = stage.label;
    label.a = piece;
    worker.name_event(label);
    // After a failure the rest of the round is only counted down, so that it ends.
    if (!stage.executor_->failed()) {
        try {
            stage.body_(piece, worker);
        } catch (...) {
            if (stage.left_.fetch_sub(1, std::memory_order_acq_rel) == 1) stage.complete(&worker);
            throw;
        }
    }
    if (stage.left_.fetch_sub(1, std::memory_order_acq_rel) == 1) stage.complete(&worker);
}

void Stage::before(Stage& later) {
    followers_.push_back(&later);
    ++later.predecessors_;
}

void Stage::set_priority(int priority) {
    for (auto& ticket : tickets_) ticket->priority = priority;
}

void Stage::arm() {
    const std::uint64_t workers = workers_, count = pieces_;
    for (std::uint64_t i = 0; i < workers; ++i)
        ranges_[i].pieces.store(count * (i + 1) / workers << 32 | count * i / workers, std::memory_order_relaxed);
    left_.store(pieces_, std::memory_order_relaxed);
    waiting_.store(predecessors_, std::memory_order_release);
}

void Stage::arrive(Worker* worker) {
    if (waiting_.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    if (tasks_.empty())
        complete(worker);
    else
        executor_->submit(tasks_, worker);
}

void Stage::complete(Worker* worker) {
    for (auto& action : done_actions_) action(worker);
    for (Stage* follower : followers_) follower->arrive(worker);
}

void Gate::open(Worker* worker) {
    std::vector<Stage*> waiting;
    {
        std::lock_guard guard(lock_);
        open_ = true;
        waiting = std::exchange(waiting_, {});
    }
    for (Stage* stage : waiting) stage->arrive(worker);
}

bool Gate::pass(Stage& stage) {
    std::lock_guard guard(lock_);
    if (open_) return true;
    waiting_.push_back(&stage);
    return false;
}

}  // namespace znn
