// What one stretch of a row hands to the next, and the associative laws by which stretches combine.
//
// Plain data shared by all levels; everything here is inlined into the level that uses it.
#pragma once

#include "alpha_sums.h"

namespace ema_ext::cpu {

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
