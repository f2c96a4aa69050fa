// Direct convolution on bundles: R voxels of a row by NB bundles of outputs in registers, inputs by broadcasts.
//
// Packed kernels: forward [out bundle][tap][in map][V], backward [in bundle][tap, x reversed][out map][V]. With few output
// maps the forward pass has input maps in its lanes instead, [tap][in bundle][out map][V], and sums across lanes at the end.
// Where registers are twice as wide as a bundle, two maps that come in share one: [in map / 2][V][2], summed at the end.
#include <algorithm>
#include <type_traits>
#include <utility>

#include "tiled/layout.hpp"
#include "tiled/variant.hpp"

namespace znn::tiled::ZNN_VARIANT {
namespace {

#if defined(__AVX512F__)
constexpr int kRows[] = {0, 14, 12, 8};     // by NB; GCC does not unroll loops of more than 16
constexpr int kFewRows[] = {0, 14, 12, 8, 6};
constexpr int kSharedRows[] = {0, 24, 12}, kSharedGroups = 2;  // what adjacent taps share, and by how many bundles at most
constexpr int kSharedUpdateRows = 8;
constexpr int kUpdateRows[] = {0, 16, 8, 8};
constexpr bool kTurns = true;  // values that adjacent taps share stay in registers
#elif defined(__AVX2__)
constexpr int kRows[] = {0, 12, 6, 4};
constexpr int kFewRows[] = {0, 8, 6, 4, 3};
constexpr int kSharedRows[] = {0, 11}, kSharedGroups = 1;
constexpr int kSharedUpdateRows = 4;
constexpr int kUpdateRows[] = {0, 8, 6, 4};
constexpr bool kTurns = false;
#else
constexpr int kRows[] = {0, 4, 2, 1};
constexpr int kFewRows[] = {0, 4, 2, 1, 1};
constexpr int kSharedRows[] = {0, 3}, kSharedGroups = 1;
constexpr int kSharedUpdateRows = 1;
constexpr int kUpdateRows[] = {0, 4, 2, 1};
constexpr bool kTurns = false;
#endif

// What a register sums: products of one map that comes in, a lane for each map that goes out.
struct One {
    typedef V Sum;
    static constexpr int maps = 1;
    static ZNN_INLINE float spread(const float* x) { return *x; }
    static ZNN_INLINE const Sum* vector(const float* p) { return vec(p); }
    template <int R>
    static ZNN_INLINE void store(const Sum (&sums)[R], V* out, bool adds) {
        for (int r = 0; r < R; ++r) out[r] = adds ? out[r] + sums[r] : sums[r];
    }
    static ZNN_INLINE void add(V* first, long, int, V sum) { *first += sum; }
};
#if defined(__AVX512F__) && ZNN_V == 8
// Of two maps, in turn, where a register is twice as wide as a bundle.
struct Two {
    typedef float Sum __attribute__((vector_size(64), may_alias));
    static constexpr int maps = 2;
    static ZNN_INLINE Sum spread(const float* x) {
        typedef double Pair __attribute__((may_alias));
        typedef double Pairs __attribute__((vector_size(64)));
        const double pair = *reinterpret_cast<const Pair*>(x);
        return Sum(Pairs{pair, pair, pair, pair, pair, pair, pair, pair});
    }
    static ZNN_INLINE V first(Sum sum) { return __builtin_shufflevector(sum, sum, 0, 2, 4, 6, 8, 10, 12, 14); }
    static ZNN_INLINE V second(Sum sum) { return __builtin_shufflevector(sum, sum, 1, 3, 5, 7, 9, 11, 13, 15); }
    static ZNN_INLINE const Sum* vector(const float* p) { return reinterpret_cast<const Sum*>(p); }
    static ZNN_INLINE Sum doubled(V g) {
        return __builtin_shufflevector(g, g, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    }
    static ZNN_INLINE Sum together(V a, V b) {
        return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    }
    template <int R>
    static ZNN_INLINE void store(const Sum (&sums)[R], V* out, bool adds) {
        typedef float TwoVoxels __attribute__((vector_size(64), may_alias, aligned(32)));
        for (int r = 0; r + 1 < R; r += 2) {
            const Sum a = sums[r], b = sums[r + 1];
            const auto both = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
                              __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
            TwoVoxels& to = *reinterpret_cast<TwoVoxels*>(out + r);
            to = adds ? to + both : both;
        }
        const V last = first(sums[R - 1]) + second(sums[R - 1]);
        if (R % 2) out[R - 1] = adds ? out[R - 1] + last : last;
    }
    // `maps`: of the two, those that exist.
    static ZNN_INLINE void add(V* to, long step, int maps, Sum sum) {
        to[0] += first(sum);
        if (maps > 1) to[step] += second(sum);
    }
};
#else
using Two = One;
#endif
constexpr int kOwnTaps = 3;  // x taps of kernels that have functions of their own: the usual ones
// Rows of three voxels and more may fall into blocks of one.
constexpr bool kShortBlocks = std::min({kRows[1], kRows[2], kRows[3], kSharedRows[kSharedGroups]}) < 3;

// The taps one output row takes part in, and what they touch. Steps of x in floats, of w in vectors.
struct Walk {
    int nz, ny, nx, bundles, lanes, last_lanes;
    long z, y, x, bundle, lane;     // steps of the input
    long w_z, w_y, w_tap, w_out;    // steps of the kernels; lanes and bundles are consecutive
    int together = 1;               // rows of taps whose products are added one by one
    bool adds = false;              // to what is in the output already
};

// taps: one map comes in, whose x taps are its lanes; single: whose kOwnTaps are; shared: one bundle goes out, by several
// adjacent x taps; few: few go out.
enum class Maps { many, taps, single, shared, few };
template <Maps M>
using Lanes = std::conditional_t<M == Maps::many || M == Maps::shared, Two, One>;

// How many voxels that kOwnTaps taps of a block would meet lie before and after the row, kOwnTaps - 1 at most: left out, they
// need not be zeros in memory.
struct Edge {
    int before = 0, after = 0;
};

// Voxels First to Last-1 of a block, one tap, the maps of one bundle; the kernels of the next.
template <int First, int Last, int R, int NB, Maps M, class W = typename Lanes<M>::Sum>
[[gnu::always_inline]] inline const W* add_maps(const Walk& k, const float* at, const W* w, int lanes, long lane,
                                               W (&sum)[NB][R]) {
#pragma GCC unroll 4
    for (int l = 0; l < lanes; ++l, ++w, at += lane) {
        W weight[NB];
        for (int b = 0; b < NB; ++b) weight[b] = w[b * k.w_out];
        for (int r = First; r < Last; ++r)
            for (int b = 0; b < NB; ++b) sum[b][r] += Lanes<M>::spread(at + r * kV) * weight[b];
    }
    return w;
}

// All maps.
template <int First, int Last, int R, int NB, Maps M, class W = typename Lanes<M>::Sum>
[[gnu::always_inline]] inline const W* add_tap(const Walk& k, const float* x, const W* w, W (&sum)[NB][R]) {
    if constexpr (M == Maps::single) return add_maps<First, Last, R, NB, M>(k, x, w, kOwnTaps, k.lane, sum);
    if constexpr (M != Maps::many) return add_maps<First, Last, R, NB, M>(k, x, w, k.last_lanes, k.lane, sum);
    constexpr int whole = kV / Two::maps;  // counts known beforehand are worth a twentieth in loops this short
    for (int bundle = 1; bundle < k.bundles; ++bundle, x += k.bundle)
        w = add_maps<First, Last, R, NB, M>(k, x, w, whole, Two::maps, sum);
    if (k.last_lanes == whole) return add_maps<First, Last, R, NB, M>(k, x, w, whole, Two::maps, sum);
    return add_maps<First, Last, R, NB, M>(k, x, w, k.last_lanes, Two::maps, sum);
}

template <int Tap, int R, int NB, Maps M, Edge E, class W = typename Lanes<M>::Sum>
[[gnu::always_inline]] inline const W* add_edge_tap(const Walk& k, const float* row, const W* w, W (&sum)[NB][R]) {
    constexpr int first = std::max(0, E.before - Tap), last = R - std::max(0, E.after - (kOwnTaps - 1 - Tap));
    if constexpr (first < last)
        return add_tap<first, last, R, NB, M>(k, row + Tap * k.x, w, sum);
    else
        return w + (k.bundles - 1) * k.lanes + k.last_lanes;
}

template <int R, int NB, Maps M, Edge E>
void forward_block(const Walk& k, const float* in, const float* kernels, V* out, long out_bundle) {
    using W = typename Lanes<M>::Sum;
    const int nx = M == Maps::single ? 1 : k.nx;
    W sum[NB][R];
    clear(sum);
    for (int jz = 0; jz < k.nz; ++jz) {
        for (int jy = 0; jy < k.ny; ++jy) {
            const float* row = in + jz * k.z + jy * k.y;
            const W* w = reinterpret_cast<const W*>(kernels) + jz * k.w_z + jy * k.w_y;
            if constexpr (E.before == 0 && E.after == 0) {
                for (int jx = 0; jx < nx; ++jx, row += k.x) w = add_tap<0, R, R, NB, M>(k, row, w, sum);
            } else {
                w = add_edge_tap<0, R, NB, M, E>(k, row, w, sum);
                w = add_edge_tap<1, R, NB, M, E>(k, row, w, sum);
                w = add_edge_tap<2, R, NB, M, E>(k, row, w, sum);
            }
        }
    }
    for (int b = 0; b < NB; ++b)
        Lanes<M>::store(sum[b], out + b * out_bundle, k.adds);
}

using Shared = Two::Sum;

// Voxels First to Last-1, J adjacent taps, one lane after another: one voxel read serves all taps that meet it.
template <int First, int Last, int J, int R, int NB>
[[gnu::always_inline]] inline void add_shared_taps(const Walk& k, const float* x, const Shared* w, int lanes,
                                                   Shared (&sum)[NB][R]) {
#pragma GCC unroll 2 * Two::maps
    for (int l = 0; l < lanes; ++l, ++w, x += Two::maps) {
        Shared weight[J][NB];
        for (int j = 0; j < J; ++j)
            for (int b = 0; b < NB; ++b) weight[j][b] = w[j * k.w_tap + b * k.w_out];
#pragma GCC unroll 32
        for (int r = First; r < Last; ++r)
            for (int j = std::max(0, r - R + 1); j <= std::min(r, J - 1); ++j)
                for (int b = 0; b < NB; ++b) sum[b][r - j] += Two::spread(x + r * kV) * weight[j][b];
    }
}

// A row of taps, kOwnTaps at a time.
template <int R, int NB, Edge E>
[[gnu::always_inline]] inline void add_shared_row(const Walk& k, const float* x, const Shared* w, int lanes,
                                                  Shared (&sum)[NB][R]) {
    constexpr int J = kOwnTaps, first = E.before, last = R + J - 1 - E.after;
    int left = k.nx;
    for (; left >= J; left -= J, x += J * kV, w += J * k.w_tap) add_shared_taps<first, last, J>(k, x, w, lanes, sum);
    if constexpr (E.before == 0 && E.after == 0) {
        static_assert(J == 3);
        if (left == 2) add_shared_taps<0, R + 1, 2>(k, x, w, lanes, sum);
        if (left == 1) add_shared_taps<0, R, 1>(k, x, w, lanes, sum);
    }
}

// Adjacent taps, which share what they read: reads would else be many beside the multiplications of few bundles of outputs.
template <int R, int NB, Edge E>
void shared_block(const Walk& k, const float* in, const float* kernels, V* out, long out_bundle) {
    constexpr int whole = kV / Two::maps;
    Shared sum[NB][R];
    clear(sum);
    for (int jz = 0; jz < k.nz; ++jz) {
        for (int jy = 0; jy < k.ny; ++jy) {
            const float* x = in + jz * k.z + jy * k.y;
            const Shared* w = reinterpret_cast<const Shared*>(kernels) + jz * k.w_z + jy * k.w_y;
            for (int bundle = 1; bundle <= k.bundles; ++bundle, x += k.bundle, w += whole) {
                const int lanes = bundle == k.bundles ? k.last_lanes : k.lanes;
                if (lanes == whole)  // a count known beforehand is worth a twentieth in a loop this short
                    add_shared_row<R, NB, E>(k, x, w, whole, sum);
                else
                    add_shared_row<R, NB, E>(k, x, w, lanes, sum);
            }
        }
    }
    for (int b = 0; b < NB; ++b) Two::store(sum[b], out + b * out_bundle, k.adds);
}

// Lanes are input maps; sums across them give output maps 0..O-1.
template <int R, int O>
void few_block(const Walk& k, const float* in, const float* kernels, V* out, long) {
    V sum[O][R];
    clear(sum);
    for (int jz = 0; jz < k.nz; ++jz) {
        for (int jy = 0; jy < k.ny; ++jy) {
            const float* row = in + jz * k.z + jy * k.y;
            const V* w = vec(kernels) + jz * k.w_z + jy * k.w_y;
            for (int jx = 0; jx < k.nx; ++jx, row += k.x) {
                const V* x = vec(row);
                for (int bundle = 0; bundle < k.bundles; ++bundle, x += k.bundle / kV, w += O) {
                    V weight[O];
                    for (int o = 0; o < O; ++o) weight[o] = w[o];
                    for (int r = 0; r < R; ++r) {
                        const V value = x[r];
                        for (int o = 0; o < O; ++o) sum[o][r] += value * weight[o];
                    }
                }
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        V voxel{};
        for (int o = 0; o < O; ++o) {
            float total = 0;
            for (int l = 0; l < kV; ++l) total += sum[o][r][l];
            voxel[o] = total;
        }
        out[r] = k.adds ? out[r] + voxel : voxel;
    }
}

using RowFunction = void (*)(const Walk&, const float*, const float*, V*, long);

// Voxels of a register block with NB bundles (few: O maps).
constexpr int most_rows(Maps maps, int group) {
    return maps == Maps::few ? kFewRows[group] : maps == Maps::shared ? kSharedRows[group] : kRows[group];
}

template <int NB, Maps M, Edge E, int R>
constexpr RowFunction block_function() {
    if constexpr (M == Maps::few)
        return few_block<R, NB>;
    else if constexpr (M == Maps::shared)
        return shared_block<R, NB, E>;
    else
        return forward_block<R, NB, M, E>;
}

template <int NB, Maps M, Edge E, int... R>
RowFunction row_function(int rows, std::integer_sequence<int, R...>) {
    static constexpr RowFunction functions[] = {block_function<NB, M, E, R + 1>()...};
    return functions[rows - 1];
}

// The function of so many voxels of a row, for a register block of group NB (few: O maps).
template <int NB, Maps M, Edge E>
RowFunction row_function(int rows) {
    return row_function<NB, M, E>(rows, std::make_integer_sequence<int, most_rows(M, NB)>());
}

template <Maps M, Edge E = Edge{}>
RowFunction row_function(int group, int rows) {
    constexpr int most = M == Maps::few ? 4 : M == Maps::shared ? kSharedGroups : 3;
    if constexpr (most >= 4)
        if (group == 4) return row_function<4, M, E>(rows);
    if constexpr (most >= 3)
        if (group == 3) return row_function<3, M, E>(rows);
    if constexpr (most >= 2)
        if (group == 2) return row_function<2, M, E>(rows);
    return row_function<1, M, E>(rows);
}

template <Maps M>
RowFunction row_function(int group, int rows, Edge edge) {
    constexpr int whole = kOwnTaps - 1;
    static_assert(whole == 2);
    switch (3 * edge.before + edge.after) {
        case 2: return row_function<M, Edge{0, whole}>(group, rows);
        case 6: return row_function<M, Edge{whole, 0}>(group, rows);
        case 8: return row_function<M, Edge{whole, whole}>(group, rows);
    }
    if constexpr (kShortBlocks) {
        switch (3 * edge.before + edge.after) {
            case 1: return row_function<M, Edge{0, 1}>(group, rows);
            case 3: return row_function<M, Edge{1, 0}>(group, rows);
            case 4: return row_function<M, Edge{1, 1}>(group, rows);
            case 5: return row_function<M, Edge{1, 2}>(group, rows);
            case 7: return row_function<M, Edge{2, 1}>(group, rows);
        }
    }
    return row_function<M>(group, rows);
}

RowFunction row_function(Maps maps, int group, int rows, Edge edge) {
    switch (maps) {
        case Maps::few: return row_function<Maps::few>(group, rows);
        case Maps::taps: return row_function<Maps::taps>(group, rows);
        case Maps::single: return row_function<Maps::single>(group, rows);
        case Maps::shared: return row_function<Maps::shared>(group, rows, edge);
        case Maps::many: break;
    }
    // Edges are of adjacent taps, for which plans have no more bundles than these share.
    if constexpr (kSharedGroups > 1) return row_function<Maps::many>(group, rows);
    return row_function<Maps::many>(group, rows, edge);
}

// A row of `voxels` in nearly equal register blocks. cut: the row of inputs begins kOwnTaps - 1 voxels late and ends as many
// early, under kOwnTaps adjacent taps of many maps.
struct Row {
    Maps maps;
    int group, voxels;
    bool cut;
    int blocks = ceil_div(voxels, most_rows(maps, group)), least = voxels / blocks, larger = voxels % blocks;
    // Looked up for each short row anew, it would be felt.
    RowFunction only = blocks == 1 ? row_function(maps, group, voxels, cut ? Edge{kOwnTaps - 1, kOwnTaps - 1} : Edge{}) : nullptr;
};

// Results in `out`, bundles `out_bundle` vectors apart.
void convolve_taps(const Walk& k, const Row& row, const float* in, const float* kernels, V* out, long out_bundle) {
    if (row.only) return row.only(k, in, kernels, out, out_bundle);
    for (int i = 0, done = 0; i < row.blocks; ++i) {
        const int r = row.least + (i < row.larger), left = row.voxels - done - r;
        const Edge edge = row.cut ? Edge{std::max(0, kOwnTaps - 1 - done), std::max(0, kOwnTaps - 1 - left)} : Edge{};
        row_function(row.maps, row.group, r, edge)(k, in, kernels, out, out_bundle);
        in += r * kV;
        out += r;
        done += r;
    }
}

// The same, rows of taps in groups whose sums are added up.
void convolve_groups(Walk k, const Row& row, const float* in, const float* kernels, V* out, long out_bundle) {
    const int nz = k.nz, ny = k.ny, vector = row.maps == Maps::many || row.maps == Maps::shared ? Two::maps * kV : kV;
    const int planes = std::max(1, k.together / ny), lines = std::min(k.together, ny), across = group_count(ny, lines);
    for (int i = 0; i < group_count(nz, planes) * across; ++i) {
        const GroupRange z = group_range(nz, planes, i / across), y = group_range(ny, lines, i % across);
        k.nz = z.last - z.first, k.ny = y.last - y.first, k.adds = i > 0;
        const float* own = kernels + (z.first * k.w_z + y.first * k.w_y) * vector;
        convolve_taps(k, row, in + z.first * k.z + y.first * k.y, own, out, out_bundle);
    }
}

void convolve_row(const Walk& k, const Row& row, const float* in, const float* kernels, V* out, long out_bundle) {
    if (k.nz * k.ny <= k.together)
        convolve_taps(k, row, in, kernels, out, out_bundle);
    else
        convolve_groups(k, row, in, kernels, out, out_bundle);
}

// Where the voxels of rows go: into work space, to be finished from there; or where there is nothing to finish, where they belong.
struct Place {
    V* sums;
    V* image = nullptr;     // its first bundle
    long image_bundle = 0;  // vectors from bundle to bundle
};

// Rows [first, last) of an image, several together: add(z, y, to, step) convolves one to `to`, results of its bundles `step` vectors
// apart; with a 1x1x1 kernel add_part(start, voxels, to, step) does what is taken as a row. finish(start, voxels) ends each lot.
template <class Add, class AddPart, class Finish>
void each_row(const LayerPlan& p, Extent image, int first, int last, const Place& place, Add add, AddPart add_part, Finish finish) {
    const auto begin = [&](long start) { return place.image ? place.image + start : place.sums; };
    const auto step = [&](long voxels) { return place.image ? place.image_bundle : voxels; };
    if (is_pointwise(p)) {
        for (int i = first; i < last; ++i) {
            const long start = long(i) * kRowVoxels, voxels = std::min(long(kRowVoxels), long(image.volume()) - start);
            add_part(start, voxels, begin(start), step(voxels));
            if (!place.image) finish(start, voxels);
        }
        return;
    }
    int z = first / image.y, y = first % image.y;
    for (int i = first, now; i < last; i += now) {
        now = std::min(last - i, rows_together(image.x));
        const long start = long(i) * image.x, voxels = long(now) * image.x;
        for (int j = 0; j < now; ++j) {
            add(z, y, begin(start) + j * image.x, step(voxels));
            if (++y == image.y) y = 0, ++z;
        }
        if (!place.image) finish(start, voxels);
    }
}

// Rows [first, last) of windows of the output of a group of bundles: add(z, y, to, step) as above, finish(start, windows) ends each.
template <class Add, class Finish>
void each_pooled_row(const LayerPlan& p, const Buffers& b, GroupRange group, int first, int last, V* sums, Add add, Finish finish) {
    const Extent m = p.output, w = p.problem.pool;
    const int across = m.x / w.x, down = m.y / w.y, nb = group.last - group.first;
    const long step = long(w.y) * m.x;
    V* const maxima = sums + nb * step;
    for (int i = first; i < last; ++i) {
        for (int z = 0; z < w.z; ++z) {
            for (int y = 0; y < w.y; ++y) add(i / down * w.z + z, i % down * w.y + y, sums + y * m.x, step);
            for (int o = 0; o < nb; ++o)
                pool_row(sums + o * step, m.x, w.y, w.x, z * w.y * w.x, across, maxima + 2L * o * across);
        }
        const long start = long(i) * across;
        for (int o = 0; o < nb; ++o)
            take_maxima(maxima + 2L * o * across, across, sums + long(o) * across,
                        notes_at(b.largest, (group.first + o) * b.output_stride + start * kV));
        finish(start, across);
    }
}

// Input steps of one map become steps of x taps where there is only one map: the inner loop stays long. The walk's outputs are
// those of `group` bundles.
Maps set_maps(Walk& k, int maps, int group) {
    k.bundles = ceil_div(maps, kV);
    if (maps > 1) {
        k.lanes = kV / Two::maps;
        k.last_lanes = ceil_div(maps - (k.bundles - 1) * kV, Two::maps);
        k.lane = Two::maps;
        return group <= kSharedGroups && k.nx > 1 && k.x == kV ? Maps::shared : Maps::many;
    }
    k.last_lanes = k.nx;
    k.lane = k.x;
    k.nx = 1;
    return k.last_lanes == kOwnTaps ? Maps::single : Maps::taps;
}

// Vectors of one tap of packed kernels, by the maps that come in, and how long they are.
int tap_vectors(int maps) { return maps == 1 ? 1 : ceil_div(maps, Two::maps); }
int vector_floats(int maps) { return maps == 1 ? kV : Two::maps * kV; }
long tap_floats(int maps) { return long(tap_vectors(maps)) * vector_floats(maps); }

// The error of a sum grows with the root of the number of products that are added one by one.
constexpr int kMostSummands = 1024;

int tap_rows_together(const Walk& k, Maps maps) {
    const int products = k.nx * (maps == Maps::few ? k.bundles : (k.bundles - 1) * k.lanes + k.last_lanes);
    return std::max(1, kMostSummands / products);
}

void forward(const LayerPlan& p, int index, const Buffers& b, float* scratch) {
    const Extent n = p.problem.input, k = p.problem.kernel, s = p.problem.sparsity, m = p.output;
    const int maps = p.problem.in_maps, groups = p.few_outputs ? 1 : group_count(p.out_bundles, p.group_out);
    const int rows = forward_rows(p), first = index / groups * p.rows_forward;
    const GroupRange group = p.few_outputs ? GroupRange{0, 1} : group_range(p.out_bundles, p.group_out, index % groups);
    const int nb = group.last - group.first, taps = int(k.volume());
    const long per_tap = p.few_outputs ? long(p.in_bundles) * p.problem.out_maps : tap_vectors(maps);
    Walk walk{k.z, k.y, k.x, p.in_bundles, kV, kV, long(s.z) * n.y * n.x * kV, long(s.y) * n.x * kV, long(s.x) * kV,
              long(b.input_stride), 1, long(k.y) * k.x * per_tap, k.x * per_tap, per_tap, taps * per_tap};
    const Maps kind = p.few_outputs ? Maps::few : set_maps(walk, maps, nb);
    walk.together = tap_rows_together(walk, kind);
    const long bundle_floats = taps * (p.few_outputs ? per_tap * kV : tap_floats(maps));
    const float* kernels = b.at(Buffer::kernels_forward) + group.first * bundle_floats;
    const int last = std::min(rows, first + p.rows_forward), register_group = p.few_outputs ? p.problem.out_maps : nb;
    const Row whole{kind, register_group, m.x, false};
    V* sums = vec(scratch);
    const auto add = [&](int z, int y, V* to, long apart) {
        convolve_row(walk, whole, b.input + (long(z) * n.y + y) * n.x * kV, kernels, to, apart);
    };
    const auto add_part = [&](long start, long voxels, V* to, long apart) {
        convolve_row(walk, {kind, register_group, int(voxels), false}, b.input + start * kV, kernels, to, apart);
    };
    const auto finish = [&](long start, long voxels) {
        for (int o = 0; o < nb; ++o) {
            const int bundle = group.first + o;
            finish_forward(sums + o * voxels, vec(b.output + bundle * b.output_stride) + start, 1, voxels,
                           b.bias ? b.bias + bundle * kV : nullptr, b.transfer, b.accumulate_output);
        }
    };
    if (p.pools())
        each_pooled_row(p, b, group, first, last, sums, add, finish);
    else
        each_row(p, m, first, last, {sums}, add, add_part, finish);
}

// Rows of the output gradient, spread where it is pooled and collected where it is filtered, between zeros.
void pad_gradient(const LayerPlan& p, int index, const Buffers& b) {
    const Extent m = p.output, w = p.filters() ? Extent{1, 1, 1} : p.problem.pool;
    const int bundle = index / m.z, z = index % m.z, side = p.problem.sparsity.x * (p.problem.kernel.x - 1), across = m.x / w.x;
    const long row = padded_row(p), start = long(z / w.z) * (m.y / w.y) * across;
    const V* from = vec(b.output_gradient + bundle * b.output_gradient_stride) + start;
    const std::int8_t* largest = p.pools() ? b.largest + bundle * b.output_gradient_stride + start * kV : nullptr;
    const FilteredGradient filtered = filtered_gradient(p, b, bundle);
    V* to = vec(b.at(Buffer::gradient_spectra)) + (long(bundle) * m.z + z) * m.y * row;
    for (int y = 0; y < m.y; y += w.y, to += w.y * row) {
        if (p.filters())
            collect_row(filtered, z, y, to + side, nullptr);
        else if (p.pools())
            spread_row(from + long(y / w.y) * across, 1, largest + long(y / w.y) * across * kV, 1, across, w.y, w.x,
                       z % w.z * w.y * w.x, to + side, row);
        else
            std::copy_n(from + long(y) * across, m.x, to + side);
        for (int i = 0; i < w.y; ++i) {
            std::fill_n(to + i * row, side, V{});
            std::fill_n(to + i * row + side + m.x, side, V{});
        }
    }
}

void backward(const LayerPlan& p, int index, const Buffers& b, float* scratch) {
    const Extent n = p.problem.input, k = p.problem.kernel, s = p.problem.sparsity, m = p.output;
    const int maps = p.problem.out_maps, groups = group_count(p.in_bundles, p.group_in);
    const int rows = row_count(p, n), first = index / groups * p.rows_backward;
    const GroupRange group = group_range(p.in_bundles, p.group_in, index % groups);
    const int nb = group.last - group.first, taps = int(k.volume());
    const bool padded = pads_gradient(p), cut = k.x > 1 && !padded;
    const long length = padded ? padded_row(p) : m.x, before = cut ? k.x - 1 : 0;
    const long per_tap = tap_vectors(maps);
    const float* gradient = padded ? b.at(Buffer::gradient_spectra) : b.output_gradient;
    const long bundle_step = padded ? long(m.z) * m.y * length * kV : long(b.output_gradient_stride);
    Walk walk{k.z, k.y, k.x, 1, kV, kV, -long(s.z) * m.y * length * kV, -long(s.y) * length * kV,
              long(s.x) * kV, bundle_step, 1, k.y * k.x * per_tap, k.x * per_tap, per_tap, taps * per_tap};
    const Maps kind = set_maps(walk, maps, nb);
    walk.together = tap_rows_together(walk, kind);
    const float* kernels = b.at(Buffer::kernels_backward) + group.first * taps * tap_floats(maps);
    const int last = std::min(rows, first + p.rows_backward);
    const Row whole{kind, nb, n.x, cut};
    V* sums = vec(scratch);
    // One row: the taps along z and y whose outputs exist.
    const auto add = [&](int z, int y, V* to, long apart) {
        const TapRange tz(z, m.z, k.z, s.z), ty(y, m.y, k.y, s.y);
        if (tz.count == 0 || ty.count == 0) {
            for (int c = 0; c < nb; ++c) std::fill_n(to + c * apart, n.x, V{});
            return;
        }
        walk.nz = tz.count, walk.ny = ty.count;
        const long from = (long(z - s.z * tz.first) * m.y + (y - s.y * ty.first)) * length - before;
        const long first_tap = (long(tz.first) * k.y + ty.first) * k.x;
        convolve_row(walk, whole, gradient + from * kV, kernels + first_tap * tap_floats(maps), to, apart);
    };
    const auto add_part = [&](long start, long voxels, V* to, long apart) {
        convolve_row(walk, {kind, nb, int(voxels), false}, gradient + start * kV, kernels, to, apart);
    };
    const bool finished = !b.accumulate_input_gradient && !b.activation;
    V* const image = vec(b.input_gradient + group.first * b.input_gradient_stride);
    const Place place{sums, finished ? image : nullptr, long(b.input_gradient_stride) / kV};
    each_row(p, n, first, last, place, add, add_part, [&](long start, long voxels) {
        for (int c = 0; c < nb; ++c) {
            const int bundle = group.first + c;
            V* out = image + c * place.image_bundle + start;
            finish_forward(sums + c * voxels, out, 1, voxels, nullptr, Transfer::linear, b.accumulate_input_gradient);
            if (b.activation)
                apply_derivative(out, vec(b.activation + bundle * b.input_stride) + start, 1, voxels,
                                 b.activation_transfer);
        }
    });
}

// Kernels of the maps of a piece that come in; `kernel`: of a tap and a map.
template <class L, class Kernel>
void pack(int maps, const MapPiece& piece, long taps, Kernel kernel, float* to) {
    auto* at = reinterpret_cast<typename L::Sum*>(to);
    const int vectors = ceil_div(maps, L::maps);
    for (long tap = 0; tap < taps; ++tap, at += vectors)
        for (int i = piece.first; i < piece.last; i += L::maps) {
            if constexpr (L::maps == 1)
                at[i] = kernel(tap, i);
            else
                at[i / L::maps] = L::together(kernel(tap, i), i + 1 < piece.last ? kernel(tap, i + 1) : V{});
        }
}

template <class Kernel>
void pack(int maps, const MapPiece& piece, long taps, Kernel kernel, float* to) {
    if (maps == 1)
        pack<One>(maps, piece, taps, kernel, to);
    else
        pack<Two>(maps, piece, taps, kernel, to);
}

void pack_forward(const LayerPlan& p, int index, const Buffers& b, float* scratch) {
    const long taps = long(p.problem.kernel.volume());
    if (p.few_outputs) {
        V* turned = vec(scratch);
        transpose_kernels(p, b, 0, index, turned);
        for (int o = 0; o < p.problem.out_maps; ++o)
            for (long j = 0; j < taps; ++j)
                vec(b.at(Buffer::kernels_forward))[(j * p.in_bundles + index) * p.problem.out_maps + o] = turned[o * taps + j];
        return;
    }
    const MapPiece piece = map_piece(p.out_bundles, p.problem.in_maps, p.kernel_maps_in, index);
    const int maps = p.problem.in_maps;
    const V* from = vec(b.kernels) + piece.bundle * maps * taps;
    float* to = b.at(Buffer::kernels_forward) + piece.bundle * taps * tap_floats(maps);
    pack(maps, piece, taps, [&](long tap, int i) { return from[i * taps + tap]; }, to);
}

void pack_backward(const LayerPlan& p, int index, const Buffers& b, float* scratch) {
    const MapPiece piece = map_piece(p.in_bundles, p.problem.out_maps, p.kernel_maps_out, index);
    const long taps = long(p.problem.kernel.volume()), kx = p.problem.kernel.x;
    const int maps = p.problem.out_maps;
    V* turned = vec(scratch);
    float* to = b.at(Buffer::kernels_backward) + piece.bundle * taps * tap_floats(maps);
    for (int o = piece.first; o < piece.last; o += kV) {
        transpose_kernels(p, b, o / kV, piece.bundle, turned);
        const auto reversed = [&](long tap, int i) { return turned[(i - o) * taps + tap - tap % kx + (kx - 1 - tap % kx)]; };
        pack(maps, {piece.bundle, o, std::min(o + kV, piece.last)}, taps, reversed, to);
    }
}

// sums[r][b] += over rows and columns of a[r] g[b]: a by broadcasts, `a_r` floats apart, g as vectors (L::doubled ones). Of a
// single map r are the x taps, and there are y taps as well, `a_y` floats apart.
struct Patch {
    int rows, columns;
    const float* a;
    long a_r, a_x, a_row, a_y;
    const float* g;
    long g_bundle, g_row;  // floats
    V* sums;
    long sums_r, sums_bundle;
};

// R registers of as many maps, or pairs of maps, or taps; `count`: those maps that exist.
template <int R, int NB, class L>
[[gnu::always_inline]] inline void update_block(const Patch& k, int count) {
    typename L::Sum sum[R][NB];  // a patch is summed by itself first: fewer roundings of the large total
    clear(sum);
    for (int y = 0; y < k.rows; ++y) {
        const float* a = k.a + y * k.a_row;
        const float* g = k.g + y * k.g_row;
#pragma GCC unroll 2
        for (int x = 0; x < k.columns; ++x, a += k.a_x, g += L::maps * kV) {
            typename L::Sum value[NB];
            for (int b = 0; b < NB; ++b) value[b] = *L::vector(g + b * k.g_bundle);
            for (int r = 0; r < R; ++r)
                for (int b = 0; b < NB; ++b) sum[r][b] += L::spread(a + r * L::maps * k.a_r) * value[b];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < NB; ++b)
            L::add(k.sums + r * L::maps * k.sums_r + b * k.sums_bundle, k.sums_r, count - r * L::maps, sum[r][b]);
}

// Inlined, as calls would cost blocks this short a twentieth.
template <int NB, class L, int R = 1>
[[gnu::always_inline]] inline void update_rows(int count, const Patch& k) {
    if constexpr (R * L::maps < (L::maps == 1 ? kUpdateRows[NB] : kV)) {
        if (count > R * L::maps) return update_rows<NB, L, R + 1>(count, k);
    }
    update_block<R, NB, L>(k, count);
}

template <int NB, class L>
[[gnu::always_inline]] inline void update_all_rows(int count, Patch k) {
    const int blocks = ceil_div(count, kUpdateRows[NB]);
    for (int i = 0; i < blocks; ++i) {
        const int r = (i + 1) * count / blocks - i * count / blocks;
        update_rows<NB, L>(r, k);
        k.a += r * k.a_r;
        k.sums += r * k.sums_r;
    }
}

template <class L>
void update_patch(int nb, int count, const Patch& k) {
    switch (nb) {
        case 1: return update_all_rows<1, L>(count, k);
        case 2: return update_all_rows<2, L>(count, k);
        default: return update_all_rows<3, L>(count, k);
    }
}

// What one voxel of the input adds to R sums of maps: the taps First to Last-1 that meet it, each with an output voxel one
// further left.
template <int First, int Last, int R>
[[gnu::always_inline]] inline void add_shared(const float* a, const Shared (&value)[kOwnTaps], Shared (&sum)[R][kOwnTaps]) {
    for (int r = 0; r < R; ++r)
        for (int j = First; j < Last; ++j) sum[r][j] += Two::spread(a + r * Two::maps) * value[j];
}

// Of one bundle of outputs: R sums of maps by kOwnTaps adjacent taps at once; at least kOwnTaps - 1 columns. Output voxels
// that the next voxels of the input meet too stay in registers where these suffice.
template <int R>
[[gnu::noinline]] void shared_update_block(const Patch& k, int count) {
    static_assert(kOwnTaps == 3);
    Shared sum[R][kOwnTaps], value[kOwnTaps];
    clear(sum);
    for (int y = 0; y < k.rows; ++y) {
        const float* a = k.a + y * k.a_row;
        const Shared* g = Two::vector(k.g + y * k.g_row);
        value[0] = g[0];
        add_shared<0, 1>(a, value, sum);
        value[1] = value[0], value[0] = g[1];
        add_shared<0, 2>(a + kV, value, sum);
        a += 2 * kV, g += 2;
#pragma GCC unroll 6
        for (int x = 2; x < k.columns; ++x, a += kV, ++g) {
            if constexpr (kTurns) {
                value[2] = value[1], value[1] = value[0], value[0] = g[0];
            } else {
                asm("" : "+r"(g));  // else GCC keeps them all the same
                for (int j = 0; j < kOwnTaps; ++j) value[j] = g[-j];
            }
            add_shared<0, 3>(a, value, sum);
        }
        value[1] = g[-1], value[2] = g[-2];
        add_shared<1, 3>(a, value, sum);
        value[2] = value[1];
        add_shared<2, 3>(a + kV, value, sum);
    }
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < kOwnTaps; ++j)
            Two::add(k.sums + r * Two::maps * k.sums_r + j, k.sums_r, count - r * Two::maps, sum[r][j]);
}

template <int R = 1>
void shared_update_rows(int count, const Patch& k) {
    if constexpr (R * Two::maps < kSharedUpdateRows) {
        if (count > R * Two::maps) return shared_update_rows<R + 1>(count, k);
    }
    shared_update_block<R>(k, count);
}

void shared_update_patch(int maps, Patch k) {
    const int blocks = ceil_div(maps, kSharedUpdateRows);
    for (int i = 0; i < blocks; ++i) {
        const int r = (i + 1) * maps / blocks - i * maps / blocks;
        shared_update_rows(r, k);
        k.a += r;
        k.sums += r * k.sums_r;
    }
}

#if defined(__AVX512F__)
constexpr int kSingleRows[] = {0, 3, 3, 3};  // y taps by NB
#elif defined(__AVX2__)
constexpr int kSingleRows[] = {0, 3, 2, 1};
#else
constexpr int kSingleRows[] = {0, 1, 1, 1};
#endif

// Of a single map: R by kOwnTaps taps at once.
template <int NB, int R>
void single_update_block(const Patch& k) {
    V sum[R][kOwnTaps][NB];
    clear(sum);
    for (int y = 0; y < k.rows; ++y) {
        const float* a = k.a + y * k.a_row;
        const float* g = k.g + y * k.g_row;
        for (int x = 0; x < k.columns; ++x, a += k.a_x, g += kV) {
            V value[NB];
            for (int b = 0; b < NB; ++b) value[b] = *vec(g + b * k.g_bundle);
            for (int r = 0; r < R; ++r)
                for (int j = 0; j < kOwnTaps; ++j)
                    for (int b = 0; b < NB; ++b) sum[r][j][b] += a[r * k.a_y + j * k.a_r] * value[b];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < kOwnTaps; ++j)
            for (int b = 0; b < NB; ++b) k.sums[r * kOwnTaps + j + b * k.sums_bundle] += sum[r][j][b];
}

template <int NB, int R = 1>
void single_update_rows(int rows, const Patch& k) {
    if constexpr (R < kSingleRows[NB]) {
        if (rows > R) return single_update_rows<NB, R + 1>(rows, k);
    }
    single_update_block<NB, R>(k);
}

template <int NB>
void single_update_patch(int rows, Patch k) {
    for (int left = rows; left > 0; left -= kSingleRows[NB]) {
        const int now = std::min(left, kSingleRows[NB]);
        single_update_rows<NB>(now, k);
        k.a += now * k.a_y;
        k.sums += now * kOwnTaps;
    }
}

void single_update_patch(int nb, int rows, const Patch& k) {
    switch (nb) {
        case 1: return single_update_patch<1>(rows, k);
        case 2: return single_update_patch<2>(rows, k);
        default: return single_update_patch<3>(rows, k);
    }
}

// Copies what a patch has of nb bundles of gradients, as registers that sum two maps need it.
void double_gradient(Patch& patch, std::size_t bundle, int row, int nb, float* to) {
#if defined(__AVX512F__) && ZNN_V == 8
    Two::Sum* at = reinterpret_cast<Two::Sum*>(to);
    for (int b = 0; b < nb; ++b)
        for (int y = 0; y < patch.rows; ++y)
            for (int x = 0; x < patch.columns; ++x) *at++ = Two::doubled(vec(patch.g + b * bundle)[long(y) * row + x]);
    patch.g = to;
    patch.g_row = 2L * kV * patch.columns;
    patch.g_bundle = patch.g_row * patch.rows;
#endif
}

// Output gradients as the update reads them: where they are pooled, the copy that pad_gradient has spread.
struct Gradient {
    const float* first;
    long bundle;  // floats
    int row;      // voxels from row to row
};
Gradient gradient_of(const LayerPlan& p, const Buffers& b) {
    if (!p.pools()) return {b.output_gradient, long(b.output_gradient_stride), p.output.x};
    const int row = padded_row(p), side = (row - p.output.x) / 2;
    return {b.at(Buffer::gradient_spectra) + side * kV, long(p.output.z) * p.output.y * row * kV, row};
}

// Partial sums of one chunk of the output, all taps: one input bundle by one group of output bundles, laid out as kernels.
// With few outputs the lanes are input maps: one group of input bundles, [tap][out map][in bundle].
void update_partial(const LayerPlan& p, int index, const Buffers& b, float* scratch) {
    const Extent n = p.problem.input, k = p.problem.kernel, s = p.problem.sparsity;
    const bool few = p.few_outputs, pointwise = is_pointwise(p);
    const int bundles = few ? p.in_bundles : p.out_bundles, groups = group_count(bundles, p.group_sums);
    const GroupRange group = group_range(bundles, p.group_sums, index % groups);
    const int in_bundle = few ? 0 : index / groups % p.in_bundles, chunk = index / groups / (few ? 1 : p.in_bundles);
    const int nb = group.last - group.first, out_maps = p.problem.out_maps;
    const int maps = std::min(kV, p.problem.in_maps - in_bundle * kV);
    const bool over_taps = !few && maps == 1;  // rows of the register block are x taps instead of maps
    const bool single = over_taps && k.x == kOwnTaps;
    const bool dense = !few && !over_taps && s.x == 1;  // adjacent taps share what they read, of one bundle (plan.group_sums)
    const int count = few ? out_maps : over_taps ? k.x : maps;
    const long taps = long(k.volume());

    V* sums = vec(b.at(Buffer::update_spectra)) + chunk * update_chunk_vectors(p);
    Patch patch{};
    if (few) {
        sums += group.first;
        patch.sums_r = p.in_bundles, patch.sums_bundle = 1;
        for (long j = 0; j < taps * out_maps; ++j) std::fill_n(sums + j * p.in_bundles, nb, V{});
    } else {
        sums += (long(group.first) * p.problem.in_maps + in_bundle * kV) * taps;
        patch.sums_r = over_taps ? 1 : taps, patch.sums_bundle = p.problem.in_maps * taps;
        for (int o = 0; o < nb; ++o) std::fill_n(sums + o * patch.sums_bundle, maps * taps, V{});
    }
    const long tap_step = few ? long(out_maps) * p.in_bundles : 1;
    const Extent m = pointwise ? Extent{1, 1, int(p.output.volume())} : p.output;
    const Extent from = pointwise ? m : n;
    const float* image = b.input + (few ? group.first : in_bundle) * b.input_stride;
    const Gradient all = gradient_of(p, b);
    const float* gradient = all.first + (few ? 0 : group.first) * all.bundle;
    patch.a_r = over_taps ? s.x * kV : 1;
    patch.a_x = kV;
    patch.a_row = (few ? all.row : from.x) * kV;
    patch.a_y = s.y * from.x * kV;
    patch.g_row = (few ? from.x : all.row) * kV;
    patch.g_bundle = long(few ? b.input_stride : all.bundle);

    const PatchGrid grid(p);
    const int first = int(long(chunk) * grid.count() / p.update_chunks);
    const int last = int(long(chunk + 1) * grid.count() / p.update_chunks);
    for (int i = first; i < last; ++i) {
        const int z = i / (grid.down * grid.across), y = i / grid.across % grid.down * grid.rows, x = i % grid.across * grid.columns;
        patch.rows = std::min(grid.rows, m.y - y), patch.columns = std::min(grid.columns, m.x - x);
        const float* g = gradient + ((long(z) * m.y + y) * all.row + x) * kV;
        patch.g = g;
        if (Two::maps > 1 && !few && !over_taps) double_gradient(patch, all.bundle, all.row, nb, scratch);
        int step;
        for (int j = 0; j < taps; j += step) {
            const int jz = j / (k.y * k.x), jy = j / k.x % k.y, jx = j % k.x;
            const bool shared = nb == 1 && dense && jx + kOwnTaps <= k.x && patch.columns >= kOwnTaps - 1;
            step = single ? k.y * k.x : over_taps ? k.x : shared ? kOwnTaps : 1;
            const float* in = image + ((long(z + s.z * jz) * from.y + y + s.y * jy) * from.x + x + s.x * jx) * kV;
            patch.a = few ? g : in;
            if (few) patch.g = in;
            patch.sums = sums + j * tap_step;
            if (single)
                single_update_patch(nb, k.y, patch);
            else if (shared)
                shared_update_patch(count, patch);
            else if (few || over_taps)
                update_patch<One>(nb, count, patch);
            else
                update_patch<Two>(nb, count, patch);
        }
    }
}

// The sum of the chunks' partial sums, then the update.
void update(const LayerPlan& p, int index, const Buffers& b, float* scratch) {
    const long taps = long(p.problem.kernel.volume()), chunk = update_chunk_vectors(p);
    const V* partial = vec(b.at(Buffer::update_spectra));
    const bool few = p.few_outputs;
    const MapPiece piece = few ? MapPiece{0, index * kV, std::min(p.problem.in_maps, (index + 1) * kV)}
                               : map_piece(p.out_bundles, p.problem.in_maps, p.kernel_maps_in, index);
    V* total = vec(scratch);
    for (int i = piece.first; i < piece.last; ++i) {
        std::fill_n(total, taps, V{});
        for (int c = 0; c < p.update_chunks; ++c) {
            const V* part = partial + c * chunk;
            for (long j = 0; j < taps; ++j) {
                if (few)
                    for (int o = 0; o < p.problem.out_maps; ++o)
                        total[j][o] += part[(j * p.problem.out_maps + o) * p.in_bundles + index][i % kV];
                else
                    total[j] += part[(long(piece.bundle) * p.problem.in_maps + i) * taps + j];
            }
        }
        finish_update(p, b, piece.bundle, i, total);
    }
}

}  // namespace

FilteredGradient filtered_gradient(const LayerPlan& p, const Buffers& b, int bundle) {
    if (!p.filters()) return {};
    const Extent w = p.problem.pool, m = p.problem.pooled(p.output);
    const long first = long(bundle * b.output_gradient_stride), plane = long(m.y) * m.x;
    return {vec(b.output_gradient + first), b.largest + first, {w.z, w.y, w.x}, {m.z, m.y, m.x}, {plane, m.x, 1}, {plane, m.x, 1}};
}

void run_direct(const LayerPlan& p, Phase phase, int index, const Buffers& b, float* scratch) {
    if (p.problem.depthwise && phase != Phase::gradient_transform) return run_depthwise(p, phase, index, b, scratch);
    if (is_single(p) && phase == Phase::forward_inverse) return forward_single(p, index, b, scratch);
    if (is_single(p) && phase == Phase::update_product) return update_single(p, index, b, scratch);
    switch (phase) {
        case Phase::kernels_forward: return pack_forward(p, index, b, scratch);
        case Phase::kernels_backward: return pack_backward(p, index, b, scratch);
        case Phase::forward_inverse: return forward(p, index, b, scratch);
        case Phase::gradient_transform: return pad_gradient(p, index, b);
        case Phase::backward_inverse: return backward(p, index, b, scratch);
        case Phase::update_product: return update_partial(p, index, b, scratch);
        case Phase::update_inverse: return update(p, index, b, scratch);
        default: return;  // these phases have no pieces
    }
}

}  // namespace znn::tiled::ZNN_VARIANT
