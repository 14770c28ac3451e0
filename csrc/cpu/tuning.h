// The numbers that tune the CPU kernels, each with its reason. benchmarks/bench.py measures them.
#pragma once

#include "problem.h"

namespace ema_ext::cpu {

// The least share of a thread, half of torch's own grain: a scan does more per sample than the
// elementwise operators which that is made for.
constexpr int64_t kGrainSamples = 16384;

// Rows of at least two segments are cut, and the carries between segments folded in order. Where a
// row is cut follows from its length alone, so that results are the same for any number of threads.
// 64k samples of float32 leave half of a 512 kB L2 cache to the output.
constexpr int64_t kSegmentSamples = 65536;

inline __attribute__((always_inline)) int64_t segments(const Problem& problem) {
  if (problem.length < 2 * kSegmentSamples) return 1;
  return (problem.length + kSegmentSamples - 1) / kSegmentSamples;
}

inline __attribute__((always_inline)) int64_t segment_length(const Problem& problem) {
  return segments(problem) > 1 ? kSegmentSamples : problem.length;
}

// What finding a segment's aggregate takes of the time to scan it.
constexpr double kAggregateCost = 0.6;

// Rows shorter than this are not worth a tile.
constexpr int64_t kTiledRow = 32;

// Rows shorter than this walk side by side, however few: a row has the same bits whatever rows
// stand beside it. What a row costs by tiles besides its samples, its tail above all, is saved from
// 64 samples by half and more, and begins to be less than what bringing rows side by side takes
// between 128 and 256.
constexpr int64_t kShortRow = 192;

// Samples that pass through a buffer in L1 at a time, where the kernel cannot read memory directly.
// A multiple of every tile.
constexpr int64_t kChunkSamples = 1024;

// Samples, of one row or of many side by side, that pass through each of the float64 buffers of
// varying.h: five of them fit into L1.
constexpr int64_t kVaryingChunk = 256;
static_assert(kSegmentSamples % kVaryingChunk == 0);

// Segments per thread from which threads share them: finding what a segment does to the y before it
// takes half as long as its scan, which two threads have to win back first.
constexpr int64_t kVaryingCutItems = 4;

// Rows side by side that pass through them together: whole cache lines, several of them, for the
// sake of the memory; fewer where there are no more, for every lane costs the same.
inline __attribute__((always_inline)) int64_t varying_lanes(int64_t width) {
  return width > 32 ? 64 : width > 16 ? 32 : 16;
}

// Outputs from here on do not stay in the cache anyway: stores that pass it by save reading the
// lines first.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

inline __attribute__((always_inline)) bool streams_stores(const Problem& problem) {
  return problem.rows * problem.length * bytes_of(problem.y.dtype) >= kStreamBytes;
}

// glibc maps larger blocks anew at each allocation, and 4 kB page faults take most of the time.
// Smaller ones it reuses, where huge pages would only cost.
constexpr int64_t kHugePageBytes = int64_t{32} << 20;

// Rows side by side that walk along time together: their states fill half of the registers, and two
// cache lines of float32 are read at each step.
constexpr int kLanesPerBlock = 32;

// Blocks that pass through time together, kLaneSteps samples at a time: 64 steps of 8 blocks are
// 64 kB of float32, in and out, and stay in L2.
constexpr int kBlocksPerWalk = 8;
constexpr int64_t kLaneSteps = 64;

}  // namespace ema_ext::cpu
