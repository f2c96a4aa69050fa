// Speed of the kernels by hand, per instruction set: GFLOP/s of the arithmetic kernels (and their part of the measured
// multiply-add peak), GB/s of the streaming ones. The fastest of several runs is printed.
// usage: kernels_bench [name part] [isa]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/kernels.hpp"

using namespace znn;
using namespace znn::kernels;

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Fastest time of one call, over about `budget` seconds.
template <class F>
double fastest(const F& call, double budget = 0.03) {
    call();
    const double begin = now();
    call();
    const int inner = std::max(1, int(2e-4 / std::max(now() - begin, 1e-9)));
    double best = 1e30;
    const double start = now();
    while (now() - start < budget) {
        const double t = now();
        for (int i = 0; i < inner; ++i) call();
        best = std::min(best, (now() - t) / inner);
    }
    return best;
}

#if defined(__x86_64__)
typedef float v8 __attribute__((vector_size(32)));
#define ZNN_CHAIN(a) a = a * b + c
__attribute__((target("avx2,fma"), noinline)) float multiply_adds(long n, float x) {
    asm volatile("" : "+x"(x));  // unknown at every call, so that none is left out
    const v8 b = x - v8{}, c = b * 0.5f;
    v8 p = c + 1, q = c + 2, r = c + 3, s = c + 4, t = c + 5, u = c + 6, v = c + 7, w = c + 8, y = c + 9, z = c + 10;
    for (long i = 0; i < n; ++i) {
        ZNN_CHAIN(p), ZNN_CHAIN(q), ZNN_CHAIN(r), ZNN_CHAIN(s), ZNN_CHAIN(t);
        ZNN_CHAIN(u), ZNN_CHAIN(v), ZNN_CHAIN(w), ZNN_CHAIN(y), ZNN_CHAIN(z);
    }
    p += q + r + s + t + u + v + w + y + z;
    return p[0];
}
#endif

// GFLOP/s of 8-wide multiply-adds in registers.
double peak() {
#if defined(__x86_64__)
    volatile float sink = 0;
    const double t = fastest([&] { sink = multiply_adds(100000, 0.5f); }, 0.3);
    return 100000.0 * 10 * 16 / t * 1e-9;
#else
    return 0;
#endif
}

const char* only = "";
double peak_gflops = 0;

bool wanted(const std::string& name) { return name.find(only) != std::string::npos; }

void report_flop(const std::string& name, double flop, double seconds) {
    std::printf("  %-52s %8.2f us %7.1f GFLOP/s %5.0f %%\n", name.c_str(), seconds * 1e6, flop / seconds * 1e-9,
                100 * flop / seconds * 1e-9 / peak_gflops);
}

void report_bytes(const std::string& name, double bytes, double voxels, double seconds) {
    std::printf("  %-52s %8.2f us %7.1f GB/s   %6.2f ns/value\n", name.c_str(), seconds * 1e6, bytes / seconds * 1e-9,
                seconds / voxels * 1e9);
}

std::vector<float> values(std::size_t n, float scale = 1) {
    std::vector<float> v(n);
    unsigned state = 12345;
    for (float& x : v) state = state * 1664525u + 1013904223u, x = scale * (float(state >> 8) / 8388608.0f - 1);
    return v;
}

void bench_convolution(const Table& t) {
    struct Case { Extent m, k; int s; };
    std::vector<Case> cases;
    for (const int k : {3, 5, 7})
        for (const int n : {20, 32, 50, 100}) cases.push_back({{n - k + 1, n - k + 1, n - k + 1}, {k, k, k}, 1});
    cases.push_back({{24, 24, 24}, {3, 3, 3}, 2});
    cases.push_back({{12, 12, 12}, {5, 5, 5}, 4});
    for (const int m : {1, 2, 4, 6, 8}) cases.push_back({{m, m, m}, {3, 3, 3}, 1});
    for (const int m : {1, 2, 4, 6, 8}) cases.push_back({{m, m, m}, {7, 7, 7}, 1});
    for (const int k : {11, 20, 40})
        for (const int m : {1, 8, 60}) cases.push_back({{1, m, m}, {1, k, k}, 1});
    for (const Case& c : cases) {
        const Extent s{c.m.z == 1 && c.k.z == 1 ? 1 : c.s, c.s, c.s};
        const Extent n{c.m.z + s.z * (c.k.z - 1), c.m.y + s.y * (c.k.y - 1), c.m.x + s.x * (c.k.x - 1)};
        auto in = values(n.volume()), w = values(c.k.volume()), out = values(c.m.volume());
        const double flop = 2.0 * double(c.k.volume()) * double(c.m.volume());
        const std::string shape = " k " + to_string(c.k) + " m " + to_string(c.m) + " s " + std::to_string(c.s);
        if (wanted("correlate"))
            report_flop("correlate" + shape, flop,
                        fastest([&] { t.correlate(in.data(), n, w.data(), c.k, s, out.data(), false); }));
        if (wanted("gradient"))
            report_flop("gradient " + shape, flop,
                        fastest([&] { t.correlate_gradient(in.data(), n, out.data(), c.k, s, w.data(), false); }));
    }
}

void bench_spectral(const Table& t) {
    for (const std::size_t blocks : {1, 8})
        for (const std::size_t count : {4000, 16000, 100000, 1000000}) {
            auto a = values(2 * blocks * count, 1e-3f), w = values(2 * count, 1e-3f), acc = values(2 * blocks * count);
            const std::string shape = " " + std::to_string(blocks) + " x " + std::to_string(count);
            const double n = double(blocks * count), read = 8 * double(count);
            if (wanted("spectral_multiply"))
                report_bytes("spectral_multiply_conj, accumulating" + shape, 24 * n + read, n, fastest([&] {
                                 t.spectral_multiply_conj(a.data(), w.data(), acc.data(), blocks, count, true);
                             }));
            if (wanted("spectral_correlate"))
                report_bytes("spectral_correlate" + shape, 16 * n + read, n, fastest([&] {
                                 t.spectral_correlate(a.data(), acc.data(), w.data(), blocks, count);
                             }));
        }
}

void bench_pointwise(const Table& t) {
    for (const std::size_t n : {10000, 1000000}) {
        auto x = values(n), y = values(n), z = values(n), bias = values(16, 1e-9f);
        double sums[16];
        const double count = double(n);
        const std::string shape = " " + std::to_string(n);
        if (wanted("add")) report_bytes("add" + shape, 12 * count, count, fastest([&] { t.add(x.data(), y.data(), n); }));
        if (wanted("sgd"))
            report_bytes("sgd" + shape, 20 * count, count,
                         fastest([&] { t.update(x.data(), y.data(), nullptr, z.data(), n, {1e-9f, 0.5f, 0.0f, 0.5f}); }));
        const char* names[] = {"linear", "relu", "tanh", "logistic"};
        for (int f = 0; f < 4; ++f)
            for (const int bundle : {1, 8, 16}) {
                const std::string what = std::string(names[f]) + " bundle " + std::to_string(bundle) + shape;
                if (wanted("transfer_forward"))
                    report_bytes("transfer_forward " + what, 8 * count, count,
                                 fastest([&] { t.transfer_forward(x.data(), n, bias.data(), bundle, Transfer(f)); }));
                if (wanted("transfer_backward"))
                    report_bytes("transfer_backward " + what, 12 * count, count,
                                 fastest([&] { t.transfer_backward(z.data(), y.data(), n, bundle, Transfer(f), sums); }));
            }
        auto p = values(n), q = values(n);
        const float* ys[] = {x.data(), y.data()};
        const float* targets[] = {p.data(), q.data()};
        float* gradients[] = {z.data(), bias.data()};
        std::vector<float> other(n);
        gradients[1] = other.data();
        if (wanted("loss")) {
            report_bytes("loss_squared" + shape, 12 * count, count,
                         fastest([&] { t.loss_squared(x.data(), y.data(), nullptr, z.data(), n); }));
            report_bytes("loss_binomial" + shape, 12 * count, count,
                         fastest([&] { t.loss_binomial(x.data(), y.data(), nullptr, z.data(), n); }));
            report_bytes("loss_softmax 2 maps" + shape, 24 * count, count,
                         fastest([&] { t.loss_softmax(ys, targets, nullptr, gradients, 2, n); }));
        }
    }
}

void bench_max(const Table& t) {
    for (const int bundle : {1, 8})
        for (const int w : {2, 3, 5, 8}) {
            const int side = bundle == 1 ? 64 : 32;
            const Extent n{side, side, side}, window{w, w, w}, one{1, 1, 1};
            auto in = values(n.volume() * bundle), out = in;
            std::vector<std::int32_t> index(in.size());
            std::vector<char> scratch(max_filter_scratch_bytes(n, window, one, bundle));
            const double count = double(in.size());
            const std::string shape = " w " + std::to_string(w) + " n " + to_string(n) + " bundle " + std::to_string(bundle);
            if (wanted("max_filter"))
                report_bytes("max_filter" + shape, 12 * count, count, fastest([&] {
                                 t.max_filter(in.data(), n, window, one, bundle, out.data(), index.data(), scratch.data());
                             }));
            if (wanted("max_pool"))
                report_bytes("max_pool" + shape, 4 * count, count, fastest([&] {
                                 t.max_pool(in.data(), n, window, window, bundle, out.data(), index.data());
                             }));
        }
}

// Cost of the sliding maximum along one axis after the other, from narrow windows to wide ones.
void bench_max_windows(const Table& t) {
    if (!wanted("max_filter")) return;
    const Extent m{32, 64, 64};
    for (const char* axis : {"z", "y", "x", "cube"})
        for (const int w : {2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64}) {
            const bool all = *axis == 'c';
            const Extent window{all || *axis == 'z' ? w : 1, all || *axis == 'y' ? w : 1, all || *axis == 'x' ? w : 1};
            const Extent n = m + window - Extent{1, 1, 1}, one{1, 1, 1};
            auto in = values(n.volume()), out = values(m.volume());
            std::vector<std::int32_t> index(out.size());
            std::vector<char> scratch(max_filter_scratch_bytes(n, window, one, 1));
            report_bytes(std::string("max_filter along ") + axis + " w " + std::to_string(w), 12 * double(in.size()),
                         double(in.size()), fastest([&] {
                             t.max_filter(in.data(), n, window, one, 1, out.data(), index.data(), scratch.data());
                         }));
        }
}

void bench_boxes(const Table& t) {
    const Extent n{64, 64, 64}, inner{60, 60, 60}, at{2, 2, 2}, two{2, 2, 2}, half{32, 32, 32};
    auto a = values(n.volume()), b = values(n.volume());
    const double count = double(n.volume());
    if (wanted("embed")) report_bytes("embed", 8 * count, count, fastest([&] { t.embed(a.data(), inner, b.data(), n, at, 1); }));
    if (wanted("extract"))
        report_bytes("extract", 8 * count, count, fastest([&] { t.extract(a.data(), n, b.data(), inner, at, 1, false); }));
    if (wanted("split_sublattices"))
        report_bytes("split_sublattices s 2", 8 * count, count,
                     fastest([&] { t.split_sublattices(a.data(), n, two, b.data(), half, half.x, half.volume()); }));
    if (wanted("merge_sublattices"))
        report_bytes("merge_sublattices s 2", 8 * count, count, fastest([&] {
                         t.merge_sublattices(b.data(), half, half.x, half.volume(), two, a.data(), n, 1.0f, false);
                     }));
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 1) only = argv[1];
    peak_gflops = peak();
    std::printf("multiply-add peak, 8 wide: %.1f GFLOP/s\n", peak_gflops);
    for (const char* isa : {"baseline", "avx2", "avx512"}) {
        const Table* t = table_for(isa);
        if (t == nullptr || (argc > 2 && std::string(argv[2]) != isa)) continue;
        std::printf("%s\n", isa);
        bench_convolution(*t);
        bench_spectral(*t);
        bench_pointwise(*t);
        bench_max(*t);
        bench_max_windows(*t);
        bench_boxes(*t);
    }
}
