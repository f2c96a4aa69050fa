// Zeroed, cache-line aligned arrays of floats (parameters, spectra, images, scratch), in huge pages where they are large or many:
// what is read pencil by pencil or row by row meets a page with every step, and small pages cost their translation each time.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

namespace znn {

// Memory straight from the system: zeroed, resident only where it is touched, in huge pages where there are some.
class HugePages {
public:
    static constexpr std::size_t page = std::size_t{2} << 20;
    static constexpr std::size_t whole(std::size_t bytes) { return (bytes + page - 1) / page * page; }

    HugePages() = default;
    explicit HugePages(std::size_t bytes) : mapped_(whole(bytes) + page) {  // one more, as the system may not begin with a page
        memory_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory_ == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        madvise(data(), mapped_ - page, MADV_HUGEPAGE);
#endif
    }
    HugePages(HugePages&& other) noexcept
        : memory_(std::exchange(other.memory_, nullptr)), mapped_(std::exchange(other.mapped_, 0)) {}
    HugePages& operator=(HugePages&& other) noexcept {
        std::swap(memory_, other.memory_);
        std::swap(mapped_, other.mapped_);
        return *this;
    }
    ~HugePages() {
        if (mapped_) munmap(memory_, mapped_);
    }

    std::byte* data() const { return reinterpret_cast<std::byte*>(whole(reinterpret_cast<std::uintptr_t>(memory_))); }

private:
    void* memory_ = nullptr;
    std::size_t mapped_ = 0;
};

class AlignedFloats {
public:
    AlignedFloats() = default;
    // A part of memory that somebody else owns.
    AlignedFloats(float* data, std::size_t floats) : data_(data), size_(floats) {}
    explicit AlignedFloats(std::size_t floats) : size_(floats) {
        if (!floats) return;
        const std::size_t bytes = floats * sizeof(float);
        if (bytes >= large) {
            pages_ = HugePages(bytes);
            data_ = reinterpret_cast<float*>(pages_.data());
            return;
        }
        // calloc and not memset: what the system gives zeroed stays untouched here, too.
        block_ = std::calloc(bytes + 64, 1);
        if (!block_) throw std::bad_alloc();
        data_ = reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(block_) + 63) / 64 * 64);
    }
    AlignedFloats(AlignedFloats&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)),
          block_(std::exchange(other.block_, nullptr)), pages_(std::move(other.pages_)) {}
    AlignedFloats& operator=(AlignedFloats&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        std::swap(block_, other.block_);
        std::swap(pages_, other.pages_);
        return *this;
    }
    ~AlignedFloats() { std::free(block_); }

    float* data() const { return data_; }
    std::size_t size() const { return size_; }
    float& operator[](std::size_t i) const { return data_[i]; }

private:
    static constexpr std::size_t large = HugePages::page;

    float* data_ = nullptr;
    std::size_t size_ = 0;
    void* block_ = nullptr;  // as calloc gave it, or null and the memory is
    HugePages pages_;        // here, or somebody else's
};

// Arrays that live and die together, side by side in huge pages.
class Arena {
public:
    AlignedFloats floats(std::size_t count) {
        if (!count) return {};
        const std::size_t bytes = (count * sizeof(float) + line - 1) / line * line;
        if (bytes > left_) {
            const std::size_t size = std::max(HugePages::whole(bytes), chunk);
            chunks_.emplace_back(size);  // may throw: nothing has changed then
            left_ = size;
            next_ = chunks_.back().data();
        }
        left_ -= bytes;
        return {reinterpret_cast<float*>(std::exchange(next_, next_ + bytes)), count};
    }

private:
    static constexpr std::size_t line = 128;                    // of cache: processors fetch them in pairs
    static constexpr std::size_t chunk = std::size_t{64} << 20;  // of addresses, of which what is not touched costs nothing

    std::vector<HugePages> chunks_;
    std::byte* next_ = nullptr;
    std::size_t left_ = 0;
};

}  // namespace znn
