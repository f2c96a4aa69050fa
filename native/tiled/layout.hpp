// How piece numbers map to tiles, strips and maps, and how scratch is divided. Shared by the plan and every variant.
#pragma once
#include <algorithm>

#include "tiled/tiled.hpp"

namespace znn::tiled {

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// ---- scratch of tile and kernel transforms, in vectors
struct TileScratchSizes {
    long planes, plane, rows, line, maxima, row_frequencies;

    explicit TileScratchSizes(const LayerPlan& p) {
        const Axis* a = p.axis;
        row_frequencies = a[2].frequencies() | 1;
        planes = 2 * p.plane * a[0].T;
        plane = 2 * row_frequencies * a[1].T;
        // Of a plane, or of all planes that a filter's windows have voxels in.
        rows = std::max(2L * a[1].T, long(p.filters() ? a[0].pool : 1) * a[1].T * a[2].T);
        line = 2L * std::max({a[0].T, a[1].T, a[2].T}) + 2;
        maxima = p.pools() && !p.filters() ? 2L * (a[1].T / a[1].pool) * (a[2].T / a[2].pool) : 0;
    }
    long total() const { return planes + plane + rows + line + maxima; }
};

// Kernel spectra: vectors from pencil to pencil, an odd number of pairs so that pencils spread over the cache's sets.
inline long kernel_pencil(const LayerPlan& p, int maps) { return 2 * ((long(maps) * p.axis[0].k) | 1); }

// Kernels of so many pairs of taps at most are transformed frequency by frequency inside the product (and back inside the
// update's) where so many tiles (in the update by narrow registers: for each pair) share it.
inline constexpr int kTurnedPairs = 3, kTurnedTiles = 8;
// The most output bundles that a code path does so for at once, in the product and in the update: there is scratch for them.
inline constexpr int kMostTurned = 2, kMostSummed = 3;
// The pairs of such a kernel, else 0.
inline int turned_pairs(const Axis& lines) { return lines.table() && lines.k / 2 <= kTurnedPairs ? lines.k / 2 : 0; }

// ---- tiles: numbered by residue (z, y, x), then tile coordinate (z, y, x), the last fastest
struct TilePlace {
    int r[3], q[3];  // by the plan's axes
};

inline TilePlace tile_place(const LayerPlan& p, int tile) {
    TilePlace place;
    int axis_of[3];
    for (int a = 0; a < 3; ++a) axis_of[p.order[a]] = a;
    for (int memory = 2; memory >= 0; --memory) {
        const int a = axis_of[memory];
        place.q[a] = tile % p.axis[a].tiles;
        tile /= p.axis[a].tiles;
    }
    for (int memory = 2; memory >= 0; --memory) {
        const int a = axis_of[memory];
        place.r[a] = tile % p.axis[a].residues;
        tile /= p.axis[a].residues;
    }
    return place;
}

// A piece of tile transforms: tiles [first, last) of a slab, one bundle.
struct TilePiece {
    int slab, bundle, first, last;
};

inline int tile_pieces(const LayerPlan& p, int slab_tiles, int bundles, int tiles_per_piece) {
    (void)p;
    return bundles * ceil_div(slab_tiles, tiles_per_piece);
}

inline TilePiece tile_piece(const LayerPlan& p, int index, int bundles, int tiles_per_piece) {
    const int per_slab = tile_pieces(p, p.tiles_per_slab, bundles, tiles_per_piece);
    TilePiece piece;
    piece.slab = index / per_slab;
    const int tiles = p.slab_tiles(piece.slab), groups = ceil_div(tiles, tiles_per_piece);
    index -= piece.slab * per_slab;
    piece.bundle = index / groups;
    piece.first = index % groups * tiles_per_piece;
    piece.last = std::min(tiles, piece.first + tiles_per_piece);
    return piece;
}

// A piece of products: pencils [first, last) of a slab, and some of the bundles that come out.
struct ProductPiece {
    int slab, first, last, first_bundle, last_bundle;
};

inline int product_pieces(const LayerPlan& p, int parts) { return ceil_div(p.pencils, p.product_pencils) * parts; }

inline ProductPiece product_piece(const LayerPlan& p, int index, int parts, int bundles) {
    const int part = index % parts, per_slab = product_pieces(p, 1), slab = index / parts / per_slab;
    const int first = index / parts % per_slab * p.product_pencils;
    return {slab, first, std::min(p.pencils, first + p.product_pencils), part * bundles / parts, (part + 1) * bundles / parts};
}

// ---- strips of the backward pass: every sub-lattice of the input, also those without outputs (tile_strip < 0)
struct StripPiece {
    int bundle, r[3], q, tile_strip;
};

inline int strip_pieces(const LayerPlan& p) {
    return p.in_bundles * p.axis[0].s * p.axis[1].s * p.axis[2].s * p.axis[p.split].tiles;
}

inline StripPiece strip_piece(const LayerPlan& p, int index) {
    StripPiece piece;
    const int tiles = p.axis[p.split].tiles;
    piece.bundle = index % p.in_bundles;
    index /= p.in_bundles;
    piece.q = index % tiles;
    index /= tiles;
    int axis_of[3];
    for (int a = 0; a < 3; ++a) axis_of[p.order[a]] = a;
    for (int memory = 2; memory >= 0; --memory) {
        const int a = axis_of[memory];
        piece.r[a] = index % p.axis[a].s;
        index /= p.axis[a].s;
    }
    int residue = 0;
    for (int memory = 0; memory < 3; ++memory) {
        const int a = axis_of[memory];
        if (piece.r[a] >= p.axis[a].residues) residue = -1;
        if (residue >= 0) residue = residue * p.axis[a].residues + piece.r[a];
    }
    piece.tile_strip = residue < 0 ? -1 : residue * tiles + piece.q;
    return piece;
}

// What a strip's tiles leave beyond it: kernel - 1 along the split axis, the whole sub-lattice along the others.
struct HaloShape {
    long step[3], volume;

    explicit HaloShape(const LayerPlan& p) {
        volume = 1;
        for (int a = 2; a >= 0; --a) {
            step[a] = volume;
            volume *= a == p.split ? p.axis[a].k - 1 : p.axis[a].inputs(0);
        }
    }
    long at(const int i[3]) const { return i[0] * step[0] + i[1] * step[1] + i[2] * step[2]; }
};

// ---- kernels: a bundle on one side, a range of maps on the other
struct MapPiece {
    int bundle, first, last;
};

inline MapPiece map_piece(int bundles, int maps, int maps_per_piece, int index) {
    (void)bundles;
    const int groups = ceil_div(maps, maps_per_piece);
    const int first = index % groups * maps_per_piece;
    return {index / groups, first, std::min(maps, first + maps_per_piece)};
}

// ---- fused: scratch of the pipeline for few input maps, in vectors
inline constexpr int kFusedBlock = 8;  // pencils whose lines stay in L1 between product and transform

// Kernels of so many taps at most along axis 0 have them summed one by one there, not transformed.
inline constexpr int kSummedTaps = 8;
inline bool sums_taps(const LayerPlan& p) { return p.fused && p.axis[1].T > 1 && p.axis[0].k <= kSummedTaps; }

inline int fused_groups(const LayerPlan& p) { return ceil_div(p.tiles, p.fused_tiles); }
// Of so many parts of a group, those that share a bundle of outputs, each with some of its tiles.
inline int parts_by_tile(const LayerPlan& p, int parts) { return std::max(1, parts / p.out_bundles); }

struct FusedSizes {
    long pencil, box, inputs, sums = 0, lines = 0, input_plane = 0;

    explicit FusedSizes(const LayerPlan& p) {
        // By planes: one at a time. Rows are gathered in blocks of vectors.
        box = long(sums_taps(p) ? 1 : p.axis[0].T) * p.axis[1].T * p.axis[2].T + p.bundle - 1;
        pencil = 2 * ((p.problem.in_maps * p.line) | 1);  // an odd number of pairs: pencils spread over the cache's sets
        if (sums_taps(p)) {
            input_plane = (ceil_div(2 * p.pencils, p.bundle) | 1) * p.bundle;  // floats
            inputs = input_plane * p.axis[0].T * p.problem.in_maps;
            return;
        }
        inputs = pencil * p.pencils;
        sums = inputs * p.out_bundles;  // forward: the kernels of one bundle
        lines = 2L * kFusedBlock * p.line;
    }
    long total() const { return box + inputs + sums + lines; }
};

// ---- direct: bundles in nearly equal groups of at most `most`
struct GroupRange {
    int first, last;
};

inline int group_count(int bundles, int most) { return ceil_div(bundles, most); }
inline GroupRange group_range(int bundles, int most, int index) {
    const int groups = group_count(bundles, most);
    return {index * bundles / groups, (index + 1) * bundles / groups};
}

// Rows of voxels of a direct convolution. A 1x1x1 kernel sees the whole image as one row, cut into pieces of kRowVoxels.
inline constexpr int kRowVoxels = 512;
inline bool is_pointwise(const LayerPlan& p) { return p.problem.kernel.volume() == 1; }
inline int row_count(const LayerPlan& p, Extent image) {
    return is_pointwise(p) ? ceil_div(int(image.volume()), kRowVoxels) : image.z * image.y;
}
// Of the output: of windows, where it is pooled.
inline int forward_rows(const LayerPlan& p) {
    const Extent m = p.output, w = p.problem.pool;
    return p.pools() ? m.z / w.z * (m.y / w.y) : row_count(p, m);
}
// How many rows of so many voxels are finished together, while they are in L1, and the voxels there must be room for.
inline constexpr int kFinishedVoxels = 64;
inline int rows_together(int voxels) { return std::max(1, kFinishedVoxels / voxels); }
inline int finished_voxels(const LayerPlan& p) {
    return is_pointwise(p) ? kRowVoxels : std::max(kFinishedVoxels, p.problem.input.x);
}
// Whether the backward pass reads a copy of the output gradient with zeros on both sides of its rows. Three adjacent taps of
// many maps, the usual ones, have functions that leave out what lies outside. A pooled gradient is spread there.
inline bool pads_gradient(const LayerPlan& p) {
    const Problem& q = p.problem;
    return p.pools() || (q.kernel.x > 1 && (q.kernel.x != 3 || q.sparsity.x > 1 || q.out_maps == 1 || q.depthwise));
}
// Voxels of a row of that copy.
inline int padded_row(const LayerPlan& p) {
    return p.output.x + 2 * p.problem.sparsity.x * (p.problem.kernel.x - 1);
}

// ---- direct convolution of a single map (single.cpp), whose vectors are of voxels
inline bool is_single(const LayerPlan& p) { return p.method == Method::direct && p.problem.in_maps == 1 && !p.problem.depthwise; }
// Whether direct convolution reads a copy of the kernels, in another order.
inline bool packs_kernels(const LayerPlan& p) { return !p.problem.depthwise && !is_single(p); }
inline constexpr int kSingleLanes = 16;      // of the widest vectors
inline constexpr int kRunVoxels = 512;       // of a plane, that are in L1 together with what they are made of

// Rows of windows of the pooling (of outputs, where there are no windows, or as the update of a filtered layer sees it), how many are
// taken together, and scratch: of one bundle, all of a run. Where windows overlap, a run goes through many planes: what windows
// share is computed once.
struct SingleSizes {
    int down, count, run;  // rows of a plane, of all, of a run
    long input, pitch, planar, sums, taps;  // floats, the last integers
    long rows, plane, maxima;                 // vectors

    SingleSizes(const LayerPlan& p, bool update) {
        const Problem& q = p.problem;
        const bool filters = p.filters() && !update;
        const Extent n = q.input, m = p.output, left = p.filters() && update ? m : q.pooled(m);
        const Extent w = p.filters() ? Extent{1, 1, 1} : q.pool;
        const int overlap = filters ? q.pool.y - 1 : 0;  // rows
        down = left.y, count = left.z * down;
        run = filters ? ceil_div(down, p.filter_runs) : std::clamp(kRunVoxels / (w.y * n.x), 1, down);
        const auto whole = [](long floats) { return (floats + kSingleLanes - 1) / kSingleLanes * kSingleLanes; };
        const long planes = w.z + q.sparsity.z * (q.kernel.z - 1), halo = q.sparsity.y * (q.kernel.y - 1);
        input = whole(planes * (run * w.y + overlap + halo) * n.x + kSingleLanes);
        pitch = whole(long(run * w.y + overlap) * n.x + kSingleLanes);
        if (pitch / kSingleLanes % 2 == 0) pitch += kSingleLanes;  // an odd number: maps spread over the cache's sets
        planar = pitch * p.bundle;
        plane = long(p.pools() && !p.filters() ? w.y : run + overlap) * m.x + kSingleLanes;
        rows = std::max((filters ? q.pool.z : 1) * plane, long(run) * left.x);
        maxima = p.pools() ? 2L * run * left.x : 0;
        taps = whole(long(q.kernel.volume()));
        sums = taps * p.bundle * kSingleLanes;
    }
    long floats(int bundle) const { return input + planar + sums + (rows + maxima) * bundle + taps; }
};

// Taps j of an axis for which 0 <= i - s j < m.
struct TapRange {
    int first, count;
    TapRange(int i, int m, int k, int s) {
        first = i < m ? 0 : s == 1 ? i - m + 1 : (i - m + s) / s;
        count = std::max(0, std::min(k, (s == 1 ? i : i / s) + 1) - first);
    }
};

// The kernel gradient sums over patches of the output small enough for L1, numbered z, y, x.
struct PatchGrid {
    int rows, columns, down, across, planes;

    explicit PatchGrid(const LayerPlan& p) {
        const Extent m = is_pointwise(p) ? Extent{1, 1, int(p.output.volume())} : p.output;
        columns = std::min(m.x, p.patch_voxels);
        rows = std::min(m.y, std::max(1, p.patch_voxels / columns));
        down = ceil_div(m.y, rows), across = ceil_div(m.x, columns), planes = m.z;
    }
    int count() const { return planes * down * across; }
};
// Vectors of one chunk's partial sums.
inline long update_chunk_vectors(const LayerPlan& p) {
    const long taps = long(p.problem.kernel.volume());
    return p.few_outputs ? taps * p.problem.out_maps * p.in_bundles : taps * p.problem.fan_in() * p.out_bundles;
}

}  // namespace znn::tiled
