#include "engine/probe.hpp"

#include <algorithm>
#include <chrono>

namespace znn {

namespace {

// Enough to fall out of the caches, and little enough for any machine.
constexpr std::size_t kernel_budget_floats = std::size_t{16} << 20, image_budget_floats = std::size_t{8} << 20;

void fill(AlignedFloats& values) {
    std::uint32_t state = 1;
    for (std::size_t i = 0; i < values.size(); ++i) {
        state = state * 1664525u + 1013904223u;
        values[i] = float(state >> 8) / float(1 << 24) - 0.5f;
    }
}

std::vector<AlignedFloats> copies(std::size_t floats, int wanted, std::size_t budget) {
    const std::size_t most = std::max<std::size_t>(1, budget / std::max<std::size_t>(1, floats));
    std::vector<AlignedFloats> all;
    for (std::size_t i = 0; i < std::min<std::size_t>(std::max(1, wanted), most); ++i) {
        all.emplace_back(floats);
        fill(all.back());
    }
    return all;
}

}  // namespace

ConvProbe::ConvProbe(Method method, const ConvShape& shape, Extent transform, int images, int kernels)
    : shape_(shape), method_(make_method(method, shape, transform)) {
    image_codec_ = std::make_unique<Codec>(method_->image_domain, shape.in, shape.patches);
    padded_codec_ = std::make_unique<Codec>(method_->backward_domain, shape.out, shape.patches);
    update_codec_ = std::make_unique<Codec>(method_->update_domain, shape.out, shape.patches);
    forward_sum_ = std::make_unique<Codec>(method_->forward_sum, shape.out, shape.patches);
    backward_sum_ = std::make_unique<Codec>(method_->backward_sum, shape.in, shape.patches);
    const std::size_t kernel_floats = std::max(method_->kernel_floats(), shape.kernel.volume());
    images_ = copies(image_codec_->floats(), images, image_budget_floats);
    kernels_ = copies(kernel_floats, kernels, kernel_budget_floats);
    const auto make = [](std::size_t floats) {
        AlignedFloats values(floats);
        fill(values);
        return values;
    };
    raw_kernel_ = make(shape.kernel.volume());
    plain_image_ = make(shape.in.volume() * shape.patches);
    plain_gradient_ = make(shape.out.volume() * shape.patches);
    padded_ = make(padded_codec_->floats());
    gradient_ = make(update_codec_->floats());
    forward_result_ = make(forward_sum_->floats());
    backward_result_ = make(backward_sum_->floats());
}

double ConvProbe::run(Piece piece) {
    const std::size_t turn = turn_++;
    float* kernel = kernels_[turn % kernels_.size()].data();
    const auto start = std::chrono::steady_clock::now();
    switch (piece) {
        case Piece::encode_image: image_codec_->encode(plain_image_.data(), image(turn)); break;
        case Piece::encode_gradient: update_codec_->encode(plain_gradient_.data(), gradient_.data()); break;
        case Piece::encode_padding: padded_codec_->encode(plain_gradient_.data(), padded_.data()); break;
        case Piece::transform_kernel: method_->transform_kernel(raw_kernel_.data(), kernel, scratch_); break;
        case Piece::forward: method_->forward(image(turn), kernel, forward_result_.data(), true, scratch_); break;
        case Piece::backward: method_->backward(padded_.data(), kernel, backward_result_.data(), true, scratch_); break;
        case Piece::update: method_->update(image(turn), gradient_.data(), raw_kernel_.data(), scratch_); break;
        case Piece::decode_forward: forward_sum_->decode(forward_result_.data(), plain_gradient_.data()); break;
        case Piece::decode_backward: backward_sum_->decode(backward_result_.data(), plain_image_.data()); break;
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    // Repeated accumulation must not run into overflow or denormals, which cost time of their own.
    if (piece == Piece::forward) fill(forward_result_);
    if (piece == Piece::backward) fill(backward_result_);
    if (piece == Piece::update) fill(raw_kernel_);
    if (piece == Piece::decode_forward) fill(forward_result_), fill(plain_gradient_);
    if (piece == Piece::decode_backward) fill(backward_result_), fill(plain_image_);
    return seconds;
}

}  // namespace znn
