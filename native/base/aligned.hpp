// A zeroed, cache-line aligned array of floats that lives as long as its owner (parameters, kernel spectra, scratch).
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace znn {

class AlignedFloats {
public:
    AlignedFloats() = default;
    explicit AlignedFloats(std::size_t floats) : size_(floats) {
        if (!floats) return;
        // Large arrays are streamed: huge pages spare the address translation.
        constexpr std::size_t huge = std::size_t{2} << 20;
        const std::size_t bytes = floats * sizeof(float), alignment = bytes >= 4 * huge ? huge : 64;
        const std::size_t whole = (bytes + alignment - 1) / alignment * alignment;
        data_ = static_cast<float*>(std::aligned_alloc(alignment, whole));
        if (!data_) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        if (alignment == huge) madvise(data_, whole, MADV_HUGEPAGE);
#endif
        std::memset(data_, 0, whole);
    }
    AlignedFloats(AlignedFloats&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
    AlignedFloats& operator=(AlignedFloats&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        return *this;
    }
    ~AlignedFloats() { std::free(data_); }

    float* data() const { return data_; }
    std::size_t size() const { return size_; }
    float& operator[](std::size_t i) const { return data_[i]; }

private:
    float* data_ = nullptr;
    std::size_t size_ = 0;
};

}  // namespace znn
