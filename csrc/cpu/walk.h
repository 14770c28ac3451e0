// The recurrence one sample at a time, on one row or on many rows side by side in memory.
//
// It serves every layout and every coefficient, a decay above 1 or a NaN included, and non-finite
// samples do what they do in the plain loop. The state is float64, so for float32 and the half
// dtypes rounding does not grow with the length; for float64 an EMA's step is compensated.
#pragma once

#include "cpu/row.h"

namespace ema_ext::cpu::EMA_EXT_LEVEL {

// N rows side by side: a vector of float64 for N > 1.
template <int N>
struct Lanes {
  using D = Vector<double, N>;

  template <class Storage>
  static EMA_EXT_INLINE D get(const typename Storage::Sample* from) {
    if constexpr (Storage::kDirect) {
      return __builtin_convertvector(load<Vector<typename Storage::Sample, N>>(from), D);
    } else {
      float values[N];
      Storage::unpack(from, N, values);
      return __builtin_convertvector(load<Vector<float, N>>(values), D);
    }
  }

  template <class Storage>
  static EMA_EXT_INLINE void put(D value, typename Storage::Sample* to) {
    using Acc = typename Storage::Acc;
    Acc values[N];
    store(values, __builtin_convertvector(value, Vector<Acc, N>));
    Storage::pack(values, N, to);
  }

  static EMA_EXT_INLINE D all(double value) { return D{} + value; }
};

template <>
struct Lanes<1> {
  using D = double;

  template <class Storage>
  static EMA_EXT_INLINE D get(const typename Storage::Sample* from) {
    return Storage::get(*from);
  }
  template <class Storage>
  static EMA_EXT_INLINE void put(D value, typename Storage::Sample* to) {
    *to = Storage::put(static_cast<typename Storage::Acc>(value));
  }
  static EMA_EXT_INLINE D all(double value) { return value; }
};

// state = ratio * state + in * x. D is double or a vector of doubles.
template <class D, bool kCompensated>
struct Recurrence {
  D ratio, in, state, error;

  EMA_EXT_INLINE void step(D x) {
    const D plain = ratio * state + in * x;
    if constexpr (kCompensated) {
      // state + in * (x - state) with the rounding error of the sum carried on: 1 - in has lost
      // the low bits of in. Not for a non-finite state, whose difference with itself is NaN.
      const D change = in * ((x - state) - error) + error;
      const D next = state + change;
      const auto use = (in < 0.5) & (in > 0.0) & (next - next == 0.0);
      error = use ? change - (next - state) : D{};
      state = use ? next : plain;
    } else {
      state = plain;
    }
  }
};

// A block of M * N rows: N lanes in each of M vectors, M recurrences in flight.
template <class Storage, int N, int M>
struct Block {
  using L = Lanes<N>;
  using D = typename L::D;
  using Sample = typename Storage::Sample;
  static constexpr bool kCompensated = sizeof(typename Storage::Acc) == 8;

  const Problem& problem;
  const Sample* x;
  Sample* y;
  const Sample* forward_x;
  D coefficient[M], start[M], forward_start[M];
  D state[M], grad_coefficient[M];  // results

  // Runs kEma or kLinearRecurrence. With only_nonfinite, y is written from the first non-finite
  // state on: the others are there already.
  EMA_EXT_INLINE void forward(bool only_nonfinite = false) {
    const bool ema = problem.op == Op::kEma;
    Recurrence<D, kCompensated> scan[M];
    for (int m = 0; m < M; ++m) {
      if (ema)
        scan[m] = {L::all(1) - coefficient[m], coefficient[m], start[m], D{}};
      else
        scan[m] = {coefficient[m], L::all(1), start[m], D{}};
    }
    int64_t n = 0;
    if (ema && problem.start.data == nullptr) {
      std::memcpy(y, x, sizeof(Sample) * N * M);  // y[0] = x[0]; a single lane of any stride
      n = 1;
    }
    for (; n < problem.length; ++n) {
      const Sample* from = x + n * problem.x.time_stride;
      Sample* to = y + n * problem.y.time_stride;
      for (int m = 0; m < M; ++m) {
        scan[m].step(L::template get<Storage>(from + m * N));
        if constexpr (N * M == 1)
          if (only_nonfinite && finite(scan[m].state)) continue;
        L::template put<Storage>(scan[m].state, to + m * N);
      }
    }
    for (int m = 0; m < M; ++m) state[m] = scan[m].state;
  }

  // Runs kEmaBackward along reversed time. The gradient to alpha is the sum over samples of
  // kappa[n] * (forward_x[n] - forward_x[n-1]), where kappa is the adjoint of the adjoint: summed by
  // parts, the samples' mean cancels before it is multiplied.
  template <bool kWithCoefficient>
  EMA_EXT_INLINE void backward(bool only_nonfinite = false) {
    Recurrence<D, kCompensated> scan[M];
    D out[M], to_lambda[M], kappa[M], sum[M], later[M];
    for (int m = 0; m < M; ++m) {
      const D alpha = coefficient[m];
      const auto scaled = (alpha >= 0x1p-64) | (alpha <= -0x1p-64) | (alpha != alpha);
      const D in = scaled ? alpha : L::all(1);
      out[m] = scaled ? L::all(1) : alpha;
      to_lambda[m] = scaled ? 1 / alpha : L::all(1);
      scan[m] = {L::all(1) - alpha, in, D{}, D{}};
      start[m] *= in;
      kappa[m] = sum[m] = D{};
      if constexpr (kWithCoefficient) later[m] = L::template get<Storage>(forward_x + m * N);
    }
    for (int64_t n = 0; n < problem.length; ++n) {
      const Sample* from = x + n * problem.x.time_stride;
      Sample* to = y + n * problem.y.time_stride;
      const Sample* before = forward_x + (n + 1) * problem.forward_x.time_stride;
      const bool last = n == problem.length - 1;
      for (int m = 0; m < M; ++m) {
        scan[m].step(L::template get<Storage>(from + m * N));
        if (n == 0) scan[m].state += start[m];
        if constexpr (kWithCoefficient) {
          const D now = later[m];
          later[m] = last ? forward_start[m] : L::template get<Storage>(before + m * N);
          kappa[m] = scan[m].state + scan[m].ratio * kappa[m];
          sum[m] += kappa[m] * (now - later[m]);
        }
        const D value = last && !problem.has_initial_state ? scan[m].state * to_lambda[m]
                                                           : scan[m].state * out[m];
        if constexpr (N * M == 1)
          if (only_nonfinite && finite(scan[m].state)) continue;
        L::template put<Storage>(value, to + m * N);
      }
    }
    for (int m = 0; m < M; ++m) {
      state[m] = scan[m].ratio * (scan[m].state * to_lambda[m]);
      grad_coefficient[m] = sum[m] * to_lambda[m];
    }
  }

  EMA_EXT_INLINE void run(bool only_nonfinite = false) {
    if (problem.op != Op::kEmaBackward)
      forward(only_nonfinite);
    else if (forward_x != nullptr)
      backward<true>(only_nonfinite);
    else
      backward<false>(only_nonfinite);
  }
};

// One row of any strides; see Block::forward for only_nonfinite.
template <class Storage>
RowEnd walk_row(const Problem& problem, const Row<Storage>& row, bool only_nonfinite = false) {
  Block<Storage, 1, 1> block{problem,
                             row.x,
                             row.y,
                             row.forward_x,
                             {row.coefficient},
                             {row.start},
                             {row.forward_start},
                             {},
                             {}};
  block.run(only_nonfinite);
  return {block.state[0], block.grad_coefficient[0]};
}

}  // namespace ema_ext::cpu::EMA_EXT_LEVEL
