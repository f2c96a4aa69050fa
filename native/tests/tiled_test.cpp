// Random layers through every phase of znn_tiled against plain double-precision loops.
//
//     tiled_test [cases] [seed]
//
// Pieces run in random order, work space starts as NaN, lanes beyond the last map hold junk. Prints "N passed, N failed".
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "tiled/tiled.hpp"

namespace {

using namespace znn;
using namespace znn::tiled;

constexpr double kTolerance = 2e-6;  // of the largest value

struct Aligned {
    float* data = nullptr;
    std::size_t floats = 0;
    explicit Aligned(std::size_t n, float fill = std::numeric_limits<float>::quiet_NaN()) : floats(n) {
        // Exactly as long as asked for, so that the sanitizer sees any access beyond.
        if (posix_memalign(reinterpret_cast<void**>(&data), 64, std::max<std::size_t>(n * sizeof(float), 1))) std::abort();
        std::fill_n(data, n, fill);
    }
    Aligned(Aligned&& other) noexcept : data(other.data), floats(other.floats) { other.data = nullptr; }
    ~Aligned() { std::free(data); }
};

struct Case {
    Problem problem;
    int bundle;
    bool direct;
    Extent tile;
    Transfer transfer, activation;
    bool bias, accumulate_output, accumulate_gradient, derivative, update, small_caches, memoize, keep, fused, packed, note_positive;

    std::string text() const {
        const Problem& q = problem;
        return std::to_string(q.in_maps) + "->" + std::to_string(q.out_maps) + " input " + to_string(q.input) + " kernel " +
               to_string(q.kernel) + " sparsity " + to_string(q.sparsity) + " bundle " + std::to_string(bundle) +
               (direct ? " direct" : " tile " + to_string(tile)) + " transfer " + std::to_string(int(transfer)) +
               (problem.pool.volume() > 1 ? (problem.filter ? " filter " : " pool ") + to_string(problem.pool) : "") + (small_caches ? " slabs" : "") + (memoize ? "" : " not memoized") + (keep ? "" : " not kept") + (packed ? " packed" : "") + (note_positive ? " positive" : "") + (fused ? " fused" : "") +
               (q.depthwise ? " depthwise" : "");
    }
};

double apply(Transfer f, double x) {
    switch (f) {
        case Transfer::relu: return std::max(0.0, x);
        case Transfer::tanh: return std::tanh(x);
        case Transfer::logistic: return 1 / (1 + std::exp(-x));
        default: return x;
    }
}

double derivative(Transfer f, double y) {
    switch (f) {
        case Transfer::relu: return y > 0 ? 1 : 0;
        case Transfer::tanh: return 1 - y * y;
        case Transfer::logistic: return y * (1 - y);
        default: return 1;
    }
}

// Largest difference over the largest magnitude.
struct Error {
    double difference = 0, largest = 1e-30;
    void add(double got, double want) {
        if (!(std::abs(got - want) <= difference)) difference = std::isnan(got) ? 1e300 : std::abs(got - want);
        largest = std::max(largest, std::abs(want));
    }
    double value() const { return difference / largest; }
};

class Runner {
public:
    Runner(const Case& c, std::mt19937& random) : c_(c), random_(random), V_(c.bundle) {}

    bool run() {
        prepare();
        compute_reference();
        run_rounds();
        return compare();
    }

private:
    int in_maps() const { return c_.problem.in_maps; }
    int out_maps() const { return c_.problem.out_maps; }
    float uniform() { return std::uniform_real_distribution<float>(-1, 1)(random_); }

    // Index into a bundled image.
    std::size_t at(int map, Extent n, int z, int y, int x) const {
        return (map / V_ * n.volume() + (std::size_t(z) * n.y + y) * n.x + x) * V_ + map % V_;
    }
    std::size_t weight(int o, int i, std::size_t tap) const {
        const int nth = i - first_input(o);
        return ((std::size_t(o / V_) * c_.problem.fan_in() + nth) * c_.problem.kernel.volume() + tap) * V_ + o % V_;
    }
    // The input maps that output map o is made of.
    int first_input(int o) const { return c_.problem.depthwise ? o : 0; }
    int end_input(int o) const { return c_.problem.depthwise ? o + 1 : in_maps(); }

    Aligned random_image(int bundles, Extent n) {
        Aligned image(bundles * n.volume() * V_);
        for (std::size_t i = 0; i < image.floats; ++i) image.data[i] = uniform();
        return image;
    }

    void prepare() {
        Machine machine;
        if (c_.small_caches) machine.l2_bytes = 4 << 10, machine.l3_bytes = 16 << 10;
        machine.piece_s = std::uniform_real_distribution<double>(0, 3e-5)(random_);
        machine.workers = std::uniform_int_distribution<int>(1, 24)(random_);
        plan_ = c_.direct  ? plan_direct(c_.problem, V_, machine)
                : c_.fused ? plan_fused(c_.problem, V_, c_.tile, machine, c_.memoize)
                           : plan_tiled(c_.problem, V_, c_.tile, machine, c_.memoize);
        n_ = c_.problem.input, m_ = plan_.output, w_ = c_.problem.pool;
        pooled_ = c_.problem.pooled(m_);
        images_.clear();
        images_.push_back(random_image(plan_.in_bundles, n_));   // input, and activation of the derivative
        images_.push_back(random_image(plan_.out_bundles, pooled_));  // output, old values
        images_.push_back(random_image(plan_.out_bundles, pooled_));  // output gradient
        images_.push_back(random_image(plan_.in_bundles, n_));   // input gradient, old values
        const std::size_t kernels = kernel_floats(plan_);
        for (int i = 0; i < 3; ++i) images_.emplace_back(kernels, 0.0f);
        // Sums of order 1, so that the transfer functions are tried where they bend.
        const float size = 1 / std::sqrt(float(c_.problem.fan_in()) * float(c_.problem.kernel.volume()));
        for (int o = 0; o < out_maps(); ++o)
            for (int i = first_input(o); i < end_input(o); ++i)
                for (std::size_t j = 0; j < c_.problem.kernel.volume(); ++j) {
                    images_[4].data[weight(o, i, j)] = size * uniform();
                    images_[5].data[weight(o, i, j)] = uniform();
                }
        images_.emplace_back(plan_.out_bundles * V_, 0.0f);
        for (int o = 0; o < out_maps(); ++o) images_[7].data[o] = uniform();

        b_ = Buffers{};
        b_.input = images_[0].data, b_.output = images_[1].data;
        b_.output_gradient = images_[2].data, b_.input_gradient = images_[3].data;
        b_.input_stride = b_.input_gradient_stride = n_.volume() * V_;
        b_.output_stride = b_.output_gradient_stride = pooled_.volume() * V_;
        b_.packed_input = c_.packed && packs_input(plan_);
        packed_.clear();
        for (std::size_t i = 0; b_.packed_input && i < n_.volume(); ++i) packed_.push_back(images_[0].data[i * V_]);
        if (b_.packed_input) b_.input = packed_.data();
        largest_.assign(images_[1].floats, -1);
        b_.largest = largest_.data();
        b_.kernels = images_[4].data;
        b_.momenta = images_[5].data;
        b_.kernel_gradient = images_[6].data;
        b_.update = c_.update;
        b_.step = {0.1f, 0.9f, 0.01f, 0.5f};
        b_.bias = c_.bias ? images_[7].data : nullptr;
        b_.note_positive = c_.note_positive;
        bias_sums_.assign(std::size_t(bias_parts(plan_)) * plan_.out_bundles * V_, std::numeric_limits<double>::quiet_NaN());
        b_.bias_sums = c_.note_positive ? bias_sums_.data() : nullptr;
        b_.transfer = c_.transfer;
        b_.accumulate_output = c_.accumulate_output;
        b_.accumulate_input_gradient = c_.accumulate_gradient;
        if (c_.derivative) b_.activation = images_[0].data, b_.activation_transfer = c_.activation;
        work_.clear();
        for (int i = 0; i < kBuffers; ++i) {
            work_.emplace_back(buffer_bytes(plan_, Buffer(i)) / sizeof(float));
            b_.work[i] = work_.back().data;
        }
        scratch_.clear();
        scratch_.emplace_back(scratch_bytes(plan_) / sizeof(float));
    }

    void run_phase(Phase phase, int slab) {
        const int first = first_piece(plan_, phase, slab), last = first_piece(plan_, phase, slab + 1);
        std::vector<int> order(last - first);
        std::iota(order.begin(), order.end(), first);
        std::shuffle(order.begin(), order.end(), random_);
        for (int index : order) {
            std::fill_n(scratch_[0].data, scratch_[0].floats, std::numeric_limits<float>::quiet_NaN());
            run_piece(plan_, phase, index, b_, scratch_[0].data);
        }
    }

    // Slab by slab, as an engine would.
    void run_slabs(std::initializer_list<Phase> phases) {
        for (int slab = 0; slab < plan_.slabs; ++slab)
            for (Phase phase : phases) run_phase(phase, slab);
    }

    void run_rounds() {
        run_phase(Phase::kernels_forward, 0);
        run_phase(Phase::kernels_backward, 0);
        b_.keep = c_.keep;
        run_slabs({Phase::input_transform, Phase::forward_product, Phase::forward_inverse});
        if (c_.keep && plan_.kept_slabs == plan_.slabs)
            run_slabs({Phase::gradient_transform, Phase::backward_product, Phase::backward_inverse, Phase::update_product});
        else
            run_slabs({Phase::input_transform, Phase::gradient_transform, Phase::backward_product,
                       Phase::backward_inverse, Phase::update_product});
        run_phase(Phase::backward_join, 0);
        run_phase(Phase::update_inverse, 0);
    }

    // each(tap, index of an input voxel, index of the output voxel it is multiplied into)
    template <class Each>
    void each_product(int o, int i, Each each) {
        const Extent k = c_.problem.kernel, s = c_.problem.sparsity;
        for (std::size_t j = 0; j < k.volume(); ++j) {
            const int jz = int(j / (k.y * k.x)), jy = int(j / k.x % k.y), jx = int(j % k.x);
            for (int z = 0; z < m_.z; ++z)
                for (int y = 0; y < m_.y; ++y)
                    for (int x = 0; x < m_.x; ++x)
                        each(j, at(i, n_, z + s.z * jz, y + s.y * jy, x + s.x * jx), at(o, m_, z, y, x));
        }
    }

    // The maxima of all windows into output_, the given gradient to where they were. Where rounding decides which of two voxels is the
    // larger, or whether that is noted, their window is given no gradient.
    void pool_reference(const std::vector<double>& sums, std::vector<double>& gradients) {
        output_.assign(images_[1].floats, 0);
        const bool filter = c_.problem.filter;
        const Extent step = filter ? Extent{1, 1, 1} : w_, s = filter ? c_.problem.sparsity : Extent{1, 1, 1};
        double size = 0;
        for (const double sum : sums) size = std::max(size, std::abs(sum));
        for (int o = 0; o < out_maps(); ++o)
            for (int z = 0; z < pooled_.z; ++z)
                for (int y = 0; y < pooled_.y; ++y)
                    for (int x = 0; x < pooled_.x; ++x) {
                        std::size_t most = at(o, m_, z * step.z, y * step.y, x * step.x);
                        double second = -1e30;
                        for (int i = 1; i < int(w_.volume()); ++i) {
                            const std::size_t voxel = at(o, m_, z * step.z + i / (w_.y * w_.x) * s.z,
                                                         y * step.y + i / w_.x % w_.y * s.y, x * step.x + i % w_.x * s.x);
                            second = std::max(second, std::min(sums[voxel], sums[most]));
                            if (sums[voxel] > sums[most]) most = voxel;
                        }
                        const std::size_t pooled = at(o, pooled_, z, y, x);
                        const double result = sums[most] + (c_.bias ? images_[7].data[o] : 0), close = 2 * kTolerance * size;
                        const bool either = c_.note_positive && std::abs(result) < close;
                        if (sums[most] - second < close || either) images_[2].data[pooled] = 0;
                        output_[pooled] = sums[most];
                        if (!c_.note_positive || result > 0) gradients[most] += images_[2].data[pooled];
                    }
    }

    void compute_reference() {
        std::vector<double> sums(plan_.out_bundles * m_.volume() * V_, 0);
        gradient_.assign(images_[3].floats, 0);
        kernel_gradient_.assign(images_[4].floats, 0);
        for (int o = 0; o < out_maps(); ++o)
            for (int i = first_input(o); i < end_input(o); ++i)
                each_product(o, i, [&](std::size_t j, std::size_t in, std::size_t out) {
                    sums[out] += double(images_[4].data[weight(o, i, j)]) * images_[0].data[in];
                });
        std::vector<double> gradients(sums.size(), 0);
        pool_reference(sums, gradients);
        bias_gradient_.assign(out_maps(), 0.0);
        for (int o = 0; o < out_maps(); ++o)
            for (std::size_t i = 0; i < m_.volume(); ++i) bias_gradient_[o] += gradients[(o / V_ * m_.volume() + i) * V_ + o % V_];
        for (int o = 0; o < out_maps(); ++o)
            for (int i = first_input(o); i < end_input(o); ++i)
                each_product(o, i, [&](std::size_t j, std::size_t in, std::size_t out) {
                    gradient_[in] += images_[4].data[weight(o, i, j)] * gradients[out];
                    kernel_gradient_[weight(o, i, j)] += images_[0].data[in] * gradients[out];
                });
        for (std::size_t i = 0; i < output_.size(); ++i) {
            const int map = int(i / (pooled_.volume() * V_) * V_ + i % V_);
            double x = output_[i] + (c_.accumulate_output ? images_[1].data[i] : 0);
            if (c_.bias) x += images_[7].data[map];
            if (map < out_maps()) output_size_ = std::max(output_size_, std::abs(x));
            output_[i] = apply(c_.transfer, x);
        }
        for (std::size_t i = 0; i < gradient_.size(); ++i) {
            gradient_[i] += c_.accumulate_gradient ? images_[3].data[i] : 0;
            gradient_size_ = std::max(gradient_size_, std::abs(gradient_[i]));
            if (c_.derivative) gradient_[i] *= derivative(c_.activation, images_[0].data[i]);
        }
        weights_.assign(images_[4].data, images_[4].data + images_[4].floats);
        momenta_.assign(images_[5].data, images_[5].data + images_[5].floats);
        if (!c_.update) return;
        for (std::size_t i = 0; i < weights_.size(); ++i) {
            momenta_[i] = 0.9 * momenta_[i] + 0.5 * kernel_gradient_[i] + 0.01 * weights_[i];
            weights_[i] -= 0.1 * momenta_[i];
        }
    }

    void compare_image(Error& e, const float* got, const std::vector<double>& want, Extent n, int maps) {
        for (std::size_t i = 0; i < want.size(); ++i)
            if (int(i / (n.volume() * V_) * V_ + i % V_) < maps) e.add(got[i], want[i]);
    }

    bool compare() {
        Error e[6];
        // An output of few voxels, or the gradients of a kernel of few taps, may by chance all be near zero: measure against sums
        // of that many random products.
        e[0].largest = std::max(output_size_, 1.0 / 3), e[1].largest = gradient_size_;
        const double sum = std::sqrt(double(m_.volume())) / 3;
        e[2].largest = sum;
        if (c_.update) e[3].largest = 0.05 * sum, e[4].largest = 0.5 * sum;
        compare_image(e[0], b_.output, output_, pooled_, out_maps());
        compare_image(e[1], b_.input_gradient, gradient_, n_, in_maps());
        for (std::size_t i = 0; i < weights_.size(); ++i) {  // padded lanes must be zero
            e[2].add(b_.kernel_gradient[i], kernel_gradient_[i]);
            e[3].add(b_.kernels[i], weights_[i]);
            e[4].add(b_.momenta[i], momenta_[i]);
        }
        e[5].largest = std::sqrt(double(pooled_.volume())) / 3;
        const int parts = bias_parts(plan_);
        for (int o = 0; o < out_maps() && c_.note_positive; ++o) {
            double sum = 0;
            for (int part = 0; part < parts; ++part) sum += bias_sums_[(std::size_t(o / V_) * parts + part) * V_ + o % V_];
            e[5].add(sum, bias_gradient_[o]);
        }
        static const char* names[] = {"output", "input gradient", "kernel gradient", "weights", "momenta", "biases' gradient"};
        bool good = true;
        for (int i = 0; i < 6; ++i) {
            worst = std::max(worst, e[i].value());
            if (e[i].value() <= kTolerance) continue;
            std::printf("FAILED %s: %s differs by %.2e\n", c_.text().c_str(), names[i], e[i].value());
            good = false;
        }
        return good;
    }

    const Case& c_;
    std::mt19937& random_;
    int V_;
    LayerPlan plan_;
    Extent n_, m_, w_, pooled_;
    std::vector<std::int8_t> largest_;
    std::vector<float> packed_;
    Buffers b_;
    std::vector<Aligned> images_, work_, scratch_;
    double output_size_ = 1e-30, gradient_size_ = 1e-30;  // largest values before f and times f'
    std::vector<double> bias_sums_, bias_gradient_, output_, gradient_, kernel_gradient_, weights_, momenta_;

public:
    static inline double worst = 0;
};

// A random layer whose plain loops take well under a second.
Case random_case(std::mt19937& random) {
    auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
    for (;;) {
        Case c;
        Problem& q = c.problem;
        const int kind = pick(0, 9);
        const int largest = kind < 2 ? 14 : 5;
        q.in_maps = pick(1, pick(0, 1) ? 4 : 20);
        q.out_maps = pick(1, pick(0, 1) ? 4 : 20);
        auto extents = [&](int& n, int& k, int& s) {
            k = pick(1, largest), s = pick(0, 3) ? 1 : pick(2, 4);
            n = s * (k - 1) + pick(1, kind < 2 ? 40 : 16);
        };
        extents(q.input.z, q.kernel.z, q.sparsity.z);
        extents(q.input.y, q.kernel.y, q.sparsity.y);
        extents(q.input.x, q.kernel.x, q.sparsity.x);
        if (kind < 4) {  // two dimensions, along any pair of axes
            const int axis = kind < 3 ? 0 : pick(0, 2);
            (axis == 0 ? q.input.z : axis == 1 ? q.input.y : q.input.x) = 1;
            (axis == 0 ? q.kernel.z : axis == 1 ? q.kernel.y : q.kernel.x) = 1;
        }
        if (kind == 9) q.kernel = {1, 1, 1};
        if (pick(0, 4) == 0) {
            q.depthwise = true;
            q.out_maps = q.in_maps;
            if (pick(0, 1)) q.kernel.x = pick(1, 20), q.input.x = q.sparsity.x * (q.kernel.x - 1) + pick(1, 40);
        }
        const Extent m = valid_extent(q.input, q.kernel, q.sparsity);
        if (double(m.volume()) * q.kernel.volume() * q.fan_in() * q.out_maps > 1e7) continue;
        c.bundle = has_bundle(16) && pick(0, 1) ? 16 : 8;
        c.direct = q.depthwise || pick(0, 2) == 0;
        auto tile = [&](int n, int k, int s) {
            for (;;) {
                const int T = pick(0, 5) ? pick(k, std::min(128, std::max(k, (n + s - 1) / s + 2))) : pick(k, k + (pick(0, 3) ? 8 : 80));
                if (has_transform(T)) return T;
            }
        };
        c.tile = {tile(q.input.z, q.kernel.z, q.sparsity.z), tile(q.input.y, q.kernel.y, q.sparsity.y),
                  tile(q.input.x, q.kernel.x, q.sparsity.x)};
        if (!c.direct && c.tile.volume() > 20000) continue;
        c.transfer = Transfer(pick(0, 3)), c.activation = Transfer(pick(0, 3));
        c.bias = pick(0, 1), c.accumulate_output = pick(0, 2) == 0, c.accumulate_gradient = pick(0, 2) == 0;
        c.derivative = pick(0, 1), c.update = pick(0, 1), c.small_caches = pick(0, 2) == 0;
        c.memoize = pick(0, 1), c.keep = pick(0, 2) > 0, c.fused = q.in_maps <= 4 && pick(0, 1), c.packed = pick(0, 1), c.note_positive = false;
        if (pick(0, 1)) return c;
        const LayerPlan plan = c.direct ? plan_direct(q, c.bundle) : plan_tiled(q, c.bundle, c.tile);
        q.filter = !c.fused && pick(0, 1);
        for (int Extent::*axis : {&Extent::z, &Extent::y, &Extent::x}) {
            Extent window = q.pool;
            window.*axis = pick(2, 3);
            if (can_pool(plan, window, q.filter)) q.pool = window;
        }
        c.note_positive = q.filter && q.pool.volume() > 1 && c.transfer == Transfer::relu && !c.accumulate_output;
        return c;
    }
}

// A convolution that passes its first map on to all, pooled or filtered: the first NaN of a window goes on, else its first maximum.
bool pools_nans(int in_maps, int bundle, bool filter, std::mt19937& random) {
    const Extent n{6, 4, 34}, w{2, 2, 2};
    Problem q{in_maps, 5, n, {1, 1, 1}, {1, 1, 1}, w};
    q.filter = filter;
    const Extent m = q.pooled(n);
    const int step = filter ? 1 : 2;
    const LayerPlan plan = plan_direct(q, bundle);
    Aligned image(n.volume() * bundle, 0.0f), out(m.volume() * bundle), kernels(kernel_floats(plan), 0.0f),
        scratch(scratch_bytes(plan) / sizeof(float));
    const auto value = [&](int z, int y, int x) -> float& { return image.data[((z * n.y + y) * std::size_t(n.x) + x) * bundle]; };
    for (std::size_t i = 0; i < n.volume(); ++i)
        image.data[i * bundle] = random() % 9 ? float(int(random() % 7) - 3) : std::numeric_limits<float>::quiet_NaN();
    for (int o = 0; o < q.out_maps; ++o) kernels.data[o] = 1;
    std::vector<std::int8_t> largest(out.floats);
    Buffers b;
    b.input = image.data, b.input_stride = image.floats, b.kernels = kernels.data;
    b.output = out.data, b.output_stride = out.floats, b.largest = largest.data();
    std::vector<Aligned> work;
    for (int i = 0; i < kBuffers; ++i) b.work[i] = work.emplace_back(buffer_bytes(plan, Buffer(i)) / sizeof(float)).data;
    for (Phase phase : {Phase::kernels_forward, Phase::forward_inverse})
        for (int i = 0; i < piece_count(plan, phase); ++i) run_piece(plan, phase, i, b, scratch.data);
    bool right = true;
    for (int z = 0; z < m.z; ++z)
        for (int y = 0; y < m.y; ++y)
            for (int x = 0; x < m.x; ++x) {
                float most = value(step * z, step * y, step * x);
                int where = 0;
                for (int j = 1; j < 8; ++j) {
                    const float v = value(step * z + j / 4, step * y + j / 2 % 2, step * x + j % 2);
                    if (!std::isnan(most) && !(v <= most)) most = v, where = j;
                }
                for (int o = 0; o < q.out_maps; ++o) {
                    const std::size_t at = ((z * m.y + y) * std::size_t(m.x) + x) * bundle + o;
                    right &= largest[at] == where && (std::isnan(most) ? std::isnan(out.data[at]) : out.data[at] == most);
                }
            }
    return right;
}

bool rejects(const Problem& q, int bundle, Extent tile) {
    try {
        plan_tiled(q, bundle, tile);
    } catch (const std::invalid_argument&) {
        return true;
    }
    return false;
}

}  // namespace

int main(int argc, char** argv) {
    const int cases = argc > 1 ? std::atoi(argv[1]) : 600;
    std::mt19937 random(argc > 2 ? std::atoi(argv[2]) : 1);
    int passed = 0, failed = 0;
    for (int i = 0; i < cases; ++i) {
        const Case c = random_case(random);
        (Runner(c, random).run() ? passed : failed)++;
    }
    const Problem good{4, 4, {8, 8, 8}, {3, 3, 3}, {1, 1, 1}};
    Problem depthwise = good;
    depthwise.depthwise = true;
    const std::size_t l2 = Machine{}.l2_bytes;
    const bool checks[] = {l2 >= 256 << 10 && l2 <= 2 << 20,
                           rejects(depthwise, 8, {8, 8, 8}), candidate_tiles(depthwise, 8, {}, 3).empty(),
                           !rejects(good, 8, {8, 8, 8}), rejects(good, 8, {2, 8, 8}), rejects(good, 8, {33, 8, 8}),
                           rejects(good, 4, {8, 8, 8}), rejects({0, 4, {8, 8, 8}, {3, 3, 3}}, 8, {8, 8, 8}),
                           rejects({4, 4, {2, 8, 8}, {3, 3, 3}}, 8, {8, 8, 8}),
                           !candidate_tiles(good, 8, {}, 3).empty()};
    for (bool ok : checks) (ok ? passed : failed)++;
    for (int in_maps : {1, 2})
        for (int bundle : {8, 16})
            for (bool filter : {false, true})
                if (has_bundle(bundle) && !(filter && in_maps > 1)) (pools_nans(in_maps, bundle, filter, random) ? passed : failed)++;
    std::printf("%s, largest error %.2e of the largest value\n%d passed, %d failed\n", isa(), Runner::worst, passed, failed);
    return failed ? 1 : 0;
}
