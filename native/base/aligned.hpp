// A zeroed, cache-line aligned array of floats that lives as long as its owner (parameters, spectra, images, scratch).
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace znn {

class AlignedFloats {
public:
    AlignedFloats() = default;
    explicit AlignedFloats(std::size_t floats) : size_(floats) {
        if (!floats) return;
        const std::size_t bytes = floats * sizeof(float);
        if (bytes >= large) {
            map(bytes);
            return;
        }
        // calloc and not memset: what the system gives zeroed stays untouched here, too.
        block_ = std::calloc(bytes + 64, 1);
        if (!block_) throw std::bad_alloc();
        data_ = reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(block_) + 63) / 64 * 64);
    }
    AlignedFloats(AlignedFloats&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)),
          block_(std::exchange(other.block_, nullptr)), mapped_(std::exchange(other.mapped_, 0)) {}
    AlignedFloats& operator=(AlignedFloats&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        std::swap(block_, other.block_);
        std::swap(mapped_, other.mapped_);
        return *this;
    }
    ~AlignedFloats() {
        if (mapped_)
            munmap(data_, mapped_);
        else
            std::free(block_);
    }

    float* data() const { return data_; }
    std::size_t size() const { return size_; }
    float& operator[](std::size_t i) const { return data_[i]; }

private:
    static constexpr std::size_t large = std::size_t{8} << 20, huge_page = std::size_t{2} << 20;

    // Large arrays come straight from the system: zeroed, resident only where they are touched, in huge pages where there
    // are some (they are streamed, and huge pages spare the address translation).
    void map(std::size_t bytes) {
        const std::size_t whole = (bytes + huge_page - 1) / huge_page * huge_page;
        void* memory = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        madvise(memory, whole, MADV_HUGEPAGE);
#endif
        data_ = static_cast<float*>(memory);
        mapped_ = whole;
    }

    float* data_ = nullptr;
    std::size_t size_ = 0;
    void* block_ = nullptr;   // as calloc gave it, or null and
    std::size_t mapped_ = 0;  // the bytes mapped
};

}  // namespace znn
