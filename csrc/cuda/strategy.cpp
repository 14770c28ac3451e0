// See strategy.h.

#include "cuda/strategy.h"

#include <algorithm>

#include "cuda/tuning.h"

namespace ema_ext::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where in its chunk of `samples` the row's first sample lies.
int64_t phase(const View& view, int64_t samples) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(view.data) / bytes_of(view.dtype)) %
         samples;
}

// Whether each row's chunks lie on multiples of 16 bytes, in all tensors of samples at once: from
// its first sample on, or (with heads) from the same later one on.
bool is_aligned(const Scan& scan, bool with_heads) {
  const int64_t samples = 16 / bytes_of(scan.x.dtype);
  const bool backward = scan.x.time_stride < 0;
  if (scan.x.time_stride != 1 && scan.x.time_stride != -1) return false;
  const int64_t first = phase(scan.x, samples);
  if (!with_heads && first != (backward ? samples - 1 : 0)) return false;
  for (const View* view : {&scan.x, &scan.y, &scan.forward_x}) {
    if (view->data == nullptr) continue;
    if (view->time_stride != scan.x.time_stride || phase(*view, samples) != first) return false;
    for (int d = 0; d < scan.ndim; ++d) {
      const int64_t expected = with_heads ? scan.x.row_strides[d] : 0;
      if ((view->row_strides[d] - expected) % samples != 0) return false;
    }
  }
  return true;
}

}  // namespace

Plan make_plan(const Scan& scan, const Device& device) {
  const int64_t items = kThreadChunks * (16 / bytes_of(scan.x.dtype));
  const int64_t tile = items * kBlockThreads;
  const int64_t tiles = std::max<int64_t>(
      1, ceil_div(scan.length / (items / kThreadChunks), kThreadChunks * kBlockThreads));
  const bool few = scan.rows < kRowsPerMultiprocessor * device.multiprocessors;
  if (few && scan.length >= kSplitTiles * tile)
    return {Strategy::kSplitRows, kBlockThreads, is_aligned(scan, true), scan.rows * tiles, tiles};
  const int team = scan.length <= kShortTiles * 8 * items ? 8
                   : scan.rows >= kWarpRows * device.multiprocessors || scan.length <= 64 * items
                       ? 32
                       : kBlockThreads;
  return {Strategy::kRows, team, is_aligned(scan, team > 8),
          ceil_div(scan.rows, kBlockThreads / team), 0};
}

}  // namespace ema_ext::cuda
