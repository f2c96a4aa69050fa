// Dropout masks that depend on what is dropped only, never on which worker draws them or how maps are bundled.
#pragma once
#include <cstddef>
#include <cstdint>

namespace znn {

struct DropoutKey {
    std::uint64_t seed, round;
    int group, first_map, patch;
};

// The finaliser of splitmix64 (Steele, Lea, Flood 2014), used as a counter-based generator.
inline std::uint64_t mix(std::uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// mask[voxel * bundle + lane] of map first_map + lane: 0 with probability `ratio`, else 1 / (1 - ratio).
inline void fill_dropout_mask(const DropoutKey& key, float ratio, float* mask, std::size_t voxels, int bundle) {
    const auto limit = std::uint64_t(double(ratio) * 4294967296.0);
    const float kept = 1.0f / (1.0f - ratio);
    for (int lane = 0; lane < bundle; ++lane) {
        const std::uint64_t place = std::uint64_t(key.group) << 40 | std::uint64_t(key.first_map + lane) << 16 |
                                    std::uint64_t(key.patch);
        const std::uint64_t stream = mix(mix(mix(key.seed) ^ key.round) ^ place);
        for (std::size_t i = 0; i < voxels; ++i) mask[i * bundle + lane] = (mix(stream + i) >> 32) < limit ? 0.0f : kept;
    }
}

}  // namespace znn
