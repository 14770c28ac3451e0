// Powers of a coefficient that is constant in time; as csrc/decay.h, on the device.
#pragma once

#include <cmath>

#include "cuda/storage.cuh"

namespace ema_ext::cuda {

// c^k in float64 is right to float32's rounding by products alone, up to k = 2^29; float64 itself
// takes it from the logarithm, as near 1 the float64 nearest to c has lost the low bits of 1 - c.
template <class Acc>
class Decay {
 public:
  __device__ Decay(double ratio, double complement) : ratio_(ratio), complement_(complement) {
    if constexpr (sizeof(Acc) == 8)
      log_ = complement > -0.5 && complement < 0.5 ? log1p(-complement) : log(fabs(ratio));
  }

  // c and 1 - c.
  __device__ double ratio() const { return ratio_; }
  __device__ double complement() const { return complement_; }

  // c^k, k >= 0; 0^0 is 1.
  __device__ double power(int64_t k) const {
    if constexpr (sizeof(Acc) == 8) {
      if (k == 0) return 1;
      const double size = exp(static_cast<double>(k) * log_);
      return ratio_ < 0 && (k & 1) != 0 ? -size : size;
    }
    double result = 1, square = ratio_;
    for (; k > 0; k >>= 1, square *= square)
      if ((k & 1) != 0) result *= square;
    return result;
  }

  // 1 - c^k, exact where c^k is near 1.
  __device__ double drop(int64_t k) const {
    if constexpr (sizeof(Acc) == 8)
      if (ratio_ > 0) return -expm1(static_cast<double>(k) * log_);
    return 1 - power(k);
  }

  // Whether powers of this coefficient serve at all. The fourth must be a normal number of Acc;
  // what is steeper, or grows, is walked sample by sample (walk.cuh).
  __device__ bool fits() const {
    constexpr double kSmallest = sizeof(Acc) == 8 ? 0x1p-240 : 0x1p-30;
    const double size = fabs(ratio_);
    return ratio_ == 0 || (size >= kSmallest && size <= 1);
  }

 private:
  double ratio_, complement_, log_;
};

// The state handed from tile to tile, in more than the precision of Acc: float64 for float32; for
// float64 by differences where the decay is slow, with the rounding error of the sum (Kahan 1965).
template <class Acc>
struct State {
  double value = 0;
  double error = 0;

  // Over a tile that ends at `aggregate` when scanned from zero and leaves `carried` of the state
  // before it, which drops by the share `drop`.
  __device__ void advance(double aggregate, double carried, double drop) {
    if (sizeof(Acc) == 4 || drop > 0.5 || !finite(value)) {
      value = aggregate + carried;
      error = 0;
      return;
    }
    const double change = (aggregate - drop * value) + error;
    const double next = value + change;
    error = finite(next) ? change - (next - value) : 0;
    value = next;
  }
};

}  // namespace ema_ext::cuda
