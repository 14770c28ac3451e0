// Powers of a decay ratio without the rounding of the ratio itself.
//
// Near 1 the float64 nearest to c = 1 - alpha has lost the low bits of alpha, so that c^k is off by
// k/2 units in the last place of 1. exp(k * log1p(-alpha)) is not; see Goldberg (1991), theorem 4.
#pragma once

namespace ema_ext {

// A ratio c in [0, 1], kept as c and 1 - c, both exact to float64.
struct Decay {
  double ratio;       // c
  double complement;  // 1 - c

  static Decay from_alpha(double alpha);
  static Decay from_ratio(double ratio);

  // c^k, k >= 0; 0^0 is 1.
  double power(double k) const;

  // 1 - c^k, k >= 1, exact where c^k is near 1.
  double power_complement(double k) const;

 private:
  double log() const;
};

}  // namespace ema_ext
