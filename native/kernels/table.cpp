// The table of one instruction set.
#include "kernels/isa.hpp"

#define ZNN_STRING_OF(x) #x
#define ZNN_STRING(x) ZNN_STRING_OF(x)

namespace znn::kernels::ZNN_ISA {

Table make_table() {
    Table table{};
    table.isa = ZNN_STRING(ZNN_ISA);
    fill_convolve(table);
    fill_boxes(table);
    fill_spectral(table);
    fill_pointwise(table);
    fill_pooling(table);
    fill_small_windows(table);
    fill_losses(table);
    fill_short_dft(table);
    return table;
}

}  // namespace znn::kernels::ZNN_ISA
