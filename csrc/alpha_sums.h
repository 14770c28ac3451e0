// The gradient to alpha of a stretch of samples, and the associative law by which stretches join.
//
// Plain data shared by all backends and levels; everything here is inlined where it is used.
#pragma once

#ifdef __CUDACC__
#define EMA_EXT_LAW __host__ __device__ __forceinline__
#else
#define EMA_EXT_LAW inline __attribute__((always_inline))
#endif

namespace ema_ext {

// With lambda the adjoint of y and r[n] = x[n] - y[n-1], the gradient is the sum of lambda[n] *
// r[n]. The backward scan knows lambda, but of y only what its own stretch contributes; the past
// enters linearly, by one number. Samples are measured from one of their own (reference), so that
// what is summed is of the size of r and not of x.
//
// "Past" is meant in the forward's time; the backward scan meets stretches from the last one on.
struct AlphaSums {
  double reference = 0;
  double share = 0;      // the gradient if y before the stretch were the reference
  double weight = 0;     // sum of lambda[i] * c^i
  double aggregate = 0;  // y after the stretch less the reference, in that case
  double decay = 1;      // c^length

  // Puts the stretch `past` before this one.
  EMA_EXT_LAW void prepend(const AlphaSums& past) {
    const double gap = past.reference - reference;
    share += past.share - (past.aggregate + gap) * weight;
    aggregate += decay * (past.aggregate + gap) - gap;
    weight = past.weight + past.decay * weight;
    decay *= past.decay;
    reference = past.reference;
  }

  EMA_EXT_LAW double gradient(double y_before) const {
    return share - (y_before - reference) * weight;
  }
};

}  // namespace ema_ext
