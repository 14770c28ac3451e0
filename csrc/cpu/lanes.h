// Vectors of rows that walk along time together: rows that lie side by side in memory, as in
// (batch, time, channels) scanned over time, so that memory is read and written in its own order;
// and very short rows.
#pragma once

#include "cpu/tuning.h"
#include "cpu/walk.h"

namespace ema_ext::cpu::EMA_EXT_LEVEL {

// Up to Count blocks of one size, without the need of an empty one.
template <class Block, int Count>
class Blocks {
 public:
  explicit Blocks(const Problem& problem) : problem_(problem) {}

  // Takes blocks from the next `rows` rows while a whole one fits; returns the rows left.
  int64_t take(int64_t rows, RowOffsets& at) {
    for (; rows >= Block::kRows; rows -= Block::kRows) new (place(count_++)) Block(problem_, at);
    return rows;
  }
  void walk(int64_t begin, int64_t end) {
    for (int i = 0; i < count_; ++i) place(i)->walk(begin, end);
  }
  void write_ends() {
    for (int i = 0; i < count_; ++i) place(i)->write_ends();
  }

 private:
  Block* place(int i) { return reinterpret_cast<Block*>(memory_) + i; }

  const Problem& problem_;
  int count_ = 0;
  alignas(Block) char memory_[Count * sizeof(Block)];
};

// `rows` neighbouring rows from `at` on: all blocks pass through a stretch of time before any goes
// on to the next, so that memory is met in long runs.
template <class Storage>
void walk_lanes(const Problem& problem, RowOffsets at, int64_t rows) {
  constexpr int kN = kLanes<double>, kWide = kLanesPerBlock / kN < 8 ? kLanesPerBlock / kN : 8;
  Blocks<Block<Storage, kN, kWide>, kBlocksPerWalk * kLanesPerBlock / (kN * kWide)> wide(problem);
  Blocks<Block<Storage, kN, 1>, kWide - 1> narrow(problem);
  Blocks<Block<Storage, 1, 1>, kN - 1> single(problem);
  rows = wide.take(rows, at);
  rows = narrow.take(rows, at);
  single.take(rows, at);
  for (int64_t begin = 0; begin < problem.length; begin += kLaneSteps) {
    const int64_t end = problem.length - begin < kLaneSteps ? problem.length : begin + kLaneSteps;
    wide.walk(begin, end);
    narrow.walk(begin, end);
    single.walk(begin, end);
  }
  wide.write_ends();
  narrow.write_ends();
  single.write_ends();
}

// Items [begin, end): each kLanesPerBlock neighbouring rows, or those left of the innermost axis.
template <class Storage>
void scan_lanes(const Problem& problem, int64_t begin, int64_t end) {
  const int64_t width = problem.sizes[problem.ndim - 1];
  const int64_t blocks = (width + kLanesPerBlock - 1) / kLanesPerBlock;
  while (begin < end) {
    const int64_t outer = begin / blocks, block = begin % blocks;
    int64_t count = blocks - block < kBlocksPerWalk ? blocks - block : kBlocksPerWalk;
    if (end - begin < count) count = end - begin;
    const int64_t first = block * kLanesPerBlock, left = width - first;
    const int64_t rows = left < count * kLanesPerBlock ? left : count * kLanesPerBlock;
    walk_lanes<Storage>(problem, RowCursor(problem, outer * width + first).at(), rows);
    begin += count;
  }
  if (streams_stores(problem)) _mm_sfence();
}

}  // namespace ema_ext::cpu::EMA_EXT_LEVEL
