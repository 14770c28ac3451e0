// From a Problem to its rows: where each row's samples lie, and its scalars as float64.
#pragma once

#include "cpu/storage.h"
#include "problem.h"

namespace ema_ext::cpu::EMA_EXT_LEVEL {

// The scalar of `operand` at an offset in elements.
EMA_EXT_INLINE double read(const Operand& operand, int64_t offset) {
  switch (operand.dtype) {
    case Dtype::kFloat64:
      return static_cast<const double*>(operand.data)[offset];
    case Dtype::kFloat32:
      return static_cast<const float*>(operand.data)[offset];
    case Dtype::kFloat16:
      return Float16::get(static_cast<const uint16_t*>(operand.data)[offset]);
    case Dtype::kBFloat16:
      return BFloat16::get(static_cast<const uint16_t*>(operand.data)[offset]);
  }
  return 0;
}

EMA_EXT_INLINE void write(const Operand& operand, int64_t offset, double value) {
  if (operand.data == nullptr) return;
  if (operand.dtype == Dtype::kFloat64)
    static_cast<double*>(operand.data)[offset] = value;
  else
    static_cast<float*>(operand.data)[offset] = static_cast<float>(value);
}

// The offsets of one row in every operand, in elements.
struct RowOffsets {
  int64_t x = 0, y = 0, coefficient = 0, start = 0, state = 0;
  int64_t forward_x = 0, forward_y = 0, forward_start = 0, grad_coefficient = 0;

  // By `by` rows along axis d.
  EMA_EXT_INLINE void move(const Problem& problem, int d, int64_t by) {
    x += by * problem.x.row_strides[d];
    y += by * problem.y.row_strides[d];
    coefficient += by * problem.coefficient.row_strides[d];
    start += by * problem.start.row_strides[d];
    state += by * problem.state.row_strides[d];
    forward_x += by * problem.forward_x.row_strides[d];
    forward_y += by * problem.forward_y.row_strides[d];
    forward_start += by * problem.forward_start.row_strides[d];
    grad_coefficient += by * problem.grad_coefficient.row_strides[d];
  }
};

// Steps through the rows in order.
class RowCursor {
 public:
  RowCursor(const Problem& problem, int64_t row) : problem_(problem) {
    for (int d = problem.ndim - 1; d >= 0; --d) {
      index_[d] = row % problem.sizes[d];
      row /= problem.sizes[d];
      at_.move(problem, d, index_[d]);
    }
  }

  const RowOffsets& at() const { return at_; }

  // To the next row.
  EMA_EXT_INLINE void advance() {
    for (int d = problem_.ndim - 1; d >= 0; --d) {
      if (++index_[d] < problem_.sizes[d]) return at_.move(problem_, d, 1);
      at_.move(problem_, d, 1 - index_[d]);
      index_[d] = 0;
    }
  }

 private:
  const Problem& problem_;
  RowOffsets at_;
  int64_t index_[kMaxDims];
};

// One row, its samples by address and its scalars by value.
template <class Storage>
struct Row {
  using Sample = typename Storage::Sample;
  const Sample* x;
  Sample* y;
  const Sample* forward_x;  // nullptr: no gradient to the coefficient
  double coefficient;
  // States are in the accumulate dtype, as they are handed on.
  double start;          // of kEma: x[0] where there is no initial state
  double forward_start;  // the same for forward_x

  EMA_EXT_INLINE Row(const Problem& problem, const RowOffsets& at)
      : x(static_cast<const Sample*>(problem.x.data) + at.x),
        y(static_cast<Sample*>(problem.y.data) + at.y),
        forward_x(nullptr),
        coefficient(problem.coefficient.data ? read(problem.coefficient, at.coefficient)
                                             : problem.value),
        start(0),
        forward_start(0) {
    if (problem.start.data)
      start = static_cast<typename Storage::Acc>(read(problem.start, at.start));
    else if (problem.op == Op::kEma)
      start = Storage::get(*x);
    if (problem.grad_coefficient.data) {
      forward_x = static_cast<const Sample*>(problem.forward_x.data) + at.forward_x;
      const int64_t first = (problem.length - 1) * problem.forward_x.time_stride;
      forward_start =
          problem.forward_start.data
              ? static_cast<typename Storage::Acc>(read(problem.forward_start, at.forward_start))
              : Storage::get(forward_x[first]);
    }
  }
};

// What a scan hands on besides its samples.
struct RowEnd {
  double state = 0;             // see Problem::state
  double grad_coefficient = 0;  // see Problem::grad_coefficient
};

EMA_EXT_INLINE void write_end(const Problem& problem, const RowOffsets& at, const RowEnd& end) {
  write(problem.state, at.state, end.state);
  write(problem.grad_coefficient, at.grad_coefficient, end.grad_coefficient);
}

// Whether an EMA's adjoint runs as alpha * lambda. Not for an alpha so small that lambda could not
// be had from it, 0 above all; then it runs as lambda itself.
EMA_EXT_INLINE bool scaled_adjoint(double alpha) { return !(alpha < 0x1p-64 && alpha > -0x1p-64); }

EMA_EXT_INLINE bool finite(double value) { return value - value == 0; }

}  // namespace ema_ext::cpu::EMA_EXT_LEVEL
