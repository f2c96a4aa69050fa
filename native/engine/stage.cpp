#include "engine/stage.hpp"

#include <utility>

namespace znn {

Stage::Stage(TaskLabel label, int pieces, Body body) : label(label), body_(std::move(body)) {
    for (int i = 0; i < pieces; ++i) {
        pieces_.push_back(std::make_unique<Piece>(*this, i));
        pieces_.back()->label = label;
        pieces_.back()->label.a = i;
        tasks_.push_back(pieces_.back().get());
    }
}

void Stage::Piece::run(Worker& worker) {
    // After a failure the rest of the round is only counted down, so that it ends.
    if (!stage_.executor_->failed()) {
        try {
            stage_.body_(index_, worker);
        } catch (...) {
            if (stage_.left_.fetch_sub(1, std::memory_order_acq_rel) == 1) stage_.complete(&worker);
            throw;
        }
    }
    if (stage_.left_.fetch_sub(1, std::memory_order_acq_rel) == 1) stage_.complete(&worker);
}

void Stage::before(Stage& later) {
    followers_.push_back(&later);
    ++later.predecessors_;
}

void Stage::set_priority(int priority) {
    for (auto& piece : pieces_) piece->priority = priority;
}

void Stage::arm() {
    left_.store(int(pieces_.size()), std::memory_order_relaxed);
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
