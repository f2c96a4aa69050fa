// Memory that one thread reuses from task to task; grows to the largest request and stays.
#pragma once
#include "base/aligned.hpp"

namespace znn {

class Scratch {
public:
    static constexpr int slots = 3;

    // At least `floats` floats, valid until the next call with the same slot. Contents undefined.
    float* get(std::size_t floats, int slot) {
        if (memory_[slot].size() < floats) memory_[slot] = AlignedFloats(floats < large ? floats : HugePages::whole(floats * 4) / 4);
        return memory_[slot].data();
    }

private:
    static constexpr std::size_t large = std::size_t{1} << 14;  // floats, from here on in huge pages
    AlignedFloats memory_[slots];
};

}  // namespace znn
