// The complex matrix products, frequency by frequency: tiles x input maps times input maps x output maps.
//
// R tiles by NB output vectors stay in registers; spectra enter by broadcasts of single floats, kernels as vectors. Kernel
// spectra arrive transformed along two axes and are expanded along the third into scratch, where they stay in L2.
#include <algorithm>

#include "tiled/layout.hpp"
#include "tiled/short_transforms.hpp"
#include "tiled/variant.hpp"

namespace znn::tiled::ZNN_VARIANT {
namespace {

#if defined(__AVX512F__)
constexpr int kRows[] = {0, 8, 4, 3, 2};   // by NB: the most tiles whose sums stay in registers
constexpr int kUpdateRows = 8;
#elif defined(__AVX2__)
constexpr int kRows[] = {0, 5, 2, 1, 1};
constexpr int kUpdateRows = 4;
#else
constexpr int kRows[] = {0, 2, 1, 1, 1};
constexpr int kUpdateRows = 2;
#endif
constexpr int kMaxRows = 8, kMaxGroup = 4;

ZNN_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// sums += a w, or a conj(w).
template <int NB, bool CONJ>
ZNN_INLINE void multiply_add(float xr, float xi, const V* wr, const V* wi, V* re, V* im) {
    for (int b = 0; b < NB; ++b) re[b] += xr * wr[b], im[b] += xi * wr[b];
    for (int b = 0; b < NB; ++b) {
        if constexpr (CONJ)
            re[b] += xi * wi[b], im[b] -= xr * wi[b];
        else
            re[b] -= xi * wi[b], im[b] += xr * wi[b];
    }
}

// Steps in floats for a, in vectors for w and c.
struct Block {
    const float* a;
    long a_tile, a_bundle;
    int maps;
    const V* w;
    long w_out;
    V* c;
    long c_tile, c_out;
};

template <int R, int NB, bool CONJ>
void forward_block(const Block& k) {
    V re[R][NB], im[R][NB];
    clear(re), clear(im);
    const V* w = k.w;
    const float* a = k.a;
    for (int left = k.maps; left > 0; left -= kV, a += k.a_bundle) {
        for (int r = 0; r < R; ++r) prefetch(a + r * k.a_tile + 2 * kV);
        const int lanes = std::min(left, kV);
#pragma GCC unroll 2
        for (int l = 0; l < lanes; ++l, w += 2) {
            V wr[NB], wi[NB];
            for (int b = 0; b < NB; ++b) wr[b] = w[b * k.w_out], wi[b] = w[b * k.w_out + 1];
            for (int r = 0; r < R; ++r)
                multiply_add<NB, CONJ>(a[r * k.a_tile + l], a[r * k.a_tile + kV + l], wr, wi, re[r], im[r]);
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int b = 0; b < NB; ++b) {
            V* c = k.c + r * k.c_tile + b * k.c_out;
            c[0] = re[r][b], c[1] = im[r][b];
        }
    }
}

using BlockFunction = void (*)(const Block&);

template <int NB, bool CONJ>
BlockFunction block_function(int rows) {
    switch (rows) {
        case 1: return forward_block<1, NB, CONJ>;
        case 2: if constexpr (kRows[NB] >= 2) return forward_block<2, NB, CONJ>; [[fallthrough]];
        case 3: if constexpr (kRows[NB] >= 3) return forward_block<3, NB, CONJ>; [[fallthrough]];
        case 4: if constexpr (kRows[NB] >= 4) return forward_block<4, NB, CONJ>; [[fallthrough]];
        case 5: if constexpr (kRows[NB] >= 5) return forward_block<5, NB, CONJ>; [[fallthrough]];
        case 6: if constexpr (kRows[NB] >= 6) return forward_block<6, NB, CONJ>; [[fallthrough]];
        case 7: if constexpr (kRows[NB] >= 7) return forward_block<7, NB, CONJ>; [[fallthrough]];
        default: if constexpr (kRows[NB] >= 8) return forward_block<8, NB, CONJ>;
    }
    return nullptr;
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

// Output bundles per register block: many tiles fill the registers alone.
int group_of(int tiles) {
    for (int group = 1; group < kMaxGroup; ++group)
        if (tiles >= kRows[group]) return group;
    return kMaxGroup;
}

// Tiles of one group in nearly equal blocks.
struct Blocks {
    int count;
    BlockFunction even, more;  // the first `larger` blocks have one row more
    int rows, larger;

    template <bool CONJ>
    static Blocks make(int tiles, int group) {
        Blocks b;
        b.count = ceil_div(tiles, kRows[group]);
        b.rows = tiles / b.count;
        b.larger = tiles % b.count;
        b.even = block_function<CONJ>(group, b.rows);
        b.more = b.larger ? block_function<CONJ>(group, b.rows + 1) : b.even;
        return b;
    }
    void run(Block k) const {
        for (int i = 0; i < count; ++i) {
            const int r = i < larger ? rows + 1 : rows;
            (i < larger ? more : even)(k);
            k.a += r * k.a_tile;
            k.c += r * k.c_tile;
        }
    }
};

// Walks through the next pencil's spectra, a few lines at a time, so that they are in L2 when their turn comes.
struct Prefetcher {
    const char* next;
    long left, per_step;

    Prefetcher(const float* from, long floats, long steps, bool any)
        : next(reinterpret_cast<const char*>(from)), left(any ? floats / 16 : 0), per_step(left / steps + 1) {}
    void step() {
        for (long i = std::min(per_step, left); i > 0; --i, --left, next += 64) __builtin_prefetch(next, 0, 2);
    }
};

constexpr long kPrefetchFloats = 48 << 10;  // larger pencils would push out what is in use

// Pencils `pencil` floats apart, [bundle][tile][line] inside.
struct SpectraView {
    float* data;
    long pencil;
};

template <bool CONJ>
void product_of(const LayerPlan& p, const Buffers& b, int tiles, SpectraView spectra, SpectraView result, int p0, int p1,
                int first, int last, float* scratch) {
    const Axis& axis = p.axis[0];
    const int T = axis.T, maps = CONJ ? p.problem.in_maps : p.problem.out_maps, chunk = CONJ ? p.chunk_out : p.chunk_in;
    const V* kernels = vec(b.at(CONJ ? Buffer::kernels_forward : Buffer::kernels_backward));
    const long line = 2 * p.line, step = 2 * maps + 2, kernel = kernel_pencil(p, maps);
    V* expanded = vec(scratch);
    V* buffer = expanded + long(chunk) * T * step;

    const int group = std::min({group_of(tiles), last - first, chunk});
    const Blocks full = Blocks::make<CONJ>(tiles, group);
    for (int pencil = p0; pencil < p1; ++pencil) {
        const float* a = spectra.data + pencil * spectra.pencil;
        V* c = vec(result.data + pencil * result.pencil);
        Prefetcher ahead(a + spectra.pencil, spectra.pencil, long(T) * ceil_div(last - first, group),
                         pencil + 1 < p1 && spectra.pencil <= kPrefetchFloats);
        for (int o0 = first; o0 < last; o0 += chunk) {
            const int o1 = std::min(last, o0 + chunk);
            for (int o = o0; o < o1; ++o)
                kernel_line(axis, kernels + (long(o) * p.pencils + pencil) * kernel, 2, 2 * axis.k,
                            expanded + (o - o0) * T * step, step, 2, maps, buffer);
            for (int f = 0; f < T; ++f) {
                for (int o = o0; o < o1; o += group) {
                    ahead.step();
                    const Block block{a + 2 * kV * f, line * kV, line * kV * tiles, maps,
                                      expanded + ((o - o0) * T + f) * step, T * step,
                                      c + (o - first) * tiles * line + 2 * f, line, line * tiles};
                    if (o + group <= o1)
                        full.run(block);
                    else
                        Blocks::make<CONJ>(tiles, o1 - o).run(block);
                }
            }
        }
    }
}

}  // namespace

void product(const LayerPlan& p, bool forward, int slab, int p0, int p1, const Buffers& b, float* scratch) {
    const int tiles = p.slab_tiles(slab);
    if (forward)
        product_of<true>(p, b, tiles, {b.at(Buffer::input_spectra) + p.input_place(slab, b.keep), p.in_pencil},
                         {b.at(Buffer::output_spectra) + p.passing_out(slab), p.out_pencil}, p0, p1, 0, p.out_bundles,
                         scratch);
    else
        product_of<false>(p, b, tiles, {b.at(Buffer::gradient_spectra) + p.passing_out(slab), p.out_pencil},
                          {b.at(Buffer::input_gradient_spectra) + p.passing_in(slab), p.in_pencil}, p0, p1, 0,
                          p.in_bundles, scratch);
}

// Sums over tiles of x conj(g): R maps of an input bundle by one output bundle. `out` steps by map.
template <int R>
static ZNN_INLINE void update_block(const float* x, const V* g, long line, int tiles, V* out, long out_map) {
    V re[R], im[R];
    clear(re), clear(im);
#pragma GCC unroll 2
    for (int t = 0; t < tiles; ++t, x += line * kV, g += line) {
        const V gr = g[0], gi = g[1];
        for (int r = 0; r < R; ++r) multiply_add<1, true>(x[r], x[kV + r], &gr, &gi, &re[r], &im[r]);
    }
    for (int r = 0; r < R; ++r) out[r * out_map] = re[r], out[r * out_map + 1] = im[r];
}

void update_product(const LayerPlan& p, int slab, int p0, int p1, const Buffers& b, float* scratch) {
    const Axis& axis = p.axis[0];
    const int T = axis.T, maps = p.problem.in_maps, tiles = p.slab_tiles(slab);
    const long line = 2 * p.line, step = 2 * T + 2, kernel = kernel_pencil(p, maps);
    V* sums = vec(scratch);
    V* taps = sums + p.in_bundles * kV * step;
    V* buffer = taps + kernel;
    for (int pencil = p0; pencil < p1; ++pencil) {
        const float* x = b.at(Buffer::input_spectra) + p.input_place(slab, b.keep) + pencil * p.in_pencil;
        const float* gradient = b.at(Buffer::gradient_spectra) + p.passing_out(slab) + pencil * p.out_pencil;
        const long steps = long(T) * p.out_bundles;
        const bool next = pencil + 1 < p1 && std::max(p.in_pencil, p.out_pencil) <= kPrefetchFloats;
        Prefetcher inputs(x + p.in_pencil, p.in_pencil, steps, next), gradients(gradient + p.out_pencil, p.out_pencil, steps, next);
        for (int o = 0; o < p.out_bundles; ++o) {
            const V* g = vec(gradient) + o * tiles * line;
            for (int f = 0; f < T; ++f) {
                inputs.step(), gradients.step();
                for (int i = 0; i < maps; i += kUpdateRows)
                    update_block<kUpdateRows>(x + (i / kV * tiles * line + 2 * f) * kV + i % kV, g + 2 * f, line, tiles,
                                              sums + i * step + 2 * f, step);
            }
            V* out = vec(b.at(Buffer::update_spectra)) + (long(o) * p.pencils + pencil) * kernel;
            kernel_line_inverse(axis, sums, 2, step, slab ? taps : out, 2, 2 * axis.k, maps, buffer);
            if (slab)
                for (long i = 0; i < 2L * maps * axis.k; ++i) out[i] += taps[i];
        }
    }
}

}  // namespace znn::tiled::ZNN_VARIANT
