#include "engine/node.hpp"

#include "engine/edge.hpp"

namespace znn {

void raise_to(std::atomic<std::int64_t>& value, std::int64_t candidate) {
    std::int64_t old = value.load(std::memory_order_relaxed);
    while (old < candidate && !value.compare_exchange_weak(old, candidate)) {
    }
}

void release_use(Encoding& encoding, bool drop) {
    if (encoding.uses_left.fetch_sub(1, std::memory_order_acq_rel) == 1 && drop) encoding.value.reset();
}

SideLayout::PortIndex SideLayout::port(const Domain& domain, Extent n, int patches, int contributions) {
    for (std::size_t i = 0; i < ports.size(); ++i)
        if (ports[i].domain == domain) {
            const int first = ports[i].contributions;
            ports[i].contributions += contributions;
            return {int(i), first};
        }
    ports.push_back({domain, Codec(domain, n, patches), contributions});
    return {int(ports.size()) - 1, 0};
}

int SideLayout::form(const Domain& domain, Extent n, int patches) {
    for (std::size_t i = 0; i < forms.size(); ++i)
        if (forms[i].domain == domain) return int(i);
    forms.push_back({domain, Codec(domain, n, patches)});
    return int(forms.size()) - 1;
}

void Side::clear() {
    for (auto& sum : sums) sum->clear();
    merged.clear();
    for (auto& encoding : encodings) {
        encoding->value.reset();
        encoding->again.source.reset();
        encoding->again.set_complete();
        encoding->again_started.store(false);
    }
    value.reset();
    path_ns.store(0);
}

// Encodes once more, for the updates alone, and hands the result to them.
void Encoding::AgainTask::run(Worker& worker) {
    Buffer image = std::move(source), encoded;
    try {
        encoded = context->pool.allocate(codec->floats());
        codec->encode(image.data(), encoded.data());
    } catch (...) {
        // The updates must still become ready, or what FORCEs them would wait for ever; they skip an absent image.
        for (ConvEdge* edge : encoding->updates)
            of_gradient ? edge->deliver_gradient({}, &worker) : edge->deliver_image({}, &worker);
        throw;
    }
    auto& counts = context->counts[worker.index];
    (of_gradient ? counts.gradients : counts.images) += std::int64_t(codec->transforms());
    for (ConvEdge* edge : encoding->updates)
        of_gradient ? edge->deliver_gradient(encoded, &worker) : edge->deliver_image(encoded, &worker);
}

namespace {

void build_side(Side& side, const SideLayout& layout, Context& context, std::size_t image_floats, bool gradient) {
    const auto add = kernels::table().add;
    for (const auto& port : layout.ports) {
        side.sums.push_back(std::make_unique<ConcurrentSum>());
        side.sums.back()->configure(context.options.sum, port.contributions, port.codec.floats(), add);
    }
    side.merged.configure(context.options.sum, int(layout.ports.size()), image_floats, add);
    for (const auto& form : layout.forms) {
        side.encodings.push_back(std::make_unique<Encoding>());
        Encoding& encoding = *side.encodings.back();
        encoding.again.context = &context;
        encoding.again.encoding = &encoding;
        encoding.again.codec = &form.codec;
        encoding.again.of_gradient = gradient;
        encoding.again.essential = true;
    }
}

}  // namespace

Node::Node(Context& context, NodeGroup& group, int map) : context(context), group(group), map(map) {
    build_side(forward, group.forward, context, group.floats(context), false);
    build_side(backward, group.backward, context, group.floats(context), true);
}

Buffer Node::sum_buffer(Side& side, const SideLayout& layout, int port, bool& fresh, Worker& worker) {
    Buffer sum = side.sums[port]->take(worker);
    fresh = !sum;
    return fresh ? context.pool.allocate(layout.ports[port].codec.floats()) : sum;
}

bool Node::collect(Side& side, const SideLayout& layout, int port, Buffer result, int index, bool gradient,
                   Worker& worker, Buffer& image) {
    if (worker.tracing()) raise_to(side.path_ns, worker.path_now());
    Buffer whole = side.sums[port]->give(std::move(result), index, worker);
    if (!whole) return false;
    const Codec& codec = layout.ports[port].codec;
    const bool last_port_alone = layout.ports.size() == 1;
    const TaskLabel label{std::int16_t(gradient ? Phase::backward : Phase::forward), std::int16_t(WorkKind::node),
                          group.index, map, map};
    worker.relabel(label);
    if (layout.ports[port].domain.kind == Domain::Kind::image) {
        image = std::move(whole);
    } else {
        image = context.pool.allocate(group.floats(context));
        codec.decode(whole.data(), image.data());
        auto& counts = context.counts[worker.index];
        (gradient ? counts.inverse_gradients : counts.inverse_images) += std::int64_t(codec.transforms());
    }
    if (!last_port_alone) image = side.merged.give(std::move(image), port, worker);
    if (!image) return false;
    if (worker.tracing()) worker.join_path(side.path_ns.exchange(0));
    return true;
}

void Node::contribute_forward(int port, Buffer result, int index, Worker& worker) {
    Buffer image;
    if (collect(forward, group.forward, port, std::move(result), index, false, worker, image))
        complete_forward(std::move(image), worker);
}

void Node::contribute_backward(int port, Buffer result, int index, Worker& worker) {
    Buffer gradient;
    if (collect(backward, group.backward, port, std::move(result), index, true, worker, gradient))
        complete_backward(std::move(gradient), worker);
}

void Node::complete_forward(Buffer image, Worker& worker) {
    const NodeGroupDescription& d = group.description;
    if (d.bias || d.transfer != kernels::Transfer::linear) {
        const float none = 0;
        kernels::table().transfer_forward(image.data(), group.floats(context), d.bias ? &group.bias[map] : &none, 1,
                                          d.transfer);
    }
    for (std::size_t i = 0; i < forward.encodings.size(); ++i) {
        const SideLayout::Form& form = group.forward.forms[i];
        Encoding& encoding = *forward.encodings[i];
        if (form.domain.kind == Domain::Kind::image) {
            encoding.value = image;
        } else {
            encoding.value = context.pool.allocate(form.codec.floats());
            form.codec.encode(image.data(), encoding.value.data());
            context.counts[worker.index].images += std::int64_t(form.codec.transforms());
        }
        encoding.again_started.store(false, std::memory_order_relaxed);
        encoding.uses_left.store(form.uses, std::memory_order_relaxed);
    }
    forward.value.reset();
    if (d.output || (context.training && group.keep_image)) forward.value = std::move(image);
    context.executor->submit(forward.followers, &worker);
    if (!d.output) return;
    raise_to(context.forward_path_ns, worker.path_now());
    const bool ends_here = context.after_forward.empty();  // once nothing is left, the next round may be under way
    if (context.forward_left.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    if (ends_here)
        context.executor->wake();
    else
        context.executor->submit(context.after_forward, &worker);
}

void Node::update_bias(double gradient) {
    const float g = float(gradient);
    float* second_moment = group.bias_second_moment.size() ? &group.bias_second_moment[map] : nullptr;
    kernels::table().update(&group.bias[map], &group.bias_momentum[map], second_moment, &g, 1,
                            context.step.of_group(group.description.rate, 0));
}

void Node::complete_backward(Buffer gradient, Worker& worker) {
    const NodeGroupDescription& d = group.description;
    if (d.bias || d.transfer != kernels::Transfer::linear) {
        double bias_gradient = 0;
        // A linear function's derivative does not need the image, which then was not kept.
        const float* image = forward.value ? forward.value.data() : gradient.data();
        kernels::table().transfer_backward(gradient.data(), image, group.floats(context), 1, d.transfer, &bias_gradient);
        if (d.bias) update_bias(bias_gradient);
    }
    // Everything that leaves this node has run its backward task: the images have been handed to the updates.
    for (auto& encoding : forward.encodings) encoding->value.reset();
    if (!d.output) forward.value.reset();

    std::vector<Task*>& followers = backward.followers;
    const bool memoize = context.options.memoize_gradients;
    for (std::size_t i = 0; i < backward.encodings.size(); ++i) {
        const SideLayout::Form& form = group.backward.forms[i];
        Encoding& encoding = *backward.encodings[i];
        const bool shared = form.domain.kind == Domain::Kind::image;
        encoding.uses_left.store(form.uses, std::memory_order_relaxed);
        if (shared) {
            encoding.value = gradient;
        } else if (form.uses > 0) {
            encoding.value = context.pool.allocate(form.codec.floats());
            form.codec.encode(gradient.data(), encoding.value.data());
            context.counts[worker.index].gradients += std::int64_t(form.codec.transforms());
        }
        if (form.for_updates && !shared && !(memoize && form.uses > 0)) {
            encoding.again.source = gradient;
            encoding.again.rearm();
            context.executor->submit(&encoding.again, &worker);
        }
    }
    if (d.input) backward.value = gradient;  // wanted by the caller
    gradient.reset();
    for (ConvEdge* edge : updates_without_backward) edge->ready_update(worker);
    for (std::size_t i = 0; i < backward.encodings.size(); ++i)
        if (group.backward.forms[i].uses == 0) backward.encodings[i]->value.reset();
    context.executor->submit(followers, &worker);
    raise_to(context.backward_path_ns, worker.path_now());
    // Last: the caller may begin the next round when the last node has been counted.
    if (context.backward_left.fetch_sub(1, std::memory_order_acq_rel) == 1) context.executor->wake();
}

}  // namespace znn
