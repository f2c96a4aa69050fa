// Transforms of tiles and kernels between images and spectra, and the dispatch of the tiled method's phases.
//
// Spectra: [slab][pencil (f2, f1)][bundle][tile][line of f0, padded][re V, im V]. Everything a pencil's product reads lies
// together. Of the pencils whose f2 is its own negative only f1 = 0..T1/2 are kept: the real image fixes the others.
#include <algorithm>
#include <cstring>

#include "tiled/layout.hpp"
#include "tiled/short_transforms.hpp"
#include "tiled/variant.hpp"

namespace znn::tiled::ZNN_VARIANT {
namespace {

// Scratch of a tile: planes of pencils, one plane before its middle transform, rows of voxels, one line.
struct TileScratch {
    V *planes, *plane, *rows, *line, *maxima;
    long row_frequencies;

    TileScratch(const LayerPlan& p, float* scratch) {
        const TileScratchSizes s(p);
        planes = vec(scratch);
        plane = planes + s.planes;
        rows = plane + s.plane;
        line = rows + s.rows;
        maxima = line + s.line;
        row_frequencies = s.row_frequencies;
    }
};

// Rows [first, first + count) of T1, the others zero; `plane` has them in real-to-complex order.
void zero_rows(V* plane, long row, int first, int count, int total) {
    std::fill(plane, plane + first * row, V{});
    std::fill(plane + (first + count) * row, plane + total * row, V{});
}

// One plane: middle transforms of all f2, from [i1][f2] to pencils.
void middle_forward(const LayerPlan& p, const TileScratch& t, V* pencils) {
    const int T1 = p.axis[1].T, F2 = p.axis[2].frequencies();
    const Codelets& c = codelets(T1);
    const long is = 2 * t.row_frequencies;
    const int regular = p.axis[2].T % 2 == 0 ? F2 - 2 : F2 - 1;
    if (regular > 0) {
        V* out = pencils + 2 * p.first_pencil(1);
        c.forward(t.plane + 2, is, 2, out, 2 * T1, regular);
    }
    for (int f2 = 0; f2 < F2; ++f2) {
        if (!p.self_conjugate(f2)) continue;
        c.forward(t.plane + 2 * f2, is, 0, t.line, 0, 1);
        std::copy(t.line, t.line + 2 * (T1 / 2 + 1), pencils + 2 * p.first_pencil(f2));
    }
}

// The reverse: pencils of one plane to [i1][f2].
void middle_inverse(const LayerPlan& p, const TileScratch& t, const V* pencils) {
    const int T1 = p.axis[1].T, F2 = p.axis[2].frequencies();
    const Codelets& c = codelets(T1);
    const long os = 2 * t.row_frequencies;
    const int regular = p.axis[2].T % 2 == 0 ? F2 - 2 : F2 - 1;
    if (regular > 0) {
        const V* in = pencils + 2 * p.first_pencil(1);
        c.inverse(in, 2 * T1, t.plane + 2, os, 2, regular);
    }
    for (int f2 = 0; f2 < F2; ++f2) {
        if (!p.self_conjugate(f2)) continue;
        const V* kept = pencils + 2 * p.first_pencil(f2);
        std::copy(kept, kept + 2 * (T1 / 2 + 1), t.line);
        for (int f1 = T1 / 2 + 1; f1 < T1; ++f1) {
            t.line[2 * f1] = kept[2 * (T1 - f1)];
            t.line[2 * f1 + 1] = -kept[2 * (T1 - f1) + 1];
        }
        c.inverse(t.line, 0, t.plane + 2 * f2, os, 0, 1);
    }
}

}  // namespace

// Plane z of a filtered gradient.
static void collect_plane(const LayerPlan& p, const Box& box, int z, V* rows) {
    FilteredGradient gradient{vec(box.origin), box.largest, {}, {}, {}, {}};
    for (int a = 0; a < 3; ++a) {
        gradient.window[a] = p.axis[a].pool, gradient.count[a] = p.axis[a].windows(box.count[a]);
        gradient.step[a] = box.step[a], gradient.note_step[a] = box.note_step[a];
    }
    const bool any = std::min({gradient.count[0], gradient.count[1], gradient.count[2]}) > 0;
    for (int y = 0; y < box.count[1]; ++y) {
        V* const row = rows + long(y) * p.axis[2].T + box.at[2];
        if (any)
            collect_row(gradient, z, y, row, box.sums);
        else
            std::fill_n(row, box.count[2], V{});
    }
}

// Plane z of a pooled gradient, spread to the voxels that were the largest of their windows.
static void spread_plane(const LayerPlan& p, const Box& box, int z, V* rows) {
    if (p.filters()) return collect_plane(p, box, z, rows);
    const int w0 = p.axis[0].pool, w1 = p.axis[1].pool, w2 = p.axis[2].pool, first = z % w0 * w1 * w2;
    const long row = p.axis[2].T;
    for (int y = 0; y < box.count[1]; y += w1) {
        const long at = z / w0 * box.step[0] + y / w1 * box.step[1], note = z / w0 * box.note_step[0] + y / w1 * box.note_step[1];
        spread_row(vec(box.origin) + at, box.step[2], box.largest + note * kV, box.note_step[2], box.count[2] / w2, w1, w2, first,
                   rows + y * row + box.at[2], row);
    }
}

// The rows of plane z, far apart in the image: fetched while the plane before is worked on.
static void prefetch_plane(const LayerPlan& p, const Box& box, int z) {
    const bool pooled = box.largest;
    const auto count = [&](int a) { return pooled ? p.axis[a].windows(box.count[a]) : box.count[a]; };
    const int step = pooled ? p.axis[0].pool_step : 1;
    if (z % step || z / step >= count(0)) return;
    const long bytes = count(2) * box.step[2] * long(sizeof(V)), notes = count(2) * box.note_step[2] * kV;
    for (int y = 0; y < count(1); ++y) {
        const char* row = reinterpret_cast<const char*>(vec(box.origin) + z / step * box.step[0] + y * box.step[1]);
        for (long i = 0; i < bytes; i += 64) __builtin_prefetch(row + i);
        if (!pooled) continue;
        const std::int8_t* largest = box.largest + (z / step * box.note_step[0] + y * box.note_step[1]) * kV;
        for (long i = 0; i < notes; i += 64) __builtin_prefetch(largest + i);
    }
}

void Ahead::fetch(const LayerPlan& p, int plane, int planes) const {
    if (!spectrum) return;
    const int each = ceil_div(p.pencils, planes);
    const long bytes = 2L * p.axis[0].T * long(sizeof(V));
    for (int i = plane * each; i < std::min(p.pencils, (plane + 1) * each); ++i) {
        const char* line = reinterpret_cast<const char*>(spectrum + i * pencil);
        for (long at = 0; at < bytes; at += 64) __builtin_prefetch(line + at, 0, 2);
    }
}

void forward_planes(const LayerPlan& p, const Box& box, int planes, float* scratch, Ahead ahead) {
    const TileScratch t(p, scratch);
    const int T1 = p.axis[1].T, T2 = p.axis[2].T;
    const bool middle = T1 > 1;
    const long row = 2 * t.row_frequencies;
    const bool padded = box.count[2] < T2;
    const Codelets& real = codelets(T2);
    if (padded) std::fill(t.rows, t.rows + long(T1) * T2, V{});
    if (middle) zero_rows(t.plane, row, box.at[1], box.count[1], T1);
    for (int i0 = 0; i0 < planes; ++i0) {
        V* pencils = t.planes + 2 * p.plane * i0;
        ahead.fetch(p, i0, planes);
        const int z = i0 - box.at[0];
        if (z < 0 || z >= box.count[0] || box.count[1] == 0 || box.count[2] == 0) {
            std::fill(pencils, pencils + 2 * p.pencils, V{});
            continue;
        }
        prefetch_plane(p, box, z + 1);
        const V* x = vec(box.origin) + z * box.step[0];
        long is = box.step[2], in_line = box.step[1];
        if (box.largest) {
            spread_plane(p, box, z, t.rows);
            x = t.rows, is = 1, in_line = T2;
        } else if (padded) {
            for (int y = 0; y < box.count[1]; ++y)
                for (int i = 0; i < box.count[2]; ++i)
                    t.rows[y * T2 + box.at[2] + i] = x[y * box.step[1] + i * box.step[2]];
            x = t.rows, is = 1, in_line = T2;
        }
        if (middle) {
            V* first = t.plane + box.at[1] * row;
            real.r2c(x, is, in_line, first, row, box.count[1]);
            middle_forward(p, t, pencils);
        } else {
            real.r2c(x, is, in_line, pencils, 0, 1);
        }
    }
}

void forward_tile(const LayerPlan& p, const Box& box, V* out, long out_line, float* scratch) {
    forward_planes(p, box, p.axis[0].T, scratch, {out, out_line});
    const V* planes = vec(scratch);
    codelets(p.axis[0].T).forward(planes, 2 * p.plane, 2, out, out_line, p.pencils);
}

// The same past the caches, by way of one line after the other.
static void stream_tile(const LayerPlan& p, const Box& box, V* out, long out_line, float* scratch) {
    forward_planes(p, box, p.axis[0].T, scratch);
    const V* planes = vec(scratch);
    V* line = TileScratch(p, scratch).line;
    const int T = p.axis[0].T;
    const Codelets& c = codelets(T);
    for (int pencil = 0; pencil < p.pencils; ++pencil, planes += 2, out += out_line) {
        c.forward(planes, 2 * p.plane, 0, line, 0, 1);
        for (int i = 0; i < 2 * T; ++i) stream(out + i, line[i]);
    }
}

namespace {

// Inverse of one tile up to the planes of pencils.
void inverse_lines(const LayerPlan& p, const TileScratch& t, const V* in, long in_line) {
    codelets(p.axis[0].T).inverse(in, in_line, t.planes, 2 * p.plane, 2, p.pencils);
}

// The plane of pencils i0 up to its rows.
void inverse_plane(const LayerPlan& p, const TileScratch& t, int i0) {
    if (p.axis[1].T > 1) middle_inverse(p, t, t.planes + 2 * p.plane * i0);
}

// Rows [first, first + count) of the plane in hand, i0, as voxels: few at a time, which stay in L1.
void inverse_rows(const LayerPlan& p, const TileScratch& t, int i0, int first, int count, V* rows) {
    const bool middle = p.axis[1].T > 1;
    const long row = middle ? 2 * t.row_frequencies : 0;
    const V* in = middle ? t.plane + first * row : t.planes + 2 * p.plane * i0;
    codelets(p.axis[2].T).c2r(in, row, rows, p.axis[2].T, count);
}

}  // namespace

Box input_box(const LayerPlan& p, const TilePlace& place, const float* image, long voxel_floats) {
    Box box;
    long offset = 0;
    for (int a = 0; a < 3; ++a) {
        const Axis& axis = p.axis[a];
        const int first = place.q[a] * axis.M;
        box.count[a] = std::max(0, std::min(axis.T, axis.inputs(place.r[a]) - first));
        box.at[a] = 0;
        box.step[a] = axis.in_step * axis.s;
        offset += axis.in_step * (place.r[a] + long(axis.s) * first);
    }
    box.origin = image + offset * voxel_floats;
    return box;
}

Box output_box(const LayerPlan& p, const TilePlace& place, const float* image) {
    Box box;
    long offset = 0;
    for (int a = 0; a < 3; ++a) {
        const Axis& axis = p.axis[a];
        const int first = place.q[a] * axis.M;
        box.count[a] = std::max(0, std::min(axis.M, axis.outputs(place.r[a]) - first));
        box.at[a] = axis.center;
        box.step[a] = axis.out_step * axis.s;
        box.note_step[a] = axis.out_step;
        offset += axis.out_step * ((place.r[a] + long(axis.s) * first) / axis.pool_step);
        box.notes += axis.out_step * (axis.windows_before(place.r[a]) + first / axis.pool_step);
    }
    box.origin = image + offset * kV;
    return box;
}

Box gradient_box(const LayerPlan& p, const TilePlace& place, const Buffers& b, int bundle) {
    Box box = output_box(p, place, b.output_gradient + bundle * b.output_gradient_stride);
    if (p.pools()) box.largest = b.largest + bundle * b.output_gradient_stride + box.notes * kV;
    return box;
}

static void finish_pooled_tile(const LayerPlan& p, const Box& box, const Buffers& b, const float* bias, std::int8_t* largest,
                               const TileScratch& t, const Ahead& ahead) {
    const Axis* a = p.axis;
    const int count = box.count[2] / a[2].pool;
    for (int i0 = 0; i0 < box.count[0]; ++i0) {
        ahead.fetch(p, i0, box.count[0]);
        inverse_plane(p, t, i0 + box.at[0]);
        for (int y = 0; y < box.count[1] / a[1].pool; ++y) {
            V* maxima = t.maxima + 2L * y * count;
            inverse_rows(p, t, i0 + box.at[0], box.at[1] + y * a[1].pool, a[1].pool, t.rows);
            pool_row(t.rows + box.at[2], a[2].T, a[1].pool, a[2].pool, i0 % a[0].pool * a[1].pool * a[2].pool, count, maxima);
            if ((i0 + 1) % a[0].pool) continue;
            const int z = i0 / a[0].pool;
            V* out = vec(const_cast<float*>(box.origin)) + z * box.step[0] + y * box.step[1];
            take_maxima(maxima, count, t.rows, notes_at(largest, (z * box.note_step[0] + y * box.note_step[1]) * kV), box.note_step[2]);
            finish_forward(t.rows, out, box.step[2], count, bias, b.transfer, b.accumulate_output);
        }
    }
}

// Planes that a filter's windows have voxels in, in turns.
static V* filtered_plane(const LayerPlan& p, const TileScratch& t, int plane) {
    return t.rows + long(plane % p.axis[0].pool) * p.axis[1].T * p.axis[2].T;
}

static void finish_filtered_tile(const LayerPlan& p, const Box& box, const Buffers& b, const float* bias, std::int8_t* largest,
                                 const TileScratch& t, const Ahead& ahead) {
    const Axis* a = p.axis;
    const int w0 = a[0].pool, w1 = a[1].pool, down = a[1].windows(box.count[1]), across = a[2].windows(box.count[2]);
    const V shift = bias ? *vec(bias) : V{};
    for (int i0 = 0; i0 < box.count[0]; ++i0) {
        ahead.fetch(p, i0, box.count[0]);
        inverse_plane(p, t, i0 + box.at[0]);
        inverse_rows(p, t, i0 + box.at[0], box.at[1], box.count[1], filtered_plane(p, t, i0));
        const int z = i0 - w0 + 1;
        if (z < 0 || across == 0) continue;
        const V* rows[most_filtered];
        for (int i = 0; i < w0; ++i)
            for (int j = 0; j < w1; ++j) rows[i * w1 + j] = filtered_plane(p, t, z + i) + long(j) * a[2].T + box.at[2];
        for (int y = 0; y < down; ++y) {
            V* out = vec(const_cast<float*>(box.origin)) + z * box.step[0] + y * box.step[1];
            filter_row(rows, w0 * w1, a[2].pool, across, t.line,
                       {notes_at(largest, (z * box.note_step[0] + y * box.note_step[1]) * kV), box.note_step[2],
                        b.note_positive ? &shift : nullptr});
            finish_forward(t.line, out, box.step[2], across, bias, b.transfer, b.accumulate_output);
            for (int i = 0; i < w0 * w1; ++i) rows[i] += a[2].T;
        }
    }
}

void finish_output_tile(const LayerPlan& p, const TilePlace& place, const Buffers& b, int bundle, float* scratch, Ahead ahead) {
    const Box box = output_box(p, place, b.output + bundle * b.output_stride);
    if (std::min({box.count[0], box.count[1], box.count[2]}) <= 0) return;
    const TileScratch t(p, scratch);
    const float* bias = b.bias ? b.bias + bundle * kV : nullptr;
    std::int8_t* largest = notes_at(b.largest, bundle * b.output_stride + box.notes * kV);
    if (p.pools()) return (p.filters() ? finish_filtered_tile : finish_pooled_tile)(p, box, b, bias, largest, t, ahead);
    V* origin = vec(const_cast<float*>(box.origin));
    for (int i0 = 0; i0 < box.count[0]; ++i0) {
        ahead.fetch(p, i0, box.count[0]);
        inverse_plane(p, t, i0 + box.at[0]);
        for (int i1 = 0; i1 < box.count[1]; ++i1) {
            inverse_rows(p, t, i0 + box.at[0], box.at[1] + i1, 1, t.rows);
            finish_forward(t.rows + box.at[2], origin + i0 * box.step[0] + i1 * box.step[1], box.step[2], box.count[2], bias,
                           b.transfer, b.accumulate_output);
        }
    }
}

void write_output_tile(const LayerPlan& p, const TilePlace& place, const Buffers& b, int bundle, const V* spectra,
                       long in_line, float* scratch) {
    inverse_lines(p, TileScratch(p, scratch), spectra, in_line);
    finish_output_tile(p, place, b, bundle, scratch, {spectra + 2 * p.line, in_line});
}

namespace {

// ---- phases

void transform_tiles(const LayerPlan& p, bool gradient, int index, const Buffers& b, float* scratch) {
    const TilePiece piece = tile_piece(p, index, gradient ? p.out_bundles : p.in_bundles, p.transform_tiles);
    float* spectra = gradient ? b.at(Buffer::gradient_spectra) + p.passing_out(piece.slab)
                              : b.at(Buffer::input_spectra) + p.input_place(piece.slab, b.keep);
    const long pencil = (gradient ? p.out_pencil : p.in_pencil) / kV;
    for (int t = piece.first; t < piece.last; ++t) {
        const TilePlace place = tile_place(p, piece.slab * p.tiles_per_slab + t);
        Box box = gradient ? gradient_box(p, place, b, piece.bundle) : input_box(p, place, b.input + piece.bundle * b.input_stride);
        if (gradient && b.bias_sums) {
            box.sums = b.bias_sums + (long(piece.bundle) * p.tiles + piece.slab * p.tiles_per_slab + t) * kV;
            std::fill_n(box.sums, kV, 0.0);
        }
        V* out = vec(spectra) + (long(piece.bundle) * p.slab_tiles(piece.slab) + t) * 2 * p.line;
        (p.streams ? stream_tile : forward_tile)(p, box, out, pencil, scratch);
    }
    if (p.streams) finish_streams();
}

void forward_inverse(const LayerPlan& p, int index, const Buffers& b, float* scratch) {
    const TilePiece piece = tile_piece(p, index, p.out_bundles, p.transform_tiles);
    const V* spectra = vec(b.at(Buffer::output_spectra) + p.passing_out(piece.slab));
    for (int t = piece.first; t < piece.last; ++t)
        write_output_tile(p, tile_place(p, piece.slab * p.tiles_per_slab + t), b, piece.bundle,
                          spectra + (long(piece.bundle) * p.slab_tiles(piece.slab) + t) * 2 * p.line, p.out_pencil / kV,
                          scratch);
}

// Voxels of a sub-lattice that no output reaches get no gradient.
void zero_sublattice(const LayerPlan& p, const int r[3], V* image) {
    const Axis *a = p.axis;
    for (int i = 0; i < a[0].inputs(r[0]); ++i)
        for (int j = 0; j < a[1].inputs(r[1]); ++j)
            for (int k = 0; k < a[2].inputs(r[2]); ++k)
                image[a[0].in_step * (r[0] + i * a[0].s) + a[1].in_step * (r[1] + j * a[1].s) +
                      a[2].in_step * (r[2] + k * a[2].s)] = V{};
}

// One tile of the input's gradient, added to what earlier tiles of the strip left where they overlap.
void add_backward_tile(const LayerPlan& p, const TileScratch& t, const TilePlace& place, bool add, V* image, V* halo,
                       const Ahead& ahead) {
    int count[3], overlap[3];
    long step[3], offset = 0;
    for (int a = 0; a < 3; ++a) {
        const Axis& axis = p.axis[a];
        const int first = place.q[a] * axis.M;
        count[a] = std::min(axis.M + axis.k - 1, axis.inputs(place.r[a]) - first);
        overlap[a] = a != p.split && place.q[a] > 0 ? axis.k - 1 : 0;
        step[a] = axis.in_step * axis.s;
        offset += axis.in_step * (place.r[a] + long(axis.s) * first);
    }
    const Axis& split = p.axis[p.split];
    const bool last = place.q[p.split] + 1 == split.tiles;
    const HaloShape shape(p);
    for (int i0 = 0; i0 < count[0]; ++i0) {
        ahead.fetch(p, i0, count[0]);
        inverse_plane(p, t, i0);
        for (int i1 = 0; i1 < count[1]; ++i1) {
            const V* row = t.rows;
            inverse_rows(p, t, i0, i1, 1, t.rows);
            const int at[3] = {i0, i1, 0};
            const bool row_done = i0 < overlap[0] || i1 < overlap[1];
            for (int i2 = 0; i2 < count[2];) {
                // Runs of voxels with one fate: own region or halo, first written here or added to.
                const int along = p.split == 2 ? i2 : at[p.split];
                const bool outside = !last && along >= split.M;
                const bool written = row_done || i2 < overlap[2];
                int end = !row_done && i2 < overlap[2] ? std::min(overlap[2], count[2]) : count[2];
                if (p.split == 2 && !last && i2 < split.M) end = std::min(end, split.M);
                V* dst = image + offset + i0 * step[0] + i1 * step[1] + i2 * step[2];
                long dst_step = step[2];
                if (outside) {
                    int local[3] = {place.q[0] * p.axis[0].M + i0, place.q[1] * p.axis[1].M + i1,
                                    place.q[2] * p.axis[2].M + i2};
                    local[p.split] = along - split.M;
                    dst = halo + shape.at(local);
                    dst_step = shape.step[2];
                }
                if (written || (add && !outside)) {
                    for (; i2 < end; ++i2, dst += dst_step) *dst += row[i2];
                } else {
                    for (; i2 < end; ++i2, dst += dst_step) *dst = row[i2];
                }
            }
        }
    }
}

void backward_inverse(const LayerPlan& p, int index, const Buffers& b, float* scratch) {
    const StripPiece piece = strip_piece(p, index);
    V* image = vec(b.input_gradient + piece.bundle * b.input_gradient_stride);
    if (piece.tile_strip < 0) {
        if (piece.q == 0 && !b.accumulate_input_gradient) zero_sublattice(p, piece.r, image);
        return;
    }
    const TileScratch t(p, scratch);
    const HaloShape shape(p);
    V* halo = vec(b.at(Buffer::halo)) + (long(piece.bundle) * p.strips + piece.tile_strip) * shape.volume;
    for (int i = 0; i < p.tiles_per_strip; ++i) {
        const int tile = piece.tile_strip * p.tiles_per_strip + i;
        const int slab = tile / p.tiles_per_slab;
        const V* spectra = vec(b.at(Buffer::input_gradient_spectra) + p.passing_in(slab));
        const long place = long(piece.bundle) * p.slab_tiles(slab) + (tile - slab * p.tiles_per_slab);
        const V* lines = spectra + place * 2 * p.line;
        const long next = i + 1 < p.tiles_per_strip ? 1 : p.slab_tiles(slab);  // tile, or bundle
        inverse_lines(p, t, lines, p.in_pencil / kV);
        add_backward_tile(p, t, tile_place(p, tile), b.accumulate_input_gradient, image, halo, {lines + next * 2 * p.line, p.in_pencil / kV});
    }
}

// Adds what the strips before this one left beyond their own region, then the derivative.
void backward_join(const LayerPlan& p, int index, const Buffers& b) {
    const StripPiece piece = strip_piece(p, index);
    const Axis& split = p.axis[p.split];
    V* image = vec(b.input_gradient + piece.bundle * b.input_gradient_stride);
    const V* activation = b.activation ? vec(b.activation + piece.bundle * b.input_stride) : nullptr;
    const HaloShape shape(p);
    // The strip's own box in sub-lattice coordinates; where nothing was computed q = 0 stands for the whole sub-lattice.
    int first[3] = {0, 0, 0}, last[3];
    for (int a = 0; a < 3; ++a) last[a] = p.axis[a].inputs(piece.r[a]);
    const bool empty = piece.tile_strip < 0;
    if (empty && piece.q > 0) return;
    if (!empty) {
        first[p.split] = std::min(piece.q * split.M, last[p.split]);
        if (piece.q + 1 < split.tiles) last[p.split] = std::min(last[p.split], first[p.split] + split.M);
    }
    const int earlier = empty ? 0 : piece.q;
    for (int i0 = first[0]; i0 < last[0]; ++i0) {
        for (int i1 = first[1]; i1 < last[1]; ++i1) {
            const Axis *a = p.axis;
            const long row = a[0].in_step * (piece.r[0] + i0 * a[0].s) + a[1].in_step * (piece.r[1] + i1 * a[1].s) +
                             a[2].in_step * piece.r[2];
            const long step = a[2].in_step * a[2].s;
            for (int q = std::max(0, earlier - (split.k - 2) / split.M - 1); q < earlier; ++q) {
                const V* halo = vec(b.at(Buffer::halo)) +
                                (long(piece.bundle) * p.strips + piece.tile_strip - earlier + q) * shape.volume;
                const int begin = (q + 1) * split.M, end = begin + split.k - 1;  // covered along the split axis
                int from = first[2], to = last[2];
                if (p.split == 2) {
                    from = std::max(from, begin), to = std::min(to, end);
                } else {
                    const int along = p.split == 0 ? i0 : i1;
                    if (along < begin || along >= end) continue;
                }
                int local[3] = {i0, i1, from};
                local[p.split] -= begin;
                const V* src = halo + shape.at(local);
                for (int i2 = from; i2 < to; ++i2, src += shape.step[2]) image[row + i2 * step] += *src;
            }
            if (activation)
                apply_derivative(image + row + first[2] * step, activation + row + first[2] * step, step,
                                 last[2] - first[2], b.activation_transfer);
        }
    }
}

// One map's lines lie a pencil apart, far from the caches: the next map's are fetched meanwhile.
template <int WRITE>
ZNN_INLINE void prefetch_pencils(const V* first, long pencil, int count) {
    for (int f1 = 0; f1 < count; ++f1)
        for (long v = 0; v < 2; v += 64 / long(sizeof(V))) __builtin_prefetch(first + f1 * pencil + v, WRITE, 3);
}

// What a transform there and back multiplies with, undone; by planes: along two axes.
float inverse_scale(const LayerPlan& p, bool planes) {
    return 1.0f / (float(planes ? 1 : p.axis[0].T) * p.axis[1].T * p.axis[2].T);
}

// Kernel spectra [bundle][pencil][map][tap along axis 0]: transformed along axes 2 and 1, expanded along 0 by the product.
void transform_kernel(const LayerPlan& p, float scale, bool streams, const V* taps, V* out, long pencil, float* scratch) {
    const TileScratch t(p, scratch);
    const Axis *a = p.axis;
    const int F2 = a[2].frequencies();
    const long row = 2 * t.row_frequencies;
    for (int j0 = 0; j0 < a[0].k; ++j0) {
        kernel_line_real(a[2], scale, taps + j0 * a[0].kernel_step, a[2].kernel_step, a[1].kernel_step, t.plane, 2, row,
                         a[1].k, t.line);
        V* dst = out + 2 * j0;
        for (int f2 = 0; f2 < F2; ++f2) {
            const int kept = p.self_conjugate(f2) ? a[1].T / 2 + 1 : a[1].T;
            V* first = dst + p.first_pencil(f2) * pencil;
            if (!streams) prefetch_pencils<1>(first + 2 * a[0].k, pencil, kept);
            const bool in_place = kept == a[1].T && !streams;
            kernel_line(a[1], t.plane + 2 * f2, row, 0, in_place ? first : t.rows, in_place ? pencil : 2, 0, 1, t.line);
            for (int i = 0; !in_place && i < 2 * kept; ++i) {
                V* to = first + i / 2 * pencil + i % 2;
                if (streams)
                    stream(to, t.rows[i]);
                else
                    *to = t.rows[i];
            }
        }
    }
}

void kernels_forward(const LayerPlan& p, int index, const Buffers& b, float* scratch) {
    const MapPiece piece = map_piece(p.out_bundles, p.problem.in_maps, p.kernel_maps_in, index);
    const long taps = long(p.problem.kernel.volume()), nc = p.problem.in_maps, k0 = p.axis[0].k;
    const long pencil = kernel_pencil(p, int(nc));
    const float scale = inverse_scale(p, sums_taps(p));
    const bool streams = p.streams && !p.fused;  // which has no spectra but these
    V* spectra = vec(b.at(Buffer::kernels_forward)) + piece.bundle * p.pencils * pencil;
    for (int i = piece.first; i < piece.last; ++i)
        transform_kernel(p, scale, streams, vec(b.kernels) + (piece.bundle * nc + i) * taps, spectra + i * k0 * 2, pencil, scratch);
    if (streams) finish_streams();
}

// Lanes are input maps here: the kernels of one input bundle and one output bundle are transposed first.
void kernels_backward(const LayerPlan& p, int index, const Buffers& b, float* scratch) {
    const MapPiece piece = map_piece(p.in_bundles, p.problem.out_maps, p.kernel_maps_out, index);
    const long taps = long(p.problem.kernel.volume()), k0 = p.axis[0].k, no = p.problem.out_maps;
    const long pencil = kernel_pencil(p, int(no));
    const float scale = inverse_scale(p, false);
    V* spectra = vec(b.at(Buffer::kernels_backward)) + piece.bundle * p.pencils * pencil;
    V* turned = vec(scratch) + TileScratchSizes(p).total();  // [lane of the out bundle][tap]
    for (int o = piece.first; o < piece.last; o += kV) {
        transpose_kernels(p, b, o / kV, piece.bundle, turned);
        for (int lane = 0; lane < kV && o + lane < piece.last; ++lane)
            transform_kernel(p, scale, p.streams, turned + lane * taps, spectra + (o + lane) * k0 * 2, pencil, scratch);
    }
    if (p.streams) finish_streams();
}

void update_inverse(const LayerPlan& p, int index, const Buffers& b, float* scratch) {
    const MapPiece piece = map_piece(p.out_bundles, p.problem.in_maps, p.kernel_maps_in, index);
    const TileScratch t(p, scratch);
    const Axis *a = p.axis;
    const long taps = long(p.problem.kernel.volume()), nc = p.problem.in_maps, k0 = a[0].k, pencil = kernel_pencil(p, int(nc));
    const int T1 = a[1].T, F2 = a[2].frequencies();
    const float scale = inverse_scale(p, sums_taps(p));
    const long row = 2 * t.row_frequencies;
    V* gradient = vec(scratch) + TileScratchSizes(p).total();
    for (int i = piece.first; i < piece.last; ++i) {
        V* spectra = vec(b.at(Buffer::update_spectra)) + piece.bundle * p.pencils * pencil + i * k0 * 2;
        for (int chunk = 1; chunk < p.update_chunks; ++chunk)
            for (long j = 0; j < p.pencils; ++j)
                for (long v = 0; v < 2 * k0; ++v)
                    spectra[j * pencil + v] += spectra[(long(chunk) * p.out_bundles * p.pencils + j) * pencil + v];
        for (int j0 = 0; j0 < k0; ++j0) {
            for (int f2 = 0; f2 < F2; ++f2) {
                const V* in = spectra + p.first_pencil(f2) * pencil + 2 * j0;
                long is = pencil;
                prefetch_pencils<0>(in + 2 * k0, pencil, p.self_conjugate(f2) ? T1 / 2 + 1 : T1);
                if (p.self_conjugate(f2)) {
                    for (int f1 = 0; f1 < T1; ++f1) {
                        const bool kept = f1 <= T1 / 2;
                        const V* from = in + (kept ? f1 : T1 - f1) * pencil;
                        t.rows[2 * f1] = from[0];
                        t.rows[2 * f1 + 1] = kept ? from[1] : -from[1];
                    }
                    in = t.rows, is = 2;
                }
                kernel_line_inverse(a[1], in, is, 0, t.plane + 2 * f2, row, 0, 1, t.line);
            }
            kernel_line_inverse_real(a[2], t.plane, 2, row, gradient + j0 * a[0].kernel_step, a[2].kernel_step,
                                     a[1].kernel_step, a[1].k, t.line);
        }
        for (long j = 0; j < taps; ++j) gradient[j] *= scale;
        finish_update(p, b, piece.bundle, i, gradient);
    }
}

}  // namespace

void transpose_kernels(const LayerPlan& p, const Buffers& b, int o, int in_bundle, V* turned) {
    const long taps = long(p.problem.kernel.volume());
    const int maps = std::min(kV, p.problem.in_maps - in_bundle * kV);
    const V* from = vec(b.kernels) + (long(o) * p.problem.in_maps + in_bundle * kV) * taps;
    V block[kV];
    clear(block);
    for (long j = 0; j < taps; ++j) {
        for (int i = 0; i < maps; ++i) block[i] = from[i * taps + j];
        transpose_block(block, 1, turned + j, taps);
    }
}

void run_tiled(const LayerPlan& p, Phase phase, int index, const Buffers& b, float* scratch) {
    switch (phase) {
        case Phase::kernels_forward: return kernels_forward(p, index, b, scratch);
        case Phase::kernels_backward: return kernels_backward(p, index, b, scratch);
        case Phase::input_transform:
            return p.fused ? transform_fused(p, index, b, scratch) : transform_tiles(p, false, index, b, scratch);
        case Phase::gradient_transform: return transform_tiles(p, true, index, b, scratch);
        case Phase::forward_inverse:
            return p.fused ? forward_fused(p, index, b, scratch) : forward_inverse(p, index, b, scratch);
        case Phase::backward_inverse: return backward_inverse(p, index, b, scratch);
        case Phase::backward_join: return backward_join(p, index, b);
        case Phase::update_inverse: return update_inverse(p, index, b, scratch);
        case Phase::forward_product: return product(p, true, index, b, scratch);
        case Phase::backward_product: return product(p, false, index, b, scratch);
        case Phase::update_product:
            return p.fused ? update_fused(p, index, b, scratch) : update_product(p, index, b, scratch);
    }
}

}  // namespace znn::tiled::ZNN_VARIANT
