#include "engine/edge.hpp"

#include <cstring>

#include "engine/dropout.hpp"

namespace znn {

Edge::Edge(Context& context, const EdgeGroupDescription& group, int group_index, Node& source, Node& target)
    : context(context), group(group), source(source), target(target), forward_task(*this), backward_task(*this) {
    const auto label = [&](Phase phase) {
        return TaskLabel{std::int16_t(phase), std::int16_t(group.kind), group_index, source.map, target.map};
    };
    forward_task.label = label(Phase::forward);
    backward_task.label = label(Phase::backward);
}

bool Edge::prepare_forward(Task&, Worker&) { return true; }

// ---------------------------------------------------------------- convolution

ConvEdge::ConvEdge(Context& context, ConvGroup& conv, const EdgeGroupDescription& group, int group_index, Node& source,
                   Node& target, std::size_t kernel_index)
    : Edge(context, group, group_index, source, target), update_task(*this), conv_(conv), kernel_index_(kernel_index) {
    update_task.label = forward_task.label;
    update_task.label.phase = std::int16_t(Phase::update);
    update_task.essential = true;
}

bool ConvEdge::image_deferred() const {
    return conv_.method->image_domain.kind == Domain::Kind::spectrum && !context.options.memoize_images;
}

bool ConvEdge::gradient_deferred() const {
    if (conv_.method->update_domain.kind == Domain::Kind::image) return false;
    return !context.options.memoize_gradients || target.group.backward.forms[update_form].uses == 0;
}

// The kernel must hold the previous round's update: FORCE it, and first the transforms it may be waiting for.
bool ConvEdge::prepare_forward(Task& task, Worker& worker) {
    Executor& executor = *context.executor;
    if (update_task.is_complete()) return true;
    if (image_deferred() && !executor.force(image().again, task, worker)) return false;
    if (gradient_deferred() && !executor.force(update_gradient().again, task, worker)) return false;
    return executor.force(update_task, task, worker);
}

const float* ConvEdge::transformed_kernel(Worker& worker) {
    const float* kernel = conv_.kernels.data() + kernel_index_ * conv_.taps;
    const std::size_t floats = conv_.method->kernel_floats();
    if (floats == 0) return kernel;
    const bool kept = conv_.spectra.size() > 0;
    float* out = kept ? conv_.spectra.data() + kernel_index_ * floats : worker.scratch.get(floats, 2);
    if (kept && spectrum_valid_) return out;
    conv_.method->transform_kernel(kernel, out, worker.scratch);
    ++context.counts[worker.index].kernels;
    spectrum_valid_ = kept;
    return out;
}

void ConvEdge::run_forward(Worker& worker) {
    const float* kernel = transformed_kernel(worker);
    bool fresh;
    Buffer sum = target.sum_buffer(target.forward, target.group.forward, forward_port, fresh, worker);
    conv_.method->forward(image().value.data(), kernel, sum.data(), !fresh, worker.scratch);
    if (context.training) update_waits_.store(1 + image_deferred() + gradient_deferred(), std::memory_order_relaxed);
    const bool for_updates = source.group.forward.forms[image_form].for_updates;
    release_use(image(), !context.training || !for_updates || image_deferred());
    target.contribute_forward(forward_port, std::move(sum), forward_index, worker);
}

void ConvEdge::run_backward(Worker& worker) {
    const float* kernel = transformed_kernel(worker);
    bool fresh;
    Buffer sum = source.sum_buffer(source.backward, source.group.backward, backward_port, fresh, worker);
    conv_.method->backward(gradient().value.data(), kernel, sum.data(), !fresh, worker.scratch);
    ready_update(worker);
    release_use(gradient(), true);
    if (update_form != gradient_form) release_use(update_gradient(), true);
    source.contribute_backward(backward_port, std::move(sum), backward_index, worker);
}

void ConvEdge::ready_update(Worker& worker) {
    step_ = context.step.of_group(group.rate, group.decay);
    update_task.rearm();
    if (!image_deferred()) {
        update_image_ = image().value;
    } else if (!image().again_started.exchange(true, std::memory_order_acq_rel)) {
        image().again.source = source.forward.value;
        image().again.rearm();
        context.executor->submit(&image().again, &worker);
    }
    if (!gradient_deferred()) update_gradient_ = update_gradient().value;
    one_arrived(&worker);
}

void ConvEdge::deliver_image(const Buffer& image, Worker* worker) {
    update_image_ = image;
    one_arrived(worker);
}

void ConvEdge::deliver_gradient(const Buffer& gradient, Worker* worker) {
    update_gradient_ = gradient;
    one_arrived(worker);
}

void ConvEdge::one_arrived(Worker* worker) {
    if (update_waits_.fetch_sub(1, std::memory_order_acq_rel) == 1) context.executor->submit(&update_task, worker);
}

void ConvEdge::run_update(Worker& worker) {
    Buffer image = std::move(update_image_), gradient = std::move(update_gradient_);
    if (!image || !gradient) return;  // computing it failed, which has been reported
    float* kernel_gradient = worker.scratch.get(conv_.taps, 2);
    conv_.method->update(image.data(), gradient.data(), kernel_gradient, worker.scratch);
    if (conv_.method->kernel_floats()) ++context.counts[worker.index].inverse_kernels;
    const std::size_t first = kernel_index_ * conv_.taps;
    float* second_moment = conv_.second_moment.size() ? conv_.second_moment.data() + first : nullptr;
    kernels::table().update(conv_.kernels.data() + first, conv_.momentum.data() + first, second_moment, kernel_gradient,
                            conv_.taps, step_);
    spectrum_valid_ = false;
}

void ConvEdge::clear() {
    update_task.set_complete();
    update_image_.reset();
    update_gradient_.reset();
    spectrum_valid_ = false;
}

// ---------------------------------------------------------------- edges that join map i to map i

namespace {

// Takes the image, leaves a new image; what backward needs is kept in `state_`.
class SimpleEdge : public Edge {
public:
    using Edge::Edge;

    void run_forward(Worker& worker) override {
        const std::size_t in = source.group.description.extent.volume(), out = target.group.description.extent.volume();
        Buffer result = context.pool.allocate(out * context.options.patches);
        const float* image_data = image().value.data();
        begin_forward(out);
        for (int patch = 0; patch < context.options.patches; ++patch)
            forward_patch(image_data + patch * in, result.data() + patch * out, patch, worker);
        release_use(image(), !context.training || !source.group.forward.forms[image_form].for_updates);
        target.contribute_forward(forward_port, std::move(result), forward_index, worker);
    }

    void run_backward(Worker& worker) override {
        const std::size_t in = source.group.description.extent.volume(), out = target.group.description.extent.volume();
        Buffer result = context.pool.allocate(in * context.options.patches);
        for (int patch = 0; patch < context.options.patches; ++patch)
            backward_patch(gradient().value.data() + patch * out, result.data() + patch * in, patch);
        state_.reset();
        release_use(gradient(), true);
        source.contribute_backward(backward_port, std::move(result), backward_index, worker);
    }

    void clear() override { state_.reset(); }

protected:
    virtual void begin_forward(std::size_t) {}
    virtual void forward_patch(const float* image, float* result, int patch, Worker& worker) = 0;
    virtual void backward_patch(const float* gradient, float* result, int patch) = 0;

    Extent in() const { return source.group.description.extent; }
    Extent out() const { return target.group.description.extent; }

    Buffer state_;
};

class MaxEdge final : public SimpleEdge {
public:
    using SimpleEdge::SimpleEdge;

protected:
    void begin_forward(std::size_t out) override { state_ = context.pool.allocate(out * context.options.patches); }

    void forward_patch(const float* image, float* result, int patch, Worker& worker) override {
        std::int32_t* index = indices(patch);
        if (group.kind == EdgeKind::max_pool) {
            kernels::table().max_pool(image, in(), group.window, group.stride, 1, result, index);
            return;
        }
        const std::size_t bytes = kernels::max_filter_scratch_bytes(in(), group.window, group.sparsity, 1);
        float* scratch = worker.scratch.get((bytes + 3) / 4, 0);
        kernels::table().max_filter(image, in(), group.window, group.sparsity, 1, result, index, scratch);
    }

    void backward_patch(const float* gradient, float* result, int patch) override {
        std::memset(result, 0, in().volume() * sizeof(float));
        kernels::table().max_backward(gradient, indices(patch), out().volume(), 1, result);
    }

private:
    std::int32_t* indices(int patch) {
        return reinterpret_cast<std::int32_t*>(state_.data()) + std::size_t(patch) * out().volume();
    }
};

class DropoutEdge final : public SimpleEdge {
public:
    using SimpleEdge::SimpleEdge;

protected:
    void begin_forward(std::size_t out) override {
        state_.reset();
        if (context.training) state_ = context.pool.allocate(out * context.options.patches);
    }

    void forward_patch(const float* image, float* result, int patch, Worker&) override {
        const std::size_t n = out().volume();
        std::memcpy(result, image, n * sizeof(float));
        if (!context.training) return;
        float* mask = state_.data() + patch * n;
        fill_dropout_mask({context.options.seed, context.round, forward_task.label.group, source.map, patch}, group.ratio,
                          mask, n, 1);
        kernels::table().multiply(result, mask, n);
    }

    void backward_patch(const float* gradient, float* result, int patch) override {
        const std::size_t n = in().volume();
        std::memcpy(result, gradient, n * sizeof(float));
        kernels::table().multiply(result, state_.data() + patch * n, n);
    }
};

// Crop, and with offset 0 and equal extents the identity.
class CropEdge final : public SimpleEdge {
public:
    using SimpleEdge::SimpleEdge;

protected:
    void forward_patch(const float* image, float* result, int, Worker&) override {
        kernels::table().extract(image, in(), result, out(), group.offset, 1, false);
    }
    void backward_patch(const float* gradient, float* result, int) override {
        kernels::table().embed(gradient, out(), result, in(), group.offset, 1);
    }
};

}  // namespace

std::unique_ptr<Edge> make_simple_edge(Context& context, const EdgeGroupDescription& group, int group_index, Node& source,
                                       Node& target) {
    switch (group.kind) {
        case EdgeKind::max_filter:
        case EdgeKind::max_pool: return std::make_unique<MaxEdge>(context, group, group_index, source, target);
        case EdgeKind::dropout: return std::make_unique<DropoutEdge>(context, group, group_index, source, target);
        default: return std::make_unique<CropEdge>(context, group, group_index, source, target);
    }
}

}  // namespace znn
