// Which kernel a Scan goes to, and how many blocks: a pure function of its shape, its strides and
// the addresses' alignment, and of the device's size.
#pragma once

#include <cstdint>

#include "cuda/device.h"
#include "cuda/scan.h"

namespace ema_ext::cuda {

enum class Strategy : int8_t {
  kRows,        // row_tiles.cuh: a team of threads per row
  kSplitRows,   // split_rows.cuh: a block per tile of a row
  kLanes,       // lanes.cuh: rows side by side
  kSplitLanes,  // the same, a block per tile
  // A coefficient per sample, or an adjoint that needs y: varying.cuh.
  kVaryingRows,          // a team of threads per row
  kSplitVaryingRows,     // a block per tile of a row
  kVaryingColumns,       // rows side by side
  kSplitVaryingColumns,  // the same, a block per tile
};

struct Plan {
  Strategy strategy;
  int team;      // threads per row, of kRows and kVaryingRows
  bool aligned;  // samples move 16 bytes at a time
  int64_t blocks;
  int64_t tiles;  // per row; 0 of kRows
  int columns;    // threads across, of kLanes and kSplitLanes
};

// The axis along which rows walk side by side, to be moved to the last place, or -1.
int lane_axis(const Problem& problem);

Plan make_plan(const Scan& scan, const Device& device);

}  // namespace ema_ext::cuda
