// From a Scan to its rows: where each row's samples lie, and its scalars as float64.
#pragma once

#include "alpha_sums.h"
#include "cuda/decay.cuh"
#include "cuda/scan.h"
#include "cuda/storage.cuh"

namespace ema_ext::cuda {

// The offsets of one row in every operand, in elements.
struct RowOffsets {
  int64_t x = 0, y = 0, coefficient = 0, start = 0, state = 0;
  int64_t forward_x = 0, forward_y = 0, forward_start = 0, grad_coefficient = 0;

  __device__ RowOffsets(const Scan& scan, int64_t row) {
#pragma unroll 1
    for (int d = scan.ndim - 1; d >= 0; --d) {
      const int64_t size = scan.sizes[d];
      int64_t rest, at;
      if (((row | size) >> 32) == 0) {  // four times as quick
        rest = static_cast<uint32_t>(row) / static_cast<uint32_t>(size);
        at = static_cast<uint32_t>(row) % static_cast<uint32_t>(size);
      } else {
        rest = row / size;
        at = row % size;
      }
      row = rest;
      x += at * scan.x.row_strides[d];
      y += at * scan.y.row_strides[d];
      coefficient += at * scan.coefficient.row_strides[d];
      start += at * scan.start.row_strides[d];
      state += at * scan.state.row_strides[d];
      forward_x += at * scan.forward_x.row_strides[d];
      forward_y += at * scan.forward_y.row_strides[d];
      forward_start += at * scan.forward_start.row_strides[d];
      grad_coefficient += at * scan.grad_coefficient.row_strides[d];
    }
  }
};

// A state in the accumulate dtype, as states are handed on; `other` if there is none.
template <class Acc>
__device__ double read_state(const View& view, int64_t offset, double other) {
  return view.data == nullptr ? other : static_cast<Acc>(read(view.data, view.dtype, offset));
}

// One row of a constant coefficient. What is scanned is s[n] = c * s[n-1] + in * x[n], with
// y[n] = out * s[n]; for an adjoint s is alpha * lambda where lambda can be had from that, for an
// alpha as small as 0 it is lambda itself.
template <class Storage>
struct Row {
  using Sample = typename Storage::Sample;
  using Acc = typename Storage::Acc;

  const Sample* x;
  Sample* y;
  const Sample* forward_x;
  double coefficient, in, out, to_lambda;
  double added_first;   // to in * x[0]
  bool copies_first;    // y[0] = x[0], bit by bit: an average without an initial state
  bool last_is_lambda;  // the adjoint's last y: x[0] of the forward was its initial state as well
  Decay<Acc> decay;

  __device__ Row(const Scan& scan, const RowOffsets& at)
      : x(static_cast<const Sample*>(scan.x.data) + at.x),
        y(static_cast<Sample*>(scan.y.data) + at.y),
        forward_x(static_cast<const Sample*>(scan.forward_x.data) + at.forward_x),
        coefficient(scan.coefficient.data != nullptr
                        ? read(scan.coefficient.data, scan.coefficient.dtype, at.coefficient)
                        : scan.value),
        in(1),
        out(1),
        to_lambda(1),
        added_first(0),
        copies_first(scan.op == Op::kEma && scan.start.data == nullptr),
        last_is_lambda(scan.op == Op::kEmaBackward && !scan.has_initial_state),
        decay(scan.op == Op::kLinearRecurrence ? coefficient : 1 - coefficient,
              scan.op == Op::kLinearRecurrence ? 1 - coefficient : coefficient) {
    if (scan.op == Op::kEma) in = coefficient;
    if (scan.op != Op::kEmaBackward) return;
    const bool scaled = !(coefficient < 0x1p-64 && coefficient > -0x1p-64);
    (scaled ? in : out) = coefficient;
    if (scaled) to_lambda = 1 / coefficient;
    added_first = in * read_state<Acc>(scan.start, at.start, 0);
  }

  // s[-1]. Without an initial state an average goes on as if x[0] had been there before: what is
  // scanned from zero then stays small, and so do its roundings. But from an x[0] that is not
  // finite the scan starts at zero, and at x[0] itself.
  __device__ double start(const Scan& scan, const RowOffsets& at) const {
    if (scan.op == Op::kEmaBackward) return 0;
    if (!copies_first) return read_state<Acc>(scan.start, at.start, 0);
    const double first = Storage::get(*x);
    return finite(first) ? first : 0;
  }

  // Whether the row can be scanned by powers; otherwise it is walked. So is an adjoint that runs as
  // lambda itself: its alpha is 0, but for a rounding.
  __device__ bool scans() const { return decay.fits() && out == 1; }

  // What the row hands on, from its last s.
  __device__ void write_state(const Scan& scan, const RowOffsets& at, double last) const {
    if (scan.state.data == nullptr) return;
    if (scan.op == Op::kEmaBackward) last = decay.ratio() * (last * to_lambda);
    write(scan.state.data, scan.state.dtype, at.state, last);
  }

  // The gradient to the coefficient, if it is wanted, from the sums over the whole row.
  __device__ void write_gradient(const Scan& scan, const RowOffsets& at,
                                 const AlphaSums& sums) const {
    if (scan.grad_coefficient.data == nullptr) return;
    const double before = read_state<Acc>(scan.forward_start, at.forward_start, sums.reference);
    write(scan.grad_coefficient.data, Dtype::kFloat64, at.grad_coefficient,
          sums.gradient(before) * to_lambda);
  }
};

}  // namespace ema_ext::cuda
