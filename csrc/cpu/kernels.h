// The kernels of one level, as function pointers; levels/*.cpp define one table each.
#pragma once

#include "cpu/affine.h"
#include "cpu/segment_end.h"
#include "problem.h"
#include "sum.h"

namespace ema_ext::cpu {

struct Kernels {
  // Rows [begin, end), each from end to end: rows.h.
  void (*scan_rows)(const Problem&, int64_t begin, int64_t end);
  // Blocks of rows side by side: lanes.h.
  void (*scan_lanes)(const Problem&, int64_t begin, int64_t end);
  // Those of varying.h, as rows, as blocks and as segments.
  void (*scan_varying_rows)(const Problem&, int64_t begin, int64_t end);
  void (*scan_varying_lanes)(const Problem&, int64_t begin, int64_t end);
  void (*find_maps)(const Problem&, int64_t begin, int64_t end, Affine*);
  void (*fold_maps)(const Problem&, int64_t begin, int64_t end, const Affine*, double* before);
  void (*scan_varying_segments)(const Problem&, int64_t begin, int64_t end, const double* before,
                                Affine*);
  void (*finish_varying_rows)(const Problem&, int64_t begin, int64_t end, const double* before,
                              const Affine*);
  // Rows in segments, row * segments(problem) + segment: cut.h.
  void (*find_aggregates)(const Problem&, int64_t begin, int64_t end, Carry*);
  void (*scan_segments)(const Problem&, int64_t begin, int64_t end, const Carry*, SegmentEnd*);
  void (*finish_rows)(const Problem&, int64_t begin, int64_t end, const SegmentEnd*);
  // Blocks of results by chunks of terms, of the terms' dtype, then results, of their dtype:
  // sum_terms.h.
  void (*sum_terms)(const Sum&, int64_t begin, int64_t end, double* partials);
  void (*finish_sums)(const Sum&, int64_t begin, int64_t end, const double* partials);
};

// Indexed by Dtype.
extern const Kernels kKernelsX86_64[4];
extern const Kernels kKernelsX86_64V3[4];
extern const Kernels kKernelsX86_64V4[4];

}  // namespace ema_ext::cpu
