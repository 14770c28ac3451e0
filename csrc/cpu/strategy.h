// Which kernel scans a problem, and in which order of axes: a pure function of the problem.
#pragma once

#include <cstdint>
#include <optional>

#include "problem.h"

namespace ema_ext::cpu {

enum class Strategy : int8_t {
  kRows,          // each row from end to end: rows.h
  kLanes,         // rows side by side in memory, or very short ones: lanes.h
  kCut,           // few long rows, their segments on several threads: cut.h
  kVaryingRows,   // a coefficient per sample, or an adjoint that needs y: varying.h; row by row
  kVaryingLanes,  // the same, rows side by side
  kVaryingCut,    // the same, few long rows, their segments on several threads
};

struct Plan {
  Strategy strategy;
  int64_t items;             // what is shared among threads: rows, blocks of rows, or segments
  int64_t samples_per_item;  // roughly
};

// Reorders the problem's axes as the chosen kernel wants them. Results do not depend on `threads`.
Plan make_plan(Problem& problem, int threads);

// kRows, kLanes and kCut stand for their families: from now on every problem of this process that
// can be scanned so is. For tests, which take every kernel over problems it is not chosen for.
void force_strategy(std::optional<Strategy> family);

}  // namespace ema_ext::cpu
