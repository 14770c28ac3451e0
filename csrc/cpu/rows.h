// The scan of whole rows by tiles: rows that are contiguous in time directly, all others chunk by
// chunk through a buffer in L1. Long rows are cut into segments (tuning.h), whose carries are
// folded in order; one thread does the same arithmetic as many.
#pragma once

#include "cpu/segment.h"
#include "cpu/walk.h"

namespace ema_ext::cpu::EMA_EXT_LEVEL {

// PairCoefficients where they serve, else nothing.
template <class Storage, bool = Storage::kDirect>
struct ForPairs {
  PairCoefficients k;
  ForPairs(const TileCoefficients<float>& tile, double in) : k(tile, in) {}
  const PairCoefficients* get() const { return &k; }
};
template <class Storage>
struct ForPairs<Storage, true> {
  ForPairs(const TileCoefficients<typename Storage::Acc>&, double) {}
  const PairCoefficients* get() const { return nullptr; }
};

// A row's constants.
template <class Storage>
struct RowScan {
  using T = typename Storage::Acc;
  using Sample = typename Storage::Sample;
  static constexpr int64_t kT = kTile<T>;
  static_assert(kChunkSamples % kT == 0 && kSegmentSamples % kChunkSamples == 0);

  const Problem& problem;
  const double coefficient;
  const Decay decay;
  const bool fits;
  const TileCoefficients<T> k;
  const ForPairs<Storage> pairs;
  const double segment_decay, segment_drop;

  RowScan(const Problem& problem, double coefficient)
      : problem(problem),
        coefficient(coefficient),
        decay(problem.op == Op::kLinearRecurrence ? Decay::from_ratio(coefficient)
                                                  : Decay::from_alpha(coefficient)),
        fits(TileCoefficients<T>::fit(decay) &&
             (problem.op != Op::kEmaBackward || scaled_adjoint(coefficient))),
        k(decay, problem.op == Op::kLinearRecurrence ? 1 : coefficient,
          problem.grad_coefficient.data != nullptr),
        pairs(k, problem.op == Op::kLinearRecurrence ? 1 : coefficient),
        segment_decay(segments(problem) > 1 ? decay.power(kSegmentSamples) : 0),
        segment_drop(segments(problem) > 1 ? decay.power_complement(kSegmentSamples) : 0) {}

  Carry first_carry(const Row<Storage>& row) const {
    return {rounded(row.start * (problem.op == Op::kEmaBackward ? coefficient : decay.ratio)), 0};
  }

  // The carry into the segment after the one with this aggregate.
  Carry next_carry(Carry carry, const Carry& aggregate) const {
    carry.error += aggregate.error;
    carry.advance(aggregate.value, segment_decay, segment_drop);
    return carry;
  }

  // Scans one segment of a row. Without kWrite only the aggregate is found.
  template <bool kWrite>
  SegmentEnd segment(const Row<Storage>& row, int64_t index, const Carry& carry) const {
    const int64_t begin = index * kSegmentSamples;
    const bool last = index + 1 == segments(problem);
    const int64_t n = last ? problem.length - begin : kSegmentSamples;
    return Segment<Storage, kWrite>(problem, k, pairs.get(), row, begin, carry).run(n);
  }

  // Makes streamed stores visible to other threads; once per call, not per row.
  void settle_stores() const {
    if (streams_stores(problem)) _mm_sfence();
  }

  // Scans a row from end to end.
  RowEnd scan(const Row<Storage>& row, const RowOffsets& at) const {
    if (!fits || problem.length < kTiledRow) return walk_row<Storage>(problem, at);
    Carry carry = first_carry(row);
    SegmentEnd whole = segment<true>(row, 0, carry);
    Carry aggregate = whole.aggregate;
    for (int64_t i = 1; i < segments(problem); ++i) {
      carry = next_carry(carry, aggregate);
      const SegmentEnd end = segment<true>(row, i, carry);
      aggregate = end.aggregate;
      whole.append(end);
    }
    return finish(row, at, whole);
  }

  // The row's first or last sample and what it hands on, after its segments have been scanned.
  RowEnd finish(const Row<Storage>& row, const RowOffsets& at, const SegmentEnd& end) const {
    // A non-finite sample reaches the row's last one, here as in the plain loop, but in the tiles
    // an infinity may turn into NaN.
    if (!finite(end.last)) return walk_row<Storage>(problem, at, /*only_nonfinite=*/true);
    if (problem.op != Op::kEmaBackward) {
      return {end.last, 0};
    }
    const double lambda = end.last / coefficient;
    if (!problem.has_initial_state)
      row.y[(problem.length - 1) * problem.y.time_stride] = Storage::put(static_cast<T>(lambda));
    return {decay.ratio * lambda, end.alpha.gradient(row.forward_start) / coefficient};
  }
};

// Rows [begin, end), each scanned from end to end.
template <class Storage>
void scan_rows(const Problem& problem, int64_t begin, int64_t end) {
  RowCursor cursor(problem, begin);
  Row<Storage> row(problem, cursor.at());
  for (;;) {
    // Rows with the same coefficient follow one another (see cpu/strategy.h).
    const double coefficient = row.coefficient;
    const RowScan<Storage> scan(problem, coefficient);
    do {
      write_end(problem, cursor.at(), scan.scan(row, cursor.at()));
      if (++begin == end) return scan.settle_stores();
      cursor.advance();
      row = Row<Storage>(problem, cursor.at());
    } while (row.coefficient == coefficient);
  }
}

}  // namespace ema_ext::cpu::EMA_EXT_LEVEL
