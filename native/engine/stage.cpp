#include "engine/stage.hpp"

#include <algorithm>
#include <utility>

namespace znn {

Stage::Stage(TaskLabel label, int pieces, Body body) : label(label), body_(std::move(body)), pieces_(pieces) {}

void Stage::set_executor(Executor* executor) {
    executor_ = executor;
    if (workers_ == executor->threads()) return;  // a layer's stages get their executor before every call
    workers_ = executor->threads();
    ranges_ = std::make_unique<Range[]>(workers_);
    shares_ = std::min(pieces_, workers_);
    ticket_.label = label;
    ticket_.priority = priority_;
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

bool Stage::Range::empty() const {
    const std::uint64_t left = pieces.load(std::memory_order_relaxed);
    return (left & 0xffffffff) == left >> 32;
}

int Stage::next_piece(int worker) {
    int piece = ranges_[worker].take(false);
    for (int i = 1; piece < 0 && i < workers_; ++i) piece = ranges_[(worker + i) % workers_].take(true);
    return piece;
}

bool Stage::has_pieces() const {
    return std::any_of(&ranges_[0], &ranges_[workers_], [](const Range& range) { return !range.empty(); });
}

void Stage::work(Worker& worker) {
    for (int piece; (piece = next_piece(worker.index)) >= 0;) {
        run(piece, worker);
        if (executor_->wanted_elsewhere(worker, priority_) && has_pieces()) return executor_->give_back(ticket_);
    }
    leave(worker);
}

// After a failure the rest of the round is only counted down, so that it ends.
void Stage::run(int piece, Worker& worker) {
    TaskLabel piece_label = label;
    piece_label.a = piece;
    worker.begin_piece(piece_label);
    if (!executor_->failed()) {
        try {
            body_(piece, worker);
        } catch (...) {
            executor_->fail(std::current_exception());
        }
    }
    worker.end_piece();
}

// All pieces have been begun; whoever leaves last knows that they are over. Shares still queued are for nothing, and might lie
// there for long, behind what is more urgent.
void Stage::leave(Worker& worker) {
    const int gone = 1 + executor_->withdraw(ticket_);
    if (open_.fetch_sub(gone, std::memory_order_acq_rel) == gone) complete(&worker, true);
}

void Stage::before(Stage& later) {
    followers_.push_back(&later);
    ++later.predecessors_;
}

void Stage::arm() {
    const std::uint64_t workers = workers_, count = pieces_;
    for (std::uint64_t i = 0; i < workers; ++i)
        ranges_[i].pieces.store(count * (i + 1) / workers << 32 | count * i / workers, std::memory_order_relaxed);
    open_.store(shares_, std::memory_order_relaxed);
    ticket_.path_ns.store(0, std::memory_order_relaxed);
    waiting_.store(predecessors_, std::memory_order_release);
}

void Stage::arrive(Worker* worker, bool last) {
    if (waiting_.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    if (shares_ == 0)
        complete(worker, last);
    else
        executor_->open(ticket_, shares_, worker, last);
}

void Stage::complete(Worker* worker, bool last) {
    for (auto& action : done_actions_) action(worker);
    for (Stage* follower : followers_) follower->arrive(worker, last);
    if (shares_ > 0) executor_->close();
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
