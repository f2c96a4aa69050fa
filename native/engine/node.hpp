// Nodes: one image each, with what converges on it and what leaves it, in both directions.
#pragma once
#include <atomic>
#include <deque>
#include <memory>
#include <vector>

#include "engine/base.hpp"
#include "engine/description.hpp"
#include "engine/domain.hpp"
#include "tasks/concurrent_sum.hpp"
#include "tasks/executor.hpp"

namespace znn {

enum class Phase : std::int16_t { forward, backward, update, loss, input };
// Kinds of trace events beyond the kinds of edges (EdgeKind 0..5).
enum class WorkKind : std::int16_t { node = 6, transform = 7, loss = 8, input = 9 };

// State shared by everything in one network.
struct Context {
    explicit Context(const NetworkOptions& options) : options(options), pool(options.allocator), counts(options.threads) {}

    NetworkOptions options;
    Pool pool;
    bool training = false;      // phase of the forward pass in hand
    UpdateStep step;            // of the round in hand; each update takes a copy when it becomes ready
    std::uint64_t round = 0;
    std::atomic<int> forward_left{0}, backward_left{0};  // nodes still to finish before the caller may return
    // The losses of a training step, started when the last output is there: no edge's backward comes before another's
    // forward, so an update that is FORCEd always belongs to the round before.
    std::vector<Task*> after_forward;
    std::atomic<std::int64_t> forward_path_ns{0}, backward_path_ns{0};

    struct alignas(64) Counts : TransformCounts {};
    std::vector<Counts> counts;  // one per worker

    // Last: its workers stop before anything they use is destroyed.
    std::unique_ptr<Executor> executor;
};

class ConvEdge;
class Node;
struct NodeGroup;

// A node's image (or gradient) in one domain, as the edges of some groups want it.
struct Encoding {
    Buffer value;
    std::atomic<int> uses_left{0};   // edges that still need `value` in this pass
    std::vector<ConvEdge*> updates;  // edges whose update takes it

    // Computing it once more for the updates, where it is not kept (memoization off) or nobody but the updates wants it.
    class AgainTask final : public Task {
    public:
        void run(Worker& worker) override;
        Context* context = nullptr;
        Encoding* encoding = nullptr;
        const Codec* codec = nullptr;
        bool of_gradient = false;
        Buffer source;
    } again;
    std::atomic<bool> again_started{false};
};

// What the groups around a node group want in one direction; the same for all its nodes.
struct SideLayout {
    struct Port {  // converging results that are summed in one domain
        Domain domain;
        Codec codec;
        int contributions = 0;
    };
    struct Form {  // a domain in which leaving edges want the image
        Domain domain;
        Codec codec;
        int uses = 0;
        bool for_updates = false;
    };
    std::deque<Port> ports;
    std::deque<Form> forms;

    // Find or add. `contributions` more results will converge; returns the port and the index of the first of them.
    struct PortIndex {
        int port, first;
    };
    PortIndex port(const Domain& domain, Extent n, int patches, int contributions);
    int form(const Domain& domain, Extent n, int patches);
};

struct Side {
    std::vector<std::unique_ptr<ConcurrentSum>> sums;  // one per port
    ConcurrentSum merged;                              // of the ports, where there are several
    std::vector<std::unique_ptr<Encoding>> encodings;  // one per form
    std::vector<Task*> followers;                      // edge tasks that become ready when the image is complete
    std::atomic<std::int64_t> path_ns{0};
    Buffer value;

    void clear();
};

// A layer of feature maps.
struct NodeGroup {
    NodeGroupDescription description;
    int index = 0;
    bool has_backward = false;  // gradients of its nodes are wanted
    bool keep_image = false;    // the image is needed after forward (derivative of the transfer function, transforms again)
    SideLayout forward, backward;
    int loss_port = -1, loss_index = 0;  // output groups: where the loss gradient joins the backward sum
    std::vector<std::unique_ptr<Node>> nodes;
    AlignedFloats bias, bias_momentum, bias_second_moment;

    std::size_t floats(const Context& context) const { return description.extent.volume() * context.options.patches; }
};

// One feature map: the paper's node.
class Node {
public:
    Node(Context& context, NodeGroup& group, int map);

    // An edge hands in its result; the last one to arrive finishes the node and readies what leaves it.
    void contribute_forward(int port, Buffer result, int index, Worker& worker);
    void contribute_backward(int port, Buffer result, int index, Worker& worker);
    // The image is there (input nodes: set by the caller).
    void complete_forward(Buffer image, Worker& worker);

    // A partial sum of a port to add to, or a new buffer (then `fresh`).
    Buffer sum_buffer(Side& side, const SideLayout& layout, int port, bool& fresh, Worker& worker);

    Context& context;
    NodeGroup& group;
    const int map;
    Side forward, backward;
    std::vector<ConvEdge*> updates_without_backward;  // incoming edges whose update waits only for this node's gradient

private:
    // Sums up one port; true with the whole image when the last port is complete.
    bool collect(Side& side, const SideLayout& layout, int port, Buffer result, int index, bool gradient, Worker& worker,
                 Buffer& image);
    void complete_backward(Buffer gradient, Worker& worker);
    void update_bias(double gradient);
};

void raise_to(std::atomic<std::int64_t>& value, std::int64_t candidate);

// An edge is done with an encoding in this pass; with `drop` the last one frees it.
void release_use(Encoding& encoding, bool drop);

}  // namespace znn
