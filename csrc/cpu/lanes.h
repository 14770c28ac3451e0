// Vectors of rows that walk along time together: rows that lie side by side in memory, as in
// (batch, time, channels) scanned over time, so that memory is read and written in its own order;
// and short rows, which are brought side by side (lane_stage.h).
#pragma once

#include "cpu/lane_block.h"

namespace ema_ext::cpu::EMA_EXT_LEVEL {

// Up to kMost blocks and their coefficients, without the need of an empty one.
template <class Block, int kMost>
class Blocks {
 public:
  explicit Blocks(const Problem& problem)
      : problem_(problem), stride_(problem.coefficient.row_strides[problem.ndim - 1]) {}

  // A block of the next `rows` rows; moves `at` past them.
  void add(int rows, RowOffsets& at) {
    Coefficients* k = reinterpret_cast<Coefficients*>(coefficients_) + (stride_ == 0 ? 0 : count_);
    if (stride_ != 0 || count_ == 0) new (k) Coefficients(problem_, at.coefficient, stride_, rows);
    new (place(count_++)) Block(problem_, at, rows, *k);
    at.move(problem_, problem_.ndim - 1, rows);
  }
  void walk(int64_t begin, int64_t end) {
    for (int i = 0; i < count_; ++i) place(i)->walk(begin, end);
  }
  void finish() {
    for (int i = 0; i < count_; ++i) place(i)->finish();
  }

 private:
  using Coefficients = typename Block::Coefficients;

  Block* place(int i) { return reinterpret_cast<Block*>(memory_) + i; }

  const Problem& problem_;
  const int64_t stride_;  // of the coefficient, from row to row
  int count_ = 0;
  alignas(Coefficients) char coefficients_[kMost * sizeof(Coefficients)];
  alignas(Block) char memory_[kMost * sizeof(Block)];
};

// `rows` neighbouring rows from `at` on: all blocks pass through a stretch of time before any goes
// on to the next, so that memory is met in long runs.
template <class Storage>
void walk_lanes(const Problem& problem, RowOffsets at, int64_t rows) {
  constexpr int kN = kLanes<typename Storage::Acc>, kWide = kLanesPerBlock / kN;
  Blocks<LaneBlock<Storage, kWide>, kBlocksPerWalk> wide(problem);
  Blocks<LaneBlock<Storage, 1>, kWide> narrow(problem);
  for (; rows >= kWide * kN; rows -= kWide * kN) wide.add(kWide * kN, at);
  for (; rows > 0; rows -= kN) narrow.add(static_cast<int>(rows < kN ? rows : kN), at);
  for (int64_t begin = 0; begin < problem.length; begin += kLaneSteps) {
    const int64_t end = problem.length - begin < kLaneSteps ? problem.length : begin + kLaneSteps;
    wide.walk(begin, end);
    narrow.walk(begin, end);
  }
  wide.finish();
  narrow.finish();
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
