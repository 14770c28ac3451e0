// The recurrence one sample at a time, by one thread: for the samples before and after the aligned
// ones of a row, and for whole rows whose coefficient has no powers to scan by.
#pragma once

#include "cuda/row.cuh"

namespace ema_ext::cuda {

template <class Storage, bool kGradient>
struct Walk {
  using Acc = typename Storage::Acc;

  double state;  // s[n-1]
  AlphaSums sums;

  // Samples [begin, end) of a row.
  __device__ void over(const Row<Storage>& row, const Scan& scan, int64_t begin, int64_t end) {
    const double ratio = row.decay.ratio(), in = row.in, out = row.out;
    double s = state;
#pragma unroll 1
    for (int64_t n = begin; n < end; ++n) {
      const Acc x = Storage::get(row.x[n * scan.x.time_stride]);
      s = ratio * s + in * x;
      if (n == 0) s = row.copies_first ? x : s + row.added_first;
      const double y = s * (n == scan.length - 1 && row.last_is_lambda ? row.to_lambda : out);
      row.y[n * scan.y.time_stride] = Storage::put(static_cast<Acc>(y));
      if constexpr (kGradient)
        sums.prepend({Storage::get(row.forward_x[n * scan.forward_x.time_stride]), 0, s, 0, ratio});
    }
    state = s;
  }
};

}  // namespace ema_ext::cuda
