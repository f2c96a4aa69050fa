#include "engine/stage.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace znn {

Stage::Stage(TaskLabel label, int pieces, Body body) : label(label), body_(std::move(body)), pieces_(pieces) {
    if (pieces > Pieces::most)
        throw std::runtime_error("a layer's phase has " + std::to_string(pieces) + " pieces, expected at most " +
                                 std::to_string(Pieces::most) + ": use smaller or fewer patches");
}

void Stage::set_executor(Executor* executor) {
    executor_ = executor;
    if (workers_ == executor->threads()) return;  // a layer's stages get their executor before every call
    workers_ = executor->threads();
    ranges_ = std::make_unique<Range[]>(workers_);
    shares_ = std::min(pieces_, workers_);
    ticket_.label = label;
    ticket_.priority = priority_;
    arm();
}

Stage::Pieces Stage::left(Pieces found, int worker) const {
    if (found.round == round_) return found;
    const auto share = [&](int i) { return std::uint64_t(pieces_) * std::uint64_t(i) / std::uint64_t(workers_); };
    return {round_, share(worker), share(worker + 1)};
}

int Stage::take(int worker, bool from_end) {
    std::atomic<Pieces>& pieces = ranges_[worker].pieces;
    for (Pieces found = pieces.load(std::memory_order_relaxed);;) {
        const Pieces now = left(found, worker);
        if (now.empty()) return -1;
        Pieces rest = now;
        from_end ? --rest.end : ++rest.first;
        if (pieces.compare_exchange_weak(found, rest, std::memory_order_relaxed)) return int(from_end ? rest.end : now.first);
    }
}

int Stage::next_piece(int worker) {
    int piece = take(worker, false);
    for (int i = 1; piece < 0 && i < workers_; ++i) piece = take((worker + i) % workers_, true);
    return piece;
}

bool Stage::has_pieces() const {
    for (int i = 0; i < workers_; ++i)
        if (!left(ranges_[i].pieces.load(std::memory_order_relaxed), i).empty()) return true;
    return false;
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

// For the next round, as soon as one is over: by a worker in whose cache the counters are, and not by one that begins a round while
// the others wait.
void Stage::arm() {
    round_ = round_ % 0xffff + 1;
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
    arm();
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
