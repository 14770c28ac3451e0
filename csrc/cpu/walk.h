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
    return widen<N>(Storage::template get_vector<N>(from));
  }

  template <class Storage>
  static EMA_EXT_INLINE void put(D value, typename Storage::Sample* to) {
    Storage::template put_vector<N>(narrow<typename Storage::Acc, N>(value), to);
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

// A block of M * N rows: N lanes in each of M vectors, M recurrences in flight. It walks along time
// in steps of any number of samples: walk(0, n), walk(n, m), ..., then ends() holds the results.
template <class Storage, int N, int M>
class Block {
 public:
  static constexpr int kRows = N * M;

  // The row at `at` and the kRows - 1 after it along the innermost axis; moves `at` past them.
  Block(const Problem& problem, RowCursor& at) : problem_(problem), at_(at) {
    const Row<Storage> first(problem, at);
    x_ = first.x;
    y_ = first.y;
    forward_x_ = first.forward_x;
    double coefficient[kRows], start[kRows], forward_start[kRows];
    for (int i = 0; i < kRows; ++i, at.advance()) {
      const Row<Storage> row(problem, at);
      coefficient[i] = row.coefficient;
      start[i] = row.start;
      forward_start[i] = row.forward_start;
    }
    std::memcpy(start_, start, sizeof start);
    std::memcpy(forward_start_, forward_start, sizeof forward_start);
    for (int m = 0; m < M; ++m) set_coefficient(m, load<D>(coefficient + m * N));
  }

  // Samples [begin, end). With only_nonfinite (of a single row) y is written from the first
  // non-finite state on: the others are there already.
  EMA_EXT_INLINE void walk(int64_t begin, int64_t end, bool only_nonfinite = false) {
    if (problem_.op != Op::kEmaBackward)
      forward(begin, end, only_nonfinite);
    else if (forward_x_ != nullptr)
      backward<true>(begin, end, only_nonfinite);
    else
      backward<false>(begin, end, only_nonfinite);
  }

  // After all samples: what each row hands on.
  void ends(RowEnd* to) const {
    double state[kRows], grad_coefficient[kRows];
    for (int m = 0; m < M; ++m) {
      D last = scan_[m].state;
      if (problem_.op == Op::kEmaBackward) last = scan_[m].ratio * (last * to_lambda_[m]);
      store(state + m * N, last);
      store(grad_coefficient + m * N, sum_[m] * to_lambda_[m]);
    }
    for (int i = 0; i < kRows; ++i) to[i] = {state[i], grad_coefficient[i]};
  }

  void write_ends() {
    RowEnd to[kRows];
    ends(to);
    for (int i = 0; i < kRows; ++i, at_.advance()) write_end(problem_, at_, to[i]);
  }

 private:
  using L = Lanes<N>;
  using D = typename L::D;
  using Sample = typename Storage::Sample;
  using Scan = Recurrence<D, sizeof(typename Storage::Acc) == 8>;

  void set_coefficient(int m, D coefficient) {
    to_lambda_[m] = out_[m] = L::all(1);
    sum_[m] = kappa_[m] = later_[m] = D{};
    if (problem_.op == Op::kLinearRecurrence) {
      scan_[m] = {coefficient, L::all(1), start_[m], D{}};
    } else if (problem_.op == Op::kEma) {
      scan_[m] = {L::all(1) - coefficient, coefficient, start_[m], D{}};
    } else {
      // alpha * lambda where lambda can be had from it, else lambda: see scaled_adjoint.
      const auto scaled =
          (coefficient >= 0x1p-64) | (coefficient <= -0x1p-64) | (coefficient != coefficient);
      const D in = scaled ? coefficient : L::all(1);
      out_[m] = scaled ? L::all(1) : coefficient;
      to_lambda_[m] = scaled ? 1 / coefficient : L::all(1);
      scan_[m] = {L::all(1) - coefficient, in, D{}, D{}};
      start_[m] *= in;
      if (forward_x_ != nullptr) later_[m] = L::template get<Storage>(forward_x_ + m * N);
    }
  }

  EMA_EXT_INLINE void forward(int64_t n, int64_t end, bool only_nonfinite) {
    Scan scan[M];
    std::memcpy(scan, scan_, sizeof scan);
    if (n == 0 && problem_.op == Op::kEma && problem_.start.data == nullptr) {
      std::memcpy(y_, x_, sizeof(Sample) * kRows);  // y[0] = x[0]
      ++n;
    }
    for (; n < end; ++n) {
      const Sample* from = x_ + n * problem_.x.time_stride;
      Sample* to = y_ + n * problem_.y.time_stride;
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        scan[m].step(L::template get<Storage>(from + m * N));
        if constexpr (kRows == 1)
          if (only_nonfinite && finite(scan[m].state)) continue;
        L::template put<Storage>(scan[m].state, to + m * N);
      }
    }
    std::memcpy(scan_, scan, sizeof scan);
  }

  // The gradient to alpha is the sum over samples of kappa[n] * (forward_x[n] - forward_x[n-1]),
  // where kappa is the adjoint of the adjoint: summed by parts, the samples' mean cancels before it
  // is multiplied.
  template <bool kWithCoefficient>
  EMA_EXT_INLINE void backward(int64_t n, int64_t end, bool only_nonfinite) {
    Scan scan[M];
    std::memcpy(scan, scan_, sizeof scan);
    for (; n < end; ++n) {
      const Sample* from = x_ + n * problem_.x.time_stride;
      Sample* to = y_ + n * problem_.y.time_stride;
      const Sample* before = forward_x_ + (n + 1) * problem_.forward_x.time_stride;
      const bool last = n == problem_.length - 1;
      const D* out = last && !problem_.has_initial_state ? to_lambda_ : out_;
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        scan[m].step(L::template get<Storage>(from + m * N));
        if (n == 0) scan[m].state += start_[m];
        if constexpr (kWithCoefficient) {
          const D now = later_[m];
          later_[m] = last ? forward_start_[m] : L::template get<Storage>(before + m * N);
          kappa_[m] = scan[m].state + scan[m].ratio * kappa_[m];
          sum_[m] += kappa_[m] * (now - later_[m]);
        }
        if constexpr (kRows == 1)
          if (only_nonfinite && finite(scan[m].state)) continue;
        L::template put<Storage>(scan[m].state * out[m], to + m * N);
      }
    }
    std::memcpy(scan_, scan, sizeof scan);
  }

  const Problem& problem_;
  RowCursor at_;
  const Sample* x_;
  Sample* y_;
  const Sample* forward_x_;
  D start_[M], forward_start_[M];
  Scan scan_[M];
  D out_[M];        // from the scanned adjoint to y
  D to_lambda_[M];  // from the scanned adjoint to lambda
  D kappa_[M], sum_[M], later_[M];
};

// One row of any strides from end to end; see Block::walk for only_nonfinite.
template <class Storage>
RowEnd walk_row(const Problem& problem, RowCursor at, bool only_nonfinite = false) {
  Block<Storage, 1, 1> block(problem, at);
  block.walk(0, problem.length, only_nonfinite);
  RowEnd end;
  block.ends(&end);
  return end;
}

}  // namespace ema_ext::cpu::EMA_EXT_LEVEL
