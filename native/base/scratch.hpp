// Memory that one thread reuses from task to task; grows to the largest request and stays.
#pragma once
#include "base/aligned.hpp"

namespace znn {

class Scratch {
public:
    static constexpr int slots = 3;

    // At least `floats` floats, valid until the next call with the same slot. Contents undefined.
    float* get(std::size_t floats, int slot) {
        if (memory_[slot].size() < floats) memory_[slot] = AlignedFloats(floats);
        return memory_[slot].data();
    }

private:
    AlignedFloats memory_[slots];
};

}  // namespace znn
