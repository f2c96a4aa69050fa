// One convolution layer outside any network, for callers that own images and parameters (znn.torch). A call computes a
// whole batch: images are turned into bundles of maps, run through native/tiled's pieces, and turned back, all in parallel.
// Depthwise and thinly grouped layers work on single maps (bundle 1) with the direct kernels instead.
//
// A layer owns a plan and a task graph, no memory: one call runs at a time, so all layers of a process share the workers and
// the work space of one Team. What must outlive a call, the spectra of the inputs from forward to backward, is the caller's.
#pragma once
#include <cstddef>
#include <memory>

#include "base/extent.hpp"
#include "engine/description.hpp"
#include "engine/team.hpp"

namespace znn {

// A float32 tensor [n][map][z][y][x] of the caller, strides in floats (0 and negative ones too).
struct View {
    float* data = nullptr;
    long n = 0, map = 0, z = 0, y = 0, x = 0;

    float* at(long in, long im, long iz, long iy) const { return data + in * n + im * map + iz * z + iy * y; }
};

struct LayerProblem {
    int in_maps = 0, out_maps = 0, groups = 1;  // of all groups together
    Extent input, kernel, dilation{1, 1, 1}, before, after;  // zeros in front of and behind the image

    Extent padded() const { return before + input + after; }
    Extent output() const { return valid_extent(padded(), kernel, dilation); }
    int group_in() const { return in_maps / groups; }
    int group_out() const { return out_maps / groups; }
};

// Cross-correlation as PyTorch's conv3d: out[n][o][p] = bias[o] + sum_i sum_j x[n][i][p + dilation j - before] w[o][i][j], i
// over the maps of o's group. Outputs and gradients are [n][map][z][y][x] without gaps in z, y, x.
class Layer {
public:
    // bundle 1: direct on single maps. keep: forward may hand out spectra. Throws std::invalid_argument where the problem is
    // empty or the plan cannot be.
    static std::unique_ptr<Layer> make(Team& team, const LayerProblem& problem, Method method, int bundle, Extent tile,
                                       bool keep);
    virtual ~Layer() = default;

    const LayerProblem& problem() const { return problem_; }
    // Floats that forward leaves in `kept` for backward, per image of a batch; 0: it keeps nothing.
    virtual std::size_t kept_floats() const = 0;
    // Floats of work space.
    virtual std::size_t space_floats() const = 0;

    struct Forward {
        int batch = 1;
        View input, kernels, output;
        const float* bias = nullptr;  // or null
        float* kept = nullptr;        // or null
    };
    struct Backward {
        int batch = 1;
        View input, kernels, output_gradient;  // input: not read where `kept` is given
        const float* kept = nullptr;
        View input_gradient;                   // data null: not wanted
        float* kernel_gradient = nullptr;      // [out][in / groups][z][y][x], or null
        float* bias_gradient = nullptr;        // [out], or null
    };
    // These wait for the result. Thread-safe; one call of a team runs at a time.
    virtual void forward(const Forward& call) = 0;
    virtual void backward(const Backward& call) = 0;

protected:
    Layer(Team& team, const LayerProblem& problem) : team_(team), problem_(problem) {}

    Team& team_;
    const LayerProblem problem_;
};

}  // namespace znn
