// The bundled engine: nodes hold bundles of maps (map index innermost), a layer's work is cut into pieces (native/tiled),
// and the task graph has a stage per layer and phase. The same graph, priorities, overlapping updates and executor as the
// paper's engine; every piece owns what it writes, so there are no sums to guard and results do not depend on the threads.
#pragma once
#include <algorithm>
#include <memory>
#include <vector>

#include "engine/base.hpp"
#include "engine/stage.hpp"
#include "tiled/tiled.hpp"

namespace znn {

class BundledNetwork final : public NetworkBase {
public:
    BundledNetwork(std::vector<NodeGroupDescription> nodes, std::vector<EdgeGroupDescription> edges,
                   const NetworkOptions& options);
    ~BundledNetwork() override;

    void forward(const std::vector<const float*>& inputs, bool training) override;
    void backward(const std::vector<const float*>& gradients) override;
    double train_step(const std::vector<const float*>& inputs, const std::vector<const float*>& targets,
                      const std::vector<const float*>& weights) override;
    bool checks_inputs() const override { return true; }
    void copy_output(int node_group, float* out) const override;
    void copy_input_gradient(int node_group, float* out) const override;
    void get_kernels(int edge_group, Which which, float* out) override;
    void set_kernels(int edge_group, Which which, const float* in) override;
    void get_biases(int node_group, Which which, float* out) override;
    void set_biases(int node_group, Which which, const float* in) override;
    void sync() override;
    std::uint64_t round() const override { return round_; }
    void set_round(std::uint64_t round) override;
    Executor& executor() override { return *executor_; }
    std::size_t kernel_spectra_bytes() const override;
    std::size_t task_count() const override;
    Path critical_path() const override { return {forward_path_ns_.load(), backward_path_ns_.load()}; }

private:
    // A layer of maps.
    struct Nodes {
        NodeGroupDescription d;
        int index = 0, bundles = 0, chunks = 1;  // chunks: parts into which pointwise work on one bundle is cut
        int lanes = 0;                           // of the image: V, or 1 where a single map is packed
        bool has_backward = false;
        bool derivative_noted = false;           // a ReLU's, and its biases', by the filtering convolution before it: see tiled::Buffers
        std::size_t volume = 0, stride = 0, chunk = 0;  // voxels; floats of one bundle and of each part but the last
        AlignedFloats image, gradient;           // [patch][bundle][z][y][x][V]
        AlignedFloats bias, bias_momentum, bias_second_moment;  // [bundle][V]
        std::vector<double> bias_sums;           // [part][V], parts in any order of bundles
        Gate bias_ready;                         // the update of the biases is over
        UpdateStep step;
        AlignedFloats& state(Which which) {
            return which == Which::value ? bias : which == Which::momentum ? bias_momentum : bias_second_moment;
        }
        Stage* ready = nullptr;                  // the image is complete
        Stage* gradient_ready = nullptr;
        std::vector<Stage*> writers;             // forward stages that write the image

        // Into parts of about so many floats, several of them into fours: else the last of a few leaves workers waiting.
        void cut(std::size_t floats) {
            const std::size_t parts = (stride + floats - 1) / floats, fours = parts > 1 ? (parts + 3) / 4 * 4 : parts;
            chunk = fours > 1 ? (stride / fours + 64) / 64 * 64 : floats;
            chunks = int((stride + chunk - 1) / chunk);
        }
        bool absorbed() const { return volume == 0; }  // its maxima are taken where the convolution before it writes
    };

    // A layer of convolutions.
    struct Conv {
        int edge = 0;
        tiled::LayerPlan plan;
        std::vector<std::int8_t> largest;                 // where the plan pools: see tiled::Buffers
        AlignedFloats kernels, momentum, second_moment, gradient;  // gradient: one per patch, where there are several
        std::vector<tiled::Buffers> buffers, inference;   // one per patch; for inference, where no update follows, the same
        Gate kernels_ready;                               // transformed kernels are those of the newest parameters
        Gate operands_free;                               // the update has read images and gradients
        Stage *prepare_forward = nullptr, *prepare_backward = nullptr;
        bool stale_forward = true, stale_backward = true;  // transformed kernels, after the parameters were set
        std::vector<Stage*> gradient_transforms;          // what the update waits for, slab by slab
        Stage *sums_begin = nullptr, *sums_end = nullptr;  // the first and last stage of the update that use update_spectra
        bool shares_sums = false;                         // with the other layers where they are large, in turns
        bool has_backward = false;
        // Whether the update finds all spectra of images; else it makes them once more, slab by slab.
        bool keeps() const { return plan.kept_slabs == plan.slabs; }

        void set_stale() { stale_forward = stale_backward = true; }
        AlignedFloats& state(Which which) {
            return which == Which::value ? kernels : which == Which::momentum ? momentum : second_moment;
        }
    };

    // A layer of other edges.
    struct Simple {
        AlignedFloats state;  // indices of maxima (bytes where windows are small), or the mask of dropout
        bool derivative_at_maxima = false;  // see takes_derivative_at_maxima
    };

    enum class Pass { forward, backward, update, prepare };
    static constexpr int passes = 4;

    // ---- construction
    void build_nodes();
    bool packs(int node) const;
    void build_forward();
    void build_backward();
    void build_update();
    void plan_conv(int edge);
    int pool_to_absorb(int edge) const;
    void absorb(int pool);
    void build_conv(int edge);
    void share_buffers();
    void set_priorities();
    Stage* add(Pass pass, TaskLabel label, int pieces, Stage::Body body);
    Stage* add_conv(Pass pass, int edge, tiled::Phase phase, int slab);
    Stage* join(Pass pass, TaskLabel label);
    void gate(Stage* stage, Gate& gate);
    Stage* load_stage(Nodes& nodes, int input);
    struct Slab {
        Stage *transform, *product, *inverse;
    };
    // What a layer's slabs stand between: their operand, the layer before in the shared buffer (or null), the stage before
    // that writes the same image (or null), and what waits for them.
    struct Around {
        Stage *ready, *turn, *previous, *end;
    };
    std::vector<Slab> add_slabs(Pass pass, int edge, const Around& around);
    Stage* conv_forward(int edge, bool accumulate, bool last, Stage* previous);
    Stage* simple_forward(int edge, bool accumulate, Stage* previous);
    Stage* transfer_forward(Nodes& nodes, Stage* previous);
    Stage* loss_stage(int output);
    Stage* conv_backward(int edge, bool accumulate, bool last, Stage* previous);
    Stage* simple_backward(int edge, bool accumulate, Stage* previous);
    Stage* transfer_backward(Nodes& nodes, Pass pass, kernels::Transfer f, Stage* previous);
    bool takes_derivative_at_maxima(int edge) const;
    void update_conv(int edge);
    Stage* update_products(Conv& conv);
    void sum_biases(Conv& conv, Stage* product);
    void take_turns_in_sums();
    TaskLabel label(Pass pass, int kind, int group) const;

    // ---- pieces
    struct Cut {
        int image;                         // patch * bundles + bundle
        Extent in, out;                    // of the part
        std::size_t in_first, out_first;   // floats from the beginning of all images
        int first_voxel;                   // of the part in the input image
    };
    struct PartOf {
        int image, part, parts;
        int sum() const { return image * parts + part; }  // place in the source's bias_sums
    };
    PartOf part_of(int edge, int piece, bool forward) const;
    Cut cut_of(int edge, int piece, bool forward) const;
    void load(const Nodes& nodes, const float* data, int piece);
    void throw_if_refused() const;  // NotFinite
    void run_loss(int output, int piece, Worker& worker);
    void simple_forward_piece(int edge, int piece, bool accumulate, Worker& worker);
    void simple_backward_piece(int edge, int piece, bool accumulate, Worker& worker);
    void small_filter_forward_piece(int edge, int piece, bool accumulate, Worker& worker);
    void small_filter_backward_piece(int edge, int piece, bool accumulate, Worker& worker);
    void update_biases(Nodes& nodes, int parts);
    bool filters_small_windows(int edge) const;
    bool notes_positive_maxima(int edge) const;
    int parts(int edge, bool forward) const;  // of one bundle in simple edges

    // ---- rounds
    void start_forward(const std::vector<const float*>& inputs, bool training);
    void start_losses(Worker* worker);
    void begin_backward();
    void prepare_kernels(bool training);
    void wait_for(const std::atomic<bool>& flag);
    void unbundle(const AlignedFloats& images, const Nodes& nodes, float* out) const;
    template <class Each>
    void each_kernel(int edge, Each each) const;

    // Floats of a piece of pointwise work on `floats`: up to 20 us, but a 128th of it from 2 us on.
    static std::size_t chunk_floats(std::size_t floats) {
        return std::clamp((floats / 128 + 63) / 64 * 64, std::size_t{1} << 13, std::size_t{1} << 16);
    }
    const int V_;
    Arena arena_;  // of all arrays and buffers
    // The descriptions, in which a convolution may have absorbed the max-pooling or -filtering that follows it.
    std::vector<NodeGroupDescription> groups_;
    std::vector<EdgeGroupDescription> edges_;
    std::vector<std::unique_ptr<Nodes>> nodes_;
    std::vector<std::unique_ptr<Conv>> convs_;      // per edge group, or null
    std::vector<std::unique_ptr<Simple>> simples_;  // per edge group, or null
    std::vector<int> inputs_, outputs_;

    std::vector<std::unique_ptr<Stage>> stages_[passes];
    std::vector<std::pair<Stage*, Gate*>> gated_;   // forward stages that wait for the last round's updates
    std::vector<Stage*> first_stages_;              // of the forward pass: loading the inputs
    Stage *forward_end_ = nullptr, *losses_ = nullptr, *backward_end_ = nullptr, *update_end_ = nullptr;
    Stage *forward_turn_ = nullptr, *backward_turn_ = nullptr;  // while building: the layer before
    Gate updates_over_;

    // The round in hand.
    std::vector<const float*> input_data_, target_data_, weight_data_;
    bool given_ = false, training_ = false, with_loss_ = false, trained_forward_ = false;
    std::vector<double> losses_sum_;
    std::uint64_t round_ = 0;
    UpdateStep step_;
    std::atomic<bool> refused_{false};  // an input is not finite: the pieces of the forward pass are only counted down
    std::atomic<bool> forward_done_{false}, backward_done_{false};
    std::atomic<std::int64_t> forward_path_ns_{0}, backward_path_ns_{0};

    std::unique_ptr<Executor> executor_;  // last: its workers stop first
};

}  // namespace znn
