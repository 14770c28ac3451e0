// Rows that lie side by side in memory, as in (batch, time, channels) scanned over time: vectors of
// rows walk along time together, so that memory is read and written in its own order.
#pragma once

#include "cpu/tuning.h"
#include "cpu/walk.h"

namespace ema_ext::cpu::EMA_EXT_LEVEL {

// Walks rows `at` and the N * M - 1 after it along the innermost axis.
template <class Storage, int N, int M>
void walk_lanes(const Problem& problem, RowCursor& at) {
  alignas(64) double coefficient[N * M], start[N * M], forward_start[N * M];
  const Row<Storage> first(problem, at);
  RowCursor lane = at;
  for (int i = 0; i < N * M; ++i, lane.advance()) {
    const Row<Storage> row(problem, lane);
    coefficient[i] = row.coefficient;
    start[i] = row.start;
    forward_start[i] = row.forward_start;
  }
  Block<Storage, N, M> block{problem, first.x, first.y, first.forward_x, {}, {}, {}, {}, {}};
  std::memcpy(block.coefficient, coefficient, sizeof coefficient);
  std::memcpy(block.start, start, sizeof start);
  std::memcpy(block.forward_start, forward_start, sizeof forward_start);
  block.run();
  std::memcpy(coefficient, block.state, sizeof coefficient);
  std::memcpy(start, block.grad_coefficient, sizeof start);
  for (int i = 0; i < N * M; ++i, at.advance()) write_end(problem, at, {coefficient[i], start[i]});
}

// Items [begin, end): each kLanesPerBlock neighbouring rows, or those left of the innermost axis.
template <class Storage>
void scan_lanes(const Problem& problem, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = kLanesPerVector * kVectorsPerBlock;
  const int64_t width = problem.sizes[problem.ndim - 1];
  const int64_t blocks = (width + kBlock - 1) / kBlock;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t lane = item % blocks * kBlock;
    RowCursor at(problem, item / blocks * width + lane);
    int64_t left = width - lane < kBlock ? width - lane : kBlock;
    for (; left >= kBlock; left -= kBlock)
      walk_lanes<Storage, kLanesPerVector, kVectorsPerBlock>(problem, at);
    for (; left >= kLanesPerVector; left -= kLanesPerVector)
      walk_lanes<Storage, kLanesPerVector, 1>(problem, at);
    for (; left >= 2; left -= 2) walk_lanes<Storage, 1, 2>(problem, at);
    for (; left >= 1; left -= 1) walk_lanes<Storage, 1, 1>(problem, at);
  }
}

}  // namespace ema_ext::cpu::EMA_EXT_LEVEL
