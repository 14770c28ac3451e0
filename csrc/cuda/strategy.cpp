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

// Whether 16 bytes of rows side by side can be moved at once, from one sample to the next by less
// than 2^31 bytes.
bool is_lane_aligned(const Scan& scan) {
  const int64_t bytes = bytes_of(scan.x.dtype), samples = 16 / bytes, most = (1ll << 31) / bytes;
  if (scan.sizes[scan.ndim - 1] % samples != 0) return false;
  for (const View* view : {&scan.x, &scan.y, &scan.forward_x}) {
    if (view->data == nullptr) continue;
    if (phase(*view, samples) != 0 || view->time_stride % samples != 0) return false;
    if (view->time_stride >= most || view->time_stride <= -most) return false;
    for (int d = 0; d < scan.ndim - 1; ++d)
      if (view->row_strides[d] % samples != 0) return false;
  }
  return true;
}

Plan lanes_plan(const Scan& scan, const Device& device) {
  const bool aligned = is_lane_aligned(scan), gradient = scan.grad_coefficient.data != nullptr;
  const int64_t bytes = bytes_of(scan.x.dtype), width = scan.sizes[scan.ndim - 1];
  const int per_thread = aligned ? static_cast<int>(16 / bytes) : 1;
  int columns = kLaneColumns;
  while (2 * columns * per_thread <= lanes_per_block(per_thread, gradient) &&
         columns * per_thread < width)
    columns *= 2;
  const int64_t groups = scan.rows / width * ceil_div(width, columns * per_thread);
  const int64_t tiles =
      ceil_div(scan.length, lane_steps(bytes, aligned, gradient) * (kBlockThreads / columns));
  const bool split =
      groups < kRowsPerMultiprocessor * device.multiprocessors && tiles >= kSplitTiles;
  return {split ? Strategy::kSplitLanes : Strategy::kLanes,
          0,
          aligned,
          split ? groups * tiles : groups,
          tiles,
          columns};
}

bool touch(const Scan& scan) {
  const int d = scan.ndim - 1;
  return d >= 0 && scan.sizes[d] * bytes_of(scan.x.dtype) >= kLaneBytes &&
         scan.x.time_stride != 1 && scan.x.time_stride != -1 && scan.x.row_strides[d] == 1 &&
         scan.y.row_strides[d] == 1 &&
         (scan.forward_x.data == nullptr || scan.forward_x.row_strides[d] == 1);
}

// Threads for a row, each of which takes `items` samples at a time.
int rows_team(const Scan& scan, int64_t items, const Device& device) {
  if (scan.length <= kShortTiles * 8 * items) return 8;
  const bool many = scan.rows >= kWarpRows * device.multiprocessors;
  return many || scan.length <= 64 * items ? 32 : kBlockThreads;
}

// Whether all that a varying scan reads and writes per sample comes in whole chunks of 16 bytes.
bool is_varying_aligned(const Scan& scan) {
  const int64_t samples = 16 / bytes_of(scan.x.dtype), stride = scan.x.time_stride;
  if ((stride != 1 && stride != -1) || scan.length % samples != 0) return false;
  const auto fits = [&](const View& view) {
    if (view.data == nullptr) return true;
    if (view.dtype != scan.x.dtype || view.time_stride != stride ||
        phase(view, samples) != (stride < 0 ? samples - 1 : 0))
      return false;
    return std::all_of(view.row_strides, view.row_strides + scan.ndim,
                       [&](int64_t s) { return s % samples == 0; });
  };
  return fits(scan.x) && fits(scan.y) && fits(scan.forward_x) && fits(scan.forward_y) &&
         (!scan.varying || (fits(scan.coefficient) && fits(scan.grad_coefficient)));
}

Plan varying_plan(const Scan& scan, const Device& device) {
  const bool columns = touch(scan);
  const bool aligned = !columns && is_varying_aligned(scan);
  const auto items_of = [&](bool split) {
    return varying_items(bytes_of(scan.x.dtype), aligned, is_adjoint(scan.op), split);
  };
  const int64_t threads = columns ? kBlockWarps : kBlockThreads;  // along time
  const int64_t groups = ceil_div(scan.rows, kBlockThreads / threads);
  const int64_t tiles = ceil_div(scan.length, threads * items_of(true));
  const bool split =
      groups < kRowsPerMultiprocessor * device.multiprocessors && tiles >= kSplitTiles;
  if (split)
    return {columns ? Strategy::kSplitVaryingColumns : Strategy::kSplitVaryingRows,
            kBlockThreads,
            aligned,
            groups * tiles,
            tiles,
            0};
  if (columns) return {Strategy::kVaryingColumns, 0, false, groups, tiles, 0};
  const int items = items_of(false), team = rows_team(scan, items, device);
  return {Strategy::kVaryingRows,
          team,
          aligned,
          ceil_div(scan.rows, kBlockThreads / team),
          ceil_div(scan.length, team * items),
          0};
}

}  // namespace

int lane_axis(const Problem& problem) {
  if (problem.x.time_stride == 1 || problem.x.time_stride == -1) return -1;
  for (int d = 0; d < problem.ndim; ++d)
    if (rows_touch(problem, d)) return d;
  return -1;
}

Plan make_plan(const Scan& scan, const Device& device) {
  if (scan.varying || scan.op == Op::kLinearRecurrenceBackward) return varying_plan(scan, device);
  if (touch(scan)) return lanes_plan(scan, device);
  const int64_t bytes = bytes_of(scan.x.dtype), samples = 16 / bytes;
  const bool aligned = is_aligned(scan, true);
  const int64_t tile = samples * thread_chunks(bytes, aligned, true) * kBlockThreads;
  const int64_t tiles = std::max<int64_t>(1, ceil_div(scan.length / samples, tile / samples));
  const bool few = scan.rows < kRowsPerMultiprocessor * device.multiprocessors;
  if (few && scan.length >= kSplitTiles * tile)
    return {Strategy::kSplitRows, kBlockThreads, aligned, scan.rows * tiles, tiles, 0};
  const int team = rows_team(scan, samples * thread_chunks(bytes, aligned, false), device);
  return {Strategy::kRows,
          team,
          is_aligned(scan, team > 8),
          ceil_div(scan.rows, kBlockThreads / team),
          0,
          0};
}

}  // namespace ema_ext::cuda
