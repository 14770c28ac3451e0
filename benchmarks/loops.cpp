// Sequential loops, for benchmarks only: the plain one in float32 that kernels are measured
// against, and the exact one. loops.py compiles and calls them.

#include <cmath>
#include <cstdint>

using Exact = __float128;  // 113 bits: wrong by less than 1e-25 at alpha = 1e-5

extern "C" {

// y[n] = c y[n-1] + a x[n], y[0] = x[0], every number in float32.
void ema_float32(const float* x, float* y, int64_t length, double alpha) {
  const float a = static_cast<float>(alpha), c = static_cast<float>(1 - alpha);
  float state = length > 0 ? x[0] : 0;
  for (int64_t n = 0; n < length; ++n) {
    if (n > 0) state = c * state + a * x[n];
    y[n] = state;
  }
}

// The gradient of sum g[n] y[n] to alpha, every number in float32.
float ema_float32_grad_alpha(const float* g, const float* x, const float* y, int64_t length,
                             double alpha) {
  const float c = static_cast<float>(1 - alpha);
  float adjoint = 0, sum = 0;
  for (int64_t n = length - 1; n > 0; --n) {
    adjoint = g[n] + c * adjoint;
    sum += adjoint * (x[n] - y[n - 1]);
  }
  return sum;
}

// y = ema(x), exact, and size = ema(|x|), which measures errors only.
void ema_exact(const double* x, long double* y, double* size, int64_t length, double alpha) {
  const Exact a = alpha;
  Exact state = length > 0 ? x[0] : 0;
  long double total = std::fabs(static_cast<double>(state));
  for (int64_t n = 0; n < length; ++n) {
    if (n > 0) {
      state += a * (x[n] - state);
      total += alpha * (std::fabs(x[n]) - total);
    }
    y[n] = static_cast<long double>(state);
    size[n] = static_cast<double>(total);
  }
}

// The gradient of sum g[n] y[n] to alpha, and the sum of the |terms|, into result[0] and result[1].
void ema_exact_grad_alpha(const double* g, const double* x, const long double* y, int64_t length,
                          double alpha, long double* result) {
  const Exact a = alpha;
  Exact adjoint = 0, sum = 0;
  long double size = 0;
  for (int64_t n = length - 1; n > 0; --n) {
    adjoint = g[n] + (adjoint - a * adjoint);
    const Exact term = adjoint * (x[n] - static_cast<Exact>(y[n - 1]));
    sum += term;
    size += std::fabs(static_cast<long double>(term));
  }
  result[0] = static_cast<long double>(sum);
  result[1] = size;
}

}  // extern "C"
