// The recurrence one sample at a time, and one row of any strides by it.
//
// It serves every layout and every coefficient, a decay above 1 or a NaN included, and non-finite
// samples do what they do in the plain loop. The state is float64, so for float32 and the half
// dtypes rounding does not grow with the length; for float64 an EMA's step is compensated.
#pragma once

#include "cpu/row.h"
#include "cpu/segment_end.h"

namespace ema_ext::cpu::EMA_EXT_LEVEL {

// What a step does and what the operation makes of it: of one row where D is double, of one in each
// lane where it is a vector of doubles.
template <class D>
struct WalkFactors {
  D ratio, in;  // state = ratio * state + in * x
  D out;        // from the state to y
  D to_lambda;  // from the state of an adjoint to lambda

  WalkFactors() = default;
  WalkFactors(Op op, D coefficient) : in(all(1)), out(all(1)), to_lambda(all(1)) {
    if (op == Op::kLinearRecurrence) {
      ratio = coefficient;
      return;
    }
    ratio = all(1) - coefficient;
    in = coefficient;
    if (op == Op::kEma) return;
    // alpha * lambda where lambda can be had from it, else lambda: see scaled_adjoint.
    const auto scaled =
        (coefficient >= 0x1p-64) | (coefficient <= -0x1p-64) | (coefficient != coefficient);
    in = scaled ? coefficient : all(1);
    out = scaled ? all(1) : coefficient;
    to_lambda = scaled ? 1 / coefficient : all(1);
  }

  static EMA_EXT_INLINE D all(double value) { return D{} + value; }
};

template <class D, bool kCompensated>
struct WalkState {
  D value, error;

  EMA_EXT_INLINE void step(const WalkFactors<D>& k, D x) {
    const D plain = k.ratio * value + rounded(k.in * x);
    if constexpr (kCompensated) {
      // value + in * (x - value) with the rounding error of the sum carried on: 1 - in has lost
      // the low bits of in. Not for a non-finite state, whose difference with itself is NaN.
      const D change = k.in * ((x - value) - error) + error;
      const D next = value + change;
      const auto use = (k.in < 0.5) & (k.in > 0.0) & (next - next == 0.0);
      error = use ? change - (next - value) : D{};
      value = use ? next : plain;
    } else {
      value = plain;
    }
  }
};

// The gradient to alpha is the sum over samples of kappa[n] * (forward_x[n] - forward_x[n-1]),
// where kappa is the adjoint of the adjoint: summed by parts, the samples' mean cancels before it
// is multiplied. Before the forward's first sample stands its initial state.
template <class D>
struct WalkGradient {
  D later;  // the forward's sample where the adjoint is
  D kappa, sum;

  // With the adjoint's state, and the forward's sample before it.
  EMA_EXT_INLINE void add(const WalkFactors<D>& k, D state, D earlier) {
    kappa = state + k.ratio * kappa;
    sum += kappa * (later - earlier);
    later = earlier;
  }
};

// One row from end to end. With only_nonfinite y is written only where it is non-finite or is to
// be: the rest is there already.
template <class Storage>
RowEnd walk_row(const Problem& problem, const RowOffsets& at, bool only_nonfinite = false) {
  using Acc = typename Storage::Acc;
  const Row<Storage> row(problem, at);
  const WalkFactors<double> k(problem.op, row.coefficient);
  const bool adjoint = problem.op == Op::kEmaBackward;
  const bool copies_first = problem.op == Op::kEma && problem.start.data == nullptr;
  const int64_t last = problem.length - 1;
  WalkState<double, sizeof(Acc) == 8> state{adjoint ? 0 : row.start, 0};
  WalkGradient<double> gradient{row.forward_x ? Storage::get(*row.forward_x) : 0, 0, 0};

  const auto put = [&](double value, int64_t n) {
    auto* to = row.y + n * problem.y.time_stride;
    if (only_nonfinite && finite(value) && finite(Storage::get(*to))) return;
    *to = Storage::put(static_cast<Acc>(value));
  };
  if (copies_first) *row.y = *row.x;
  for (int64_t n = copies_first ? 1 : 0; n <= last; ++n) {
    state.step(k, Storage::get(row.x[n * problem.x.time_stride]));
    if (n == 0 && adjoint) state.value += row.start * k.in;
    if (row.forward_x != nullptr) {
      const auto* before = row.forward_x + (n + 1) * problem.forward_x.time_stride;
      gradient.add(k, state.value, n == last ? row.forward_start : Storage::get(*before));
    }
    put(state.value * k.out, n);
  }
  if (!adjoint) return {state.value, 0};
  const double lambda = state.value * k.to_lambda;
  if (!problem.has_initial_state) put(lambda, last);
  return {k.ratio * lambda, gradient.sum * k.to_lambda};
}

}  // namespace ema_ext::cpu::EMA_EXT_LEVEL
