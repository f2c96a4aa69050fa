// Every function of every kernel table this machine runs, against naive loops in double, over random shapes.
// Arrays end at an inaccessible page, and their beginnings are watched, so that stray reads and writes are found.
// usage: kernels_test [rounds [seed]]
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <complex>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kernels/kernels.hpp"
#include "kernels/short_transform.hpp"

using namespace znn;
using namespace znn::kernels;

namespace {

long passed = 0, failed = 0;
std::mt19937 engine;

int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine); }
bool coin() { return pick(0, 1) == 1; }
float normal() { return std::normal_distribution<float>()(engine); }

void expect(bool ok, const std::string& what) {
    if (ok) {
        ++passed;
    } else if (++failed <= 50) {
        std::printf("FAILED %s\n", what.c_str());
    }
}

// An array of T that ends where an inaccessible page begins; the bytes before it must keep their value.
template <class T>
class Guarded {
public:
    explicit Guarded(std::size_t count) : count_(count) {
        const std::size_t page = std::size_t(sysconf(_SC_PAGESIZE));
        inside_ = (count * sizeof(T) + 64 + page - 1) / page * page;
        mapped_ = inside_ + page;
        base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (base_ == MAP_FAILED || mprotect(base_ + inside_, page, PROT_NONE) != 0) std::abort();
        data_ = reinterpret_cast<T*>(base_ + inside_ - count * sizeof(T));
        std::memset(base_, 0x5a, inside_ - count * sizeof(T));
    }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;
    ~Guarded() {
        bool whole = true;
        for (const char* p = base_; p < reinterpret_cast<char*>(data_); ++p) whole &= *p == 0x5a;
        if (!whole) expect(false, "memory before an array was written");
        munmap(base_, mapped_);
    }
    T* data() { return data_; }
    operator T*() { return data_; }
    std::size_t size() const { return count_; }
    void fill(T value) {
        for (std::size_t i = 0; i < count_; ++i) data_[i] = value;
    }
    void randomise() {
        for (std::size_t i = 0; i < count_; ++i) data_[i] = T(normal());
    }
    std::vector<T> copy() const { return std::vector<T>(data_, data_ + count_); }

private:
    std::size_t count_, inside_, mapped_;
    char* base_;
    T* data_;
};

using Floats = Guarded<float>;
using Indices = Guarded<std::int32_t>;
using Doubles = std::vector<double>;

std::size_t at(Extent n, int z, int y, int x) { return (std::size_t(z) * n.y + y) * n.x + x; }

template <class F>
void each(Extent n, const F& f) {
    for (int z = 0; z < n.z; ++z)
        for (int y = 0; y < n.y; ++y)
            for (int x = 0; x < n.x; ++x) f(z, y, x);
}

// The largest difference relative to the largest expected value, or to `scale` if that is larger: the size of the terms of
// a sum, which may cancel (NaN must meet NaN).
double relative_error(const float* got, const Doubles& wanted, double scale = 1e-30) {
    double worst = 0, largest = scale;
    for (std::size_t i = 0; i < wanted.size(); ++i) {
        if (std::isnan(wanted[i]) != std::isnan(got[i])) return std::numeric_limits<double>::infinity();
        if (std::isnan(wanted[i])) continue;
        worst = std::max(worst, std::abs(got[i] - wanted[i]));
        largest = std::max(largest, std::abs(wanted[i]));
    }
    return worst / largest;
}

// The largest difference relative to the value itself.
double pointwise_error(const float* got, const Doubles& wanted) {
    double worst = 0;
    for (std::size_t i = 0; i < wanted.size(); ++i) {
        if (std::isnan(wanted[i]) != std::isnan(got[i])) return std::numeric_limits<double>::infinity();
        if (!std::isnan(wanted[i]) && got[i] != wanted[i])
            worst = std::max(worst, std::abs(got[i] - wanted[i]) / std::abs(wanted[i]));
    }
    return worst;
}

void expect_small(double error, double tolerance, const char* function, const Table& t, const std::string& shape) {
    expect(error <= tolerance, std::string(function) + " " + t.isa + " " + shape + ": error " + std::to_string(error * 1e9) +
                                   "e-9, expected at most " + std::to_string(tolerance * 1e9) + "e-9");
}

Extent random_extent(int most) { return {pick(1, most), pick(1, most), pick(1, most)}; }

// Kernels, sparsities and outputs of all the kinds that occur: cubes, planes, lines, wide and narrow ones.
struct Shape {
    Extent n, k, s, m;
};

Shape random_shape() {
    Shape r;
    const int kind = pick(0, 9);
    if (kind == 0) {  // 2D, large kernels
        r.k = {1, pick(1, 24), pick(1, 24)};
        r.m = {1, pick(1, 24), pick(1, 40)};
        r.s = {1, pick(1, 2), pick(1, 2)};
    } else if (kind == 1) {  // long rows
        r.k = random_extent(5);
        r.m = {pick(1, 3), pick(1, 6), pick(20, 150)};
        r.s = random_extent(2);
    } else if (kind == 2) {  // single output voxel
        r.k = random_extent(9);
        r.m = {1, 1, 1};
        r.s = coin() ? Extent{1, 1, 1} : random_extent(4);
    } else {
        r.k = random_extent(kind < 6 ? 4 : 7);
        r.m = random_extent(kind < 8 ? 9 : 20);
        r.s = kind == 9 ? Extent{1, 1, 1} : random_extent(4);
    }
    r.n = {r.m.z + r.s.z * (r.k.z - 1), r.m.y + r.s.y * (r.k.y - 1), r.m.x + r.s.x * (r.k.x - 1)};
    return r;
}

std::string describe(const Shape& r, bool accumulate) {
    return "n " + to_string(r.n) + " k " + to_string(r.k) + " s " + to_string(r.s) + (accumulate ? " accumulate" : "");
}

void test_correlate(const Table& t) {
    const Shape r = random_shape();
    const bool accumulate = coin();
    Floats in(r.n.volume()), w(r.k.volume()), out(r.m.volume());
    in.randomise(), w.randomise(), out.randomise();
    if (!accumulate) out.fill(NAN);
    Doubles wanted(out.size());
    double scale = 0;
    each(r.m, [&](int z, int y, int x) {
        double sum = accumulate ? out[at(r.m, z, y, x)] : 0.0, size = std::abs(sum);
        each(r.k, [&](int a, int b, int c) {
            const double term = double(in[at(r.n, z + r.s.z * a, y + r.s.y * b, x + r.s.x * c)]) * w[at(r.k, a, b, c)];
            sum += term, size += std::abs(term);
        });
        scale = std::max(scale, size);
        wanted[at(r.m, z, y, x)] = sum;
    });
    t.correlate(in, r.n, w, r.k, r.s, out, accumulate);
    expect_small(relative_error(out, wanted, scale), 1e-6, "correlate", t, describe(r, accumulate));
}

void check_gradient(const Table& t, const Shape& r, bool accumulate, bool positive, double tolerance) {
    Floats in(r.n.volume()), g(r.m.volume()), dw(r.k.volume());
    in.randomise(), g.randomise(), dw.randomise();
    if (positive) {
        for (std::size_t i = 0; i < in.size(); ++i) in[i] = std::abs(in[i]);
        for (std::size_t i = 0; i < g.size(); ++i) g[i] = std::abs(g[i]);
    }
    if (!accumulate) dw.fill(NAN);
    Doubles wanted(dw.size());
    double scale = 0;
    each(r.k, [&](int a, int b, int c) {
        double sum = accumulate ? dw[at(r.k, a, b, c)] : 0.0, size = std::abs(sum);
        each(r.m, [&](int z, int y, int x) {
            const double term = double(in[at(r.n, z + r.s.z * a, y + r.s.y * b, x + r.s.x * c)]) * g[at(r.m, z, y, x)];
            sum += term, size += std::abs(term);
        });
        scale = std::max(scale, size);
        wanted[at(r.k, a, b, c)] = sum;
    });
    t.correlate_gradient(in, r.n, g, r.k, r.s, dw, accumulate);
    expect_small(relative_error(dw, wanted, scale), tolerance, "correlate_gradient", t, describe(r, accumulate));
}

void test_gradient(const Table& t) { check_gradient(t, random_shape(), coin(), coin(), 3e-6); }

// Long sums keep their accuracy.
void test_large_gradient(const Table& t) {
    for (const Extent m : {Extent{150, 150, 150}, Extent{1, 700, 900}, Extent{3, 2, 5000}}) {
        const Shape r{{m.z + 1, m.y + 1, m.x + 1}, {2, 2, 2}, {1, 1, 1}, m};
        check_gradient(t, r, false, true, 5e-6);
    }
}

void test_boxes(const Table& t) {
    const int bundle = std::vector<int>{1, 3, 8, 16}[pick(0, 3)];
    const Extent small = random_extent(9), room = random_extent(6), offset{pick(0, room.z - 1), pick(0, room.y - 1), pick(0, room.x - 1)};
    const Extent large{small.z + room.z - 1, small.y + room.y - 1, small.x + room.x - 1};
    const std::string shape = to_string(small) + " in " + to_string(large) + " at " + to_string(offset) + " bundle " + std::to_string(bundle);

    Floats src(small.volume() * bundle), dst(large.volume() * bundle);
    src.randomise(), dst.fill(NAN);
    Doubles wanted(dst.size(), 0.0);
    each(small, [&](int z, int y, int x) {
        for (int b = 0; b < bundle; ++b)
            wanted[at(large, z + offset.z, y + offset.y, x + offset.x) * bundle + b] = src[at(small, z, y, x) * bundle + b];
    });
    t.embed(src, small, dst, large, offset, bundle);
    expect_small(relative_error(dst, wanted), 0, "embed", t, shape);

    const bool accumulate = coin();
    Floats big(large.volume() * bundle), crop(small.volume() * bundle);
    big.randomise(), crop.randomise();
    if (!accumulate) crop.fill(NAN);
    Doubles cropped(crop.size());
    each(small, [&](int z, int y, int x) {
        for (int b = 0; b < bundle; ++b) {
            const std::size_t i = at(small, z, y, x) * bundle + b;
            cropped[i] = big[at(large, z + offset.z, y + offset.y, x + offset.x) * bundle + b] + (accumulate ? double(crop[i]) : 0.0);
        }
    });
    t.extract(big, large, crop, small, offset, bundle, accumulate);
    expect_small(relative_error(crop, cropped, 1), 1e-7, "extract", t, shape);
}

void test_sublattices(const Table& t) {
    const Extent n{pick(1, 12), pick(1, 12), pick(1, 40)}, s = random_extent(5), least = sublattice_extent(n, s);
    const Extent grid{least.z + pick(0, 2), least.y + pick(0, 2), least.x + pick(0, 3)};
    const int row = grid.x + pick(0, 3);
    const std::size_t used = std::size_t(grid.z) * grid.y * row, block = used + std::size_t(pick(0, 5));
    const std::string shape = to_string(n) + " s " + to_string(s) + " t " + to_string(grid) + " row " + std::to_string(row) +
                              " block " + std::to_string(block);
    const std::size_t total = s.volume() * block;
    const auto place = [&](int z, int y, int x) {
        const std::size_t lattice = (std::size_t(z % s.z) * s.y + y % s.y) * s.x + x % s.x;
        return lattice * block + (std::size_t(z / s.z) * grid.y + y / s.y) * row + x / s.x;
    };

    Floats image(n.volume()), split(total);
    image.randomise(), split.fill(7);
    Doubles wanted(total, 0.0);
    for (std::size_t i = 0; i < total; ++i)
        if (i % block >= used || int(i % block % row) >= grid.x) wanted[i] = 7;  // left alone
    each(n, [&](int z, int y, int x) { wanted[place(z, y, x)] = image[at(n, z, y, x)]; });
    t.split_sublattices(image, n, s, split, grid, row, block);
    expect_small(relative_error(split, wanted), 0, "split_sublattices", t, shape);

    const bool accumulate = coin();
    const float factor = normal();
    split.randomise();
    Floats merged(n.volume());
    merged.randomise();
    if (!accumulate) merged.fill(NAN);
    Doubles joined(n.volume());
    each(n, [&](int z, int y, int x) {
        joined[at(n, z, y, x)] = double(factor) * split[place(z, y, x)] + (accumulate ? double(merged[at(n, z, y, x)]) : 0.0);
    });
    t.merge_sublattices(split, grid, row, block, s, merged, n, factor, accumulate);
    expect_small(relative_error(merged, joined, 1), 2e-7, "merge_sublattices", t, shape);
}

void test_spectral(const Table& t) {
    const std::size_t blocks = std::size_t(pick(1, 5)), count = std::size_t(pick(0, 9) ? pick(1, 70) : pick(1000, 3000));
    const std::string shape = std::to_string(blocks) + " x " + std::to_string(count);
    for (const bool conj : {false, true}) {
        const bool accumulate = coin();
        Floats a(2 * blocks * count), w(2 * count), acc(2 * blocks * count);
        a.randomise(), w.randomise(), acc.randomise();
        if (!accumulate) acc.fill(NAN);
        Doubles wanted(acc.size());
        for (std::size_t b = 0; b < blocks; ++b)
            for (std::size_t i = 0; i < count; ++i) {
                const std::size_t p = 2 * (b * count + i);
                const double ar = a[p], ai = a[p + 1], wr = w[2 * i], wi = conj ? -w[2 * i + 1] : w[2 * i + 1];
                wanted[p] = ar * wr - ai * wi + (accumulate ? acc[p] : 0.0);
                wanted[p + 1] = ar * wi + ai * wr + (accumulate ? acc[p + 1] : 0.0);
            }
        (conj ? t.spectral_multiply_conj : t.spectral_multiply)(a, w, acc, blocks, count, accumulate);
        expect_small(relative_error(acc, wanted, 1), 5e-7, conj ? "spectral_multiply_conj" : "spectral_multiply", t, shape);
    }
    Floats a(2 * blocks * count), g(2 * blocks * count), acc(2 * count);
    a.randomise(), g.randomise(), acc.fill(NAN);
    Doubles wanted(acc.size(), 0.0);
    for (std::size_t b = 0; b < blocks; ++b)
        for (std::size_t i = 0; i < count; ++i) {
            const std::size_t p = 2 * (b * count + i);
            wanted[2 * i] += double(a[p]) * g[p] + double(a[p + 1]) * g[p + 1];
            wanted[2 * i + 1] += double(a[p + 1]) * g[p] - double(a[p]) * g[p + 1];
        }
    t.spectral_correlate(a, g, acc, blocks, count);
    expect_small(relative_error(acc, wanted, 1), 5e-7, "spectral_correlate", t, shape);
}

void test_pointwise(const Table& t) {
    const std::size_t n = std::size_t(pick(1, 100));
    const std::string shape = std::to_string(n);
    Floats a(n), b(n), c(n);
    a.randomise(), b.randomise(), c.randomise();
    Doubles sum(n), scaled(n), product(n), w(n), v(n);
    const float factor = normal();
    for (std::size_t i = 0; i < n; ++i) sum[i] = double(a[i]) + b[i];
    t.add(a, b, n);
    expect_small(relative_error(a, sum, 1), 1e-7, "add", t, shape);
    expect(t.all_finite(a, n), std::string("all_finite: finite numbers, ") + t.isa + ", " + shape);
    if (n) {
        using Limits = std::numeric_limits<float>;
        float& one = a[pick(0, int(n) - 1)];
        for (const float odd : {Limits::quiet_NaN(), Limits::infinity(), -Limits::infinity(), Limits::max(), Limits::denorm_min()}) {
            const float kept = std::exchange(one, odd);
            expect(t.all_finite(a, n) == std::isfinite(odd), "all_finite: " + std::to_string(odd) + ", " + t.isa + ", " + shape);
            one = kept;
        }
    }
    for (std::size_t i = 0; i < n; ++i) scaled[i] = double(a[i]) * factor;
    t.scale(a, factor, n);
    expect_small(relative_error(a, scaled), 1e-7, "scale", t, shape);
    for (std::size_t i = 0; i < n; ++i) product[i] = double(a[i]) * b[i];
    t.multiply(a, b, n);
    expect_small(relative_error(a, product), 1e-7, "multiply", t, shape);
    const UpdateStep step{0.1f * normal(), std::abs(0.5f * normal()), 0.01f * normal(), normal()};
    for (std::size_t i = 0; i < n; ++i) {
        v[i] = double(step.momentum) * b[i] + (double(step.scale) * c[i] + double(step.decay) * a[i]);
        w[i] = a[i] - double(step.rate) * v[i];
    }
    t.update(a, b, nullptr, c, n, step);
    expect_small(relative_error(b, v, 1), 5e-7, "sgd momentum", t, shape);
    expect_small(relative_error(a, w, 1), 5e-7, "sgd weights", t, shape);
}

void test_adam(const Table& t) {
    const std::size_t n = std::size_t(pick(1, 100));
    const std::string shape = std::to_string(n);
    Floats weights(n), momenta(n), squares(n), gradient(n);
    weights.randomise(), momenta.randomise(), squares.randomise(), gradient.randomise();
    for (std::size_t i = 0; i < n; ++i) squares[i] = 0.01f + squares[i] * squares[i];
    const UpdateStep given{0.01f, 0.9f, 0.1f, 0.5f, 0.99f, 1e-3f};
    const UpdateStep step = given.adam(3);
    Doubles w(n), m(n), s(n);
    for (std::size_t i = 0; i < n; ++i) {
        const double g = 0.5 * gradient[i] + double(0.1f) * weights[i];
        m[i] = double(0.9f) * momenta[i] + (1 - double(0.9f)) * g;
        s[i] = double(0.99f) * squares[i] + (1 - double(0.99f)) * g * g;
        const double mean = m[i] / (1 - std::pow(double(0.9f), 3)), square = s[i] / (1 - std::pow(double(0.99f), 3));
        w[i] = weights[i] - double(0.01f) * mean / (std::sqrt(square) + double(1e-3f));
    }
    t.update(weights, momenta, squares, gradient, n, step);
    expect_small(relative_error(momenta, m, 1), 5e-7, "adam momentum", t, shape);
    expect_small(relative_error(squares, s, 1), 5e-7, "adam second moment", t, shape);
    expect_small(relative_error(weights, w, 1), 5e-7, "adam weights", t, shape);
}

double exact_transfer(Transfer f, double x) {
    switch (f) {
        case Transfer::relu: return x < 0 ? 0.0 : x;
        case Transfer::tanh: return std::tanh(x);
        case Transfer::logistic: return 1 / (1 + std::exp(-x));
        default: return x;
    }
}

double exact_slope(Transfer f, double y) {
    switch (f) {
        case Transfer::relu: return y > 0 ? 1 : 0;
        case Transfer::tanh: return 1 - y * y;
        case Transfer::logistic: return y * (1 - y);
        default: return 1;
    }
}

void test_transfer(const Table& t) {
    for (const Transfer f : {Transfer::linear, Transfer::relu, Transfer::tanh, Transfer::logistic}) {
        const int bundle = std::vector<int>{1, 2, 3, 8, 16, 21}[pick(0, 5)];
        const std::size_t n = std::size_t(pick(1, 60)) * bundle;
        const std::string shape = "f " + std::to_string(int(f)) + " n " + std::to_string(n) + " bundle " + std::to_string(bundle);
        Floats x(n), bias{std::size_t(bundle)}, g(n);
        x.randomise(), bias.randomise(), g.randomise();
        const float spread = std::pow(10.0f, float(pick(-3, 1)));
        for (std::size_t i = 0; i < n; ++i) x[i] *= spread;
        if (pick(0, 3) == 0) x[std::size_t(pick(0, int(n) - 1))] = NAN;
        Doubles y(n), back(n);
        std::vector<double> sums(n / n * bundle, 0.0), got(n / n * bundle, 99.0);
        for (std::size_t i = 0; i < n; ++i) y[i] = exact_transfer(f, double(x[i] + bias[i % bundle]));
        t.transfer_forward(x, n, bias, bundle, f);
        expect_small(pointwise_error(x, y), 3e-7, "transfer_forward", t, shape);
        double largest = 1e-30;
        for (std::size_t i = 0; i < n; ++i) {
            if (std::isnan(x[i])) x[i] = 0.25f;
            back[i] = g[i] * exact_slope(f, x[i]);
            sums[i % bundle] += back[i];
            largest = std::max(largest, std::abs(back[i]));
        }
        t.transfer_backward(g, x, n, bundle, f, got.data());
        expect_small(relative_error(g, back), 3e-7, "transfer_backward", t, shape);
        double worst = 0;
        for (int b = 0; b < bundle; ++b) worst = std::max(worst, std::abs(got[b] - sums[b]));
        expect_small(worst / largest, 2e-6, "transfer_backward bias", t, shape);
    }
}

// The whole range of tanh and logistic.
void test_transfer_range(const Table& t) {
    const std::size_t n = 1 << 16;
    Floats x(n), zero(1);
    zero.fill(0);
    for (const Transfer f : {Transfer::tanh, Transfer::logistic}) {
        Doubles y(n);
        for (std::size_t i = 0; i < n; ++i) {
            x[i] = float(-80.0 + 160.0 * double(i) / double(n - 1));
            y[i] = exact_transfer(f, x[i]);
        }
        t.transfer_forward(x, n, zero, 1, f);
        expect_small(pointwise_error(x, y), 3e-7, "transfer_forward", t, "range");
        const float extremes[] = {-INFINITY, -1e30f, -200.0f, -0.0f, 0.0f, 1e-38f, 1e-20f, 200.0f, 1e30f, INFINITY};
        for (std::size_t i = 0; i < std::size(extremes); ++i) {
            float v = extremes[i];
            t.transfer_forward(&v, 1, zero, 1, f);
            expect(std::abs(v - exact_transfer(f, extremes[i])) <= 1e-7 && !std::isnan(v), std::string("transfer at an extreme ") + t.isa);
        }
    }
}

// One window of one float of the bundle, in z, y, x order.
void naive_maximum(const float* in, Extent n, Extent w, Extent s, int bundle, int b, Extent corner, float& best, std::int32_t& where) {
    bool first = true;
    each(w, [&](int z, int y, int x) {
        const std::size_t voxel = at(n, corner.z + s.z * z, corner.y + s.y * y, corner.x + s.x * x);
        const float value = in[voxel * bundle + b];
        if (first || (!std::isnan(best) && (value > best || std::isnan(value)))) best = value, where = std::int32_t(voxel);
        first = false;
    });
}

// Values with many ties and some NaN.
void fill_with_ties(Floats& in) {
    const int levels = pick(1, 30);
    const bool with_nan = pick(0, 3) == 0, infinite = pick(0, 7) == 0;
    for (std::size_t i = 0; i < in.size(); ++i) {
        in[i] = float(pick(-levels, levels));
        if (with_nan && pick(0, 19) == 0) in[i] = NAN;
        if (infinite && pick(0, 2) == 0) in[i] = -INFINITY;
    }
}

// Small windows, rows cut anywhere: the same maxima and gradients, and nothing else written.
void test_small_filter(const Table& t, Extent n, Extent w, Extent s, int bundle, const float* in, const float* out,
                       const std::int32_t* index, const float* g, const Doubles& back, const std::string& shape) {
    const Extent m{n.z - s.z * (w.z - 1), n.y - s.y * (w.y - 1), n.x - s.x * (w.x - 1)};
    const std::size_t count = m.volume() * bundle;
    Floats got(count), gin(n.volume() * bundle);
    Guarded<std::int8_t> place(count);
    const int out_rows = m.z * m.y, in_rows = n.z * n.y, cut = pick(0, out_rows), back_cut = pick(0, in_rows);
    const std::size_t out_row = std::size_t(m.x) * bundle;
    const auto filter = [&](bool places, bool positive) {
        t.small_max_filter(in, n, w, s, bundle, cut, out_rows, &got[0] + cut * out_row,
                           places ? place.data() + cut * out_row : nullptr, positive);
        t.small_max_filter(in, n, w, s, bundle, 0, cut, got, places ? place.data() : nullptr, positive);
    };
    const auto equal = [&](std::size_t p) { return std::isnan(out[p]) ? std::isnan(got[p]) : got[p] == out[p]; };
    filter(true, false);
    bool same = true;
    for (std::size_t p = 0; p < count; ++p) {
        const int voxel = int(p / bundle), z = voxel / (m.y * m.x), y = voxel / m.x % m.y, x = voxel % m.x;
        const int j = place[p], jz = j / (w.y * w.x), jy = j / w.x % w.y, jx = j % w.x;
        same &= index[p] == ((z + s.z * jz) * n.y + y + s.y * jy) * n.x + x + s.x * jx;
        same &= equal(p);
    }
    expect(same, std::string("small_max_filter ") + t.isa + " " + shape);
    const std::size_t row = std::size_t(n.x) * bundle;
    const auto collect = [&](const Doubles& wanted, const char* function) {
        t.small_max_filter_backward(g, place.data(), n, w, s, bundle, back_cut, in_rows, &gin[0] + back_cut * row);
        t.small_max_filter_backward(g, place.data(), n, w, s, bundle, 0, back_cut, &gin[0]);
        expect_small(relative_error(gin, wanted, 1), 2e-6, function, t, shape);
    };
    collect(back, "small_max_filter_backward");
    // As if the input were a ReLU's output.
    filter(true, true);
    Doubles passed(gin.size());
    for (std::size_t p = 0; p < count; ++p)
        if (out[p] > 0) passed[std::size_t(index[p]) * bundle + p % bundle] += g[p];
    collect(passed, "small_max_filter_backward of positive maxima");
    std::fill(&got[0], &got[0] + count, 0.0f);
    filter(false, false);
    same = true;
    for (std::size_t p = 0; p < count; ++p) same &= equal(p);
    expect(same, std::string("small_max_filter without places ") + t.isa + " " + shape);
}

void test_max(const Table& t) {
    const int bundle = std::vector<int>{1, 1, 3, 8, 16, 19}[pick(0, 5)];
    const bool filter = coin(), flat = pick(0, 4) == 0;
    Extent w = random_extent(pick(0, 4) ? 4 : 10), s = random_extent(4), m = random_extent(bundle == 1 ? 12 : 5);
    if (pick(0, 3) == 0) {  // one wide window, few enough positions
        int* const axes[] = {&w.z, &w.y, &w.x};
        *axes[pick(0, 2)] = pick(8, 70);
        s = random_extent(2);
    }
    if (flat) w.z = 1;
    if (bundle == 1 && coin()) m.x = pick(1, 50);
    Extent n, step = s;
    if (filter) {
        n = {m.z + s.z * (w.z - 1), m.y + s.y * (w.y - 1), m.x + s.x * (w.x - 1)};
        step = {1, 1, 1};
    } else {
        m = random_extent(6);
        n = {(m.z - 1) * s.z + w.z + pick(0, s.z - 1), (m.y - 1) * s.y + w.y + pick(0, s.y - 1), (m.x - 1) * s.x + w.x + pick(0, s.x - 1)};
    }
    const std::string shape = to_string(n) + " w " + to_string(w) + " s " + to_string(s) + " bundle " + std::to_string(bundle);
    Floats in(n.volume() * bundle), out(m.volume() * bundle), gin(n.volume() * bundle);
    Indices index(m.volume() * bundle);
    fill_with_ties(in);
    if (filter) {
        Guarded<char> scratch((max_filter_scratch_bytes(n, w, s, bundle) + 3) / 4 * 4);
        t.max_filter(in, n, w, s, bundle, out, index, scratch.data());
    } else {
        t.max_pool(in, n, w, s, bundle, out, index);
    }
    bool same = true;
    Doubles back(gin.size(), 0.0);
    Floats g(m.volume() * bundle);
    g.randomise(), gin.fill(0);
    each(m, [&](int z, int y, int x) {
        for (int b = 0; b < bundle; ++b) {
            float best = 0;
            std::int32_t where = 0;
            naive_maximum(in, n, w, filter ? s : Extent{1, 1, 1}, bundle, b, {z * step.z, y * step.y, x * step.x}, best, where);
            const std::size_t p = at(m, z, y, x) * bundle + b;
            same &= index[p] == where && (std::isnan(best) ? std::isnan(out[p]) : out[p] == best);
            back[std::size_t(where) * bundle + b] += g[p];
        }
    });
    expect(same, std::string(filter ? "max_filter " : "max_pool ") + t.isa + " " + shape);
    if (!same) return;
    t.max_backward(g, index, m.volume(), bundle, gin);
    expect_small(relative_error(gin, back, 1), 2e-6, "max_backward", t, shape);
    if (filter && w.volume() <= small_window) test_small_filter(t, n, w, s, bundle, in, out, index, g, back, shape);
}

void expect_loss(double got, double wanted, double scale, const char* name, const Table& t, const std::string& shape) {
    expect_small(std::abs(got - wanted) / std::max(scale, 1e-30), 1e-6, name, t, shape);
}

void test_losses(const Table& t) {
    const std::size_t n = std::size_t(pick(1, 60));
    const bool weighted = coin();
    const float spread = std::vector<float>{0.1f, 1, 10, 300}[pick(0, 3)];
    const std::string shape = std::to_string(n) + (weighted ? " weighted" : "") + " spread " + std::to_string(spread);
    Floats y(n), target(n), weight(n), gradient(n);
    y.randomise();
    for (std::size_t i = 0; i < n; ++i) y[i] *= spread, target[i] = 0.1f * float(pick(0, 10)), weight[i] = 0.5f * float(pick(0, 3));
    const float* given = weighted ? weight.data() : nullptr;
    const auto factor = [&](std::size_t i) { return weighted ? double(weight[i]) : 1.0; };
    Doubles slope(n);
    double loss = 0, scale = 0;
    gradient.fill(NAN);
    for (std::size_t i = 0; i < n; ++i) {
        const double d = double(y[i]) - target[i];
        loss += factor(i) * 0.5 * d * d;
        slope[i] = factor(i) * d;
    }
    expect_loss(t.loss_squared(y, target, given, gradient, n), loss, loss, "loss_squared", t, shape);
    expect_small(relative_error(gradient, slope, 1), 3e-7, "loss_squared gradient", t, shape);

    loss = 0, gradient.fill(NAN);
    for (std::size_t i = 0; i < n; ++i) {
        const double a = y[i], term = std::max(a, 0.0) - a * target[i] + std::log1p(std::exp(-std::abs(a)));
        loss += factor(i) * term;
        scale += factor(i) * (std::abs(a) + 1);
        slope[i] = factor(i) * (exact_transfer(Transfer::logistic, a) - target[i]);
    }
    expect_loss(t.loss_binomial(y, target, given, gradient, n), loss, scale, "loss_binomial", t, shape);
    expect_small(relative_error(gradient, slope, 1), 3e-7, "loss_binomial gradient", t, shape);

    const int maps = pick(1, 6);
    std::vector<Floats*> all;
    std::vector<const float*> ys, targets;
    std::vector<float*> gradients;
    for (int m = 0; m < 3 * maps; ++m) all.push_back(new Floats(n)), all.back()->randomise();
    for (int m = 0; m < maps; ++m) {
        for (std::size_t i = 0; i < n; ++i)
            (*all[m])[i] *= spread, (*all[maps + m])[i] = coin() ? 0.0f : 0.1f * float(pick(0, 10));
        ys.push_back(*all[m]), targets.push_back(*all[maps + m]), gradients.push_back(*all[2 * maps + m]);
    }
    loss = 0, scale = 0;
    std::vector<Doubles> slopes{std::size_t(maps), Doubles(n)};
    for (std::size_t i = 0; i < n; ++i) {
        double top = -INFINITY, z = 0, mass = 0;
        for (int m = 0; m < maps; ++m) top = std::max(top, double(ys[m][i])), mass += targets[m][i];
        for (int m = 0; m < maps; ++m) z += std::exp(ys[m][i] - top);
        for (int m = 0; m < maps; ++m) {
            const double log_p = ys[m][i] - top - std::log(z);
            loss -= factor(i) * targets[m][i] * log_p;
            scale += factor(i) * targets[m][i] * (std::abs(log_p) + 1);
            slopes[m][i] = factor(i) * (std::exp(log_p) * mass - targets[m][i]);
        }
    }
    expect_loss(t.loss_softmax(ys.data(), targets.data(), given, gradients.data(), maps, n), loss, scale, "loss_softmax", t, shape);
    for (int m = 0; m < maps; ++m) {
        double worst = 0;
        for (std::size_t i = 0; i < n; ++i) worst = std::max(worst, std::abs(gradients[m][i] - slopes[m][i]));
        expect_small(worst, 5e-6, "loss_softmax gradient", t, shape + " maps " + std::to_string(maps));
    }
    for (Floats* array : all) delete array;
}

using Complex = std::complex<double>;

// exp(2 pi i f j / t)
Complex turn(int f, int j, int t) { return std::polar(1.0, 2 * M_PI * double(f * j % t) / t); }

void test_lines(const Table& t) {
    const int length = pick(1, 20), k = pick(1, length), m = pick(1, coin() ? 40 : 5);
    const std::size_t narrow = std::size_t(2 * m), gap_in = std::size_t(pick(0, 3)), gap_out = std::size_t(pick(0, 3));
    const std::string shape = "k " + std::to_string(k) + " t " + std::to_string(length) + " m " + std::to_string(m);
    Floats table(std::size_t(2 * k) * (length / 2 + 1));
    for (int f = 0; 2 * f <= length; ++f)
        for (int j = 0; j < k; ++j) {
            table[std::size_t(2 * (f * k + j))] = float(turn(f, j, length).real());
            table[std::size_t(2 * (f * k + j) + 1)] = float(turn(f, j, length).imag());
        }
    const auto check = [&](bool expand) {
        const int from = expand ? k : length, to = expand ? length : k;
        const std::size_t in_stride = narrow + gap_in, out_stride = narrow + gap_out;
        Floats in(in_stride * (from - 1) + narrow), out(out_stride * (to - 1) + narrow);
        in.randomise(), out.fill(7);
        Doubles wanted(out.size(), 7.0);
        for (int b = 0; b < to; ++b)
            for (int i = 0; i < m; ++i) {
                Complex sum = 0;
                for (int a = 0; a < from; ++a) {
                    const float* x = in + std::size_t(a) * in_stride + 2 * i;
                    sum += Complex(x[0], x[1]) * (expand ? std::conj(turn(b, a, length)) : turn(a, b, length));
                }
                wanted[std::size_t(b) * out_stride + 2 * i] = sum.real();
                wanted[std::size_t(b) * out_stride + 2 * i + 1] = sum.imag();
            }
        (expand ? t.dft_expand(in, in_stride, k, std::size_t(m), out, out_stride, length, table)
                : t.dft_reduce(in, in_stride, length, std::size_t(m), out, out_stride, k, table));
        expect_small(relative_error(out, wanted, from), 1e-6, expand ? "dft_expand" : "dft_reduce", t, shape);
    };
    check(true);
    check(false);
}

void test_rows(const Table& t) {
    const std::size_t rows = std::size_t(pick(1, 9)), k = std::size_t(pick(1, 9)), floats = std::size_t(pick(1, 70));
    const std::string shape = std::to_string(rows) + " rows of " + std::to_string(k) + " and " + std::to_string(floats);
    Floats few(rows * k), many(rows * floats), basis(k * floats), out(rows * floats), back(rows * k);
    few.randomise(), many.randomise(), basis.randomise(), out.fill(NAN), back.fill(NAN);
    Doubles expanded(out.size(), 0.0), reduced(back.size(), 0.0);
    for (std::size_t r = 0; r < rows; ++r)
        for (std::size_t j = 0; j < k; ++j)
            for (std::size_t i = 0; i < floats; ++i) {
                expanded[r * floats + i] += double(few[r * k + j]) * basis[j * floats + i];
                reduced[r * k + j] += double(many[r * floats + i]) * basis[j * floats + i];
            }
    t.rows_expand(few, rows, int(k), basis, floats, out);
    expect_small(relative_error(out, expanded, double(k)), 1e-6, "rows_expand", t, shape);
    t.rows_reduce(many, rows, floats, basis, int(k), back);
    expect_small(relative_error(back, reduced, double(floats)), 1e-6, "rows_reduce", t, shape);
}

// Kernel to spectrum and back, on the instruction set that table() chose: with and without z, odd and even.
void test_short_transform() {
    const Extent t{coin() ? 1 : pick(1, 7), coin() ? pick(1, 9) : pick(1, 3), pick(1, 12)};
    const Extent k{pick(1, t.z), pick(1, t.y), pick(1, t.x)};
    const std::string shape = "k " + to_string(k) + " t " + to_string(t);
    const ShortTransform transform(k, t);
    const Extent half{t.z, t.y, t.x / 2 + 1};
    expect(transform.spectrum_size() == half.volume(), "ShortTransform::spectrum_size " + shape);
    Floats w(k.volume()), spectrum(2 * half.volume()), scratch(transform.scratch_floats()), back(k.volume());
    w.randomise(), spectrum.fill(NAN), scratch.fill(NAN), back.fill(NAN);
    const auto phase = [&](int fz, int fy, int fx, int z, int y, int x) { return turn(fz, z, t.z) * turn(fy, y, t.y) * turn(fx, x, t.x); };
    Doubles wanted(spectrum.size());
    each(half, [&](int fz, int fy, int fx) {
        Complex sum = 0;
        each(k, [&](int z, int y, int x) { sum += double(w[at(k, z, y, x)]) * std::conj(phase(fz, fy, fx, z, y, x)); });
        wanted[2 * at(half, fz, fy, fx)] = sum.real();
        wanted[2 * at(half, fz, fy, fx) + 1] = sum.imag();
    });
    transform.forward(w, spectrum, scratch);
    expect_small(relative_error(spectrum, wanted, double(k.volume())), 1e-6, "ShortTransform::forward", table(), shape);

    // The spectrum of any real image, not only of what a kernel can give.
    Floats image(t.volume());
    image.randomise(), scratch.fill(NAN);
    each(half, [&](int fz, int fy, int fx) {
        Complex sum = 0;
        each(t, [&](int z, int y, int x) { sum += double(image[at(t, z, y, x)]) * std::conj(phase(fz, fy, fx, z, y, x)); });
        spectrum[2 * at(half, fz, fy, fx)] = float(sum.real());
        spectrum[2 * at(half, fz, fy, fx) + 1] = float(sum.imag());
    });
    Doubles first(k.volume());
    each(k, [&](int z, int y, int x) { first[at(k, z, y, x)] = image[at(t, z, y, x)]; });
    transform.inverse(spectrum, back, scratch);
    expect_small(relative_error(back, first, 3), 1e-6, "ShortTransform::inverse", table(), shape);
}

}  // namespace

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 1500;
    const unsigned seed = argc > 2 ? unsigned(std::atol(argv[2])) : 1;
    for (const char* isa : {"baseline", "avx2", "avx512"}) {
        const Table* t = table_for(isa);
        if (t == nullptr) {
            std::printf("%s: not here\n", isa);
            continue;
        }
        engine.seed(seed);
        const long before = passed;
        for (int i = 0; i < rounds; ++i) {
            test_correlate(*t);
            test_gradient(*t);
            test_boxes(*t);
            test_sublattices(*t);
            test_spectral(*t);
            test_pointwise(*t);
            test_adam(*t);
            test_transfer(*t);
            test_max(*t);
            test_losses(*t);
            test_lines(*t);
            test_rows(*t);
        }
        test_transfer_range(*t);
        test_large_gradient(*t);
        std::printf("%s: %ld passed\n", isa, passed - before);
    }
    for (int i = 0; i < rounds / 3; ++i) test_short_transform();
    expect(table_for("sse9") == nullptr, "an unknown instruction set must not be found");
    std::printf("%ld passed, %ld failed\n", passed, failed);
    return failed == 0 && passed > 0 ? 0 : 1;
}
