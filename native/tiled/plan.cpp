// Plans: geometry, piece sizes and buffer sizes from a layer's shape; the cost model; the choice of code path.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numbers>
#include <stdexcept>
#include <string>

#include <unistd.h>

#include "tiled/layout.hpp"
#include "tiled/transform_ops.hpp"
#include "tiled/tiled.hpp"

namespace znn::tiled {

// ---- code paths: the same sources compiled per instruction set and bundle width

#define ZNN_DECLARE(variant)                                                                                        \
    namespace variant {                                                                                             \
    void run_tiled(const LayerPlan&, Phase, int, const Buffers&, float*);                                           \
    void run_direct(const LayerPlan&, Phase, int, const Buffers&, float*);                                          \
    }
ZNN_DECLARE(baseline)
#ifdef ZNN_X86
ZNN_DECLARE(avx2)
#ifdef ZNN_WIDE_AVX2  // for tests: bundles of 16 maps on processors without AVX-512
ZNN_DECLARE(avx2w)
#endif
ZNN_DECLARE(avx512)
ZNN_DECLARE(avx512w)
#endif
namespace baseline {
TransformOps transform_ops(int extent);
}

namespace {

using Run = void (*)(const LayerPlan&, Phase, int, const Buffers&, float*);

struct Path {
    const char* name;
    Run tiled, direct, tiled16, direct16;
};

bool runs_here(const std::string& name) {
    if (name == "baseline") return true;
#ifdef ZNN_X86
    __builtin_cpu_init();
    if (name == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (name == "avx512")
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
#endif
    return false;
}

const Path& path() {
    static const Path* chosen = [] {
        static const Path paths[] = {
#ifdef ZNN_X86
            {"avx512", avx512::run_tiled, avx512::run_direct, avx512w::run_tiled, avx512w::run_direct},
#ifdef ZNN_WIDE_AVX2
            {"avx2", avx2::run_tiled, avx2::run_direct, avx2w::run_tiled, avx2w::run_direct},
#else
            {"avx2", avx2::run_tiled, avx2::run_direct, nullptr, nullptr},
#endif
#endif
            {"baseline", baseline::run_tiled, baseline::run_direct, nullptr, nullptr},
        };
        const char* forced = std::getenv("ZNN_ISA");
        for (const Path& p : paths) {
            if (forced ? std::string(forced) != p.name : !runs_here(p.name)) continue;
            if (!runs_here(p.name))
                throw std::runtime_error("ZNN_ISA=" + std::string(forced) + " cannot run on this processor");
            return &p;
        }
        throw std::runtime_error("ZNN_ISA must be baseline, avx2 or avx512 as built for this machine, got " +
                                 std::string(forced));
    }();
    return *chosen;
}

void check(const Problem& q, int bundle) {
    const Extent n = q.input, k = q.kernel, s = q.sparsity, m = valid_extent(n, k, s);
    auto fail = [](const std::string& text) { throw std::invalid_argument("convolution layer: " + text); };
    if (q.in_maps < 1 || q.out_maps < 1)
        fail("needs at least one map on each side, got " + std::to_string(q.in_maps) + " and " + std::to_string(q.out_maps));
    if (std::min({k.z, k.y, k.x, s.z, s.y, s.x}) < 1)
        fail("kernel " + to_string(k) + " and sparsity " + to_string(s) + " must be positive");
    if (std::min({m.z, m.y, m.x}) < 1)
        fail("kernel " + to_string(k) + " with sparsity " + to_string(s) + " does not fit the input " + to_string(n));
    if (q.depthwise && q.in_maps != q.out_maps)
        fail("is depthwise, so its maps must agree, got " + std::to_string(q.in_maps) + " and " + std::to_string(q.out_maps));
    if (!has_bundle(bundle)) fail("bundles of " + std::to_string(bundle) + " maps are not supported by " + isa());
}

int clamp_count(double wanted, int most) { return std::max(1, int(std::min<double>(wanted, most))); }

// Vector operations of the table-driven or full transform of one kernel line (complex).
double kernel_line_ops(const Axis& a) {
    if (a.table()) return 4.0 * (a.k / 2 + 1) * ((a.T - 1) / 2) + 4 * a.k + 6;
    return baseline::transform_ops(a.T).complex + 3.0 * a.T;
}

// Vector operations, copies counted as well, of the transform of one tile with `rows` rows per plane and `planes` planes, with or
// without the lines along axis 0.
double tile_ops(const LayerPlan& p, int planes, int rows, bool inverse, bool lines) {
    const Axis* a = p.axis;
    const TransformOps x = baseline::transform_ops(a[2].T), y = baseline::transform_ops(a[1].T),
                       z = baseline::transform_ops(a[0].T);
    const double row = (inverse ? x.inverse + a[2].T : x.real) + 2.5 * a[2].T;
    const double middle = a[1].T > 1 ? a[2].frequencies() * (y.complex + 4.0 * a[1].T) : 0;
    return planes * (rows * row + middle) + (lines ? p.pencils * (z.complex + 4.0 * a[0].T) : 0);
}

double transform_seconds(const LayerPlan& p, bool gradient, bool inverse, const Machine& machine, bool lines = true) {
    const Axis* a = p.axis;
    const bool outputs = gradient != inverse;  // tiles of M voxels: gradients in, outputs back
    const double ops = tile_ops(p, outputs ? a[0].M : a[0].T, outputs ? a[1].M : a[1].T, inverse, lines);
    // Scratch that does not fit in L2 together with what it is read from costs more.
    const double bytes = 8.0 * p.bundle * p.plane * a[0].T;
    return ops * p.bundle / machine.transform_flops * (bytes > 0.7 * double(machine.l2_bytes) ? machine.spill : 1.0);
}

double expand_rate(const Axis& a, const Machine& machine) { return a.table() ? machine.expand_flops : machine.line_flops; }

// Images that outgrow L3 come from memory; written, they are fetched first.
double image_seconds(const Extent& extent, int bundles, int bundle, bool written, const Machine& machine) {
    const double bytes = 4.0 * double(extent.volume()) * bundles * bundle;
    return bytes > 0.5 * double(machine.l3_bytes) ? (written ? 2 : 1) * bytes / machine.memory_bytes : 0.0;
}

double bytes_of_spectra(const LayerPlan& p, int bundles) {
    return 8.0 * p.bundle * double(p.pencils) * bundles * p.tiles * p.line;
}

double product_seconds(const LayerPlan& p, int maps, int bundles, const Machine& machine) {
    const double frequencies = double(p.pencils) * p.axis[0].T;
    const double one = frequencies * maps * bundles * 8.0 * p.bundle / machine.product_flops, multiply = one * p.tiles;
    if (const int pairs = turned_pairs(p.axis[0]); pairs && p.tiles_per_slab >= kTurnedTiles) return multiply + one * pairs * p.slabs;
    // Kernels are expanded once per slab, and come from L2 again for all of its tiles: dear where these are few.
    const double lines = double(p.pencils) * p.slabs * maps * bundles;
    const double expand = lines * kernel_line_ops(p.axis[0]) * p.bundle / expand_rate(p.axis[0], machine);
    const double load = lines * 8.0 * p.bundle * p.axis[0].T / machine.expanded_bytes;
    return multiply + expand + load;
}

double kernel_seconds(const LayerPlan& p, int maps, int bundles, const Machine& machine) {
    const Axis* a = p.axis;
    const double lines = a[1].k * kernel_line_ops(a[2]) / 2 / expand_rate(a[2], machine) +
                         a[2].frequencies() * kernel_line_ops(a[1]) / expand_rate(a[1], machine);
    return maps * bundles * a[0].k * lines * p.bundle;
}

bool has_wide_registers() { return std::string(isa()) == "avx512"; }

double direct_seconds(const LayerPlan& p, int row, double voxels, int maps, int bundles, const Machine& machine) {
    const double taps = double(p.problem.kernel.volume());
    // Sums in registers; fewer than 10 wait for each other.
    const double block = std::min(12, row * (p.problem.depthwise ? 1 : std::min(bundles, 3)));
    double efficiency = std::min(1.0, block / 10);
    // Of a single map one read serves one multiplication (measured).
    if (maps == 1 && !p.problem.depthwise) efficiency *= has_wide_registers() ? 0.5 : 0.75;
    return 2.0 * voxels * taps * maps * bundles * p.bundle / (machine.direct_flops * efficiency);
}

// Vector operations, measured, that put together a voxel's bundle, and that pool it.
constexpr double kBundleOperations = 8, kPoolOperations = 8;
double pool_seconds(const LayerPlan& p, const Machine& machine) {
    return kPoolOperations * double(p.output.volume()) * p.out_bundles * p.bundle / machine.transform_flops;
}

// Passes of a single map (single.cpp) over some rows of windows. Forward: no lanes are lost to maps that are not there, but some
// voxels to the ends of rows; then voxels' bundles are put together and pooled, in so many vector operations (measured). Windows that
// overlap are taken to be as many as voxels.
struct SingleSeconds {
    double forward, update;
};
SingleSeconds single_seconds(const LayerPlan& p, double windows, const Machine& machine) {
    const Problem& q = p.problem;
    const double rows = p.filters() ? windows : windows * q.pool.z * q.pool.y;
    const double taps = double(q.kernel.volume()), bundles = double(p.out_bundles) * p.bundle;
    const double products = 2 * rows * q.input.x * taps * q.out_maps / machine.direct_flops;
    const double bundled = rows * p.output.x * bundles / machine.transform_flops;
    const double plain = products + kBundleOperations * bundled, pooled = plain + kPoolOperations * bundled;
    if (p.filters()) return {pooled, pooled};
    if (!p.pools()) return {plain, plain};
    // Of a window one vector operation for every row of taps that a vector holds, and some to find the voxel.
    const int lanes = has_wide_registers() ? 16 : 8;
    const double rows_of_taps = double(q.kernel.z) * q.kernel.y * ceil_div(q.kernel.x, lanes);
    const double found = windows * (p.output.x / q.pool.x) * q.out_maps;
    return {pooled, found * (rows_of_taps + 6) * 2 * lanes / machine.direct_flops};
}

// Tile geometry of one memory axis.
Axis make_axis(int n, int k, int s, int T) {
    Axis a;
    a.n = n, a.k = k, a.s = s, a.T = T;
    a.m = n - s * (k - 1);
    a.M = T - k + 1;
    a.residues = std::min(s, a.m);
    a.tiles = ceil_div(a.outputs(0), a.M);
    const int half = k / 2;
    if (half >= 1 && half <= 4) {  // short enough for tables (short_transforms.hpp)
        a.center = half;
        for (int f = 0; f <= T / 2; ++f)
            for (int j = 1; j <= half; ++j) {
                const double angle = 2 * std::numbers::pi * (f * j % T) / T;
                a.cosines.push_back(float(std::cos(angle)));
                a.sines.push_back(float(std::sin(angle)));
            }
    }
    return a;
}

// Axis 2 carries the real transform (x where x has one), axis 0 the lines inside a pencil; extents of 1 go to the middle.
void arrange_axes(LayerPlan& p) {
    const Extent n = p.problem.input, k = p.problem.kernel, s = p.problem.sparsity, T = p.tile, m = p.problem.pooled(p.output);
    const Axis memory[3] = {make_axis(n.z, k.z, s.z, T.z), make_axis(n.y, k.y, s.y, T.y), make_axis(n.x, k.x, s.x, T.x)};
    const Extent w = p.problem.pool;
    const long in_step[3] = {long(n.y) * n.x, n.x, 1}, out_step[3] = {long(m.y) * m.x, m.x, 1};
    const int pool[3] = {w.z, w.y, w.x};
    const long kernel_step[3] = {long(k.y) * k.x, k.x, 1};
    int real = T.x > 1 ? 2 : T.y > 1 ? 1 : 0;
    int rest[2], count = 0;
    for (int i = 0; i < 3; ++i)
        if (i != real) rest[count++] = i;
    if (memory[rest[0]].T == 1) std::swap(rest[0], rest[1]);
    const int order[3] = {rest[0], rest[1], real};
    for (int a = 0; a < 3; ++a) {
        p.order[a] = order[a];
        p.axis[a] = memory[order[a]];
        p.axis[a].in_step = in_step[order[a]];
        p.axis[a].out_step = out_step[order[a]];
        p.axis[a].kernel_step = kernel_step[order[a]];
        p.axis[a].pool_by(pool[order[a]], p.problem.filter);
    }
}

void arrange_tiles(LayerPlan& p, const Machine& machine, bool memoize) {
    Axis* a = p.axis;
    p.tiles = 1;
    for (int i = 0; i < 3; ++i) p.tiles *= a[i].residues * a[i].tiles;
    p.pencils = 0;
    for (int f2 = 0; f2 < a[2].frequencies(); ++f2) p.pencils += p.self_conjugate(f2) ? a[1].T / 2 + 1 : a[1].T;
    p.plane = p.pencils | 1;
    p.line = a[0].T | 1;
    // Strips along the slowest memory axis that is cut at all.
    p.split = 0;
    int slowest = 3;
    for (int i = 0; i < 3; ++i)
        if (a[i].tiles > 1 && p.order[i] < slowest) slowest = p.order[i], p.split = i;
    p.tiles_per_strip = 1;
    for (int i = 0; i < 3; ++i)
        if (i != p.split) p.tiles_per_strip *= a[i].tiles;
    p.strips = p.tiles / p.tiles_per_strip;
    // Slabs of strips whose spectra stay in L3 from one phase to the next, unless expanding the kernels once more per slab
    // would cost more than a fifteenth of what is done per tile (operations per frequency; those of expanding count twice,
    // because their results and often the kernels themselves do not stay in L1 and L2).
    const double pairs = double(p.problem.in_maps) * p.out_bundles;
    const double per_tile = 4 + 45.0 * (p.in_bundles + p.out_bundles) / pairs;
    const double fewest = 15 * 2 * kernel_line_ops(a[0]) / a[0].T / per_tile;
    const double share = memoize ? 1.0 : 0.5;  // small slabs where memory is what matters
    const double per_strip = bytes_of_spectra(p, p.in_bundles + p.out_bundles) / p.strips;
    const int strips = std::max({1, int(std::ceil(share * fewest / p.tiles_per_strip)),
                                int(share * 0.5 * double(machine.l3_bytes) / per_strip)});
    p.slabs = ceil_div(p.strips, strips);
    p.tiles_per_slab = ceil_div(p.strips, p.slabs) * p.tiles_per_strip;
    p.slabs = ceil_div(p.tiles, p.tiles_per_slab);
    p.passing_slabs = p.slabs > 3 ? 2 : 1;  // two, so that workers find work where one slab's ends; of few, large ones too dear
    p.kept_slabs = memoize ? p.slabs : p.passing_slabs;
    const long pad = 16;
    p.in_pencil = long(p.in_bundles) * p.tiles_per_slab * p.line * 2 * p.bundle + pad;
    p.out_pencil = long(p.out_bundles) * p.tiles_per_slab * p.line * 2 * p.bundle + pad;
    p.in_slab = std::size_t(p.in_pencil) * p.pencils;
    p.out_slab = std::size_t(p.out_pencil) * p.pencils;
    // From the writing of a product's operands to their reading, or of its result, all of these pass through the caches.
    const std::size_t kernels = std::size_t(kernel_pencil(p, p.problem.in_maps)) * p.bundle * p.pencils * p.out_bundles;
    p.streams = 4 * (p.in_slab + p.out_slab + kernels) > machine.l3_bytes;
}

// Bundles of kernels whose expanded spectra take at most half of L2.
int expanded_chunk(const LayerPlan& p, int maps, int bundles, const Machine& machine) {
    const double one = double(p.axis[0].T) * (2 * maps + 2) * p.bundle * 4;
    return clamp_count(0.5 * double(machine.l2_bytes) / one, bundles);
}

// What a piece of a phase of `all` seconds should take: little work is cut finer, so that it still keeps `workers` busy, but not
// so fine that handing pieces out (a tenth of a microsecond each, if nothing else moves between caches) is felt.
double piece_aim(double all, int workers, const Machine& machine) {
    return std::min(machine.piece_s, std::max(all / (16 * std::max(workers, 2)), 5e-6));
}

// How many units of `one` second make a piece, of `count` there are: some for every worker, unless they would be over in no time; and
// of numbers near that the one by which the last worker is through first, as there may be few pieces for each.
int units_per_piece(double one, double count, int most, const Machine& machine) {
    const int workers = std::max(machine.workers, 2);
    const double some = std::max(count / (4 * workers), 1e-6 / one);
    const int wanted = clamp_count(std::min(piece_aim(one * count, machine.workers, machine) / one, some), most);
    const auto through = [&](int units) { return std::ceil(std::ceil(count / units) / workers) * units; };
    int best = wanted;
    for (int units = wanted - 1; units > wanted / 2; --units)
        if (through(units) < through(best)) best = units;
    return best;
}

// In how many parts one unit is cut, where units of `one` second are too few: not more than make sense, and none that short.
int parts_of_unit(double one, int count, int most, const Machine& machine) {
    return clamp_count(std::min(std::ceil(8.0 * machine.workers / count), one / 5e-6), most);
}

void size_tiled_pieces(LayerPlan& p, const Machine& machine) {
    const int in = p.problem.in_maps, out = p.problem.out_maps;
    p.chunk_out = expanded_chunk(p, in, p.out_bundles, machine);
    p.chunk_in = expanded_chunk(p, out, p.in_bundles, machine);
    const double transform = transform_seconds(p, false, false, machine), bundles = std::min(p.in_bundles, p.out_bundles);
    p.transform_tiles = units_per_piece(transform, p.tiles * bundles, p.tiles_per_slab, machine);
    const double product = product_seconds(p, in, p.out_bundles, machine) / (double(p.pencils) * p.slabs);
    p.product_pencils = units_per_piece(product, double(p.pencils) * p.slabs, p.pencils, machine);
    if (p.product_pencils == 1) {
        // Two narrow bundles share what they read, in the update all of kMostSummed.
        const int shared = p.bundle == 8 ? 2 : 1;
        p.forward_parts = parts_of_unit(product, p.pencils, ceil_div(p.out_bundles, shared), machine);
        p.backward_parts = parts_of_unit(product, p.pencils, ceil_div(p.in_bundles, shared), machine);
        p.sums_parts = parts_of_unit(product, p.pencils, ceil_div(p.out_bundles, kMostSummed), machine);
    }
    const double kernel = kernel_seconds(p, 1, 1, machine);
    p.kernel_maps_in = units_per_piece(kernel, double(in) * p.out_bundles, in, machine);
    p.kernel_maps_out = units_per_piece(kernel * p.bundle, double(out) * p.in_bundles / p.bundle, p.out_bundles, machine) * p.bundle;

    auto set = [&](Phase phase, int count) { p.pieces[int(phase)] = count; };
    auto of_tiles = [&](int bundles) {
        const int last = p.slab_tiles(p.slabs - 1);
        return (p.slabs - 1) * tile_pieces(p, p.tiles_per_slab, bundles, p.transform_tiles) +
               tile_pieces(p, last, bundles, p.transform_tiles);
    };
    set(Phase::kernels_forward, p.out_bundles * ceil_div(in, p.kernel_maps_in));
    set(Phase::kernels_backward, p.in_bundles * ceil_div(out, p.kernel_maps_out));
    set(Phase::input_transform, of_tiles(p.in_bundles));
    set(Phase::forward_product, p.slabs * product_pieces(p, p.forward_parts));
    set(Phase::forward_inverse, of_tiles(p.out_bundles));
    set(Phase::gradient_transform, of_tiles(p.out_bundles));
    set(Phase::backward_product, p.slabs * product_pieces(p, p.backward_parts));
    set(Phase::backward_inverse, strip_pieces(p));
    set(Phase::backward_join, strip_pieces(p));
    set(Phase::update_product, p.slabs * product_pieces(p, p.sums_parts));
    set(Phase::update_inverse, p.out_bundles * ceil_div(in, p.kernel_maps_in));

    const TileScratchSizes tile(p);
    const long taps = long(p.problem.kernel.volume()), T = p.axis[0].T;
    const long transforms = tile.total() + p.bundle * taps;
    const long forward = p.chunk_out * T * (2L * in + 2) + 2 * T, backward = p.chunk_in * T * (2L * out + 2) + 2 * T;
    const long turned = (2L * kTurnedPairs + 2) * 2 * kMostTurned * std::max(in, out);  // pairs of taps, and what becomes of them
    // Lines of one bundle's maps and their taps, or sums over frequencies.
    const long update = std::max(p.bundle * (2 * T + 2 + 2L * p.axis[0].k) + 2 * T,
                                 long(kMostSummed) * p.bundle * (4 * kTurnedPairs + 2));
    p.scratch = std::size_t(std::max({transforms, forward, backward, turned, update})) * p.bundle * sizeof(float);
}

LayerPlan base_plan(const Problem& problem, int bundle) {
    check(problem, bundle);
    LayerPlan p;
    p.problem = problem;
    p.bundle = bundle;
    p.output = valid_extent(problem.input, problem.kernel, problem.sparsity);
    p.in_bundles = ceil_div(problem.in_maps, bundle);
    p.out_bundles = ceil_div(problem.out_maps, bundle);
    return p;
}

}  // namespace

std::size_t l2_cache_bytes() {
    static const std::size_t bytes = [] {  // asked once: every Machine wants it, and a virtual one may be slow to say
        long found = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
        found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
        return std::size_t(found > 0 ? std::clamp(found, 256L << 10, 2L << 20) : 512L << 10);
    }();
    return bytes;
}

const char* isa() { return path().name; }
bool has_bundle(int bundle) { return bundle == 8 || (bundle == 16 && path().tiled16); }

bool has_transform(int extent) {
    return extent >= 1 && (extent <= 32 || (extent <= 128 && extent % 8 == 0));
}

LayerPlan plan_tiled(const Problem& problem, int bundle, Extent tile, const Machine& machine, bool memoize) {
    LayerPlan p = base_plan(problem, bundle);
    const Extent k = problem.kernel;
    if (problem.depthwise) throw std::invalid_argument("convolution layer: is depthwise, which only the direct method does");
    if (!has_transform(tile.z) || !has_transform(tile.y) || !has_transform(tile.x))
        throw std::invalid_argument("convolution layer: tile extents must be 1 to 32, or multiples of 8 up to 128, got " + to_string(tile));
    if (tile.z < k.z || tile.y < k.y || tile.x < k.x)
        throw std::invalid_argument("convolution layer: the kernel " + to_string(k) + " does not fit the tile " + to_string(tile));
    p.method = Method::tiled;
    p.tile = tile;
    arrange_axes(p);
    if (p.pools() && !can_pool(p, problem.pool, problem.filter))
        throw std::invalid_argument("convolution layer: tiles of " + to_string(tile) + " cannot pool windows of " +
                                    to_string(problem.pool));
    arrange_tiles(p, machine, memoize);
    size_tiled_pieces(p, machine);
    return p;
}

namespace {

std::size_t fused_spectra_bytes(const LayerPlan& p) {
    return std::size_t(fused_groups(p)) * FusedSizes(p).inputs * p.bundle * sizeof(float);
}

// Seconds of the fused pipeline: of its inputs' transforms, of writing their results to memory, of reading them there, of expanding
// kernels, and of all the rest in forward and in update.
struct FusedSeconds {
    double inputs, write, read, expand, forward, update;
};

FusedSeconds fused_seconds(const LayerPlan& p, const Machine& machine) {
    const Axis& a = p.axis[0];
    const bool lines = !sums_taps(p);
    const double transforms = double(p.problem.in_maps) * p.tiles / p.bundle;  // a tile in every lane
    const double inputs = transforms * (machine.fused * transform_seconds(p, false, false, machine, lines) +
                                        machine.gather * double(p.tile.volume()));
    const double write = double(fused_spectra_bytes(p)) / machine.spectra_bytes, read = write / 2;
    const double outputs = p.out_bundles * p.tiles * transform_seconds(p, false, true, machine, lines);
    const double products = double(p.pencils) * p.tiles * p.problem.in_maps * p.out_bundles;  // of lines
    const double points = 8.0 * p.bundle * products / machine.product_flops;
    if (!lines) {
        // Every tile reads kernels, or reads and writes their sums, from L2 again.
        const double load = 8.0 * p.bundle * products * a.k / machine.expanded_bytes;
        const double rest = machine.fused * (outputs + points * a.M * (a.k + 1));
        return {inputs, write, read, 0, rest + load, rest + 2 * load};
    }
    // Products of a few maps load and store as much as they compute: half the speed of those of many.
    const double rest = machine.fused * (outputs + points * 2 * a.T);
    const double expand = products / p.fused_tiles * kernel_line_ops(a) * p.bundle / expand_rate(a, machine);
    return {inputs, write, read, machine.fused * expand, rest, rest};
}

// In how many parts each of `count` groups of tiles is cut, by bundles of outputs and, up to `most`, by tiles: what workers do on
// average, and one piece more that the last of them is waited for, should be least. `repeated`: what each part does anew; `expand`:
// what each does for its bundles, however few their tiles.
int fused_parts(const LayerPlan& p, int count, double repeated, double expand, double rest, int most, int workers) {
    const auto seconds = [&](int parts) {
        return (double(count) * parts / workers + 1) * (repeated + (parts_by_tile(p, parts) * expand + rest) / parts);
    };
    int best = 1;
    for (int parts = 2; parts <= most && workers > 1; parts += parts < p.out_bundles ? 1 : p.out_bundles)
        if (seconds(parts) < seconds(best)) best = parts;
    return best;
}

// Parts, and whether these find spectra of inputs in memory: where two would make them anew and L3 has room for them, or more
// would. Without parts, what is saved in the update costs as much on its way through the caches.
void cut_fused(LayerPlan& p, const Machine& machine, bool memoize) {
    const FusedSeconds all = fused_seconds(p, machine);
    const auto cut = [&](double repeated) {
        const int most = p.out_bundles * p.fused_tiles;
        p.fused_parts = fused_parts(p, fused_groups(p), repeated, all.expand, all.forward, most, machine.workers);
        p.update_parts = fused_parts(p, p.update_chunks, repeated, 0, all.update, p.out_bundles, machine.workers);
    };
    cut(all.inputs);
    const bool fit = 2 * fused_spectra_bytes(p) <= machine.l3_bytes;
    p.shares_inputs = memoize && std::max(p.fused_parts, p.update_parts) > (fit ? 1 : 2);
    if (p.shares_inputs) cut(all.read);
    p.input_parts = sums_taps(p) ? parts_of_unit(all.inputs / fused_groups(p), fused_groups(p), p.axis[0].T, machine) : 1;
}

constexpr int kFusedSums = 32;  // that the update keeps apart at most

}  // namespace

LayerPlan plan_fused(const Problem& problem, int bundle, Extent tile, const Machine& machine, bool memoize) {
    if (problem.in_maps > 4)
        throw std::invalid_argument("convolution layer: the fused method is for at most 4 input maps, got " +
                                    std::to_string(problem.in_maps));
    if (problem.filter && problem.pool.volume() > 1)
        throw std::invalid_argument("convolution layer: the fused method does not filter");
    LayerPlan p = plan_tiled(problem, bundle, tile, machine);
    p.fused = true;
    // As many tiles together as a vector has lanes, evenly; chunks of as many groups each.
    const int groups = ceil_div(p.tiles, bundle);
    p.fused_tiles = ceil_div(p.tiles, groups);
    p.update_chunks = ceil_div(groups, ceil_div(groups, kFusedSums));
    cut_fused(p, machine, memoize);
    p.pieces[int(Phase::input_transform)] = p.shares_inputs ? fused_groups(p) * p.input_parts : 0;
    p.pieces[int(Phase::forward_product)] = 0;
    p.pieces[int(Phase::forward_inverse)] = fused_groups(p) * p.fused_parts;
    p.pieces[int(Phase::update_product)] = p.update_chunks * p.update_parts;
    p.scratch += std::size_t(FusedSizes(p).total()) * bundle * sizeof(float);
    return p;
}

namespace {

// Pieces of a filtered layer begin with rows and planes that others compute as well: so many that the last worker is through first, a
// quarter of a piece counted for what it waits by accident.
void cut_filtered(LayerPlan& p, int workers) {
    const Extent windows = p.problem.pooled(p.output), w = p.problem.pool;
    const int fewest = ceil_div(windows.y, std::max(1, kRunVoxels / p.problem.input.x));
    double best = 0;
    for (int runs = fewest; runs <= windows.y; ++runs)
        for (int parts = 1; parts <= windows.z; ++parts) {
            const double piece = double(ceil_div(windows.y, runs) + w.y - 1) * (ceil_div(windows.z, parts) + w.z - 1);
            const double seconds = (ceil_div(runs * parts, workers) + 0.25) * piece;
            if (best == 0 || seconds < best) best = seconds, p.filter_runs = runs, p.filter_parts = parts;
        }
}

void size_single(LayerPlan& p, const Machine& machine) {
    if (p.filters()) cut_filtered(p, machine.workers);
    const SingleSizes sizes(p, false), sums(p, true);
    p.rows_forward = units_per_piece(single_seconds(p, 1, machine).forward, sizes.count, sizes.count, machine);
    // The same for any number of workers, as they are what the order of summation depends on.
    const double all = single_seconds(p, sums.count, {}).update;
    const double piece = std::max({all / 128, std::min(all / 32, 5e-5), 1e-5});  // short ones pay for the rows they read again
    p.update_chunks = clamp_count(all / piece / p.out_bundles, sums.count);
    p.pieces[int(Phase::forward_inverse)] = p.filters() ? p.filter_runs * p.filter_parts : ceil_div(sizes.count, p.rows_forward);
    p.pieces[int(Phase::update_product)] = p.out_bundles * p.update_chunks;
    p.scratch = std::max(p.scratch, std::size_t(std::max(sizes.floats(p.bundle), sums.floats(p.bundle))) * sizeof(float));
}

}  // namespace

LayerPlan plan_direct(const Problem& problem, int bundle, const Machine& machine) {
    LayerPlan p = base_plan(problem, bundle);
    const Extent k = problem.kernel;
    const int in = problem.fan_in(), out = problem.fan_out();
    const long taps = long(k.volume());
    const bool pointwise = taps == 1;
    p.method = Method::direct;
    const bool single = is_single(p);
    if (p.pools() && !can_pool(p, problem.pool, problem.filter))
        throw std::invalid_argument("convolution layer: the direct method cannot pool windows of " + to_string(problem.pool));
    p.few_outputs = out <= 4 && !single && !problem.depthwise;
    const bool wide = has_wide_registers();
    // Bundles of outputs that a block of registers sums: two where adjacent taps share what they read (direct.cpp), which is
    // more than the reads that a third one would spare.
    const bool adjacent = k.x > 1 && problem.sparsity.x == 1;
    const auto group = [&](int maps) { return problem.depthwise ? 1 : wide && adjacent && maps > 1 ? 2 : 3; };
    p.group_out = group(in), p.group_in = group(out);
    // In the update three adjacent taps of several maps see one bundle of gradients at a time.
    const bool threes = adjacent && k.x % 3 == 0 && !problem.depthwise;
    p.group_sums = p.few_outputs ? p.group_in : threes && in > 1 ? 1 : p.group_out;
    const int out_row = pointwise ? std::min<int>(kRowVoxels, int(p.output.volume())) : p.output.x;
    const int in_row = pointwise ? out_row : problem.input.x;
    const int out_bundles = p.few_outputs ? 1 : std::min(p.group_out, p.out_bundles);
    const double forward = direct_seconds(p, out_row, out_row, in, out_bundles, machine);
    const double backward = direct_seconds(p, in_row, in_row, out, std::min(p.group_in, p.in_bundles), machine);
    const int out_rows = forward_rows(p), in_rows = row_count(p, problem.input);
    p.rows_forward = units_per_piece(forward * problem.pool.z * problem.pool.y, out_rows, out_rows, machine);
    p.rows_backward = units_per_piece(backward, in_rows, in_rows, machine);
    p.kernel_maps_in = units_per_piece(1e-9 * p.bundle * taps, double(in) * p.out_bundles, in, machine);
    p.kernel_maps_in += p.kernel_maps_in % 2;  // kernels may be packed in pairs of maps
    p.kernel_maps_out = p.bundle * units_per_piece(4e-9 * p.bundle * p.bundle * taps, double(p.out_bundles) * p.in_bundles,
                                                   p.out_bundles, machine);

    auto set = [&](Phase phase, int count) { p.pieces[int(phase)] = count; };
    const int out_groups = group_count(p.out_bundles, p.group_out), in_groups = group_count(p.in_bundles, p.group_in);
    const int packed = packs_kernels(p) ? p.out_bundles * ceil_div(in, p.kernel_maps_in) : 0;
    set(Phase::kernels_forward, p.few_outputs ? p.in_bundles : packed);
    set(Phase::kernels_backward, p.in_bundles * ceil_div(out, p.kernel_maps_out));
    set(Phase::forward_inverse, (p.few_outputs ? 1 : out_groups) * ceil_div(out_rows, p.rows_forward));
    set(Phase::gradient_transform, pads_gradient(p) ? p.out_bundles * p.output.z : 0);
    set(Phase::backward_inverse, in_groups * ceil_div(in_rows, p.rows_backward));
    // Of one bundle of gradients, or of one map, more voxels fit, and wider vectors are through with them sooner.
    if (wide && threes) p.patch_voxels *= 2;
    // Enough chunks for many workers where there are few pairs of bundles, none shorter than a piece.
    const int pairs = p.few_outputs || problem.depthwise ? in_groups : p.in_bundles * group_count(p.out_bundles, p.group_sums);
    const double pace = wide ? 2.5 : 1;  // of wide registers, beside the default rates
    const double all = direct_seconds(p, out_row, double(p.output.volume()), in, p.out_bundles, machine) / pace;
    // The same for any number of workers, as they are what the order of summation depends on.
    p.update_chunks = clamp_count(std::min(all / std::max(piece_aim(all, 2, machine), 1e-5), 64.0) / pairs, PatchGrid(p).count());
    set(Phase::update_product, pairs * p.update_chunks);
    set(Phase::update_inverse, p.few_outputs ? p.in_bundles : p.out_bundles * ceil_div(in, p.kernel_maps_in));

    const long pooled = p.pools() ? long(problem.pool.y) * p.output.x + 2L * p.output.x / problem.pool.x : 0;
    const long rows = 3L * std::max<long>(finished_voxels(p), pooled), turned = p.bundle * taps;
    const long doubled = wide && p.bundle == 8 ? 3L * 2 * p.patch_voxels : 0;  // gradients for pairs of maps
    p.scratch = std::size_t(std::max({rows, turned, doubled})) * p.bundle * sizeof(float);
    if (single) size_single(p, machine);
    return p;
}

namespace {

bool can_filter(const LayerPlan& p, Extent window) {
    const Extent s = p.problem.sparsity, left = valid_extent(p.output, window, s);
    if (window.volume() > most_filtered) return false;
    if (std::min({left.z, left.y, left.x}) < 1) return false;
    if (p.method == Method::direct) return is_single(p) && s.volume() == 1;
    if (p.fused) return false;
    const int w[3] = {window.z, window.y, window.x};
    return std::all_of(p.axis, p.axis + 3, [&](const Axis& axis) { return w[p.order[&axis - p.axis]] == 1 || axis.tiles == 1; });
}

}  // namespace

bool can_pool(const LayerPlan& p, Extent window, bool filter) {
    const int w[3] = {window.z, window.y, window.x};
    if (std::min({w[0], w[1], w[2]}) < 1 || window.volume() > 127) return false;
    if (filter) return can_filter(p, window);
    if (p.method == Method::direct) {
        const Extent m = p.output;
        const bool adjacent = !is_single(p) || p.problem.sparsity.x == 1;  // taps, that walk windows side by side (single.cpp)
        return !p.problem.depthwise && adjacent && m.z % w[0] == 0 && m.y % w[1] == 0 && m.x % w[2] == 0;
    }
    for (int a = 0; a < 3; ++a) {
        const Axis& axis = p.axis[a];
        const int length = w[p.order[a]];
        if (length > 1 && axis.s > 1) return false;
        if (axis.m % length || (axis.tiles > 1 && axis.M < length)) return false;
    }
    return true;
}

int bias_parts(const LayerPlan& p) { return p.method == Method::direct ? p.update_chunks : p.tiles; }

bool packs_input(const LayerPlan& p) {
    return is_single(p) || (p.fused && p.problem.in_maps == 1);
}

std::size_t kernel_floats(const LayerPlan& p) {
    return std::size_t(p.out_bundles) * p.problem.fan_in() * p.problem.kernel.volume() * p.bundle;
}

std::size_t buffer_bytes(const LayerPlan& p, Buffer buffer) {
    const std::size_t in = p.problem.fan_in(), out = p.problem.fan_out(), taps = p.problem.kernel.volume(), V = p.bundle;
    std::size_t floats = 0;
    if (p.method == Method::direct) {
        if (buffer == Buffer::kernels_forward && packs_kernels(p))
            floats = p.few_outputs ? taps * p.in_bundles * out * V : p.out_bundles * (in + in % 2) * taps * V;
        if (buffer == Buffer::kernels_backward) floats = p.in_bundles * (out + out % 2) * taps * V;
        if (buffer == Buffer::gradient_spectra && pads_gradient(p))
            floats = std::size_t(p.out_bundles) * p.output.z * p.output.y * padded_row(p) * V;
        if (buffer == Buffer::update_spectra) floats = std::size_t(p.update_chunks) * update_chunk_vectors(p) * V;
        return floats * sizeof(float);
    }
    const std::size_t pencils = p.pencils, in_kernels = kernel_pencil(p, int(in)) * V, out_kernels = kernel_pencil(p, int(out)) * V;
    if (p.fused && buffer == Buffer::output_spectra) return 0;
    if (p.fused && buffer == Buffer::input_spectra) return p.shares_inputs ? fused_spectra_bytes(p) : 0;
    switch (buffer) {
        case Buffer::kernels_forward: floats = p.out_bundles * pencils * in_kernels; break;
        case Buffer::kernels_backward: floats = p.in_bundles * pencils * out_kernels; break;
        case Buffer::input_spectra: floats = p.in_slab * p.kept_slabs; break;
        case Buffer::gradient_spectra: floats = p.out_slab * p.passing_slabs; break;
        case Buffer::input_gradient_spectra: floats = p.in_slab * p.passing_slabs; break;
        case Buffer::output_spectra: floats = p.out_slab * p.passing_slabs; break;
        case Buffer::halo: floats = p.axis[p.split].tiles > 1 ? p.in_bundles * p.strips * HaloShape(p).volume * V : 0; break;
        case Buffer::update_spectra: floats = p.update_chunks * p.out_bundles * pencils * in_kernels; break;
    }
    return floats * sizeof(float);
}

int first_piece(const LayerPlan& p, Phase phase, int slab) {
    const int all = piece_count(p, phase);
    if (slab >= p.slabs || all == 0) return all;
    if (p.fused && (phase == Phase::input_transform || phase == Phase::forward_inverse || phase == Phase::update_product))
        return slab ? all : 0;
    if (slab == 0) return 0;
    switch (phase) {
        case Phase::input_transform: return slab * tile_pieces(p, p.tiles_per_slab, p.in_bundles, p.transform_tiles);
        case Phase::gradient_transform:
        case Phase::forward_inverse: return slab * tile_pieces(p, p.tiles_per_slab, p.out_bundles, p.transform_tiles);
        case Phase::forward_product: return slab * product_pieces(p, p.forward_parts);
        case Phase::backward_product: return slab * product_pieces(p, p.backward_parts);
        case Phase::update_product: return slab * product_pieces(p, p.sums_parts);
        case Phase::backward_inverse: {
            int piece = 0;
            const int first_strip = slab * (p.tiles_per_slab / p.tiles_per_strip);
            while (piece < all && strip_piece(p, piece).tile_strip < first_strip) piece += p.in_bundles;
            return piece;
        }
        default: return all;
    }
}

void run_piece(const LayerPlan& p, Phase phase, int index, const Buffers& buffers, float* scratch) {
    const Path& chosen = path();
    const Run run = p.method == Method::direct ? (p.bundle == 16 ? chosen.direct16 : chosen.direct)
                                               : (p.bundle == 16 ? chosen.tiled16 : chosen.tiled);
    run(p, phase, index, buffers, scratch);
}

// ---- cost model

namespace {
double sum(const Cost& c, std::initializer_list<Phase> phases) {
    double s = 0;
    for (Phase phase : phases) s += c.phase[int(phase)];
    return s;
}
}  // namespace

double Cost::forward() const {
    return sum(*this, {Phase::kernels_forward, Phase::input_transform, Phase::forward_product, Phase::forward_inverse});
}
double Cost::backward() const {
    return sum(*this, {Phase::kernels_backward, Phase::gradient_transform, Phase::backward_product,
                       Phase::backward_inverse, Phase::backward_join});
}
double Cost::update() const { return sum(*this, {Phase::update_product, Phase::update_inverse}); }

bool takes_part(const LayerPlan& p, Phase phase, bool backward) {
    if (backward) return true;
    // The update still needs the spectra of gradients, or these spread, unless it makes its own.
    if (phase == Phase::gradient_transform) return p.method == Method::tiled ? !p.fused : p.pools() && !is_single(p);
    return phase != Phase::kernels_backward && phase != Phase::backward_product && phase != Phase::backward_inverse &&
           phase != Phase::backward_join;
}

Cost predict(const LayerPlan& p, const Machine& machine, bool backward) {
    Cost c = predict(p, machine);
    for (int phase = 0; phase < kPhases; ++phase)
        if (!takes_part(p, Phase(phase), backward)) c.phase[phase] = 0;
    return c;
}

Cost predict(const LayerPlan& p, const Machine& machine) {
    Cost c;
    auto set = [&](Phase phase, double seconds) { c.phase[int(phase)] = seconds; };
    const int in = p.problem.fan_in(), out = p.problem.fan_out();
    const auto image = [&](bool of_input, bool written) {
        const Extent extent = of_input ? p.problem.input : p.problem.pooled(p.output);
        return image_seconds(extent, of_input ? p.in_bundles : p.out_bundles, p.bundle, written, machine);
    };
    const double in_read = image(true, false), in_written = image(true, true);
    const double out_read = image(false, false), out_written = image(false, true);
    if (p.method == Method::direct) {
        const double taps = double(p.problem.kernel.volume()), voxels = double(p.output.volume());
        const double weights = taps * in * p.out_bundles * p.bundle * 4;
        const int lanes_out = p.few_outputs ? out : p.out_bundles * p.bundle;
        const int row = is_pointwise(p) ? int(voxels) : p.output.x;
        const double useful = double(lanes_out) / (p.out_bundles * p.bundle);
        const double forward = direct_seconds(p, row, voxels, p.few_outputs ? p.in_bundles * p.bundle : in, p.out_bundles,
                                              machine) * useful;
        set(Phase::kernels_forward, packs_kernels(p) ? 3 * weights / machine.memory_bytes : 0.0);
        set(Phase::kernels_backward, 6 * weights / machine.memory_bytes);
        const double pooled = p.pools() ? pool_seconds(p, machine) : 0;
        set(Phase::forward_inverse, forward + pooled + in_read + out_written);
        set(Phase::gradient_transform, pads_gradient(p) ? 8.0 * voxels * p.out_bundles * p.bundle / machine.memory_bytes : 0.0);
        // Every tap of an input voxel is walked, in x also those that meet only zeros.
        const double rows = voxels / p.output.x * (is_pointwise(p) ? p.output.x : p.problem.input.x);
        set(Phase::backward_inverse, direct_seconds(p, p.problem.input.x, rows, out, p.in_bundles, machine) + out_read + in_written);
        set(Phase::update_inverse, (p.update_chunks + 2) * weights / machine.memory_bytes);
        set(Phase::update_product, direct_seconds(p, row, voxels, p.few_outputs ? p.in_bundles * p.bundle : in,
                                                  p.out_bundles, machine) * useful * 1.1 + in_read + out_read);
        if (is_single(p)) {
            const Extent windows = p.problem.pooled(p.output);
            const SingleSeconds all = single_seconds(p, double(windows.z) * windows.y, machine);
            set(Phase::forward_inverse, all.forward + in_read + out_written);
            set(Phase::update_product, all.update + in_read + out_read);
        }
        return c;
    }
    const double bytes_in = bytes_of_spectra(p, p.in_bundles), bytes_out = bytes_of_spectra(p, p.out_bundles);
    // Spectra beyond L3 are written to and read from memory; slabs save one of the two ways.
    const double beyond = bytes_in + bytes_out > double(machine.l3_bytes) ? (p.slabs > 1 ? 0.5 : 1.0) : 0.0;
    const double memory_in = beyond * bytes_in / machine.memory_bytes, memory_out = beyond * bytes_out / machine.memory_bytes;
    // Tiles' spectra that outgrow L2 go to L3 and come from there; kernels' do so in longer runs, twice as fast.
    const double outgrow = bytes_in + bytes_out > double(machine.l2_bytes) ? 1.0 : 0.0;
    const double cache_in = outgrow * bytes_in / machine.spectra_bytes, cache_out = outgrow * bytes_out / machine.spectra_bytes;
    const double cache_kernels = 8.0 * p.bundle * p.pencils * p.axis[0].k * in * p.out_bundles / (2 * machine.spectra_bytes);
    set(Phase::kernels_forward, kernel_seconds(p, in, p.out_bundles, machine) + cache_kernels);
    set(Phase::kernels_backward, kernel_seconds(p, out, p.in_bundles, machine) + cache_kernels);
    set(Phase::input_transform, p.in_bundles * p.tiles * transform_seconds(p, false, false, machine) + memory_in + cache_in + in_read);
    set(Phase::forward_product, product_seconds(p, in, p.out_bundles, machine) + memory_in + memory_out);
    set(Phase::forward_inverse, p.out_bundles * p.tiles * transform_seconds(p, false, true, machine) + memory_out + cache_out +
                                    out_written);
    set(Phase::gradient_transform, p.out_bundles * p.tiles * transform_seconds(p, true, false, machine) + memory_out + cache_out +
                                       out_read);
    set(Phase::backward_product, product_seconds(p, out, p.in_bundles, machine) + memory_in + memory_out);
    set(Phase::backward_inverse, p.in_bundles * p.tiles * transform_seconds(p, true, true, machine) + memory_in +
                                     1.5 * cache_in + in_written);
    set(Phase::backward_join, 4.0 * p.in_bundles * p.bundle * double(p.problem.input.volume()) / machine.memory_bytes *
                                  (p.axis[p.split].k - 1) / p.axis[p.split].M);
    set(Phase::update_product, product_seconds(p, in, p.out_bundles, machine) + memory_in + memory_out);
    set(Phase::update_inverse, kernel_seconds(p, in, p.out_bundles, machine) + cache_kernels);
    if (p.fused) {
        const FusedSeconds all = fused_seconds(p, machine);
        const double again = p.shares_inputs ? 0 : in_read;
        const double repeated = p.shares_inputs ? all.read : all.inputs;
        set(Phase::input_transform, p.shares_inputs ? all.inputs + all.write + in_read : 0), set(Phase::forward_product, 0);
        const double expand = parts_by_tile(p, p.fused_parts) * all.expand;
        set(Phase::forward_inverse, p.fused_parts * repeated + expand + all.forward + again + out_written);
        set(Phase::update_product, p.update_parts * repeated + all.update + again + out_read);
    }
    return c;
}

constexpr int kLongKernel = 8;  // from here on tiles beyond 64 are worth a look

std::vector<Extent> candidate_tiles(const Problem& problem, int bundle, const Machine& machine, int count, bool backward,
                                    bool fused) {
    check(problem, bundle);
    if (problem.depthwise) return {};
    // Per axis the smallest transform for every number of tiles.
    auto options = [](int n, int k, int s) {
        std::vector<int> extents;
        if (k == 1) return std::vector<int>{1};
        const int m = ceil_div(n - s * (k - 1), s), most = k < kLongKernel ? 64 : 128;
        for (int tiles = 1; tiles <= m; ++tiles) {
            int T = ceil_div(m, tiles) + k - 1;
            while (T <= most && !has_transform(T)) ++T;
            if (T > most || (T < k + 1 && !extents.empty())) continue;
            if (extents.empty() || extents.back() != T) extents.push_back(T);
        }
        return extents;
    };
    const Extent n = problem.input, k = problem.kernel, s = problem.sparsity;
    std::vector<std::pair<double, Extent>> ranked;
    for (int z : options(n.z, k.z, s.z))
        for (int y : options(n.y, k.y, s.y))
            for (int x : options(n.x, k.x, s.x)) {
                const Extent tile{z, y, x};
                if (tile.volume() > 40 * 40 * 40) continue;
                const LayerPlan plan = fused ? plan_fused(problem, bundle, tile, machine) : plan_tiled(problem, bundle, tile, machine);
                ranked.push_back({predict(plan, machine, backward).total(), tile});
            }
    std::stable_sort(ranked.begin(), ranked.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    std::vector<Extent> best;
    for (int i = 0; i < std::min<int>(count, int(ranked.size())); ++i) best.push_back(ranked[i].second);
    return best;
}

}  // namespace znn::tiled
