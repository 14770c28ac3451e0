// A few vectors of rows that walk along time together.
#pragma once

#include "cpu/lane_group.h"
#include "cpu/lane_stage.h"
#include "cpu/tuning.h"

namespace ema_ext::cpu::EMA_EXT_LEVEL {

// Where a stretch of time of a block lies: `x` and so on point to its first sample in time.
template <class Memory>
struct Lines {
  const typename Memory::Sample* x;
  int64_t x_stride;
  typename Memory::Sample* y;
  int64_t y_stride;
  const typename Memory::Sample* forward_x;
  int64_t forward_stride;
};

// A row alone, which all lanes walk alike: nothing has to be brought side by side.
template <class Storage>
struct Alone {
  using Sample = typename Storage::Sample;
  using Acc = typename Storage::Acc;

  template <int N>
  static EMA_EXT_INLINE Vector<Acc, N> get_vector(const Sample* from) {
    return Storage::get(*from) - Vector<Acc, N>{};  // minus: of -0 as well
  }
  template <int N>
  static EMA_EXT_INLINE void put_vector(Vector<Acc, N> values, Sample* to) {
    *to = Storage::put(values[0]);
  }
};

// A block of up to M vectors of rows, M recurrences in flight. It walks along time in steps of up
// to kLaneSteps samples: walk(0, n), walk(n, m), ..., then finish().
template <class Storage, int M>
class LaneBlock {
 public:
  using Acc = typename Storage::Acc;
  static constexpr int kN = kLanes<Acc>, kRows = kN * M;

  using Coefficients = LaneCoefficients<Acc, M>;

  // The `rows` rows from `at` on along the innermost axis.
  LaneBlock(const Problem& problem, const RowOffsets& at, int rows, const Coefficients& k)
      : problem_(problem),
        at_(at),
        rows_(rows),
        k_(k),
        x_(static_cast<const Sample*>(problem.x.data) + at.x),
        y_(static_cast<Sample*>(problem.y.data) + at.y),
        forward_x_(problem.grad_coefficient.data == nullptr
                       ? nullptr
                       : static_cast<const Sample*>(problem.forward_x.data) + at.forward_x),
        adjoint_(problem.op == Op::kEmaBackward),
        copies_first_(problem.op == Op::kEma && problem.start.data == nullptr) {
    W start[M] = {};
    if (problem.start.data != nullptr) read_numbers(problem.start, at.start, start);
    for (int m = 0; m < M; ++m) {
      if (adjoint_) added_first_[m] = start[m];
      for (int p = 0; p < kParts; ++p) states_[m][p] = {adjoint_ ? D{} : start[m].part[p], D{}};
    }
  }

  // Samples [begin, end).
  void walk(int64_t begin, int64_t end) {
    if (rows_ == kRows && rows_touch(problem_, problem_.ndim - 1))
      walk_touching(begin, end);
    else if (M == 1 && rows_ == 1)
      walk_alone(begin, end);
    else
      walk_staged(begin, end);
    if (begin == 0 && copies_first_) copy_first();
    if (end == problem_.length && adjoint_ && !problem_.has_initial_state) write_lambda();
  }

  // After all samples: what each row hands on, and the rows that could not walk with the others.
  void finish() {
    if (problem_.state.data != nullptr)
      write_numbers(problem_.state, at_.state, [&](int m, int p) {
        const auto& k = k_.of(m)[p];
        const D state = states_[m][p].value;
        return adjoint_ ? k.ratio * (state * k.to_lambda) : state;
      });
    if (forward_x_ != nullptr)
      write_numbers(problem_.grad_coefficient, at_.grad_coefficient,
                    [&](int m, int p) { return gradients_[m][p].sum * k_.of(m)[p].to_lambda; });
    for (int i = 0; i < rows_ && k_.apart; ++i) {
      if (!k_.is_apart[i]) continue;
      RowOffsets at = at_;
      at.move(problem_, problem_.ndim - 1, i);
      write_end(problem_, at, walk_row<Storage>(problem_, at));
    }
  }

 private:
  using Sample = typename Storage::Sample;
  using V = Vector<Acc, kN>;
  using W = Wide<Acc>;
  using D = typename W::D;
  using State = WalkState<D, sizeof(Acc) == 8>;
  static constexpr int kParts = W::kParts, kD = kN / kParts;

  int64_t row_stride(const Operand& operand) const {
    return operand.row_strides[problem_.ndim - 1];
  }

  // A sample or a number of each row, from the first row's on; states are in the accumulate dtype,
  // as they are handed on. Lanes without a row get 0.
  void read_samples(const Operand& operand, const Sample* first, W* to) const {
    alignas(64) Acc values[kRows] = {};
    for (int i = 0; i < rows_; ++i) values[i] = Storage::get(first[i * row_stride(operand)]);
    for (int m = 0; m < M; ++m) to[m] = W::of(load<V>(values + m * kN));
  }
  void read_numbers(const Operand& operand, int64_t offset, W* to) const {
    alignas(64) Acc values[kRows] = {};
    for (int i = 0; i < rows_; ++i)
      values[i] = static_cast<Acc>(read(operand, offset + i * row_stride(operand)));
    for (int m = 0; m < M; ++m) to[m] = W::of(load<V>(values + m * kN));
  }
  template <class Value>
  void write_numbers(const Operand& operand, int64_t offset, const Value& value) {
    alignas(64) double values[kRows];
    for (int m = 0; m < M; ++m)
      for (int p = 0; p < kParts; ++p) store(values + m * kN + p * kD, value(m, p));
    for (int i = 0; i < rows_; ++i) write(operand, offset + i * row_stride(operand), values[i]);
  }

  // From sample `begin` on, where they lie.
  template <class Memory>
  Lines<Memory> lines(int64_t begin) const {
    return {x_ + begin * problem_.x.time_stride,
            problem_.x.time_stride,
            y_ + begin * problem_.y.time_stride,
            problem_.y.time_stride,
            forward_x_ + begin * problem_.forward_x.time_stride,
            problem_.forward_x.time_stride};
  }

  void walk_touching(int64_t begin, int64_t end) {
    if constexpr (Storage::kDirect) {
      if (forward_x_ == nullptr && streams_stores(problem_) &&
          reinterpret_cast<uintptr_t>(y_) % sizeof(V) == 0 && problem_.y.time_stride % kN == 0)
        return run<Storage, true>(lines<Storage>(begin), begin, end);
    }
    run<Storage, false>(lines<Storage>(begin), begin, end);
  }

  void walk_alone(int64_t begin, int64_t end) {
    if constexpr (M == 1) run<Alone<Storage>, false>(lines<Alone<Storage>>(begin), begin, end);
  }

  __attribute__((noinline)) void walk_staged(int64_t begin, int64_t end) {
    alignas(64) Acc samples[kLaneSteps * kRows], forward[(kLaneSteps + 1) * kRows];
    const int64_t count = end - begin;
    if (rows_ < kRows) std::memset(samples, 0, count * kRows * sizeof(Acc));
    stage(problem_.x).template gather<kRows>(x_ + begin * problem_.x.time_stride, count, samples);
    if (forward_x_ != nullptr) {
      const int64_t there = end < problem_.length ? count + 1 : count;
      if (rows_ < kRows) std::memset(forward, 0, there * kRows * sizeof(Acc));
      stage(problem_.forward_x)
          .template gather<kRows>(forward_x_ + begin * problem_.forward_x.time_stride, there,
                                  forward);
    }
    run<Native<Acc>, false>({samples, kRows, samples, kRows, forward, kRows}, begin, end);
    stage(problem_.y).template scatter<kRows>(samples, count, y_ + begin * problem_.y.time_stride);
  }
  LaneStage<Storage> stage(const Operand& operand) const {
    return {operand.time_stride, row_stride(operand), rows_};
  }

  template <class Memory, bool kStreamed>
  EMA_EXT_INLINE void run(const Lines<Memory>& lines, int64_t begin, int64_t end) {
    int64_t first = begin == 0 && copies_first_ ? 1 : 0;
    if (first > 0) start_at<Memory>(lines.x);
    if (begin == 0 && forward_x_ != nullptr) start_gradients_at<Memory>(lines.forward_x);
    if constexpr (sizeof(Acc) == 4) {
      if (k_.grouped) {
        if (begin == 0 && adjoint_)  // to which the gradient of the state is added
          by_steps<Memory, kStreamed, false>(lines, begin, 0, first = 1);
        return by_groups<Memory, kStreamed>(lines, first, end - begin);
      }
    }
    if (forward_x_ == nullptr)
      by_steps<Memory, kStreamed, false>(lines, begin, first, end - begin);
    else
      by_steps<Memory, false, true>(lines, begin, first, end - begin);
  }

  template <class Memory>
  void start_at(const typename Memory::Sample* x) {
    for (int m = 0; m < M; ++m) {
      const W start = W::of(Memory::template get_vector<kN>(x + m * kN));
      for (int p = 0; p < kParts; ++p) states_[m][p].value = start.part[p];
    }
  }
  template <class Memory>
  void start_gradients_at(const typename Memory::Sample* forward_x) {
    for (int m = 0; m < M; ++m) {
      const W later = W::of(Memory::template get_vector<kN>(forward_x + m * kN));
      for (int p = 0; p < kParts; ++p) gradients_[m][p] = {later.part[p], D{}, D{}};
    }
  }

  template <class Memory, bool kStreamed>
  static EMA_EXT_INLINE void put(V value, typename Memory::Sample* to) {
    if constexpr (kStreamed)
      stream(to, value);
    else
      Memory::template put_vector<kN>(value, to);
  }

  // Lines [n, end).
  template <class Memory, bool kStreamed>
  __attribute__((noinline)) void by_groups(const Lines<Memory>& lines, int64_t n, int64_t end) {
    W state[M];  // in registers, as far as they go
    V before[M];
    for (int m = 0; m < M; ++m) {
      for (int p = 0; p < kParts; ++p) state[m].part[p] = states_[m][p].value;
      before[m] = state[m].narrowed();
    }
    for (; n + kGroup <= end; n += kGroup)
      walk_group<Memory, kStreamed, kGroup>(lines, n, state, before);
    if (end - n == 1) walk_group<Memory, kStreamed, 1>(lines, n, state, before);
    if (end - n == 2) walk_group<Memory, kStreamed, 2>(lines, n, state, before);
    if (end - n == 3) walk_group<Memory, kStreamed, 3>(lines, n, state, before);
    for (int m = 0; m < M; ++m)
      for (int p = 0; p < kParts; ++p) states_[m][p].value = state[m].part[p];
  }
  template <class Memory, bool kStreamed, int K>
  EMA_EXT_INLINE void walk_group(const Lines<Memory>& lines, int64_t n, W* state, V* before) const {
    const auto* from = lines.x + n * lines.x_stride;
    auto* to = lines.y + n * lines.y_stride;
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      V samples[K];
#pragma GCC unroll 4
      for (int i = 0; i < K; ++i)
        samples[i] = Memory::template get_vector<kN>(from + i * lines.x_stride + m * kN);
      k_.group(m).template walk<K>(samples, state[m], before[m]);
#pragma GCC unroll 4
      for (int i = 0; i < K; ++i)
        put<Memory, kStreamed>(samples[i], to + i * lines.y_stride + m * kN);
    }
  }

  // Lines [n, end), the first of which is sample `begin`.
  template <class Memory, bool kStreamed, bool kWithCoefficient>
  __attribute__((noinline)) void by_steps(const Lines<Memory>& lines, int64_t begin, int64_t n,
                                          int64_t end) {
    State state[M][kParts];
    for (int m = 0; m < M; ++m)
      for (int p = 0; p < kParts; ++p) state[m][p] = states_[m][p];
    for (; n < end; ++n) {
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        W x = W::of(Memory::template get_vector<kN>(lines.x + n * lines.x_stride + m * kN)), y;
#pragma GCC unroll 2
        for (int p = 0; p < kParts; ++p) {
          const auto& k = k_.of(m)[p];
          state[m][p].step(k, x.part[p]);
          if (begin + n == 0 && adjoint_) state[m][p].value += added_first_[m].part[p] * k.in;
          y.part[p] = state[m][p].value * k.out;
        }
        if constexpr (kWithCoefficient) add_to_gradient(lines, begin, n, m, state[m]);
        put<Memory, kStreamed>(y.narrowed(), lines.y + n * lines.y_stride + m * kN);
      }
    }
    for (int m = 0; m < M; ++m)
      for (int p = 0; p < kParts; ++p) states_[m][p] = state[m][p];
  }

  template <class Memory>
  EMA_EXT_INLINE void add_to_gradient(const Lines<Memory>& lines, int64_t begin, int64_t n, int m,
                                      const State* state) {
    const auto* before = lines.forward_x + (n + 1) * lines.forward_stride + m * kN;
    const W earlier = begin + n + 1 < problem_.length
                          ? W::of(Memory::template get_vector<kN>(before))
                          : forward_start(m);
#pragma GCC unroll 2
    for (int p = 0; p < kParts; ++p)
      gradients_[m][p].add(k_.of(m)[p], state[p].value, earlier.part[p]);
  }

  // What stands before the forward's first sample: its initial state, or that sample.
  __attribute__((noinline)) W forward_start(int m) const {
    W start[M];
    const int64_t last = (problem_.length - 1) * problem_.forward_x.time_stride;
    if (problem_.forward_start.data != nullptr)
      read_numbers(problem_.forward_start, at_.forward_start, start);
    else
      read_samples(problem_.forward_x, forward_x_ + last, start);
    return start[m];
  }

  // y[0] = x[0], bit by bit.
  void copy_first() {
    const int64_t from = row_stride(problem_.x), to = row_stride(problem_.y);
    if (from == 1 && to == 1)
      std::memcpy(y_, x_, rows_ * sizeof(Sample));
    else
      for (int i = 0; i < rows_; ++i) y_[i * to] = x_[i * from];
  }

  // At the scan's last sample y is lambda itself, since the forward's first was its initial state.
  void write_lambda() {
    alignas(64) Acc lambda[kRows];
    for (int m = 0; m < M; ++m) {
      W value;
      for (int p = 0; p < kParts; ++p) value.part[p] = states_[m][p].value * k_.of(m)[p].to_lambda;
      store(lambda + m * kN, value.narrowed());
    }
    Sample* to = y_ + (problem_.length - 1) * problem_.y.time_stride;
    for (int i = 0; i < rows_; ++i) to[i * row_stride(problem_.y)] = Storage::put(lambda[i]);
  }

  const Problem& problem_;
  const RowOffsets at_;
  const int rows_;
  const Coefficients& k_;
  const Sample* x_;
  Sample* y_;
  const Sample* forward_x_;  // nullptr: no gradient to the coefficient
  const bool adjoint_, copies_first_;
  State states_[M][kParts];
  W added_first_[M];  // of an adjoint: the gradient of the state
  WalkGradient<D> gradients_[M][kParts];
};

}  // namespace ema_ext::cpu::EMA_EXT_LEVEL
