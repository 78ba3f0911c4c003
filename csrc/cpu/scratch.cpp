// SPDX-License-Identifier: Apache-2.0
#include "scratch.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

namespace bop2nd {
namespace {

constexpr size_t kLine = 64, kFirstBlock = size_t{16} << 10;

struct Block {
  std::unique_ptr<char[]> memory;
  size_t size = 0, used = 0;  // from the first cache line on

  static Block of(size_t size) {
    Block made;
    made.memory.reset(new (std::nothrow) char[size + kLine]);
    made.size = made.memory ? size : 0;
    return made;
  }
  char* at(size_t offset) const {
    size_t past_line = reinterpret_cast<uintptr_t>(memory.get()) % kLine;
    return memory.get() + (kLine - past_line) % kLine + offset;
  }
};

// Blocks behind the current one are empty.
struct Stack {
  std::vector<Block> blocks;
  size_t current = 0;
  int depth = 0;
};
thread_local Stack stack;

// One block instead of several, for the next time.
void join_blocks() {
  size_t total = 0;
  for (const Block& block : stack.blocks) total += block.size;
  if (stack.blocks.size() <= 1 && total <= kScratchKept) return;
  stack.blocks.resize(std::min<size_t>(1, stack.blocks.size()));
  stack.blocks[0] = total <= kScratchKept ? Block::of(total) : Block{};
}

}  // namespace

ScratchScope::ScratchScope() : block_(stack.current), used_(0) {
  if (block_ < stack.blocks.size()) used_ = stack.blocks[block_].used;
  ++stack.depth;
}

ScratchScope::~ScratchScope() {
  for (size_t i = block_; i < stack.blocks.size(); ++i) stack.blocks[i].used = 0;
  if (block_ < stack.blocks.size()) stack.blocks[block_].used = used_;
  stack.current = block_;
  if (--stack.depth == 0) join_blocks();
}

void* take_scratch(size_t n_bytes) {
  if (n_bytes > SIZE_MAX / 4) throw std::bad_alloc();
  size_t n = (n_bytes + kLine - 1) / kLine * kLine;
  for (; stack.current < stack.blocks.size(); ++stack.current) {
    Block& block = stack.blocks[stack.current];
    if (block.size - block.used < n) continue;
    block.used += n;
    return block.at(block.used - n);
  }
  size_t size = std::max(n, stack.blocks.empty() ? kFirstBlock : 2 * stack.blocks.back().size);
  Block made = Block::of(size);
  if (!made.memory) made = Block::of(n);
  if (!made.memory) {
    stack.current = stack.blocks.empty() ? 0 : stack.blocks.size() - 1;
    throw std::bad_alloc();
  }
  made.used = n;
  stack.blocks.push_back(std::move(made));
  return stack.blocks.back().at(0);
}

}  // namespace bop2nd
