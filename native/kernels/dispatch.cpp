// Choosing the instruction set, once, at first use.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels/kernels.hpp"

namespace znn::kernels {

namespace baseline { Table make_table(); }
#ifdef ZNN_KERNELS_avx2
namespace avx2 { Table make_table(); }
#endif
#ifdef ZNN_KERNELS_avx512
namespace avx512 { Table make_table(); }
#endif

const Table* table_for(const char* isa) {
    const std::string name = isa;
    if (name == "baseline") {
        static const Table table = baseline::make_table();
        return &table;
    }
#ifdef ZNN_KERNELS_avx2
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (name == "avx2" && has_avx2) {
        static const Table table = avx2::make_table();
        return &table;
    }
#endif
#ifdef ZNN_KERNELS_avx512
    if (name == "avx512" && has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        static const Table table = avx512::make_table();
        return &table;
    }
#endif
    return nullptr;
}

namespace {

const Table& choose() {
    const char* forced = std::getenv("ZNN_ISA");
    if (forced != nullptr && *forced != '\0') {
        if (const Table* table = table_for(forced)) return *table;
        throw std::runtime_error("ZNN_ISA is \"" + std::string(forced) +
                                 "\", which is unknown or cannot run on this processor; expected baseline, avx2 or avx512");
    }
    for (const char* isa : {"avx512", "avx2"})
        if (const Table* table = table_for(isa)) return *table;
    return *table_for("baseline");
}

}  // namespace

std::size_t max_filter_scratch_bytes(Extent n, Extent w, Extent s, int bundle) {
    // Rows end with up to 31 floats of padding (pitch_of in pooling.cpp): up to 16 rows side by side, a plane (of windows of
    // two along z those from one to the other), and of wider windows the filtered rows of all planes.
    const Extent m = valid_extent(n, w, s);
    const std::size_t row = std::size_t(n.x) * bundle + 31, flat = (std::size_t(m.x) * bundle + 31) * m.y;
    return 2 * sizeof(float) * (row * (std::size_t(n.y) * (w.z == 2 ? s.z + 1 : 1) + (bundle == 1 ? 16 : 0)) +
                                (w.z > 2 ? flat * n.z : 0));
}

const Table& table() {
    static const Table& chosen = choose();
    return chosen;
}

}  // namespace znn::kernels
