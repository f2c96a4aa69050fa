// Pools of power-of-two memory blocks (paper section on memory management): one lock-free list per size, blocks are
// recycled and nothing is returned to the system before the pool goes. Two kinds of memory are kept apart: the blocks
// that hold images, and the small headers (reference count, list link) that describe them.
#pragma once
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <utility>

namespace znn {

enum class Allocator { pools, malloc };

class Pool;

// Header of one block. Headers are never freed while the pool lives, so a stale pointer read by the lock-free list is
// harmless.
struct Block {
    std::atomic<int> references{0};
    std::atomic<std::uint32_t> next{0};  // index of the next free block of this size, 0: none
    std::uint32_t index = 0;
    int size_class = 0;
    void* memory = nullptr;  // as obtained from the system
    float* data = nullptr;   // 64-byte aligned
    Pool* pool = nullptr;
};

// Counted reference to a block.
class Buffer {
public:
    Buffer() = default;
    explicit Buffer(Block* block) : block_(block) {}  // takes over one reference
    Buffer(const Buffer& other) : block_(other.block_) {
        if (block_) block_->references.fetch_add(1, std::memory_order_relaxed);
    }
    Buffer(Buffer&& other) noexcept : block_(std::exchange(other.block_, nullptr)) {}
    Buffer& operator=(Buffer other) noexcept {
        std::swap(block_, other.block_);
        return *this;
    }
    ~Buffer() { reset(); }

    void reset();
    Block* release() { return std::exchange(block_, nullptr); }  // gives the reference away
    float* data() const { return block_->data; }
    explicit operator bool() const { return block_ != nullptr; }
    bool unique() const { return block_->references.load(std::memory_order_acquire) == 1; }

private:
    Block* block_ = nullptr;
};

class Pool {
public:
    explicit Pool(Allocator allocator = Allocator::pools) : allocator_(allocator) {}
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    // A buffer of at least `floats` floats, contents undefined. Throws std::bad_alloc.
    Buffer allocate(std::size_t floats);

    std::size_t bytes_from_system() const { return bytes_.load(std::memory_order_relaxed); }
    std::size_t blocks_from_system() const { return blocks_.load(std::memory_order_relaxed); }

private:
    friend class Buffer;
    static constexpr int size_classes = 48;
    static constexpr std::uint32_t chunk_bits = 10, chunk_size = 1u << chunk_bits, max_chunks = 1u << 12;

    struct alignas(64) FreeList {
        std::atomic<std::uint64_t> head{0};  // (tag << 32) | index: the tag defeats the ABA problem
    };

    Block& at(std::uint32_t index) { return chunks_[index >> chunk_bits][index & (chunk_size - 1)]; }
    Block* pop(FreeList& list);
    void push(FreeList& list, Block* block);
    Block* new_header();
    void attach_memory(Block* block, std::size_t bytes);
    void recycle(Block* block);

    Allocator allocator_;
    std::array<FreeList, size_classes> free_{};
    FreeList spare_headers_{};
    std::mutex grow_;
    std::uint32_t headers_ = 1;  // index 0 means "none"
    std::array<Block*, max_chunks> chunks_{};
    std::atomic<std::size_t> bytes_{0}, blocks_{0};
};

inline void Buffer::reset() {
    Block* block = std::exchange(block_, nullptr);
    if (block && block->references.fetch_sub(1, std::memory_order_acq_rel) == 1) block->pool->recycle(block);
}

}  // namespace znn
