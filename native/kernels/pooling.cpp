// Max-filter and max-pool with the index of the maximum, and their backward pass.
//
// The maximum used throughout is ordered: `later` replaces `earlier` only if it is strictly greater, or if it is the first
// NaN. It is associative and idempotent, so windows may be built from overlapping halves as long as order is kept:
// a window of w takes ceil(log2 w) steps per axis, all of them along contiguous memory.
#include "kernels/isa.hpp"

namespace znn::kernels::ZNN_ISA {
namespace {

struct Candidate {
    vf value;
    vi index;
};

ZNN_INLINE bool replaces(float later, float earlier) { return !(later <= earlier) && earlier == earlier; }

ZNN_INLINE Candidate first_maximum(Candidate earlier, Candidate later) {
    const vi take = ~(vi)(later.value <= earlier.value) & (vi)(earlier.value == earlier.value);
    return {take ? later.value : earlier.value, take ? later.index : earlier.index};
}

ZNN_INLINE Candidate load(const float* value, const std::int32_t* index) { return {load(value), load(index)}; }

ZNN_INLINE void store(float* value, std::int32_t* index, Candidate c) {
    store(value, c.value);
    store(index, c.index);
}

// p[i] = first_maximum(p[i], p[i + distance]) for i in [0, count), in place; whole vectors, so up to W - 1 more.
ZNN_INLINE void combine(float* value, std::int32_t* index, std::ptrdiff_t distance, std::ptrdiff_t count) {
    for (std::ptrdiff_t i = 0; i < count; i += W)
        store(value + i, index + i,
              first_maximum(load(value + i, index + i), load(value + i + distance, index + i + distance)));
}

// Calls step(distance, remaining) for the steps that turn an axis of n positions into windows of w with spacing s:
// remaining counts the positions that are still right after the step.
template <class F>
ZNN_INLINE void window_steps(int n, int w, int s, const F& step) {
    int have = 1;
    while (have < w) {
        const int by = 2 * have <= w ? have : w - have;
        have += by;
        step(by * s, n - s * (have - 1));
    }
}

constexpr std::size_t padding = 16;  // floats after each row, read and written by whole vectors
ZNN_INLINE std::size_t pitch_of(std::size_t length) { return (length + 2 * padding - 1) / padding * padding; }

// Values and indices of scratch images, rows `pitch` apart.
struct Scratch {
    float* value;
    std::int32_t* index;
};

// x and y windows of one input plane; the plane's rows [0, m.y) hold the result.
void filter_plane(const float* in, Extent n, Extent w, Extent s, int bundle, std::int32_t first_voxel, Extent m,
                  Scratch plane, std::size_t pitch) {
    const std::size_t length = std::size_t(n.x) * bundle;
    for (int y = 0; y < n.y; ++y) {
        float* value = plane.value + y * pitch;
        std::int32_t* index = plane.index + y * pitch;
        __builtin_memcpy(value, in + y * length, length * sizeof(float));
        const std::int32_t row = first_voxel + y * n.x;
        if (bundle == 1)
            for (int x = 0; x < n.x; ++x) index[x] = row + x;
        else
            for (int x = 0; x < n.x; ++x)
                for (int b = 0; b < bundle; ++b) index[std::ptrdiff_t(x) * bundle + b] = row + x;
        window_steps(n.x, w.x, s.x, [&](int distance, int remaining) {
            combine(value, index, std::ptrdiff_t(distance) * bundle, std::ptrdiff_t(remaining) * bundle);
        });
    }
    window_steps(n.y, w.y, s.y, [&](int distance, int remaining) {
        for (int y = 0; y < remaining; ++y)
            combine(plane.value + y * pitch, plane.index + y * pitch, distance * std::ptrdiff_t(pitch),
                    std::ptrdiff_t(m.x) * bundle);
    });
}

void copy_rows(Scratch from, std::size_t from_pitch, float* value, std::int32_t* index, std::size_t to_pitch, int rows,
               std::size_t length) {
    for (int y = 0; y < rows; ++y) {
        __builtin_memcpy(value + y * to_pitch, from.value + y * from_pitch, length * sizeof(float));
        __builtin_memcpy(index + y * to_pitch, from.index + y * from_pitch, length * sizeof(std::int32_t));
    }
}

// Scratch: one input plane, then a volume of n.z filtered planes, each as values and indices.
void max_filter(const float* in, Extent n, Extent w, Extent s, int bundle, float* out, std::int32_t* index, void* scratch) {
    const Extent m = valid(n, w, s);
    const std::size_t pitch = pitch_of(std::size_t(n.x) * bundle), length = std::size_t(m.x) * bundle;
    const std::size_t flat_pitch = pitch_of(length), flat = flat_pitch * m.y;
    float* memory = static_cast<float*>(scratch);
    const Scratch plane{memory, reinterpret_cast<std::int32_t*>(memory + pitch * n.y)};
    float* volume_memory = memory + 2 * pitch * n.y;
    const Scratch stack{volume_memory, reinterpret_cast<std::int32_t*>(volume_memory + flat * n.z)};
    for (int z = 0; z < n.z; ++z) {
        filter_plane(in + std::size_t(z) * n.y * n.x * bundle, n, w, s, bundle, z * n.y * n.x, m, plane, pitch);
        if (w.z == 1)
            copy_rows(plane, pitch, out + z * length * m.y, index + z * length * m.y, length, m.y, length);
        else
            copy_rows(plane, pitch, stack.value + z * flat, stack.index + z * flat, flat_pitch, m.y, length);
    }
    if (w.z == 1) return;
    for (int y = 0; y < m.y; ++y)  // the planes' rows y: few enough to stay in cache for all the steps
        window_steps(n.z, w.z, s.z, [&](int distance, int remaining) {
            for (int z = 0; z < remaining; ++z)
                combine(stack.value + z * flat + y * flat_pitch, stack.index + z * flat + y * flat_pitch,
                        distance * std::ptrdiff_t(flat), std::ptrdiff_t(length));
        });
    for (int z = 0; z < m.z; ++z)
        copy_rows({stack.value + z * flat, stack.index + z * flat}, flat_pitch, out + z * length * m.y,
                  index + z * length * m.y, length, m.y, length);
}

// One output voxel, floats [from, from + W) of its bundle.
ZNN_INLINE Candidate pool_vector(const float* in, Extent n, Extent w, int bundle, std::int32_t voxel) {
    Candidate best{load(in + std::ptrdiff_t(voxel) * bundle), splat(voxel)};
    for (int z = 0; z < w.z; ++z)
        for (int y = 0; y < w.y; ++y)
            for (int x = 0; x < w.x; ++x) {
                const std::int32_t at = voxel + (z * n.y + y) * n.x + x;
                best = first_maximum(best, {load(in + std::ptrdiff_t(at) * bundle), splat(at)});
            }
    return best;
}

ZNN_INLINE void pool_scalar(const float* in, Extent n, Extent w, int bundle, std::int32_t voxel, float* out,
                            std::int32_t* index) {
    float best = in[std::ptrdiff_t(voxel) * bundle];
    std::int32_t best_at = voxel;
    for (int z = 0; z < w.z; ++z)
        for (int y = 0; y < w.y; ++y)
            for (int x = 0; x < w.x; ++x) {
                const std::int32_t at = voxel + (z * n.y + y) * n.x + x;
                const float value = in[std::ptrdiff_t(at) * bundle];
                const bool take = replaces(value, best);
                best = take ? value : best;
                best_at = take ? at : best_at;
            }
    *out = best;
    *index = best_at;
}

void max_pool(const float* in, Extent n, Extent w, Extent stride, int bundle, float* out, std::int32_t* index) {
    const Extent m{(n.z - w.z) / stride.z + 1, (n.y - w.y) / stride.y + 1, (n.x - w.x) / stride.x + 1};
    for (int z = 0; z < m.z; ++z)
        for (int y = 0; y < m.y; ++y)
            for (int x = 0; x < m.x; ++x, out += bundle, index += bundle) {
                const std::int32_t voxel = (z * stride.z * n.y + y * stride.y) * n.x + x * stride.x;
                int b = 0;
                for (; b + W <= bundle; b += W) store(out + b, index + b, pool_vector(in + b, n, w, bundle, voxel));
                for (; b < bundle; ++b) pool_scalar(in + b, n, w, bundle, voxel, out + b, index + b);
            }
}

void max_backward(const float* g, const std::int32_t* index, std::size_t voxels, int bundle, float* gin) {
    if (bundle == 1) {
        for (std::size_t p = 0; p < voxels; ++p) gin[index[p]] += g[p];
        return;
    }
    for (std::size_t p = 0; p < voxels; ++p, g += bundle, index += bundle)
        for (int b = 0; b < bundle; ++b) gin[std::ptrdiff_t(index[b]) * bundle + b] += g[b];
}

}  // namespace

void fill_pooling(Table& table) {
    table.max_filter = max_filter;
    table.max_pool = max_pool;
    table.max_backward = max_backward;
}

}  // namespace znn::kernels::ZNN_ISA
