#include "base/pool.hpp"

#include <bit>
#include <cstdlib>
#include <new>

namespace znn {

namespace {

constexpr std::size_t cache_line = 64;

// Blocks of power-of-two sizes would all begin in the same cache set; shift each by a different number of lines.
constexpr std::size_t colours = 61;
std::size_t colour_bytes(std::uint32_t index) { return (index * 7 % colours) * cache_line; }

int class_of(std::size_t bytes) { return std::bit_width(bytes < 64 ? std::size_t{63} : bytes - 1); }

}  // namespace

Pool::~Pool() {
    for (std::uint32_t i = 1; i < headers_; ++i) std::free(at(i).memory);
    for (Block* chunk : chunks_) delete[] chunk;
}

Block* Pool::pop(FreeList& list) {
    std::uint64_t head = list.head.load(std::memory_order_acquire);
    while (std::uint32_t index = std::uint32_t(head)) {
        const std::uint32_t next = at(index).next.load(std::memory_order_relaxed);
        const std::uint64_t replacement = ((head >> 32) + 1) << 32 | next;
        if (list.head.compare_exchange_weak(head, replacement, std::memory_order_acq_rel)) return &at(index);
    }
    return nullptr;
}

void Pool::push(FreeList& list, Block* block) {
    std::uint64_t head = list.head.load(std::memory_order_relaxed);
    std::uint64_t replacement;
    do {
        block->next.store(std::uint32_t(head), std::memory_order_relaxed);
        replacement = ((head >> 32) + 1) << 32 | block->index;
    } while (!list.head.compare_exchange_weak(head, replacement, std::memory_order_acq_rel));
}

Block* Pool::new_header() {
    if (Block* block = pop(spare_headers_)) return block;
    std::lock_guard guard(grow_);
    const std::uint32_t index = headers_, chunk = index >> chunk_bits;
    if (chunk >= max_chunks) throw std::bad_alloc();
    if (!chunks_[chunk]) chunks_[chunk] = new Block[chunk_size];
    ++headers_;
    Block& block = at(index);
    block.index = index;
    block.pool = this;
    return &block;
}

void Pool::attach_memory(Block* block, std::size_t bytes) {
    const std::size_t whole = bytes + (allocator_ == Allocator::pools ? colours * cache_line : 0);
    void* memory = std::aligned_alloc(cache_line, (whole + cache_line - 1) / cache_line * cache_line);
    if (!memory) {
        push(spare_headers_, block);
        throw std::bad_alloc();
    }
    block->memory = memory;
    const std::size_t shift = allocator_ == Allocator::pools ? colour_bytes(block->index) : 0;
    block->data = reinterpret_cast<float*>(static_cast<char*>(memory) + shift);
    bytes_.fetch_add(bytes, std::memory_order_relaxed);
    blocks_.fetch_add(1, std::memory_order_relaxed);
}

Buffer Pool::allocate(std::size_t floats) {
    const std::size_t bytes = floats * sizeof(float);
    const int size_class = class_of(bytes);
    if (size_class >= size_classes) throw std::bad_alloc();
    Block* block = allocator_ == Allocator::pools ? pop(free_[size_class]) : nullptr;
    if (!block) {
        block = new_header();
        block->size_class = size_class;
        attach_memory(block, allocator_ == Allocator::pools ? std::size_t{1} << size_class : bytes);
    }
    block->references.store(1, std::memory_order_relaxed);
    return Buffer(block);
}

void Pool::recycle(Block* block) {
    if (allocator_ == Allocator::pools) return push(free_[block->size_class], block);
    std::free(block->memory);
    block->memory = nullptr;
    push(spare_headers_, block);
}

}  // namespace znn
