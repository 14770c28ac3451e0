// How a sum over broadcast axes is shared among threads: by its sizes alone.
#pragma once

#include "sum.h"

namespace ema_ext::cpu {

// Neighbouring results that are summed together: their float64 sums stay in L1.
constexpr int64_t kSumResults = 256;

// Terms of one result that are summed at a stretch; the chunks' sums are then added in order.
constexpr int64_t kSumTerms = 8192;

inline __attribute__((always_inline)) int64_t sum_chunks(const Sum& sum) {
  return (sum.summed.elements + kSumTerms - 1) / kSumTerms;
}

// Blocks of results; none reaches over the end of the innermost axis.
inline __attribute__((always_inline)) int64_t sum_blocks(const Sum& sum) {
  if (sum.kept.ndim == 0) return 1;
  const int64_t width = sum.kept.sizes[sum.kept.ndim - 1];
  return width == 0 ? 0 : sum.kept.elements / width * ((width + kSumResults - 1) / kSumResults);
}

}  // namespace ema_ext::cpu
