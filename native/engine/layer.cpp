#include "engine/layer.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine/plan_layer.hpp"
#include "engine/stage.hpp"
#include "kernels/kernels.hpp"
#include "tiled/tiled.hpp"

namespace znn {

namespace {

using Phase = tiled::Phase;
using Work = tiled::Buffer;

constexpr std::size_t piece_floats = std::size_t{1} << 16;

std::size_t whole_lines(std::size_t floats) { return (floats + 15) / 16 * 16; }
int ceil_div(std::size_t a, std::size_t b) { return int((a + b - 1) / b); }

// ---------------------------------------------------------------- rows of single maps <-> rows of bundles

using F4 = float __attribute__((vector_size(16)));

F4 load4(const float* p) {
    F4 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
void store4(float* p, F4 v) { std::memcpy(p, &v, sizeof v); }

// rows[i] = (a_i, b_i, c_i, d_i) of the four vectors.
void transpose4(F4& a, F4& b, F4& c, F4& d) {
    const F4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const F4 cd = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd2 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    a = __builtin_shufflevector(ab, cd, 0, 1, 4, 5), b = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
    c = __builtin_shufflevector(ab2, cd2, 0, 1, 4, 5), d = __builtin_shufflevector(ab2, cd2, 2, 3, 6, 7);
}

// out[x][V] = in[lane][x] for `lanes` lanes, the others zero.
void bundle_row(const View& in, const float* first, int lanes, int n, int V, float* out) {
    if (in.map == 1 && lanes == V) {
        for (int x = 0; x < n; ++x) std::memcpy(out + x * V, first + x * in.x, V * sizeof(float));
        return;
    }
    for (int lane = 0; lane < V; lane += 4) {
        const float* p = first + lane * in.map;
        int x = 0;
        if (in.x == 1 && lane + 4 <= lanes)
            for (; x + 4 <= n; x += 4) {
                F4 a = load4(p + x), b = load4(p + in.map + x), c = load4(p + 2 * in.map + x), d = load4(p + 3 * in.map + x);
                transpose4(a, b, c, d);
                float* to = out + x * V + lane;
                store4(to, a), store4(to + V, b), store4(to + 2 * V, c), store4(to + 3 * V, d);
            }
        const int filled = std::clamp(lanes - lane, 0, 4);
        for (; x < n; ++x) {
            for (int i = 0; i < filled; ++i) out[x * V + lane + i] = p[i * in.map + x * in.x];
            for (int i = filled; i < 4; ++i) out[x * V + lane + i] = 0;
        }
    }
}

// The inverse.
void unbundle_row(const float* in, int lanes, int n, int V, const View& out, float* first) {
    if (out.map == 1 && lanes == V) {
        for (int x = 0; x < n; ++x) std::memcpy(first + x * out.x, in + x * V, V * sizeof(float));
        return;
    }
    for (int lane = 0; lane < lanes; lane += 4) {
        float* p = first + lane * out.map;
        int x = 0;
        if (out.x == 1 && lane + 4 <= lanes)
            for (; x + 4 <= n; x += 4) {
                const float* from = in + x * V + lane;
                F4 a = load4(from), b = load4(from + V), c = load4(from + 2 * V), d = load4(from + 3 * V);
                transpose4(a, b, c, d);
                store4(p + x, a), store4(p + out.map + x, b), store4(p + 2 * out.map + x, c), store4(p + 3 * out.map + x, d);
            }
        for (; x < n; ++x)
            for (int i = 0; i < std::min(4, lanes - lane); ++i) p[i * out.map + x * out.x] = in[x * V + lane + i];
    }
}

// Images [bundle][z][y][x][V] and how work on them is cut: a bundle, a range of rows (z, y).
struct Bundled {
    Extent extent;
    int maps = 0, bundles = 0, V = 0, rows_per_piece = 1, pieces_per_bundle = 1;

    Bundled() = default;
    Bundled(int maps, Extent extent, int V) : extent(extent), maps(maps), bundles((maps + V - 1) / V), V(V) {
        const int rows = extent.z * extent.y;
        rows_per_piece = std::clamp(int(piece_floats / (std::size_t(extent.x) * V)), 1, rows);
        pieces_per_bundle = ceil_div(rows, rows_per_piece);
    }
    std::size_t stride() const { return extent.volume() * V; }
    std::size_t floats() const { return stride() * bundles; }
    int pieces() const { return bundles * pieces_per_bundle; }

    // Calls each(bundle, lanes, z, y, row) for the rows of a piece; `row` is the number of the row in its bundle.
    template <class Each>
    void rows(int piece, Each each) const {
        const int bundle = piece / pieces_per_bundle, first = piece % pieces_per_bundle * rows_per_piece;
        const int end = std::min(first + rows_per_piece, extent.z * extent.y);
        for (int row = first; row < end; ++row)
            each(bundle, std::min(V, maps - bundle * V), row / extent.y, row % extent.y, row);
    }
};

// A piece of bundling maps [first, first + images.maps) of image n, surrounded with zeros.
void load_piece(const Bundled& images, int piece, const View& in, int n, int first, Extent before, Extent size, float* out) {
    const int V = images.V, nx = images.extent.x;
    images.rows(piece, [&](int bundle, int lanes, int z, int y, int row) {
        float* to = out + bundle * images.stride() + std::size_t(row) * nx * V;
        z -= before.z, y -= before.y;
        if (z < 0 || z >= size.z || y < 0 || y >= size.y) {
            std::memset(to, 0, std::size_t(nx) * V * sizeof(float));
            return;
        }
        std::memset(to, 0, std::size_t(before.x) * V * sizeof(float));
        bundle_row(in, in.at(n, first + bundle * V, z, y), lanes, size.x, V, to + before.x * V);
        const int filled = before.x + size.x;
        std::memset(to + filled * V, 0, std::size_t(nx - filled) * V * sizeof(float));
    });
}

// A piece of taking maps back out of bundles, and out of what surrounds them.
void store_piece(const Bundled& images, int piece, const float* in, Extent before, Extent size, const View& out, int n, int first) {
    const int V = images.V;
    images.rows(piece, [&](int bundle, int lanes, int z, int y, int row) {
        z -= before.z, y -= before.y;
        if (z < 0 || z >= size.z || y < 0 || y >= size.y) return;
        const float* from = in + bundle * images.stride() + (std::size_t(row) * images.extent.x + before.x) * V;
        unbundle_row(from, lanes, size.x, V, out, out.at(n, first + bundle * V, z, y));
    });
}

// sums[lane] = sum of a piece's voxels.
void sum_piece(const Bundled& images, int piece, const float* in, double* sums) {
    const int V = images.V, nx = images.extent.x;
    std::fill_n(sums, V, 0.0);
    images.rows(piece, [&](int bundle, int, int, int, int row) {
        const float* from = in + bundle * images.stride() + std::size_t(row) * nx * V;
        float line[16] = {};
        for (int x = 0; x < nx; ++x)
            for (int lane = 0; lane < V; ++lane) line[lane] += from[x * V + lane];
        for (int lane = 0; lane < V; ++lane) sums[lane] += double(line[lane]);
    });
}

// A task graph that is run once per image of each group, one image after the other.
class ImageGraph {
public:
    explicit ImageGraph(const tiled::LayerPlan& plan) : plan_(plan), end_(add(0, {})) {
        end_->when_done([this](Worker* worker) { next(worker); });
    }

    using Body = Stage::Body;
    Stage* add(int pieces, Body body) {
        stages_.push_back(std::make_unique<Stage>(TaskLabel{}, pieces, std::move(body)));
        return stages_.back().get();
    }
    Stage* head(int pieces, Body body) {  // waits for nothing
        heads_.push_back(add(pieces, std::move(body)));
        heads_.back()->await(1);
        return heads_.back();
    }
    // Pieces of a phase of one slab (-1: of all), no-ops unless `wanted`.
    Stage* add(Phase phase, int slab, const tiled::Buffers& buffers, const bool& wanted) {
        const int first = slab < 0 ? 0 : tiled::first_piece(plan_, phase, slab);
        const int end = slab < 0 ? tiled::piece_count(plan_, phase) : tiled::first_piece(plan_, phase, slab + 1);
        const std::size_t scratch = whole_lines(tiled::scratch_bytes(plan_) / sizeof(float) + 1);
        return add(end - first, [this, phase, first, scratch, &buffers, &wanted](int piece, Worker& worker) {
            if (wanted) tiled::run_piece(plan_, phase, first + piece, buffers, worker.scratch.get(scratch, 0));
        });
    }
    Stage& end() { return *end_; }

    int image = 0, group = 0;  // those in hand

    void run(int batch, int groups, const std::function<void()>& begin_image, Team::Turn& turn) {
        batch_ = batch, groups_ = groups, image = -1, group = 0;
        begin_image_ = &begin_image;
        executor_ = &turn.executor();
        done_.store(false);
        for (auto& stage : stages_) stage->set_executor(executor_);
        next(nullptr);
        turn.wait([this] { return done_.load(std::memory_order_acquire); });
        executor_->drain();  // the last piece may still be on its way out
    }

private:
    void next(Worker* worker) {
        if (++image == batch_) image = 0, ++group;
        if (group == groups_ || executor_->failed()) {
            done_.store(true, std::memory_order_release);
            executor_->wake();
            return;
        }
        (*begin_image_)();
        for (Stage* stage : heads_) stage->arrive(worker);
    }

    const tiled::LayerPlan& plan_;
    std::vector<std::unique_ptr<Stage>> stages_;
    std::vector<Stage*> heads_;
    Stage* end_;
    Executor* executor_ = nullptr;
    const std::function<void()>* begin_image_ = nullptr;
    int batch_ = 0, groups_ = 0;
    std::atomic<bool> done_{false};
};

// Hands out parts of the work space; counts them where there is none yet.
struct Carver {
    float* base;
    std::size_t used = 0;

    float* take(std::size_t floats) {
        float* part = base ? base + used : nullptr;
        used += whole_lines(floats);
        return part;
    }
};

// ---------------------------------------------------------------- bundles of maps

class BundledLayer final : public Layer {
public:
    BundledLayer(Team& team, const LayerProblem& problem, tiled::LayerPlan plan, bool keep)
        : Layer(team, problem), plan_(std::move(plan)), keep_(keep),
          inputs_(problem.group_in(), problem.padded(), tiled::packs_input(plan_) ? 1 : plan_.bundle),
          input_gradients_(problem.group_in(), problem.padded(), plan_.bundle),
          outputs_(problem.group_out(), problem.output(), plan_.bundle), forward_graph_(plan_), backward_graph_(plan_) {
        for (int i = 0; i < tiled::kBuffers; ++i)
            work_floats_[i] = whole_lines(tiled::buffer_bytes(plan_, Work(i)) / sizeof(float));
        build_forward();
        build_backward();
    }

    std::size_t kept_floats() const override {
        return keep_ ? work_floats_[int(Work::input_spectra)] * problem_.groups : 0;
    }
    std::size_t space_floats() const override {
        tiled::Buffers b;
        Space s;
        return std::max(carve_forward(nullptr, b, s), carve_backward(nullptr, b, s));
    }

    void forward(const Forward& call) override {
        Team::Turn turn(team_);
        const std::size_t floats = carve_forward(nullptr, buffers_, space_);
        carve_forward(turn.space(floats), buffers_, space_);
        forward_ = call;
        buffers_.keep = call.kept != nullptr;
        float* const own = buffers_.work[int(Work::input_spectra)];
        run(forward_graph_, call.batch, turn, [&] {
            const auto& graph = forward_graph_;
            first_ = graph.image == 0;
            if (first_) load_bias(graph.group);
            buffers_.work[int(Work::input_spectra)] = call.kept ? call.kept + kept_at(graph) : own;
        });
    }

    void backward(const Backward& call) override {
        Team::Turn turn(team_);
        const std::size_t floats = carve_backward(nullptr, buffers_, space_);
        carve_backward(turn.space(floats), buffers_, space_);
        backward_ = call;
        buffers_.keep = call.kept != nullptr;
        to_input_ = call.input_gradient.data != nullptr;
        to_kernels_ = call.kernel_gradient != nullptr;
        again_ = to_kernels_ && !call.kept;
        float* const own = buffers_.work[int(Work::input_spectra)];
        run(backward_graph_, call.batch, turn, [&] {
            const auto& graph = backward_graph_;
            first_ = graph.image == 0;
            kernels_for_input_ = first_ && to_input_;
            buffers_.work[int(Work::input_spectra)] =
                call.kept ? const_cast<float*>(call.kept) + kept_at(graph) : own;
        });
    }

private:
    struct Space {
        float *input = nullptr, *output = nullptr, *kernels = nullptr, *bias = nullptr;
    };

    void run(ImageGraph& graph, int batch, Team::Turn& turn, const std::function<void()>& begin) {
        graph.run(batch, problem_.groups, begin, turn);
    }
    std::size_t kept_at(const ImageGraph& graph) const {
        return (std::size_t(graph.image) * problem_.groups + graph.group) * work_floats_[int(Work::input_spectra)];
    }

    void carve(Carver& carver, tiled::Buffers& b, std::initializer_list<Work> buffers) const {
        for (const Work w : buffers) {
            std::size_t floats = work_floats_[int(w)];
            // The input's spectra are kept in the caller's memory, if at all; here they pass, slab by slab unless they are fused.
            if (w == Work::input_spectra && !plan_.fused)
                floats = std::min(floats, whole_lines(plan_.in_slab * plan_.passing_slabs));
            b.work[int(w)] = carver.take(floats);
        }
    }
    std::size_t carve_forward(float* base, tiled::Buffers& b, Space& s) const {
        Carver carver{base};
        b = {};
        b.input = s.input = carver.take(inputs_.floats());
        b.output = s.output = carver.take(outputs_.floats());
        b.kernels = s.kernels = carver.take(tiled::kernel_floats(plan_));
        b.bias = s.bias = carver.take(std::size_t(outputs_.bundles) * plan_.bundle);
        b.input_stride = inputs_.stride(), b.output_stride = outputs_.stride();
        b.packed_input = inputs_.V == 1;
        carve(carver, b, {Work::kernels_forward, Work::input_spectra, Work::output_spectra});
        return carver.used;
    }
    std::size_t carve_backward(float* base, tiled::Buffers& b, Space& s) const {
        Carver carver{base};
        b = {};
        b.input = s.input = carver.take(inputs_.floats());
        b.output_gradient = s.output = carver.take(outputs_.floats());
        b.input_gradient = carver.take(input_gradients_.floats());
        b.kernels = s.kernels = carver.take(tiled::kernel_floats(plan_));
        b.kernel_gradient = carver.take(tiled::kernel_floats(plan_));
        b.input_stride = inputs_.stride(), b.input_gradient_stride = input_gradients_.stride();
        b.output_gradient_stride = outputs_.stride();
        b.packed_input = inputs_.V == 1;
        carve(carver, b, {Work::kernels_backward, Work::input_spectra, Work::gradient_spectra, Work::input_gradient_spectra,
                          Work::halo, Work::update_spectra});
        return carver.used;
    }

    void build_forward() {
        ImageGraph& g = forward_graph_;
        Stage* load = g.head(inputs_.pieces(), [this, &g](int piece, Worker&) {
            load_piece(inputs_, piece, forward_.input, g.image, g.group * inputs_.maps, problem_.before, problem_.input,
                       space_.input);
        });
        Stage* weights = g.head(outputs_.bundles, [this, &g](int bundle, Worker&) {
            if (first_) load_kernels(forward_.kernels, g.group, bundle);
        });
        Stage* kernels = g.add(Phase::kernels_forward, -1, buffers_, first_);
        Stage* store = g.add(outputs_.pieces(), [this, &g](int piece, Worker&) {
            store_piece(outputs_, piece, space_.output, {0, 0, 0}, problem_.output(), forward_.output, g.image,
                        g.group * outputs_.maps);
        });
        weights->before(*kernels);
        std::vector<Stage*> products, inverses;
        for (int slab = 0; slab < plan_.slabs; ++slab) {
            Stage* transform = g.add(Phase::input_transform, slab, buffers_, always_);
            Stage* product = g.add(Phase::forward_product, slab, buffers_, always_);
            Stage* inverse = g.add(Phase::forward_inverse, slab, buffers_, always_);
            load->before(*transform);
            transform->before(*product);
            kernels->before(*product);
            product->before(*inverse);
            if (slab >= plan_.passing_slabs) {
                products[slab - plan_.passing_slabs]->before(*transform);
                inverses[slab - plan_.passing_slabs]->before(*product);
            }
            inverse->before(*store);
            products.push_back(product);
            inverses.push_back(inverse);
        }
        store->before(g.end());
    }

    void build_backward() {
        ImageGraph& g = backward_graph_;
        sums_.resize(std::size_t(outputs_.pieces()) * plan_.bundle);
        // Spectra do for the kernels' gradient, except where it reads the images themselves.
        const bool needs_images = !plan_.updates_from_spectra();
        Stage* load = g.head(outputs_.pieces(), [this, &g](int piece, Worker&) {
            load_piece(outputs_, piece, backward_.output_gradient, g.image, g.group * outputs_.maps, {0, 0, 0},
                       problem_.output(), space_.output);
            if (backward_.bias_gradient) sum_piece(outputs_, piece, space_.output, &sums_[std::size_t(piece) * plan_.bundle]);
        });
        load->when_done([this](Worker*) { add_bias_gradient(); });
        Stage* load_input = g.head(inputs_.pieces(), [this, &g, needs_images](int piece, Worker&) {
            if (to_kernels_ && (needs_images || again_))
                load_piece(inputs_, piece, backward_.input, g.image, g.group * inputs_.maps, problem_.before, problem_.input,
                           space_.input);
        });
        Stage* weights = g.head(outputs_.bundles, [this, &g](int bundle, Worker&) {
            if (kernels_for_input_) load_kernels(backward_.kernels, g.group, bundle);
        });
        Stage* kernels = g.add(Phase::kernels_backward, -1, buffers_, kernels_for_input_);
        weights->before(*kernels);
        Stage* join = g.add(Phase::backward_join, -1, buffers_, to_input_);
        Stage* store = g.add(input_gradients_.pieces(), [this, &g](int piece, Worker&) {
            if (to_input_)
                store_piece(input_gradients_, piece, buffers_.input_gradient, problem_.before, problem_.input, backward_.input_gradient,
                            g.image, g.group * inputs_.maps);
        });
        join->before(*store);
        store->before(g.end());
        Stage* update = g.add(Phase::update_inverse, -1, buffers_, to_kernels_);
        Stage* store_kernels = g.add(outputs_.bundles, [this, &g](int bundle, Worker&) {
            if (to_kernels_) add_kernel_gradient(g.group, bundle);
        });
        update->before(*store_kernels);
        store_kernels->before(g.end());
        build_backward_slabs(*load, *load_input, *kernels, *join, *update);
    }

    void build_backward_slabs(Stage& load, Stage& load_input, Stage& kernels, Stage& join, Stage& update) {
        ImageGraph& g = backward_graph_;
        std::vector<Stage*> products, inverses, updates;
        for (int slab = 0; slab < plan_.slabs; ++slab) {
            Stage* transform = g.add(Phase::gradient_transform, slab, buffers_, always_);
            Stage* product = g.add(Phase::backward_product, slab, buffers_, to_input_);
            Stage* inverse = g.add(Phase::backward_inverse, slab, buffers_, to_input_);
            Stage* again = g.add(Phase::input_transform, slab, buffers_, again_);
            Stage* sum = g.add(Phase::update_product, slab, buffers_, to_kernels_);
            load.before(*transform);
            load_input.before(*again);
            kernels.before(*product);
            transform->before(*product);
            product->before(*inverse);
            inverse->before(join);
            transform->before(*sum);
            again->before(*sum);
            if (slab > 0) updates[slab - 1]->before(*sum);
            if (slab >= plan_.passing_slabs) {
                const int earlier = slab - plan_.passing_slabs;
                products[earlier]->before(*transform);
                updates[earlier]->before(*transform);
                updates[earlier]->before(*again);
                inverses[earlier]->before(*product);
            }
            products.push_back(product);
            inverses.push_back(inverse);
            updates.push_back(sum);
        }
        updates.back()->before(update);
    }

    // [out][in][z][y][x] of the caller -> [out bundle][in][z][y][x][V] of one group
    void load_kernels(const View& in, int group, int bundle) {
        const int V = plan_.bundle, lanes = std::min(V, outputs_.maps - bundle * V);
        const Extent k = problem_.kernel;
        float* out = space_.kernels + std::size_t(bundle) * inputs_.maps * k.volume() * V;
        for (int i = 0; i < inputs_.maps; ++i)
            for (int z = 0; z < k.z; ++z)
                for (int y = 0; y < k.y; ++y)
                    for (int x = 0; x < k.x; ++x, out += V)
                        for (int lane = 0; lane < V; ++lane)
                            out[lane] = lane < lanes ? in.at(group * outputs_.maps + bundle * V + lane, i, z, y)[x * in.x] : 0.0f;
    }

    void add_kernel_gradient(int group, int bundle) {
        const int V = plan_.bundle, lanes = std::min(V, outputs_.maps - bundle * V);
        const std::size_t each = inputs_.maps * problem_.kernel.volume();
        const float* in = buffers_.kernel_gradient + bundle * each * V;
        float* out = backward_.kernel_gradient + (std::size_t(group) * outputs_.maps + bundle * V) * each;
        for (int lane = 0; lane < lanes; ++lane)
            for (std::size_t i = 0; i < each; ++i)
                out[lane * each + i] = (first_ ? 0.0f : out[lane * each + i]) + in[i * V + lane];
    }

    void load_bias(int group) {
        std::fill_n(space_.bias, std::size_t(outputs_.bundles) * plan_.bundle, 0.0f);
        if (forward_.bias) std::copy_n(forward_.bias + group * outputs_.maps, outputs_.maps, space_.bias);
    }

    void add_bias_gradient() {
        if (!backward_.bias_gradient) return;
        const int V = plan_.bundle;
        float* out = backward_.bias_gradient + backward_graph_.group * outputs_.maps;
        for (int map = 0; map < outputs_.maps; ++map) {
            double sum = first_ ? 0.0 : double(out[map]);
            for (int part = 0; part < outputs_.pieces_per_bundle; ++part)
                sum += sums_[(std::size_t(map / V) * outputs_.pieces_per_bundle + part) * V + map % V];
            out[map] = float(sum);
        }
    }

    const tiled::LayerPlan plan_;
    const bool keep_;
    const Bundled inputs_, input_gradients_, outputs_;  // of one group, padding included; a single input map may be packed
    std::size_t work_floats_[tiled::kBuffers];
    ImageGraph forward_graph_, backward_graph_;

    // The call in hand.
    tiled::Buffers buffers_;
    Space space_;
    Forward forward_;
    Backward backward_;
    std::vector<double> sums_;
    bool first_ = false;                    // image of a group
    bool to_input_ = false, to_kernels_ = false, again_ = false, kernels_for_input_ = false;
    static constexpr bool always_ = true;
};

// ---------------------------------------------------------------- single maps

// Copies the map (n, map) into an image of extent `size` that begins `offset` voxels before it (after it where negative);
// what the map does not cover is zero.
void place(const View& in, int n, int map, Extent extent, Extent offset, Extent size, float* out) {
    std::fill_n(out, size.volume(), 0.0f);
    const int x0 = std::max(0, -offset.x), x1 = std::min(extent.x, size.x - offset.x);
    for (int z = std::max(0, -offset.z); z < std::min(extent.z, size.z - offset.z); ++z)
        for (int y = std::max(0, -offset.y); y < std::min(extent.y, size.y - offset.y); ++y) {
            const float* from = in.at(n, map, z, y);
            float* to = out + (std::size_t(z + offset.z) * size.y + y + offset.y) * size.x + offset.x;
            for (int x = x0; x < x1; ++x) to[x] = from[x * in.x];
        }
}

class MapsLayer final : public Layer {
public:
    MapsLayer(Team& team, const LayerProblem& problem)
        : Layer(team, problem), padded_(problem.padded()), out_(problem.output()),
          reach_(padded_ - out_), image_(whole_lines(padded_.volume())), kernel_(whole_lines(problem.kernel.volume())) {}

    std::size_t kept_floats() const override { return 0; }
    std::size_t space_floats() const override { return 0; }

    void forward(const Forward& call) override {
        check_packed(call.output, out_, "output");
        Team::Turn turn(team_);
        Stage stage({}, call.batch * problem_.groups,
                    [&](int piece, Worker& worker) { forward_piece(call, piece / problem_.groups, piece % problem_.groups, worker); });
        run({&stage}, turn);
    }

    void backward(const Backward& call) override {
        check_packed(call.input_gradient, problem_.input, "input gradient");
        Team::Turn turn(team_);
        Stage images({}, call.input_gradient.data ? call.batch * problem_.groups : 0, [&](int piece, Worker& worker) {
            input_piece(call, piece / problem_.groups, piece % problem_.groups, worker);
        });
        Stage kernels({}, call.kernel_gradient || call.bias_gradient ? problem_.groups : 0,
                      [&](int group, Worker& worker) { kernel_piece(call, group, worker); });
        run({&images, &kernels}, turn);
    }

private:
    void run(std::initializer_list<Stage*> stages, Team::Turn& turn) {
        std::atomic<int> left{int(stages.size())};
        Executor& executor = turn.executor();
        for (Stage* stage : stages) {
            stage->await(1);
            stage->when_done([&](Worker*) {
                left.fetch_sub(1, std::memory_order_acq_rel);
                executor.wake();
            });
            stage->set_executor(&executor);
        }
        for (Stage* stage : stages) stage->arrive(nullptr);
        turn.wait([&] { return left.load(std::memory_order_acquire) == 0; });
        executor.drain();  // the stages must outlive their last piece
    }

    static void check_packed(const View& view, Extent e, const char* what) {
        const bool packed = (e.x == 1 || view.x == 1) && (e.y == 1 || view.y == e.x) && (e.z == 1 || view.z == long(e.y) * e.x);
        if (view.data && !packed)
            throw std::invalid_argument(std::string("convolution layer: single maps need a contiguous ") + what);
    }

    const float* kernel_of(const View& kernels, int out, int in, bool flipped, float* memory) const {
        const Extent k = problem_.kernel;
        place(kernels, out, in, k, {0, 0, 0}, k, memory);
        if (flipped) std::reverse(memory, memory + k.volume());
        return memory;
    }

    void forward_piece(const Forward& call, int n, int group, Worker& worker) const {
        const int in = problem_.group_in(), out = problem_.group_out();
        float* images = worker.scratch.get(image_ * in, 0);
        float* kernel = worker.scratch.get(kernel_, 1);
        for (int i = 0; i < in; ++i)
            place(call.input, n, group * in + i, problem_.input, problem_.before, padded_, images + i * image_);
        for (int o = group * out; o < (group + 1) * out; ++o) {
            float* to = call.output.at(n, o, 0, 0);
            std::fill_n(to, out_.volume(), call.bias ? call.bias[o] : 0.0f);
            for (int i = 0; i < in; ++i)
                kernels::table().correlate(images + i * image_, padded_, kernel_of(call.kernels, o, i, false, kernel),
                                           problem_.kernel, problem_.dilation, to, true);
        }
    }

    // The full correlation of the gradients with the flipped kernels, of which only what is no padding is computed.
    void input_piece(const Backward& call, int n, int group, Worker& worker) const {
        const int in = problem_.group_in(), out = problem_.group_out();
        const Extent size = problem_.input + reach_;
        const std::size_t floats = whole_lines(size.volume());
        float* gradients = worker.scratch.get(floats * out, 0);
        float* kernel = worker.scratch.get(kernel_, 1);
        for (int o = 0; o < out; ++o)
            place(call.output_gradient, n, group * out + o, out_, reach_ - problem_.before, size, gradients + o * floats);
        for (int i = 0; i < in; ++i)
            for (int o = 0; o < out; ++o)
                kernels::table().correlate(gradients + o * floats, size, kernel_of(call.kernels, group * out + o, i, true, kernel),
                                           problem_.kernel, problem_.dilation, call.input_gradient.at(n, group * in + i, 0, 0),
                                           o > 0);
    }

    void kernel_piece(const Backward& call, int group, Worker& worker) const {
        const int in = problem_.group_in(), out = problem_.group_out();
        const std::size_t taps = problem_.kernel.volume();
        float* images = worker.scratch.get(image_ * in, 0);
        float* gradient = worker.scratch.get(whole_lines(out_.volume()), 1);
        std::vector<double> sums(out);
        for (int n = 0; n < call.batch; ++n) {
            for (int i = 0; i < in && call.kernel_gradient; ++i)
                place(call.input, n, group * in + i, problem_.input, problem_.before, padded_, images + i * image_);
            for (int o = 0; o < out; ++o) {
                place(call.output_gradient, n, group * out + o, out_, {0, 0, 0}, out_, gradient);
                for (std::size_t p = 0; p < out_.volume() && call.bias_gradient; ++p) sums[o] += double(gradient[p]);
                for (int i = 0; i < in && call.kernel_gradient; ++i)
                    kernels::table().correlate_gradient(images + i * image_, padded_, gradient, problem_.kernel, problem_.dilation,
                                                        call.kernel_gradient + (std::size_t(group * out + o) * in + i) * taps,
                                                        n > 0);
            }
        }
        for (int o = 0; o < out && call.bias_gradient; ++o) call.bias_gradient[group * out + o] = float(sums[o]);
    }

    const Extent padded_, out_, reach_;
    const std::size_t image_, kernel_;
};

void check(const LayerProblem& p) {
    const auto fail = [](const std::string& text) { throw std::invalid_argument("convolution layer: " + text); };
    if (p.groups < 1 || p.in_maps < 1 || p.out_maps < 1 || p.in_maps % p.groups || p.out_maps % p.groups)
        fail("groups must divide the maps, got " + std::to_string(p.groups) + " groups, " + std::to_string(p.in_maps) + " and " +
             std::to_string(p.out_maps) + " maps");
    const Extent n = p.input, b = p.before, a = p.after, k = p.kernel, d = p.dilation;
    if (std::min({n.z, n.y, n.x, k.z, k.y, k.x, d.z, d.y, d.x}) < 1 || std::min({b.z, b.y, b.x, a.z, a.y, a.x}) < 0)
        fail("input " + to_string(n) + ", kernel " + to_string(k) + " and dilation " + to_string(d) +
             " must be positive, padding " + to_string(b) + " and " + to_string(a) + " not negative");
    const Extent m = p.output();
    if (std::min({m.z, m.y, m.x}) < 1)
        fail("kernel " + to_string(k) + " with dilation " + to_string(d) + " does not fit the padded input " + to_string(p.padded()));
}

}  // namespace

std::unique_ptr<Layer> Layer::make(Team& team, const LayerProblem& p, Method method, int bundle, Extent tile, bool keep) {
    check(p);
    if (bundle == 1) {
        if (method != Method::direct) throw std::invalid_argument("convolution layer: single maps are for the direct method");
        return std::make_unique<MapsLayer>(team, p);
    }
    const tiled::Problem problem{p.group_in(), p.group_out(), p.padded(), p.kernel, p.dilation};
    tiled::Machine machine;
    machine.workers = team.threads();
    return std::make_unique<BundledLayer>(team, p, plan_layer(problem, method, bundle, tile, machine, keep), keep);
}

}  // namespace znn
