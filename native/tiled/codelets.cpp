// The generated transforms of one variant; ZNN_PART selects which part of the functions this unit compiles.
#include "tiled/vectors.hpp"

namespace znn::tiled::ZNN_VARIANT {

#if ZNN_PART == 0
#include "codelets_0.inc"
#include "codelets_table.inc"

// Extents are checked when a plan is made.
const Codelets& codelets(int extent) {
    if (extent > 64) return long_codelets(extent);
    const Codelets* c = kCodelets;
    while (c->n != extent) ++c;
    return *c;
}

TransformOps transform_ops(int extent) {
    const Codelets& c = codelets(extent);
    return {c.r2c_ops, c.c2c_ops, c.c2r_ops};
}
#else
#include "codelets_1.inc"
#endif

}  // namespace znn::tiled::ZNN_VARIANT
