// The plain structs that kernels receive: one scan over many rows, free of torch.
//
// A row is the time axis at one index of all other axes. All strides are in elements. A scan that
// runs backwards in time has `data` at its last sample and a negative time_stride, so that kernels
// know one direction only: forward along `sample(row, 0), sample(row, 1), ...`.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace ema_ext {

constexpr int kMaxDims = 64;  // torch's own limit

enum class Dtype : int8_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

inline __attribute__((always_inline)) int64_t bytes_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64:
      return 8;
    case Dtype::kFloat32:
      return 4;
    default:
      return 2;
  }
}

// A tensor as the rows see it. data == nullptr: absent.
struct Operand {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t time_stride = 0;
  int64_t row_strides[kMaxDims];  // 0 where it is broadcast, and where it is absent
};

enum class Op : int8_t {
  kEma,               // y[n] = (1 - coefficient) * y[n-1] + coefficient * x[n]
  kLinearRecurrence,  // y[n] = coefficient * y[n-1] + x[n]
  kEmaBackward,       // the adjoint of kEma: lambda[n] = (1 - coefficient) * lambda[n-1] + x[n],
                      // y[n] = coefficient * lambda[n], run along reversed time
  kLinearRecurrenceBackward,  // that of kLinearRecurrence, likewise: y[n] = lambda[n]
};

inline __attribute__((always_inline)) bool is_adjoint(Op op) {
  return op == Op::kEmaBackward || op == Op::kLinearRecurrenceBackward;
}

struct Problem {
  // Only the first ndim entries of the arrays are ever looked at, or set here: the rest would cost
  // more to clear than a small scan takes.
  Problem(Op op, int64_t length, int ndim) : op(op), length(length), ndim(ndim) {
    for_each_operand([=](Operand& operand) {
      for (int d = 0; d < ndim; ++d) operand.row_strides[d] = 0;
    });
  }

  template <class F>
  void for_each_operand(const F& f) {
    for (Operand* operand : {&x, &y, &coefficient, &start, &state, &forward_x, &forward_y,
                             &forward_start, &grad_coefficient})
      f(*operand);
  }

  Op op;
  int64_t length;
  int ndim;  // of the rows, outermost first
  int64_t sizes[kMaxDims];
  int64_t rows = 1;  // their product

  Operand x;
  Operand y;  // written, of x's dtype

  // alpha of an EMA, a of a linear recurrence: one value per row, or `value` (of an EMA) where
  // it is absent; if `varying`, one per sample. An adjoint takes lambda[n-1] with the coefficient
  // of n - 1.
  Operand coefficient;
  double value = 0;
  bool varying = false;

  // y[-1]. Absent: x[0] for kEma (so y[0] = x[0], copied bit by bit), 0 for kLinearRecurrence.
  // For adjoints: the gradient of the state, added to lambda at the scan's first sample.
  Operand start;

  // Written if present, in the accumulate dtype: the y after the last sample; for adjoints the
  // gradient of the initial state: lambda at the scan's last sample times what y[-1] had been.
  Operand state;

  // For adjoints only. has_initial_state, of kEmaBackward: whether the forward had one; without, y
  // at the scan's last sample is lambda itself, since x[0] was the initial state as well.
  bool has_initial_state = false;
  // The forward's input, output and initial state, in the scan's (reversed) order of time, and
  // where the gradient to the coefficient goes: one float64 per row, or if `varying`, one of any
  // dtype per sample. All absent if that gradient is not wanted. A constant alpha does without the
  // output, a linear recurrence without the input.
  Operand forward_x;
  Operand forward_y;
  Operand forward_start;
  Operand grad_coefficient;
};

// Whether rows next to each other along axis d touch in every tensor of samples.
inline __attribute__((always_inline)) bool rows_touch(const Problem& problem, int d) {
  return problem.x.row_strides[d] == 1 && problem.y.row_strides[d] == 1 &&
         (problem.forward_x.data == nullptr || problem.forward_x.row_strides[d] == 1);
}

}  // namespace ema_ext
