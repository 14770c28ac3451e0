// The recurrence one sample at a time, on one row or on many rows side by side in memory.
//
// It serves every layout and every coefficient, a decay above 1 or a NaN included, and non-finite
// samples do what they do in the plain loop. The state is float64, so for float32 and the half
// dtypes rounding does not grow with the length; for float64 an EMA's step is compensated.
#pragma once

#include "cpu/row.h"
#include "cpu/segment_end.h"
#include "cpu/tuning.h"

namespace ema_ext::cpu::EMA_EXT_LEVEL {

// How a block's rows lie to each other, and how their samples are stored.
enum class Layout {
  kApart,     // any stride from row to row
  kTouching,  // side by side in memory
  kStreamed,  // side by side, and stored past the caches
};

// N rows side by side, `stride` apart: a vector of float64 for N > 1.
template <int N>
struct Lanes {
  using D = Vector<double, N>;

  template <class Storage, Layout kLayout>
  static EMA_EXT_INLINE D get(const typename Storage::Sample* from, int64_t stride) {
    if constexpr (kLayout != Layout::kApart) return widen<N>(Storage::template get_vector<N>(from));
    D values;
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) values[i] = Storage::get(from[i * stride]);
    return values;
  }

  template <class Storage, Layout kLayout>
  static EMA_EXT_INLINE void put(D value, typename Storage::Sample* to, int64_t stride) {
    const auto rounded = narrow<typename Storage::Acc, N>(value);
    if constexpr (kLayout == Layout::kStreamed) return stream(to, rounded);
    if constexpr (kLayout == Layout::kTouching) return Storage::template put_vector<N>(rounded, to);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) to[i * stride] = Storage::put(rounded[i]);
  }

  static EMA_EXT_INLINE D all(double value) { return D{} + value; }
};

template <>
struct Lanes<1> {
  using D = double;

  template <class Storage, Layout>
  static EMA_EXT_INLINE D get(const typename Storage::Sample* from, int64_t) {
    return Storage::get(*from);
  }
  template <class Storage, Layout>
  static EMA_EXT_INLINE void put(D value, typename Storage::Sample* to, int64_t) {
    *to = Storage::put(static_cast<typename Storage::Acc>(value));
  }
  static EMA_EXT_INLINE D all(double value) { return value; }
};

// state = ratio * state + in * x. D is double or a vector of doubles.
template <class D, bool kCompensated>
struct Recurrence {
  D ratio, in, state, error;

  EMA_EXT_INLINE void step(D x) {
    const D plain = ratio * state + rounded(in * x);
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
  Block(const Problem& problem, RowOffsets& at) : problem_(problem), at_(at) {
    const Row<Storage> first(problem, at);
    x_ = first.x;
    y_ = first.y;
    forward_x_ = first.forward_x;
    alignas(64) double coefficient[kRows], start[kRows], forward_start[kRows];
    for (int i = 0; i < kRows; ++i) {
      const Row<Storage> row(problem, at);
      next_lane(at);
      coefficient[i] = row.coefficient;
      start[i] = row.start;
      forward_start[i] = row.forward_start;
    }
    std::memcpy(start_, start, sizeof start);
    std::memcpy(forward_start_, forward_start, sizeof forward_start);
    for (int m = 0; m < M; ++m) set_coefficient(m, load<D>(coefficient + m * N));
  }

  // Samples [begin, end). With only_nonfinite (of a single row) y is written only
  // where it is non-finite or is to be: the rest is there already.
  EMA_EXT_INLINE void walk(int64_t begin, int64_t end, bool only_nonfinite = false) {
    int64_t n = begin;
    if (n == 0 && problem_.op == Op::kEma && problem_.start.data == nullptr) copy_first(n++);
    if (N == 1 || rows_touch(problem_, problem_.ndim - 1))
      forward_x_ == nullptr ? walk_touching(n, end, only_nonfinite)
                            : run<Layout::kTouching, true>(n, end, only_nonfinite);
    else
      forward_x_ == nullptr ? run<Layout::kApart, false>(n, end, only_nonfinite)
                            : run<Layout::kApart, true>(n, end, only_nonfinite);
    if (end == problem_.length && problem_.op == Op::kEmaBackward) finish_adjoint(only_nonfinite);
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
    RowOffsets at = at_;
    for (int i = 0; i < kRows; ++i, next_lane(at)) write_end(problem_, at, to[i]);
  }

 private:
  using L = Lanes<N>;
  using D = typename L::D;
  using Sample = typename Storage::Sample;
  using Scan = Recurrence<D, sizeof(typename Storage::Acc) == 8>;

  EMA_EXT_INLINE void next_lane(RowOffsets& at) const {
    if (problem_.ndim > 0) at.move(problem_, problem_.ndim - 1, 1);
  }

  bool streams() const {
    constexpr int64_t kBytes = N * sizeof(Sample);
    return streams_stores(problem_) && reinterpret_cast<uintptr_t>(y_) % kBytes == 0 &&
           problem_.y.time_stride % N == 0;
  }

  template <Layout kLayout>
  EMA_EXT_INLINE int64_t lane_stride(const Operand& operand) const {
    return kLayout != Layout::kApart || N * M == 1 ? 1 : operand.row_strides[problem_.ndim - 1];
  }

  void set_coefficient(int m, D coefficient) {
    to_lambda_[m] = out_[m] = L::all(1);
    sum_[m] = kappa_[m] = later_[m] = added_first_[m] = D{};
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
      added_first_[m] = start_[m] * in;
      if (forward_x_ != nullptr) later_[m] = get<Layout::kApart>(forward_x_, m, problem_.forward_x);
    }
  }

  // Vector m of the samples at `from`.
  template <Layout kLayout>
  EMA_EXT_INLINE D get(const Sample* from, int m, const Operand& operand) const {
    const int64_t lane = lane_stride<kLayout>(operand);
    return L::template get<Storage, kLayout>(from + m * N * lane, lane);
  }
  template <Layout kLayout>
  EMA_EXT_INLINE void put(D value, int m, Sample* to) const {
    const int64_t lane = lane_stride<kLayout>(problem_.y);
    L::template put<Storage, kLayout>(value, to + m * N * lane, lane);
  }

  // y[0] = x[0], bit by bit.
  void copy_first(int64_t n) {
    const int64_t x_lane = lane_stride<Layout::kApart>(problem_.x);
    const int64_t y_lane = lane_stride<Layout::kApart>(problem_.y);
    for (int i = 0; i < kRows; ++i) y_[n + i * y_lane] = x_[n + i * x_lane];
  }

  EMA_EXT_INLINE void walk_touching(int64_t n, int64_t end, bool only_nonfinite) {
    if constexpr (Storage::kDirect && M > 1 && N * sizeof(Sample) >= 16) {
      if (streams()) return run<Layout::kStreamed, false>(n, end, only_nonfinite);
    }
    run<Layout::kTouching, false>(n, end, only_nonfinite);
  }

  // The gradient to alpha is the sum over samples of kappa[n] * (forward_x[n] - forward_x[n-1]),
  // where kappa is the adjoint of the adjoint: summed by parts, the samples' mean cancels before it
  // is multiplied. Before the forward's first sample stands its initial state; see finish_adjoint.
  template <Layout kLayout, bool kWithCoefficient>
  __attribute__((noinline)) void run(int64_t n, int64_t end, bool only_nonfinite) {
    Scan scan[M];
    std::memcpy(scan, scan_, sizeof scan);
    for (; n < end; ++n) {
      const Sample* from = x_ + n * problem_.x.time_stride;
      Sample* to = y_ + n * problem_.y.time_stride;
      const int64_t before = n + 1 < problem_.length ? n + 1 : n;
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        scan[m].step(get<kLayout>(from, m, problem_.x));
        if (n == 0) scan[m].state += added_first_[m];
        if constexpr (kWithCoefficient) {
          const D now = later_[m];
          later_[m] = get<kLayout>(forward_x_ + before * problem_.forward_x.time_stride, m,
                                   problem_.forward_x);
          kappa_[m] = scan[m].state + scan[m].ratio * kappa_[m];
          sum_[m] += kappa_[m] * (now - later_[m]);
        }
        if constexpr (kRows == 1)
          if (only_nonfinite && finite(scan[m].state) && finite(Storage::get(*to))) continue;
        put<kLayout>(scan[m].state * out_[m], m, to);
      }
    }
    std::memcpy(scan_, scan, sizeof scan);
  }

  // At the scan's last sample, the forward's first.
  void finish_adjoint(bool only_nonfinite) {
    Sample* to = y_ + (problem_.length - 1) * problem_.y.time_stride;
    for (int m = 0; m < M; ++m) {
      sum_[m] += kappa_[m] * (later_[m] - forward_start_[m]);
      if (problem_.has_initial_state) continue;
      if constexpr (kRows == 1)
        if (only_nonfinite && finite(scan_[m].state) && finite(Storage::get(*to))) continue;
      put<Layout::kApart>(scan_[m].state * to_lambda_[m], m, to);
    }
  }

  const Problem& problem_;
  const RowOffsets at_;
  const Sample* x_;
  Sample* y_;
  const Sample* forward_x_;
  D start_[M], forward_start_[M];
  D added_first_[M];  // to the adjoint at the scan's first sample: the gradient of the state
  Scan scan_[M];
  D out_[M];        // from the scanned adjoint to y
  D to_lambda_[M];  // from the scanned adjoint to lambda
  D kappa_[M], sum_[M], later_[M];
};

// One row of any strides from end to end; see Block::walk for only_nonfinite.
template <class Storage>
RowEnd walk_row(const Problem& problem, RowOffsets at, bool only_nonfinite = false) {
  Block<Storage, 1, 1> block(problem, at);
  block.walk(0, problem.length, only_nonfinite);
  RowEnd end;
  block.ends(&end);
  return end;
}

}  // namespace ema_ext::cpu::EMA_EXT_LEVEL
