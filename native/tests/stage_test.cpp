// Stages: random graphs of them, round after round, on 1 to 16 threads under every policy; failing pieces; what is more urgent.
// usage: stage_test [rounds [seed]]
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "engine/stage.hpp"
#include "tests/check.hpp"

using namespace znn;
using namespace znn::tests;

namespace {

const std::vector<Policy> policies{Policy::priority, Policy::fifo, Policy::lifo, Policy::stealing};

void work_for(int turns) {
    for (int i = 0; i < turns; ++i) cpu_relax();
}

// A graph whose stages count what their pieces do and look whether their predecessors are over.
class Graph {
public:
    Graph(Policy policy, int threads, Random& random)
        : executor({.threads = threads, .policy = policy, .priorities = 4, .pin = false, .trace = random.coin()}) {
        const int count = random.pick(1, 12);
        for (int i = 0; i < count; ++i) {
            const int pieces = random.pick(0, 3) ? random.pick(0, 40) : random.pick(0, 2), turns = random.pick(0, 100);
            runs.emplace_back(pieces);
            done.push_back(std::make_unique<std::atomic<bool>>(false));
            before.emplace_back();
            stages.push_back(std::make_unique<Stage>(TaskLabel{0, 0, i, 0, 0}, pieces, [this, i, turns](int piece, Worker&) {
                for (int earlier : before[i]) in_order = in_order && *done[earlier];
                ++runs[i][piece];
                work_for(turns);
                if (i == failing) throw std::runtime_error("a piece failed");
            }));
            Stage& stage = *stages.back();
            stage.when_done([this, i](Worker*) {
                for (const auto& piece : runs[i]) complete = complete && (piece == 1 || executor.failed());
                *done[i] = true;
            });
            for (int n = i ? random.pick(0, 2) : 0; n > 0; --n) {
                before[i].push_back(random.pick(0, i - 1));
                stages[before[i].back()]->before(stage);
            }
            stage.set_priority(random.pick(0, 3));
            if (before[i].empty()) stage.await(1);
            stage.set_executor(&executor);
        }
    }

    void round(int fail_in) {
        failing = fail_in;
        for (std::size_t i = 0; i < stages.size(); ++i) {
            *done[i] = false;
            for (auto& piece : runs[i]) piece = 0;
        }
        for (std::size_t i = 0; i < stages.size(); ++i)
            if (before[i].empty()) stages[i]->arrive(nullptr);
        executor.drain();
        for (const auto& stage : done) ended = ended && *stage;
    }

    long pieces() const {
        long count = 0;
        for (const auto& stage : stages) count += stage->pieces();
        return count;
    }

    std::vector<std::vector<std::atomic<int>>> runs;
    std::vector<std::unique_ptr<std::atomic<bool>>> done;
    std::vector<std::vector<int>> before;
    std::vector<std::unique_ptr<Stage>> stages;
    std::atomic<bool> in_order{true}, complete{true};
    bool ended = true;
    std::atomic<int> failing{-1};
    Executor executor;  // last: its workers stop first
};

void test_graph(Policy policy, int threads, int rounds, Random& random) {
    Graph graph(policy, threads, random);
    const std::string what = " (policy " + std::to_string(int(policy)) + ", " + std::to_string(threads) + " threads)";
    for (int round = 0; round < rounds; ++round) graph.round(-1);
    expect(graph.complete, "a piece was not run exactly once" + what);
    expect(graph.in_order, "a piece was run before a stage it waits for was over" + what);
    expect(graph.ended, "a round ended before all stages were over" + what);
    long counted = 0;
    for (const auto& counters : graph.executor.counters()) counted += counters.tasks;
    expect(counted == rounds * graph.pieces(), "the workers counted other pieces than there were" + what);

    const int fail_in = random.pick(0, int(graph.stages.size()) - 1);
    const bool fails = graph.stages[fail_in]->pieces() > 0;
    graph.round(fail_in);
    bool thrown = false;
    try {
        graph.executor.rethrow_failure();
    } catch (const std::runtime_error&) {
        thrown = true;
    }
    expect(thrown == fails && graph.ended, "a failing piece is not reported, or its round does not end" + what);
    graph.round(-1);
    expect(graph.complete && graph.in_order && graph.ended, "stages are not usable after a failure" + what);
}

// One worker with a stage in hand turns to a more urgent one that its pieces make ready, then goes on.
void test_urgent() {
    Executor executor({.threads = 1, .priorities = 2, .pin = false});
    std::vector<int> order;
    Stage urgent({}, 2, [&](int, Worker&) { order.push_back(1); });
    Stage ordinary({}, 4, [&](int piece, Worker& worker) {
        order.push_back(0);
        if (piece == 1) urgent.arrive(&worker);
    });
    urgent.set_priority(1);
    for (Stage* stage : {&urgent, &ordinary}) {
        stage->await(1);
        stage->set_executor(&executor);
    }
    ordinary.arrive(nullptr);
    executor.drain();
    expect(order == std::vector<int>{0, 0, 1, 1, 0, 0}, "a stage in hand does not give way to a more urgent one");
}

// Whoever waits for one stage does not have to stay until another, in which it helps meanwhile, is over.
void test_caller_goes_on() {
    Executor executor({.threads = 2, .policy = Policy::fifo, .pin = false});
    std::atomic<bool> wanted{false}, held{true};
    std::atomic<int> run{0};
    Stage stage({}, 100, [&](int, Worker& worker) {
        if (worker.index == 0) {
            wanted = true;  // what the caller waits for has come
        } else {
            while (held) std::this_thread::yield();
        }
        ++run;
    });
    stage.await(1);
    stage.set_executor(&executor);
    stage.arrive(nullptr);
    executor.wait([&] { return wanted.load(); });
    expect(run < 100, "a caller that need not wait any more stayed for all pieces of a stage");
    held = false;
    executor.drain();
    expect(run == 100, "pieces were left when a caller went on");
}

// The stamps of rounds begin again after 65535.
void test_many_rounds() {
    Executor executor({.threads = 3, .pin = false});
    std::atomic<int> run{0};
    Stage stage({}, 5, [&](int, Worker&) { ++run; });
    stage.await(1);
    stage.set_executor(&executor);
    int complete = 0;
    constexpr int rounds = 70000;
    for (int round = 1; round <= rounds; ++round) {
        stage.arrive(nullptr);
        executor.drain();
        complete += run == 5 * round;
    }
    expect(complete == rounds, "a stage lost or repeated a piece in one of many rounds");
}

}  // namespace

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 300;
    Random random(argc > 2 ? unsigned(std::atol(argv[2])) : 1);
    for (int i = 0; i < 1 + rounds / 10; ++i)
        for (Policy policy : policies)
            for (int threads : {1, 2, 3, 8, 16}) test_graph(policy, threads, random.pick(1, 20), random);
    test_urgent();
    test_caller_goes_on();
    test_many_rounds();
    return report();
}
