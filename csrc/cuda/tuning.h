// The numbers that tune the CUDA kernels, each with its reason. No GPU has measured them yet: the
// reasons are counts of bytes, registers and instructions (tools/sass.py, benchmarks/roofline.py).
#pragma once

#include <cstdint>

namespace ema_ext::cuda {

// Chunks of 16 bytes that a thread holds of each tensor: with 32 bytes on their way for each of 768
// threads a multiprocessor has 24 kB in flight, and more would not leave registers for that many.
constexpr int kThreadChunks = 2;

// Threads of a block in every kernel. Eight warps share one carry per tile.
constexpr int kBlockThreads = 256;

// Blocks per multiprocessor that the registers of a kernel must leave room for: 80 registers a
// thread for a scan, 128 where two tensors are held at once.
constexpr int kScanBlocks = 3;
constexpr int kGradientBlocks = 2;

// Rows up to this many tiles of 8 threads are scanned by 8 threads, four rows a warp: a warp would
// be half empty.
constexpr int64_t kShortTiles = 2;

// From this many rows per multiprocessor on, a warp takes a row: enough warps to fill the machine,
// and no barrier.
constexpr int64_t kWarpRows = 32;

// With fewer rows per multiprocessor, rows of at least so many tiles are split over blocks: a block
// per row would leave multiprocessors idle, and the look-back costs a few microseconds.
constexpr int64_t kRowsPerMultiprocessor = 2;
constexpr int64_t kSplitTiles = 4;

}  // namespace ema_ext::cuda
