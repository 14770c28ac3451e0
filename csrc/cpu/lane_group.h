// What rows side by side do at each step, and at each group of steps.
#pragma once

#include "cpu/walk.h"

namespace ema_ext::cpu::EMA_EXT_LEVEL {

// A vector of kLanes<T> samples in float64.
template <class T>
struct Wide {
  static constexpr int kN = kLanes<T>, kParts = static_cast<int>(sizeof(double) / sizeof(T));
  using D = Vector<double, kN / kParts>;
  D part[kParts];

  static EMA_EXT_INLINE Wide of(Vector<T, kN> v) {
    if constexpr (kParts == 1)
      return {{v}};
    else
      return {{widen<kN / 2>(half<0, T, kN>(v)), widen<kN / 2>(half<1, T, kN>(v))}};
  }
  EMA_EXT_INLINE Vector<T, kN> narrowed() const {
    if constexpr (kParts == 1)
      return part[0];
    else
      return join<T, kN / 2>(narrow<T, kN / 2>(part[0]), narrow<T, kN / 2>(part[1]));
  }
};

// Averages of float walk kGroup samples at a time: those scanned from zero in float, then the state
// before them added by its powers. Only the state itself runs in float64, once a group.
constexpr int kGroup = 4;

// Rows of fewer samples stay in float64 throughout: in so few, all of y may be small beside the
// terms that cancel in it, whose roundings then are not small beside y.
constexpr int64_t kGroupedRow = 2 * kGroup;

struct LaneGroup {
  using V = Vector<float, kLanes<float>>;
  V in;
  V powers[kGroup - 1];        // c, c^2, ...
  Wide<float> states[kGroup];  // the same, for the state

  // Whether the powers serve: none may leave float, where it would forget an infinity.
  static bool fit(Op op, double coefficient) {
    const double ratio = 1 - coefficient;
    return op != Op::kLinearRecurrence && (ratio == 0 || (ratio >= 0x1p-30 && ratio <= 1)) &&
           (op != Op::kEmaBackward || scaled_adjoint(coefficient));
  }

  LaneGroup() = default;
  explicit LaneGroup(const WalkFactors<Wide<float>::D>* factors) {
    Wide<float> drive, power;
    for (int p = 0; p < Wide<float>::kParts; ++p) {
      drive.part[p] = factors[p].in;
      power.part[p] = factors[p].ratio;
    }
    in = drive.narrowed();
    for (int i = 0; i < kGroup; ++i) {
      states[i] = power;
      if (i + 1 < kGroup) powers[i] = power.narrowed();
      for (int p = 0; p < Wide<float>::kParts; ++p) power.part[p] *= factors[p].ratio;
    }
  }

  // y of the x of K samples, and the state after them; `before` is the state in float, which is the
  // last y.
  template <int K>
  EMA_EXT_INLINE void walk(V* samples, Wide<float>& state, V& before) const {
    samples[0] = rounded(in * samples[0]);
#pragma GCC unroll 4
    for (int i = 1; i < K; ++i) samples[i] = powers[0] * samples[i - 1] + rounded(in * samples[i]);
    const auto last = Wide<float>::of(samples[K - 1]);
#pragma GCC unroll 2
    for (int p = 0; p < Wide<float>::kParts; ++p)
      state.part[p] = states[K - 1].part[p] * state.part[p] + last.part[p];
#pragma GCC unroll 4
    for (int i = 0; i + 1 < K; ++i) samples[i] += powers[i] * before;
    before = samples[K - 1] = state.narrowed();
  }
};

// What a block's rows do at each step.
template <class T, int M>
struct LaneCoefficients {
  using W = Wide<T>;
  using Factors = WalkFactors<typename W::D>;
  static constexpr int kN = W::kN;

  bool alike;             // all rows have the same coefficient: the first vector stands for all
  bool grouped;           // walked by groups ...
  bool apart = false;     // ... but for some,
  bool is_apart[kN * M];  // these: what a row does must not follow from those beside it
  Factors factors[M][W::kParts];
  LaneGroup groups[sizeof(T) == 4 ? M : 1];

  // Of the `rows` rows from `offset` on, `stride` apart.
  LaneCoefficients(const Problem& problem, int64_t offset, int64_t stride, int rows)
      : alike(stride == 0), grouped(false) {
    alignas(64) double coefficient[kN * M];
    const int vectors = alike ? 1 : M;
    for (int i = 0; i < kN * vectors; ++i) {  // lanes without a row do as the last one
      if (i > 0 && (alike || i >= rows))
        coefficient[i] = coefficient[i - 1];
      else if (problem.coefficient.data == nullptr)
        coefficient[i] = problem.value;
      else
        coefficient[i] = read(problem.coefficient, offset + i * stride);
    }
    if (sizeof(T) == 4 && problem.length >= kGroupedRow && problem.grad_coefficient.data == nullptr)
      choose_groups(problem.op, coefficient, rows);
    for (int m = 0; m < vectors; ++m) {
      constexpr int kD = kN / W::kParts;
      for (int p = 0; p < W::kParts; ++p)
        factors[m][p] = Factors(problem.op, load<typename W::D>(coefficient + m * kN + p * kD));
      if constexpr (sizeof(T) == 4)
        if (grouped) groups[m] = LaneGroup(factors[m]);
    }
  }

  EMA_EXT_INLINE const Factors* of(int m) const { return factors[alike ? 0 : m]; }
  EMA_EXT_INLINE const LaneGroup& group(int m) const { return groups[alike ? 0 : m]; }

 private:
  void choose_groups(Op op, double* coefficient, int rows) {
    const int count = alike ? 1 : rows;
    for (int i = 0; i < count; ++i) {
      is_apart[i] = !LaneGroup::fit(op, coefficient[i]);
      (is_apart[i] ? apart : grouped) = true;
    }
    if (!grouped) apart = false;
    for (int i = 0; i < count && apart; ++i)
      if (is_apart[i]) coefficient[i] = 0.5;  // which fits; the row is walked once more
  }
};

}  // namespace ema_ext::cpu::EMA_EXT_LEVEL
