// y[n] = a[n] * y[n-1] + b[n] over one row of float64 in L1, without waiting for each y in turn.
//
// (a, b) stands for the map y -> a y + b, and maps compose: (a2, b2) after (a1, b1) is
// (a2 a1, a2 b1 + b2). The row is cut into as many stretches as a vector has lanes. The lanes walk
// along them side by side and compose their maps from the first sample on; the y before each
// stretch follows from the whole stretches before it, and brings in the past by one more multiply
// and add. After Hillis and Steele (1986) and Blelloch (1990).
#pragma once

#include "cpu/affine.h"
#include "cpu/row.h"

namespace ema_ext::cpu::EMA_EXT_LEVEL {

template <int K, int... I>
EMA_EXT_INLINE void exchange(Vector<double, sizeof...(I)>& low, Vector<double, sizeof...(I)>& high,
                             Indices<I...>) {
  constexpr int kN = sizeof...(I);
  const auto first = low, second = high;
  low = __builtin_shufflevector(first, second, ((I & K) != 0 ? kN + I - K : I)...);
  high = __builtin_shufflevector(first, second, ((I & K) != 0 ? kN + I : I + K)...);
}

// Transposes kN vectors of kN lanes, by blocks of K, 2 K, ... lanes.
template <int kN, int K = 1>
EMA_EXT_INLINE void transpose(Vector<double, kN>* rows) {
  if constexpr (K < kN) {
#pragma GCC unroll 8
    for (int i = 0; i < kN; ++i)
      if ((i & K) == 0) exchange<K>(rows[i], rows[i + K], typename MakeIndices<kN>::type{});
    transpose<kN, 2 * K>(rows);
  }
}

template <int kMost>  // samples at a time
class PairScan {
 public:
  // From y[-1] = carry; returns the last y. count <= kMost. `so_far` is the map of what came before
  // and becomes that of all, but for a last part shorter than kN^2; NaN if it cannot be known.
  static double run(const double* a, const double* b, int64_t count, double carry, double* y,
                    Affine& so_far) {
    if (!finite(carry)) {
      so_far.ratio = __builtin_nan("");
      return one_by_one(a, b, count, carry, y);
    }
    const int64_t whole = count - count % (kN * kN);
    double last = whole > 0 ? stretches<true>(a, b, whole / kN, carry, y, so_far) : carry;
    last = one_by_one(a + whole, b + whole, count - whole, last, y + whole);
    // What is not finite stays so, whatever the coefficients. But a map may overflow where no y
    // does, and a y within a stretch whose map is finite.
    return finite(last) ? last : one_by_one(a, b, count, carry, y);
  }

  // The map alone, for whole chunks: count is a multiple of kN^2.
  static void compose(const double* a, const double* b, int64_t count, Affine& so_far) {
    stretches<false>(a, b, count / kN, 0, nullptr, so_far);
  }

 private:
  static constexpr int kN = kLanes<double>;
  using D = Vector<double, kN>;

  static double one_by_one(const double* a, const double* b, int64_t count, double y, double* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = y = a[i] * y + b[i];
    return y;
  }

  // kN stretches of `length` samples each, a multiple of kN. Returns NaN if any y is not finite.
  template <bool kWrite>
  static double stretches(const double* a, const double* b, int64_t length, double carry, double* y,
                          Affine& so_far) {
    alignas(64) double ratios[kMost], drives[kMost];  // the maps, sample by sample of all lanes
    D ratio = D{} + 1.0, drive{};
    for (int64_t i = 0; i < length; i += kN) {
      D p[kN], q[kN];
      get(a + i, length, p);
      get(b + i, length, q);
#pragma GCC unroll 8
      for (int k = 0; k < kN; ++k) {
        drive = p[k] * drive + q[k];
        ratio *= p[k];
        if (kWrite) store(ratios + (i + k) * kN, ratio);
        if (kWrite) store(drives + (i + k) * kN, drive);
      }
    }
    for (int lane = 0; lane < kN; ++lane) {
      so_far.ratio *= ratio[lane];
      so_far.drive = ratio[lane] * so_far.drive + drive[lane];
    }
    if (!kWrite) return 0;
    D before{}, bad{};
    for (int lane = 0; lane < kN; ++lane) {
      before[lane] = carry;
      carry = ratio[lane] * carry + drive[lane];
    }
    for (int64_t i = 0; i < length; i += kN) {
      D p[kN];
#pragma GCC unroll 8
      for (int k = 0; k < kN; ++k)
        p[k] = load<D>(ratios + (i + k) * kN) * before + load<D>(drives + (i + k) * kN);
#pragma GCC unroll 8
      for (int k = 0; k < kN; ++k) bad += p[k] * 0.0;
      transpose<kN>(p);
#pragma GCC unroll 8
      for (int k = 0; k < kN; ++k) store(y + i + k * length, p[k]);
    }
    return carry + sum_lanes<double, kN>(bad);
  }

  // Lane by lane the next kN samples of its stretch.
  static EMA_EXT_INLINE void get(const double* from, int64_t length, D* to) {
#pragma GCC unroll 8
    for (int k = 0; k < kN; ++k) to[k] = load<D>(from + k * length);
    transpose<kN>(to);
  }
};

}  // namespace ema_ext::cpu::EMA_EXT_LEVEL
