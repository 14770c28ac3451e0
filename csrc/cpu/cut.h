// Few long rows on several threads: the segments of all rows as items of their own.
//
// find_aggregates of the items that must be known beforehand, then scan_segments over all items and
// finish_rows over the rows give bit for bit what scan_rows gives (run_cut in ema_cpu.cpp).
#pragma once

#include "cpu/rows.h"

namespace ema_ext::cpu::EMA_EXT_LEVEL {

// Calls visit(scan, row, at, first item) for each of the rows [begin, end).
template <class Storage, class Visit>
EMA_EXT_INLINE void for_rows(const Problem& problem, int64_t begin, int64_t end, Visit visit) {
  RowCursor cursor(problem, begin);
  for (int64_t i = begin; i < end; ++i, cursor.advance()) {
    const Row<Storage> row(problem, cursor.at());
    visit(RowScan<Storage>(problem, row.coefficient), row, cursor.at(), i * segments(problem));
  }
}

// Calls visit(scan, row, first item, from, to) for each row that the tiles fit, with the row's
// share [from, to) of the items [begin, end).
template <class Storage, class Visit>
EMA_EXT_INLINE void for_items(const Problem& problem, int64_t begin, int64_t end, Visit visit) {
  const int64_t count = segments(problem);
  for_rows<Storage>(problem, begin / count, (end + count - 1) / count,
                    [&](const auto& scan, const auto& row, const auto&, int64_t first) {
                      if (!scan.fits) return;
                      visit(scan, row, first, begin > first ? begin : first,
                            end < first + count ? end : first + count);
                      scan.settle_stores();
                    });
}

// Of the items [begin, end), all of one row.
template <class Storage>
void find_aggregates(const Problem& problem, int64_t begin, int64_t end, Carry* aggregates) {
  for_items<Storage>(
      problem, begin, end,
      [&](const auto& scan, const auto& row, int64_t first, int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i)
          aggregates[i] = scan.template segment<false>(row, i - first, Carry{}).aggregate;
      });
}

// `aggregates` are read of the items before `begin` in its row.
template <class Storage>
void scan_segments(const Problem& problem, int64_t begin, int64_t end, const Carry* aggregates,
                   SegmentEnd* ends) {
  for_items<Storage>(
      problem, begin, end,
      [&](const auto& scan, const auto& row, int64_t first, int64_t from, int64_t to) {
        Carry carry = scan.first_carry(row);
        for (int64_t i = first; i < from; ++i) carry = scan.next_carry(carry, aggregates[i]);
        for (int64_t i = from; i < to; ++i) {
          ends[i] = scan.template segment<true>(row, i - first, carry);
          carry = scan.next_carry(carry, ends[i].aggregate);
        }
      });
}

template <class Storage>
void finish_rows(const Problem& problem, int64_t begin, int64_t end, const SegmentEnd* ends) {
  for_rows<Storage>(problem, begin, end,
                    [&](const auto& scan, const auto& row, const RowOffsets& at, int64_t first) {
                      if (!scan.fits) return write_end(problem, at, walk_row<Storage>(problem, at));
                      SegmentEnd whole = ends[first];
                      for (int64_t i = 1; i < segments(problem); ++i) whole.append(ends[first + i]);
                      write_end(problem, at, scan.finish(row, at, whole));
                    });
}

}  // namespace ema_ext::cpu::EMA_EXT_LEVEL
