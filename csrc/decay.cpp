// See decay.h.

#include "decay.h"

#include <cmath>

namespace ema_ext {

Decay Decay::from_alpha(double alpha) { return {1.0 - alpha, alpha}; }

Decay Decay::from_ratio(double ratio) { return {ratio, 1.0 - ratio}; }

double Decay::log() const { return complement < 0.5 ? std::log1p(-complement) : std::log(ratio); }

double Decay::power(double k) const { return k == 0 ? 1.0 : std::exp(k * log()); }

double Decay::power_complement(double k) const { return -std::expm1(k * log()); }

}  // namespace ema_ext
