// Powers of a coefficient that is constant in time; as csrc/decay.h, on the device.
#pragma once

#include <cmath>

#include "cuda/storage.cuh"

namespace ema_ext::cuda {

// c^k in float64 is right to float32's rounding by products alone, up to k = 2^29; float64 itself
// takes it from the logarithm, as near 1 the float64 nearest to c has lost the low bits of 1 - c.
template <class Acc>
struct Power;

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
    // Where c is small its logarithm would be known to fewer digits than c itself.
    if (sizeof(Acc) == 8 && (k > 4 || fabs(ratio_) > 0.5)) {
      const double size = exp(static_cast<double>(k) * log_);
      return ratio_ < 0 && (k & 1) != 0 ? -size : size;
    }
    double result = 1, square = ratio_;
    for (; k > 0; k >>= 1, square *= square)
      if ((k & 1) != 0) result *= square;
    return result;
  }

  // The root of |c^k|, with the sign of c^k; of float64.
  __device__ double root_power(int64_t k) const {
    if (k == 0) return 1;
    const double size = exp(0.5 * static_cast<double>(k) * log_);
    return ratio_ < 0 && (k & 1) != 0 ? -size : size;
  }

  // 1 - c^k, exact where c^k is near 1.
  __device__ double drop(int64_t k) const {
    if constexpr (sizeof(Acc) == 8)
      if (ratio_ > 0) return -expm1(static_cast<double>(k) * log_);
    return 1 - power(k);
  }

  // Over k samples.
  __device__ Power<Acc> over(int64_t k) const { return Power<Acc>(*this, k); }

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

// What a stretch of samples does to the state before it, c^k * state, joined to what it ends at
// when scanned from zero. An infinite state stays one though the power underflows, as step by step,
// unless c is 0.
template <>
struct Power<float> {
  double value;

  Power() = default;
  __device__ Power(const Decay<float>& decay, int64_t k) : value(decay.power(k)) {
    // The smallest adds nothing to a float, whatever it carries.
    constexpr double kLeast = 1e-300;
    if (decay.ratio() != 0 && fabs(value) < kLeast) value = copysign(kLeast, value);
  }
  __device__ __forceinline__ double join(double aggregate, double state) const {
    return fma(value, state, aggregate);
  }
};

// By differences where the decay is slow, so that it enters by its small complement. Otherwise by
// its root, twice: a power that underflows may meet a state that is large enough to be seen.
template <>
struct Power<double> {
  double root;  // of the sign of the power
  double drop;

  Power() = default;
  __device__ Power(const Decay<double>& decay, int64_t k) : drop(decay.drop(k)) {
    constexpr double kLeast = 5e-324;
    root = decay.root_power(k);
    if (decay.ratio() != 0 && fabs(root) < kLeast) root = copysign(kLeast, root);
  }
  __device__ __forceinline__ double join(double aggregate, double state) const {
    if (drop <= 0.5 && finite(state)) return state + fma(-drop, state, aggregate);
    return fma(fabs(root), root * state, aggregate);
  }
};

// The state handed from tile to tile, in more than the precision of Acc: float64 for float32; for
// float64 with the rounding error of the sum (Kahan 1965), where the decay is slow.
template <class Acc>
struct State {
  double value;
  double error;

  __device__ __forceinline__ void advance(double aggregate, const Power<Acc>& power) {
    if constexpr (sizeof(Acc) == 8) {
      if (power.drop <= 0.5 && finite(value)) {
        const double change = fma(-power.drop, value, aggregate) + error;
        const double next = value + change;
        error = finite(next) ? change - (next - value) : 0;
        value = next;
        return;
      }
      error = 0;
    }
    value = power.join(aggregate, value);
  }
};

}  // namespace ema_ext::cuda
