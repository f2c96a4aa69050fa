#pragma once

namespace znn::tiled {

// Vector operations of one line of a transform.
struct TransformOps {
    int real, complex, inverse;
};

}  // namespace znn::tiled
