// The consecutive samples of a coefficient and of x that a thread has of a tile: their map, and the
// walk along them from the y before. Two ways, of which each has kGroup, after as many samples of
// which a row may end, and a sum of as many values.
#pragma once

#include <type_traits>

#include "cuda/maps.cuh"

namespace ema_ext::cuda {

// What is kept of a value: all but the coefficient's share if that is an average's.
template <bool kAverage, class T>
__device__ __forceinline__ T kept(T coefficient, T value) {
  return kAverage ? fma(-coefficient, value, value) : coefficient * value;
}

// In float64 throughout. So what is rounded is a y, and never a product of coefficients.
template <class Acc, int kItems, bool kAdjoint>
struct WideStretch {
  using Real = double;
  static constexpr int kGroup = 1;
  Real c[kItems], x[kItems];

  static __device__ __forceinline__ double sum(const Real* values) { return *values; }

  // A constant coefficient, or one that leaves y as it is where has(i) says that no sample is.
  template <class F>
  __device__ __forceinline__ void fill(double coefficient, float neutral, const F& has) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) c[i] = has(i) ? coefficient : neutral;
  }

  // A forward's c and x become ratios and drives.
  template <bool kAverage>
  __device__ __forceinline__ Map compose() {
    Map map;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if constexpr (kAdjoint) {
        map.drive = kept<kAverage>(c[i], map.drive + x[i]);
        map.ratio = kept<kAverage>(c[i], map.ratio);
        continue;
      }
      if constexpr (kAverage) {
        x[i] *= c[i];
        c[i] = 1 - c[i];
      }
      map.drive = c[i] * map.drive + x[i];
      map.ratio *= c[i];
    }
    return map;
  }

  // From the y before to that after the samples, which is returned.
  __device__ __forceinline__ double walk(double y, Acc* out) const {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      y = c[i] * y + x[i];
      out[i] = static_cast<Acc>(y);
    }
    return y;
  }

  // The same of an adjoint, from the mu before; each x becomes lambda.
  template <bool kAverage>
  __device__ __forceinline__ double walk_adjoint(double mu, Acc* out) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      x[i] += mu;
      mu = kept<kAverage>(c[i], x[i]);
      out[i] = static_cast<Acc>(kAverage ? c[i] * x[i] : x[i]);
    }
    return mu;
  }
};

// Of halves, in float32 by groups of four. Coefficients are exact in float32, but for a constant
// one. Of each group the ratio is float64 and the drive, which is what follows from zero, float32.
// Groups are joined in float64, and from the y before a group, rounded once, its samples are
// walked. So however long the row is, a term meets the float32 of two groups: its own and that of
// the result. No ratio of four underflows in float64. The drive of bfloat16 near the end of its
// range may overflow where the walk does not: that group's map is then not finite.
template <class Acc, int kItems, bool kAdjoint>
struct GroupedStretch {
  using Real = float;
  static constexpr int kGroup = 4, kGroups = kItems / kGroup;
  Real c[kItems], x[kItems];

  static __device__ __forceinline__ double sum(const Real* values) {
    return (values[0] + values[1]) + (values[2] + values[3]);
  }

  template <class F>
  __device__ __forceinline__ void fill(double coefficient, float neutral, const F& has) {
    const double square = coefficient * coefficient, ratio = square * square;
#pragma unroll
    for (int i = 0; i < kItems; ++i) c[i] = has(i) ? static_cast<float>(coefficient) : neutral;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) ratio_[g] = has(g * kGroup) ? ratio : neutral;
    filled_ = true;
  }

  template <bool kAverage>
  __device__ __forceinline__ Map compose() {
    if (kAverage || !filled_) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        ratio_[g] = 1;
#pragma unroll
        for (int i = 0; i < kGroup; ++i)
          ratio_[g] = kept<kAverage, double>(c[g * kGroup + i], ratio_[g]);
      }
    }
    if constexpr (kAverage && !kAdjoint) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        x[i] *= c[i];
        c[i] = 1 - c[i];
      }
    }
    Map map;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int first = g * kGroup, last = first + kGroup - 1;
      drive_[g] = x[first];
#pragma unroll
      for (int i = first + 1; i <= last; ++i) drive_[g] = after<kAverage>(i, drive_[g]);
      if constexpr (kAdjoint) drive_[g] = kept<kAverage>(c[last], drive_[g]);
      map = Map{ratio_[g], drive_[g]}.after(map);
    }
    return map;
  }

  __device__ __forceinline__ double walk(double y, Acc* out) const {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      auto at = static_cast<float>(y);
#pragma unroll
      for (int i = g * kGroup; i < (g + 1) * kGroup; ++i) out[i] = at = after<false>(i, at);
      y = ratio_[g] * y + drive_[g];
    }
    return y;
  }

  template <bool kAverage>
  __device__ __forceinline__ double walk_adjoint(double mu, Acc* out) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int first = g * kGroup;
      x[first] += static_cast<float>(mu);
#pragma unroll
      for (int i = first + 1; i < first + kGroup; ++i) x[i] = after<kAverage>(i, x[i - 1]);
#pragma unroll
      for (int i = first; i < first + kGroup; ++i) out[i] = kAverage ? c[i] * x[i] : x[i];
      mu = ratio_[g] * mu + drive_[g];
    }
    return mu;
  }

 private:
  // The y after sample i from that before it, by a forward's ratios and drives; an adjoint's lambda
  // of sample i from that of the one before.
  template <bool kAverage>
  __device__ __forceinline__ float after(int i, float value) const {
    if constexpr (!kAdjoint) return fma(c[i], value, x[i]);
    return kAverage ? kept<kAverage>(c[i - 1], value) + x[i] : fma(c[i - 1], value, x[i]);
  }

  double ratio_[kGroups];
  float drive_[kGroups];
  bool filled_ = false;  // whether the coefficient is constant
};

}  // namespace ema_ext::cuda
