// The sum over broadcast axes (sum.h): blocks of neighbouring results, each over a chunk of terms.
#pragma once

#include "cpu/storage.h"
#include "cpu/sum_blocks.h"

namespace ema_ext::cpu::EMA_EXT_LEVEL {

// The offsets of the index'th element of `axes`, innermost axis last.
EMA_EXT_INLINE void locate(const Axes& axes, int64_t index, int64_t* from, int64_t* to) {
  *from = *to = 0;
  for (int d = axes.ndim - 1; d >= 0; --d) {
    const int64_t at = index % axes.sizes[d];
    index /= axes.sizes[d];
    *from += at * axes.from[d];
    *to += at * axes.to[d];
  }
}

// Adds to sums[i], i < count, the `terms` terms that lie `step` apart from `from + i * stride` on.
template <class Storage>
EMA_EXT_INLINE void add_run(const typename Storage::Sample* from, int64_t count, int64_t stride,
                            int64_t terms, int64_t step, double* sums) {
  constexpr int64_t kChains = 8;  // sums in flight, where one result alone would wait for each
  if (count < kChains) {
    for (int64_t i = 0; i < count; ++i) {
      double chains[kChains] = {};
      int64_t j = 0;
      for (; j + kChains <= terms; j += kChains)
        for (int64_t k = 0; k < kChains; ++k)
          chains[k] += Storage::get(from[i * stride + (j + k) * step]);
      for (int64_t k = 0; j < terms; ++j, ++k)
        chains[k] += Storage::get(from[i * stride + j * step]);
      for (int64_t k = 0; k < kChains; ++k) sums[i] += chains[k];
    }
    return;
  }
  for (int64_t j = 0; j < terms; ++j, from += step)
    for (int64_t i = 0; i < count; ++i) sums[i] += Storage::get(from[i * stride]);
}

// Items [begin, end), each a chunk of the terms of a block of results: partials[chunk][result].
template <class Storage>
void sum_terms(const Sum& sum, int64_t begin, int64_t end, double* partials) {
  const Axes &kept = sum.kept, &summed = sum.summed;
  const int64_t width = kept.ndim > 0 ? kept.sizes[kept.ndim - 1] : 1;
  const int64_t stride = kept.ndim > 0 ? kept.from[kept.ndim - 1] : 0;
  const int64_t run = summed.ndim > 0 ? summed.sizes[summed.ndim - 1] : 1;
  const int64_t step = summed.ndim > 0 ? summed.from[summed.ndim - 1] : 0;
  const int64_t blocks = sum_blocks(sum), per_row = (width + kSumResults - 1) / kSumResults;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t chunk = item / blocks, block = item % blocks;
    const int64_t first = block % per_row * kSumResults;
    const int64_t result = block / per_row * width + first;
    const int64_t count = width - first < kSumResults ? width - first : kSumResults;
    double sums[kSumResults] = {};
    int64_t from, other;
    locate(kept, result, &from, &other);
    int64_t term = chunk * kSumTerms;
    const int64_t left = summed.elements - term,
                  last = term + (left < kSumTerms ? left : kSumTerms);
    while (term < last) {
      int64_t offset;
      locate(summed, term, &offset, &other);
      int64_t terms = run - term % run;
      if (terms > last - term) terms = last - term;
      add_run<Storage>(static_cast<const typename Storage::Sample*>(sum.from) + from + offset,
                       count, stride, terms, step, sums);
      term += terms;
    }
    std::memcpy(partials + chunk * kept.elements + result, sums, count * sizeof(double));
  }
}

// Results [begin, end): their chunks added in order and stored. Storage is that of the results.
template <class Storage>
void finish_sums(const Sum& sum, int64_t begin, int64_t end, const double* partials) {
  const int64_t chunks = sum_chunks(sum);
  for (int64_t result = begin; result < end; ++result) {
    double total = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      total += partials[chunk * sum.kept.elements + result];
    int64_t other, to;
    locate(sum.kept, result, &other, &to);
    static_cast<typename Storage::Sample*>(sum.to)[to] =
        Storage::put(static_cast<typename Storage::Acc>(total));
  }
}

}  // namespace ema_ext::cpu::EMA_EXT_LEVEL
