// See strategy.h.

#include "cpu/strategy.h"

#include <algorithm>
#include <initializer_list>

#include "cpu/tuning.h"

namespace ema_ext::cpu {
namespace {

// Moves axis `from` to position `to`, the others keeping their order.
void move_axis(Problem& problem, int from, int to) {
  const auto rotate = [&](int64_t* axes) {
    if (from < to)
      std::rotate(axes + from, axes + from + 1, axes + to + 1);
    else
      std::rotate(axes + to, axes + from, axes + from + 1);
  };
  rotate(problem.sizes);
  for (Operand* operand :
       {&problem.x, &problem.y, &problem.coefficient, &problem.start, &problem.state,
        &problem.forward_x, &problem.forward_start, &problem.grad_coefficient})
    rotate(operand->row_strides);
}

// The axis along which rows lie side by side in every tensor of samples, or -1.
int lane_axis(const Problem& problem) {
  const bool contiguous_in_time = problem.x.time_stride == 1 || problem.x.time_stride == -1;
  if (contiguous_in_time) return -1;
  for (int d = 0; d < problem.ndim; ++d) {
    if (problem.x.row_strides[d] == 1 && problem.y.row_strides[d] == 1 &&
        (problem.forward_x.data == nullptr || problem.forward_x.row_strides[d] == 1))
      return d;
  }
  return -1;
}

}  // namespace

Plan make_plan(Problem& problem, int threads) {
  const int lane = lane_axis(problem);
  if (lane >= 0) {
    const int64_t width = problem.sizes[lane];
    move_axis(problem, lane, problem.ndim - 1);
    const int64_t blocks = problem.rows / width * ((width + kLanesPerBlock - 1) / kLanesPerBlock);
    return {Strategy::kLanes, blocks, problem.length * std::min<int64_t>(width, kLanesPerBlock)};
  }
  // Rows of one coefficient follow one another, so that its powers are computed once.
  if (problem.coefficient.data != nullptr && problem.length >= kShortRow) {
    int front = 0;
    for (int d = 0; d < problem.ndim; ++d)
      if (problem.coefficient.row_strides[d] != 0) move_axis(problem, d, front++);
  }
  const int64_t count = segments(problem);
  if (count > 1 && threads > 1 && problem.rows < 4 * threads)
    return {Strategy::kCut, problem.rows * count, kSegmentSamples};
  return {Strategy::kRows, problem.rows, problem.length};
}

}  // namespace ema_ext::cpu
