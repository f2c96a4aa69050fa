// Memory that one thread reuses from task to task; grows to the largest request and stays.
#pragma once
#include "base/aligned.hpp"

namespace znn {

class Scratch {
public:
    static constexpr int slots = 3;

    // At least `floats` floats, valid until the next call with the same slot. Contents undefined.
    float* get(std::size_t floats, int slot) {
        if (memory_[slot].size() < floats) memory_[slot] = AlignedFloats(room(floats * sizeof(float)) / sizeof(float));
        return memory_[slot].data();
    }

    // Bytes that so many take: all but the smallest are whole huge pages.
    static constexpr std::size_t room(std::size_t bytes) { return bytes < large ? bytes : HugePages::whole(bytes); }

private:
    static constexpr std::size_t large = std::size_t{64} << 10;
    AlignedFloats memory_[slots];
};

}  // namespace znn
