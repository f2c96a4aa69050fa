// One convolution edge outside any network, to time the pieces of which a layer's cost is made (layer-wise autotuning).
#pragma once
#include <memory>
#include <vector>

#include "engine/method.hpp"

namespace znn {

class ConvProbe {
public:
    enum class Piece {
        encode_image, encode_gradient, encode_padding, transform_kernel, forward, backward, update, decode_forward,
        decode_backward
    };

    // `kernels`: how many different kernels the layer has. So many are kept here too (up to a limit), so that a product
    // meets its operands where a real layer would, in memory and not in the cache.
    ConvProbe(Method method, const ConvShape& shape, Extent transform, int images, int kernels);

    double run(Piece piece);  // seconds of one execution

private:
    float* image(std::size_t turn) { return images_[turn % images_.size()].data(); }

    ConvShape shape_;
    std::unique_ptr<ConvMethod> method_;
    std::unique_ptr<Codec> image_codec_, padded_codec_, update_codec_, forward_sum_, backward_sum_;
    std::vector<AlignedFloats> images_, kernels_;
    AlignedFloats raw_kernel_, plain_image_, plain_gradient_, padded_, gradient_, forward_result_, backward_result_;
    Scratch scratch_;
    std::size_t turn_ = 0;
};

}  // namespace znn
