// Few long rows on several threads: the segments of all rows as items of their own.
//
// find_aggregates over all items, fold_carries over the rows, scan_segments over all items and
// finish_rows over the rows give bit for bit what scan_rows gives.
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

// Calls visit(scan, row, item, segment) for each of the items [begin, end) whose row the tiles fit.
template <class Storage, class Visit>
EMA_EXT_INLINE void for_items(const Problem& problem, int64_t begin, int64_t end, Visit visit) {
  const int64_t count = segments(problem);
  for_rows<Storage>(problem, begin / count, (end + count - 1) / count,
                    [&](const auto& scan, const auto& row, const auto&, int64_t first) {
                      if (!scan.fits) return;
                      const int64_t from = begin > first ? begin : first;
                      const int64_t to = end < first + count ? end : first + count;
                      for (int64_t item = from; item < to; ++item)
                        visit(scan, row, item, item - first);
                      scan.settle_stores();
                    });
}

template <class Storage>
void find_aggregates(const Problem& problem, int64_t begin, int64_t end, SegmentEnd* ends) {
  const int64_t last = segments(problem) - 1;
  for_items<Storage>(problem, begin, end,
                     [&](const auto& scan, const auto& row, int64_t item, int64_t index) {
                       if (index == last) return;  // nothing follows it
                       ends[item] = scan.template segment<false>(row, index, Carry{});
                     });
}

template <class Storage>
void fold_carries(const Problem& problem, int64_t begin, int64_t end, const SegmentEnd* ends,
                  Carry* carries) {
  for_rows<Storage>(problem, begin, end,
                    [&](const auto& scan, const auto& row, const auto&, int64_t first) {
                      carries[first] = scan.first_carry(row);
                      for (int64_t i = 1; i < segments(problem); ++i)
                        carries[first + i] =
                            scan.next_carry(carries[first + i - 1], ends[first + i - 1].aggregate);
                    });
}

template <class Storage>
void scan_segments(const Problem& problem, int64_t begin, int64_t end, const Carry* carries,
                   SegmentEnd* ends) {
  for_items<Storage>(problem, begin, end,
                     [&](const auto& scan, const auto& row, int64_t item, int64_t index) {
                       ends[item] = scan.template segment<true>(row, index, carries[item]);
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
