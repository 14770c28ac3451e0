// See strategy.h.

#include "cpu/strategy.h"

#include <algorithm>
#include <atomic>

#include "cpu/tuning.h"

namespace ema_ext::cpu {
namespace {

constexpr int kUnforced = -1;
std::atomic<int> forced_strategy{kUnforced};

bool forced(Strategy family) {
  return forced_strategy.load(std::memory_order_relaxed) == static_cast<int>(family);
}

// Moves axis `from` to position `to`, the others keeping their order.
void move_axis(Problem& problem, int from, int to) {
  const auto rotate = [&](int64_t* axes) {
    if (from < to)
      std::rotate(axes + from, axes + from + 1, axes + to + 1);
    else
      std::rotate(axes + to, axes + from, axes + from + 1);
  };
  rotate(problem.sizes);
  problem.for_each_operand([&](Operand& operand) { rotate(operand.row_strides); });
}

// The axis whose rows walk side by side, or -1: one along which they touch in every tensor of
// samples; for short rows, whatever their strides, the longest.
int lane_axis(const Problem& problem, bool varying) {
  if (forced(Strategy::kRows) || forced(Strategy::kCut) || problem.ndim == 0) return -1;
  if (problem.length < (varying ? kTiledRow : kShortRow) || forced(Strategy::kLanes)) {
    const int64_t* longest = std::max_element(problem.sizes, problem.sizes + problem.ndim);
    return static_cast<int>(longest - problem.sizes);
  }
  const bool contiguous_in_time = problem.x.time_stride == 1 || problem.x.time_stride == -1;
  for (int d = 0; d < problem.ndim && !contiguous_in_time; ++d) {
    if (rows_touch(problem, d)) return d;
  }
  return -1;
}

// Lanes want an axis, and a single row has none.
void add_axis(Problem& problem) {
  problem.sizes[problem.ndim] = 1;
  problem.for_each_operand([&](Operand& operand) { operand.row_strides[problem.ndim] = 0; });
  ++problem.ndim;
}

}  // namespace

Plan make_plan(Problem& problem, int threads) {
  const bool varying = problem.varying || problem.op == Op::kLinearRecurrenceBackward;
  if (problem.ndim == 0 && !varying) add_axis(problem);
  const int lane = lane_axis(problem, varying);
  if (lane >= 0) {
    const int64_t width = problem.sizes[lane];
    move_axis(problem, lane, problem.ndim - 1);
    const int64_t lanes = varying ? varying_lanes(width) : kLanesPerBlock;
    const int64_t blocks = problem.rows / width * ((width + lanes - 1) / lanes);
    return {varying ? Strategy::kVaryingLanes : Strategy::kLanes, blocks,
            problem.length * std::min<int64_t>(width, lanes)};
  }
  const int64_t count = segments(problem);
  const bool always = forced(Strategy::kCut), never = forced(Strategy::kRows);
  const bool pays = threads > 1 && problem.rows < 4 * threads;
  const bool cut = count > 1 && !never && (always || pays);
  if (varying) {
    const bool enough = always || problem.rows * count >= kVaryingCutItems * threads;
    if (cut && enough && problem.varying)
      return {Strategy::kVaryingCut, problem.rows * count, kSegmentSamples};
    return {Strategy::kVaryingRows, problem.rows, problem.length};
  }
  // Rows of one coefficient follow one another, so that its powers are computed once.
  if (problem.coefficient.data != nullptr) {
    int front = 0;
    for (int d = 0; d < problem.ndim; ++d)
      if (problem.coefficient.row_strides[d] != 0) move_axis(problem, d, front++);
  }
  if (cut) return {Strategy::kCut, problem.rows * count, kSegmentSamples};
  return {Strategy::kRows, problem.rows, problem.length};
}

void force_strategy(std::optional<Strategy> family) {
  forced_strategy = family ? static_cast<int>(*family) : kUnforced;
}

}  // namespace ema_ext::cpu
