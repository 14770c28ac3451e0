// What one stretch of a row hands to the next, and the associative laws by which stretches combine.
//
// Plain data shared by all levels; everything here is inlined into the level that uses it.
#pragma once

namespace ema_ext::cpu {

#define EMA_EXT_LAW inline __attribute__((always_inline))

// A product as a value of its own: without this the compiler may fuse it into a sum that it enters,
// in one place and not in another, and results would depend on the number of threads or of rows, or
// on the direction of time.
template <class Number>  // or a vector of them
EMA_EXT_LAW Number rounded(Number product) {
  asm("" : "+x"(product));
  return product;
}

// What the past contributes to the next sample, and the rounding error of its sum (Kahan 1965).
struct Carry {
  double value = 0;
  double error = 0;

  // Over samples that contribute `aggregate` to the sample after them, and decay what came before
  // them by `decay`, of which drop = 1 - decay. By differences where the decay is slow, so that it
  // enters by its small complement; where it is fast they would cancel.
  EMA_EXT_LAW void advance(double aggregate, double decay, double drop) {
    if (drop > 0.5) {
      value = decay * value + aggregate;
      error = 0;
      return;
    }
    const double change = (aggregate - drop * value) + error;
    const double next = value + change;
    error = change - (next - value);
    value = next;
  }
};

// The gradient to alpha of a stretch of samples. With lambda the adjoint of y and r[n] = x[n] -
// y[n-1], it is the sum of lambda[n] * r[n]. The backward scan knows lambda, but of y only what its
// own stretch contributes; the past enters linearly, by one number. Samples are measured from one
// of their own (reference), so that what is summed is of the size of r and not of x.
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

struct SegmentEnd {
  double last = 0;  // the last sample, not yet rounded to storage
  Carry aggregate;  // the segment scanned from zero: its carry into the next one
  AlphaSums alpha;  // of kEmaBackward, in units of alpha * lambda

  EMA_EXT_LAW void append(const SegmentEnd& next) {
    last = next.last;
    alpha.prepend(next.alpha);
  }
};

}  // namespace ema_ext::cpu
