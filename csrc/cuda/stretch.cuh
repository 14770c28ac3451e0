// The consecutive samples of a coefficient and of x that a thread has of a tile: their map, and the
// walk along them from the y before.
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

  // Of a group's values.
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

// Samples in float32, in groups of four, where the coefficients are exact: of what varies in time,
// halves. Of a group the ratio is float64 and the drive float32, as what follows from zero; groups
// are joined in float64, and from the y before each group, rounded once, its samples are walked. So
// however long the row is, a term is rounded by its own group, and by that in which it is read.
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
        double ratio = kept<kAverage>(static_cast<double>(c[g * kGroup]), 1.0);
#pragma unroll
        for (int i = g * kGroup + 1; i < (g + 1) * kGroup; ++i)
          ratio = kept<kAverage>(static_cast<double>(c[i]), ratio);
        ratio_[g] = ratio;
      }
    }
    Map map;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      float drive = -0.0f;
#pragma unroll
      for (int i = g * kGroup; i < (g + 1) * kGroup; ++i) {
        const bool first = i == g * kGroup;
        if constexpr (kAdjoint) {
          drive = kept<kAverage>(c[i], first ? x[i] : drive + x[i]);
          continue;
        }
        if constexpr (kAverage) {
          x[i] *= c[i];
          c[i] = 1 - c[i];
        }
        drive = first ? x[i] : fma(c[i], drive, x[i]);
      }
      drive_[g] = drive;
      map = Map{ratio_[g], drive}.after(map);
    }
    return map;
  }

  __device__ __forceinline__ double walk(double before, Acc* out) const {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      auto y = static_cast<float>(before);
#pragma unroll
      for (int i = g * kGroup; i < (g + 1) * kGroup; ++i) out[i] = y = fma(c[i], y, x[i]);
      before = ratio_[g] * before + drive_[g];
    }
    return before;
  }

  template <bool kAverage>
  __device__ __forceinline__ double walk_adjoint(double before, Acc* out) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      auto mu = static_cast<float>(before);
#pragma unroll
      for (int i = g * kGroup; i < (g + 1) * kGroup; ++i) {
        x[i] += mu;
        mu = kept<kAverage>(c[i], x[i]);
        out[i] = kAverage ? c[i] * x[i] : x[i];
      }
      before = ratio_[g] * before + drive_[g];
    }
    return before;
  }

 private:
  double ratio_[kGroups];
  float drive_[kGroups];
  bool filled_ = false;
};

}  // namespace ema_ext::cuda
