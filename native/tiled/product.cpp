// The complex matrix products, frequency by frequency: tiles x input maps times input maps x output maps.
//
// R tiles by NB output vectors stay in registers; spectra enter by broadcasts of single floats, kernels as vectors. Kernel
// spectra arrive transformed along two axes. Where there are tiles enough to share it, short kernels are transformed along
// the third frequency by frequency, in the block of registers that needs them first, from pairs of taps that stay in L1;
// others are expanded into scratch, where they stay in L2.
#include <algorithm>

#include "tiled/complex.hpp"
#include "tiled/layout.hpp"
#include "tiled/short_transforms.hpp"
#include "tiled/variant.hpp"

namespace znn::tiled::ZNN_VARIANT {
namespace {

// What fits the registers. kRows: tiles of a product, by NB. Output bundles whose kernels are transformed together: wider ones
// fill registers, and L1 with their pairs of taps, alone. Of the update: rows; rows and output bundles where frequencies are
// taken with their mirror images; and how many tiles for each pair of taps make that pay.
#if defined(__AVX512F__) && ZNN_V == 8
constexpr int kRows[] = {0, 8, 6, 4, 3}, kTurnedGroup = 2;
constexpr int kUpdateRows = 8, kTurnedRows = 2, kUpdateGroup = 3;
#elif defined(__AVX512F__)
constexpr int kRows[] = {0, 8, 6, 3, 2}, kTurnedGroup = 1;
constexpr int kUpdateRows = 8, kTurnedRows = 4, kUpdateGroup = 1;
#elif defined(__AVX2__)
constexpr int kRows[] = {0, 5, 2, 1, 1}, kTurnedGroup = 1;
constexpr int kUpdateRows = 4, kTurnedRows = 2, kUpdateGroup = 1;
#else
constexpr int kRows[] = {0, 2, 1, 1, 1}, kTurnedGroup = 1;
constexpr int kUpdateRows = 2, kTurnedRows = 1, kUpdateGroup = 1;
#endif
static_assert(kTurnedGroup <= kMostTurned && kUpdateGroup <= kMostSummed);  // there is scratch for so many
#if defined(__AVX512F__)
constexpr int update_tiles(int) { return kTurnedTiles; }
#else
constexpr int update_tiles(int pairs) { return kTurnedTiles * pairs; }
#endif
constexpr int kMaxGroup = 4;

ZNN_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// Steps in floats for a, in vectors for w and c. With pairs of taps, `turn` has the cosine and sine of the frequency for
// each, and what they come to is left in `turned`.
struct Block {
    const float* a;
    long a_tile, a_bundle;
    int maps;
    const V* w;
    long w_out = 0;
    V* c = nullptr;
    long c_tile = 0, c_out = 0;
    bool streams = false;  // c, past the caches
    const float* turn = nullptr;
    V* turned = nullptr;
    long turned_out = 0;
    const char* ahead = nullptr;  // a line of cache for each map to fetch meanwhile
    long ahead_step = 0;
};

// Complex numbers of one map: the middle tap, then what the cosine and what the sine of each of H pairs multiplies.
constexpr int pair_vectors(int half) { return 2 + 4 * half; }

template <int H>
void make_pairs(const Axis& axis, const V* kernels, int maps, V* pairs) {
    const bool even = axis.k % 2 == 0;
    for (int i = 0; i < maps; ++i, kernels += 2 * axis.k, pairs += pair_vectors(H)) {
        const shorts::Pairs<H> re = shorts::load_pairs<H>(kernels, 2, even, pairs[0]);
        const shorts::Pairs<H> im = shorts::load_pairs<H>(kernels + 1, 2, even, pairs[1]);
        for (int j = 0; j < H; ++j) {
            V* p = pairs + 2 + 4 * j;
            p[0] = re.sum[j], p[1] = im.sum[j];
            p[2] = im.difference[j], p[3] = -re.difference[j];
        }
    }
}

template <int R, int NB, bool CONJ, int H = 0, bool KEEP = false>
void forward_block(const Block& given) {
    const Block k = given;
    Sum<CONJ> sum[R][NB];
    clear(sum);
    const V* at = k.w;
    const float* a = k.a;
    const char* ahead = k.ahead;
    V* turned = k.turned;
    float turn[2 * H + 1];
    for (int j = 0; j < 2 * H; ++j) turn[j] = k.turn[j];
    for (int left = k.maps; left > 0; left -= kV, a += k.a_bundle) {
        for (int r = 0; r < R; ++r)
            for (int line = 0; line < 2 * kV; line += 16) prefetch(a + r * k.a_tile + 2 * kV + line);
        const int lanes = std::min(left, kV);
#pragma GCC unroll 2
        for (int l = 0; l < lanes; ++l, at += H ? pair_vectors(H) : 2, ahead += k.ahead_step) {
            __builtin_prefetch(ahead, 0, 2);
            Complex w[NB];
            for (int b = 0; b < NB; ++b) w[b] = load(at + b * k.w_out);
            for (int j = 0; j < 2 * H; ++j)
                for (int b = 0; b < NB; ++b) w[b] = w[b] + turn[j] * load(at + b * k.w_out + 2 + 2 * j);
            if constexpr (KEEP) {
                for (int b = 0; b < NB; ++b) store(turned + b * k.turned_out, w[b]);
                turned += 2;
            }
            for (int r = 0; r < R; ++r)
                for (int b = 0; b < NB; ++b) sum[r][b].add(a[r * k.a_tile + l], a[r * k.a_tile + kV + l], w[b]);
        }
    }
    if (k.streams) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
            for (int b = 0; b < NB; ++b) stream(k.c + r * k.c_tile + b * k.c_out, sum[r][b].value());
    } else {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
            for (int b = 0; b < NB; ++b) store(k.c + r * k.c_tile + b * k.c_out, sum[r][b].value());
    }
}

using BlockFunction = void (*)(const Block&);

template <int NB, bool CONJ, int H = 0, bool KEEP = false, int R = 1>
BlockFunction block_function(int rows) {
    if constexpr (R < kRows[NB]) {
        if (rows > R) return block_function<NB, CONJ, H, KEEP, R + 1>(rows);
    }
    return forward_block<R, NB, CONJ, H, KEEP>;
}

template <bool CONJ>
BlockFunction block_function(int group, int rows) {
    switch (group) {
        case 1: return block_function<1, CONJ>(rows);
        case 2: return block_function<2, CONJ>(rows);
        case 3: return block_function<3, CONJ>(rows);
        default: return block_function<4, CONJ>(rows);
    }
}

// The block that transforms pairs of taps itself; keep: for others, too. Groups are of kTurnedGroup or of the one left over.
template <bool CONJ, int H>
BlockFunction turning_function(int group, int rows, bool keep) {
    if (group == 1) return keep ? block_function<1, CONJ, H, true>(rows) : block_function<1, CONJ, H>(rows);
    return keep ? block_function<kTurnedGroup, CONJ, H, true>(rows) : block_function<kTurnedGroup, CONJ, H>(rows);
}
template <bool CONJ>
BlockFunction turning_function(int group, int rows, int half, bool keep) {
    const auto function = half == 1 ? turning_function<CONJ, 1> : half == 2 ? turning_function<CONJ, 2> : turning_function<CONJ, 3>;
    return function(group, rows, keep);
}

// Output bundles per register block: many tiles fill the registers alone.
int group_of(int tiles) {
    for (int group = 1; group < kMaxGroup; ++group)
        if (tiles >= kRows[group]) return group;
    return kMaxGroup;
}

// Tiles of one group in nearly equal blocks, of which the first may transform the kernels for all.
struct Blocks {
    int count;
    BlockFunction first, even, more;  // the first `larger` blocks have one row more
    int rows, larger;
    bool turns;

    template <bool CONJ>
    static Blocks make(int tiles, int group, int half = 0) {
        Blocks b;
        b.count = ceil_div(tiles, kRows[group]);
        b.rows = tiles / b.count;
        b.larger = tiles % b.count;
        b.even = block_function<CONJ>(group, b.rows);
        b.more = b.larger ? block_function<CONJ>(group, b.rows + 1) : b.even;
        b.turns = half > 0;
        b.first = half ? turning_function<CONJ>(group, b.rows + (b.larger > 0), half, b.count > 1) : b.more;
        return b;
    }
    void run(Block k) const {
        for (int i = 0; i < count; ++i) {
            const int r = i < larger ? rows + 1 : rows;
            (i == 0 ? first : i < larger ? more : even)(k);
            k.a += r * k.a_tile;
            k.c += r * k.c_tile;
            if (turns) k.w = k.turned, k.w_out = k.turned_out;
            k.ahead_step = 0;
        }
    }
};

// What is needed soon, first things first, a few lines of cache for each block, so that it is in L2 when its turn comes: at once
// they would hold up the block's own reads.
struct Lookout {
    struct Stream {
        const char* next;
        long lines;
    } streams[3];
    int at = 0;

    static Stream stream(const void* from, long floats) { return {static_cast<const char*>(from), floats / 16}; }
    // Where a block finds `lines` lines to fetch in so many steps of `step` bytes.
    const char* take(long lines, long steps, long& step) {
        while (at < 3 && streams[at].lines <= 0) ++at;
        step = at < 3 ? 64 * lines / steps : 0;
        if (at == 3) return streams[2].next;
        const char* from = streams[at].next;
        streams[at].next += 64 * lines, streams[at].lines -= lines;
        return from;
    }
    long lines() const { return streams[0].lines + streams[1].lines + streams[2].lines; }
    void first(const void* from, long floats) { at = 0, streams[0] = stream(from, floats); }
    void fetch(long lines) {
        long step;
        for (const char* next = take(lines, lines, step); lines > 0; --lines, next += step) __builtin_prefetch(next, 0, 2);
    }
};

constexpr long kPrefetchFloats = 48 << 10;  // larger pencils would push out what is in use

// Pencils `pencil` floats apart, [bundle][tile][line] inside.
struct SpectraView {
    float* data;
    long pencil;
    bool streams = false;
};

// Cosines and sines of a line's frequency f for its pairs of taps.
void set_turn(const Axis& axis, int f, float* turn) {
    const int half = axis.k / 2, folded = std::min(f, axis.T - f);
    for (int j = 0; j < half; ++j) {
        turn[2 * j] = axis.cosines[folded * half + j];
        turn[2 * j + 1] = f == folded ? axis.sines[folded * half + j] : -axis.sines[folded * half + j];
    }
}

// The product of `tiles` tiles with the kernels, a piece of it.
template <bool CONJ>
struct Product {
    const LayerPlan& p;
    const ProductPiece piece;
    int tiles;
    SpectraView spectra, result;
    const V* kernels;
    V* scratch;

    const Axis& axis = p.axis[0];
    const int T = axis.T, maps = CONJ ? p.problem.in_maps : p.problem.out_maps;
    const int chunk = CONJ ? p.chunk_out : p.chunk_in, half = tiles >= kTurnedTiles ? turned_pairs(axis) : 0;
    const int o0 = piece.first_bundle, o1 = piece.last_bundle;
    const int group = std::min(half ? kTurnedGroup : std::min(group_of(tiles), chunk), o1 - o0);
    const long line = 2 * p.line, kernel = kernel_pencil(p, maps);
    const Blocks full = Blocks::make<CONJ>(tiles, group, half);

    const V* taps(int pencil, int o) const { return kernels + (long(o) * p.pencils + pencil) * kernel; }
    // What the next pencil reads, and where it writes; first comes what a part of this one needs.
    Lookout next(int pencil) const {
        const auto stream = [&](SpectraView view) {
            const bool wanted = pencil + 1 < piece.last && view.pencil <= kPrefetchFloats && !view.streams;
            return Lookout::stream(view.data + (pencil + 1) * view.pencil, wanted ? view.pencil : 0);
        };
        return {{{}, stream(spectra), stream(result)}};
    }
    void block(const Blocks& blocks, int pencil, int o, int f, Block b, Lookout& ahead) const {
        b.a = spectra.data + pencil * spectra.pencil + 2 * kV * f, b.a_tile = line * kV, b.a_bundle = line * kV * tiles, b.maps = maps;
        b.c = vec(result.data + pencil * result.pencil) + o * tiles * line + 2 * f, b.c_tile = line, b.c_out = line * tiles;
        b.streams = result.streams;
        b.ahead = ahead.take(maps, maps, b.ahead_step);
        blocks.run(b);
    }
    // Kernels transformed in the blocks.
    void turned(int pencil) const {
        const auto make = half == 1 ? make_pairs<1> : half == 2 ? make_pairs<2> : make_pairs<3>;
        const long step = long(maps) * pair_vectors(half), turned_step = 2L * maps;
        V *pairs = scratch, *turned = pairs + group * step;
        Lookout ahead = next(pencil);
        for (int o = o0; o < o1; o += group) {
            const int count = std::min(group, o1 - o);
            for (int b = 0; b < count; ++b) make(axis, taps(pencil, o + b), maps, pairs + b * step);
            const bool last = o + count == o1;
            ahead.first(last ? taps(pencil + 1, o0) : taps(pencil, o + count), last && pencil + 1 == piece.last ? 0 : kernel * kV);
            const Blocks blocks = count == group ? full : Blocks::make<CONJ>(tiles, count, half);
            for (int f = 0; f < T; ++f) {
                float turn[2 * kTurnedPairs];
                set_turn(axis, f, turn);
                block(blocks, pencil, o, f,
                      {.w = pairs, .w_out = step, .turn = turn, .turned = turned, .turned_out = turned_step}, ahead);
            }
        }
    }
    // Kernels transformed before, as many bundles at a time as L2 holds.
    void expanded(int pencil) const {
        const long step = 2 * maps + 2;
        V *lines = scratch, *buffer = lines + long(chunk) * T * step;
        Lookout ahead = next(pencil);
        for (int begin = o0; begin < o1; begin += chunk) {
            const int end = std::min(o1, begin + chunk);
            for (int o = begin; o < end; ++o)
                kernel_line(axis, taps(pencil, o), 2, 2 * axis.k, lines + (o - begin) * T * step, step, 2, maps, buffer);
            for (int f = 0; f < T; ++f)
                for (int o = begin; o < end; o += group)
                    block(o + group <= end ? full : Blocks::make<CONJ>(tiles, end - o), pencil, o, f,
                          {.w = lines + ((o - begin) * T + f) * step, .w_out = T * step}, ahead);
        }
    }
    void run() const {
        for (int pencil = piece.first; pencil < piece.last; ++pencil) half ? turned(pencil) : expanded(pencil);
        if (result.streams) finish_streams();
    }
};

}  // namespace

void product(const LayerPlan& p, bool forward, int index, const Buffers& b, float* scratch) {
    const ProductPiece piece = product_piece(p, index, forward ? p.forward_parts : p.backward_parts,
                                             forward ? p.out_bundles : p.in_bundles);
    const int slab = piece.slab, tiles = p.slab_tiles(slab);
    if (forward)
        Product<true>{p, piece, tiles, {b.at(Buffer::input_spectra) + p.input_place(slab, b.keep), p.in_pencil},
                      {b.at(Buffer::output_spectra) + p.passing_out(slab), p.out_pencil, p.streams},
                      vec(b.at(Buffer::kernels_forward)), vec(scratch)}.run();
    else
        Product<false>{p, piece, tiles, {b.at(Buffer::gradient_spectra) + p.passing_out(slab), p.out_pencil},
                       {b.at(Buffer::input_gradient_spectra) + p.passing_in(slab), p.in_pencil, p.streams},
                       vec(b.at(Buffer::kernels_backward)), vec(scratch)}.run();
}

namespace {

// Sums over tiles of x conj(g): R maps of an input bundle by one output bundle. `out` steps by map.
template <int R>
void update_block(const float* x, const V* g, long line, int tiles, V* out, long out_map) {
    Sum<true> sum[R];
    clear(sum);
#pragma GCC unroll 2
    for (int t = 0; t < tiles; ++t, x += line * kV, g += line) {
        const Complex at = load(g);
        for (int r = 0; r < R; ++r) sum[r].add(x[r], x[kV + r], at);
    }
    for (int r = 0; r < R; ++r) store(out + r * out_map, sum[r].value());
}

// The same for NB output bundles at frequency f and at its mirror image, `mirror` vectors on, added to the sums over frequencies
// that a line's taps are made of (pair_vectors), `[bundle][map]`. MIRROR: f has one. Meanwhile lines are fetched that other
// blocks need: `near`, step by step with the tiles, into L1, `ahead` into L2.
struct UpdateBlock {
    const float* x;
    const V* g;
    long line, mirror;
    int tiles;
    const float* turn;
    V* sums;
    const float* near;
    const char* ahead;
    long ahead_step;
};

template <int R, int NB, int H, bool MIRROR>
void update_turned(const UpdateBlock& given) {
    const UpdateBlock k = given;
    const float *x = k.x, *near = k.near;
    const V* g = k.g;
    const char* ahead = k.ahead;
    Sum<true> sum[R][NB], other[R][NB];
    clear(sum), clear(other);
    for (int t = 0; t < k.tiles; ++t, x += k.line * kV, g += k.line, ahead += k.ahead_step) {
        __builtin_prefetch(ahead, 0, 2);
        Complex at[NB];
        for (int b = 0; b < NB; ++b) at[b] = load(g + b * k.tiles * k.line);
        for (int r = 0; r < R; ++r)
            for (int b = 0; b < NB; ++b) sum[r][b].add(x[r], x[kV + r], at[b]);
        if constexpr (MIRROR) {
            const float* y = x + k.mirror * kV;
            for (int b = 0; b < NB; ++b) at[b] = load(g + b * k.tiles * k.line + k.mirror);
            for (int l = 0; l < 2 * kV; l += 16) {
                prefetch(near + l);
                if constexpr (NB > 1) prefetch(near + (k.mirror - 4) * kV + l);
            }
            near += k.line * kV;
            for (int r = 0; r < R; ++r)
                for (int b = 0; b < NB; ++b) other[r][b].add(y[r], y[kV + r], at[b]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < NB; ++b) {
            V* sums = k.sums + (b * kV + r) * pair_vectors(H);
            const Complex even = sum[r][b].value() + other[r][b].value(), odd = sum[r][b].value() - other[r][b].value();
            store(sums, load(sums) + even);
            for (int j = 0; j < H; ++j) {
                V* pair = sums + 2 + 4 * j;
                store(pair, load(pair) + k.turn[2 * j] * even);
                if constexpr (MIRROR) store(pair + 2, load(pair + 2) + k.turn[2 * j + 1] * odd);
            }
        }
}

// The taps of one map's line.
template <int H>
void store_taps(const V* sums, bool even, bool add, V* out) {
    const auto put = [&](int tap, V re, V im) {
        V* to = out + 2 * tap;
        to[0] = add ? to[0] + re : re, to[1] = add ? to[1] + im : im;
    };
    put(H, sums[0], sums[1]);
    for (int j = 1; j <= H; ++j) {
        const V* pair = sums + 4 * j - 2;
        put(H - j, pair[0] + pair[3], pair[1] - pair[2]);
        if (!(even && j == H)) put(H + j, pair[0] - pair[3], pair[1] + pair[2]);
    }
}

// One pencil of NB output bundles, short kernels: [map][tap] for each, `out_bundle` vectors apart.
template <int NB, int H>
void update_bundles(const LayerPlan& p, int tiles, const float* x, const V* gradient, bool add, V* out, long out_bundle,
                    long lines, Lookout& ahead, V* sums) {
    constexpr int R = kTurnedRows;
    const Axis& axis = p.axis[0];
    const int T = axis.T, maps = p.problem.in_maps;
    const long line = 2 * p.line;
    for (int i0 = 0; i0 < maps; i0 += kV) {
        const int lanes = std::min(kV, maps - i0);
        const float* bundle = x + i0 * tiles * line;
        V* taps = out + i0 * 2L * axis.k;
        ahead.first(taps, lanes * 2L * axis.k * kV);
        std::fill_n(sums, NB * kV * pair_vectors(H), V{});
        for (int f = 0; f <= T / 2; ++f) {
            float turn[2 * H];
            set_turn(axis, f, turn);
            const auto add_rows = (f > 0 && 2 * f < T) ? update_turned<R, NB, H, true> : update_turned<R, NB, H, false>;
            const float *x_at = bundle + 2 * f * kV, *g_at = reinterpret_cast<const float*>(gradient + 2 * f);
            const long mirror = 2 * (T - 2 * f);
            const auto near = [&](int block) {
                const float* at = block == 0 ? x_at : g_at + (block - 1) % NB * tiles * line * kV;
                if constexpr (NB == 1) at = block / 2 ? g_at : x_at;
                return at + (NB == 1 && block % 2 ? mirror - 2 : 2) * kV;
            };
            for (int i = 0; i < lanes; i += R) {
                long step;
                const char* next = ahead.take(lines, tiles, step);
                add_rows({x_at + i, gradient + 2 * f, line, mirror, tiles, turn, sums + i * pair_vectors(H), near(i / R % 4),
                          next, step});
            }
        }
        for (int b = 0; b < NB; ++b)
            for (int i = 0; i < lanes; ++i)
                store_taps<H>(sums + (b * kV + i) * pair_vectors(H), axis.k % 2 == 0, add, taps + b * out_bundle + i * 2L * axis.k);
    }
}

// The same for `bundles` of outputs.
template <int H>
void update_pencil(const LayerPlan& p, int tiles, int bundles, const float* x, const V* gradient, bool add, V* out,
                   long out_bundle, Lookout& ahead, V* sums) {
    const long bundle = 2 * tiles * p.line;
    const int groups = ceil_div(bundles, kUpdateGroup);
    const long blocks = long(groups) * ceil_div(p.problem.in_maps, kTurnedRows) * (p.axis[0].T / 2 + 1);
    const long taps = long(p.problem.in_maps) * groups * 2 * p.axis[0].k * kV / 16;  // lines, fetched besides
    const long lines = std::min<long>(tiles, (ahead.lines() + taps) * 5 / 4 / blocks + 1);
    for (int o = 0; o < bundles; o += kUpdateGroup) {
        const int count = std::min(kUpdateGroup, bundles - o);
        const auto update = [&]<int NB>() {
            update_bundles<NB, H>(p, tiles, x, gradient + o * bundle, add, out + o * out_bundle, out_bundle, lines, ahead, sums);
        };
        if (count == 1) update.template operator()<1>();
        else if (count == 2) update.template operator()<std::min(2, kUpdateGroup)>();
        else update.template operator()<kUpdateGroup>();
    }
}

// The same for kernels that are transformed back line by line, once all frequencies of a bundle's maps are there: these sums stay
// in L1 until then.
void update_expanded(const LayerPlan& p, int tiles, int bundles, const float* x, const V* gradient, bool add, V* out,
                     long out_bundle, Lookout& ahead, V* sums) {
    const Axis& axis = p.axis[0];
    const int T = axis.T, maps = p.problem.in_maps;
    const long line = 2 * p.line, step = 2 * T + 2;
    V *taps = sums + kV * step, *buffer = taps + 2L * kV * axis.k;
    const long lines = ahead.lines() / (long(T) * bundles * p.in_bundles) + 1;
    for (int o = 0; o < bundles; ++o, gradient += tiles * line, out += out_bundle)
        for (int i0 = 0; i0 < maps; i0 += kV) {
            const int lanes = std::min(kV, maps - i0);
            const float* bundle = x + i0 * tiles * line;
            V* own = out + i0 * 2L * axis.k;
            for (int f = 0; f < T; ++f) {
                ahead.fetch(lines);
                for (int i = 0; i < lanes; i += kUpdateRows)
                    update_block<kUpdateRows>(bundle + 2 * f * kV + i, gradient + 2 * f, line, tiles, sums + i * step + 2 * f, step);
            }
            kernel_line_inverse(axis, sums, 2, step, add ? taps : own, 2, 2 * axis.k, lanes, buffer);
            if (add)
                for (long i = 0; i < 2L * lanes * axis.k; ++i) own[i] += taps[i];
        }
}

}  // namespace

void update_product(const LayerPlan& p, int index, const Buffers& b, float* scratch) {
    const ProductPiece piece = product_piece(p, index, p.sums_parts, p.out_bundles);
    const int slab = piece.slab, tiles = p.slab_tiles(slab), bundles = piece.last_bundle - piece.first_bundle;
    const int pairs = turned_pairs(p.axis[0]);
    const long kernel = kernel_pencil(p, p.problem.in_maps);
    const auto update = pairs == 0 || tiles < update_tiles(pairs) ? update_expanded
                        : pairs == 1 ? update_pencil<1> : pairs == 2 ? update_pencil<2> : update_pencil<3>;
    for (int pencil = piece.first; pencil < piece.last; ++pencil) {
        const float* x = b.at(Buffer::input_spectra) + p.input_place(slab, b.keep) + pencil * p.in_pencil;
        const float* gradient = b.at(Buffer::gradient_spectra) + p.passing_out(slab) + pencil * p.out_pencil;
        V* out = vec(b.at(Buffer::update_spectra)) + (long(piece.first_bundle) * p.pencils + pencil) * kernel;
        const bool next = pencil + 1 < piece.last && std::max(p.in_pencil, p.out_pencil) <= kPrefetchFloats;
        Lookout ahead{{{}, Lookout::stream(x + p.in_pencil, next ? p.in_pencil : 0),
                       Lookout::stream(gradient + p.out_pencil, next ? p.out_pencil : 0)}};
        update(p, tiles, bundles, x, vec(gradient) + piece.first_bundle * 2L * tiles * p.line, slab > 0, out, p.pencils * kernel,
               ahead, vec(scratch));
    }
}

}  // namespace znn::tiled::ZNN_VARIANT
