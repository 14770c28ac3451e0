// The numbers that tune the CUDA kernels, each with its reason. No GPU has measured them yet: the
// reasons are counts of bytes, registers and instructions (tools/sass.py, benchmarks/roofline.py).
#pragma once

#include <cstdint>

namespace ema_ext::cuda {

// Chunks of 16 bytes that a thread holds of each tensor: with 64 bytes on their way for each of 512
// threads, or 128 for 256, a multiprocessor has 32 kB in flight. Twice as many where more bytes
// must share what a thread spends on a scan: halves, whose samples take as many instructions as
// float32, and split rows, where each warp folds 31 messages a tile. Half as many halves where they
// are moved one by one, for want of registers.
constexpr int thread_chunks(int64_t sample_bytes, bool aligned, bool split) {
  if (!aligned) return sample_bytes == 2 ? 2 : 4;
  return sample_bytes == 2 || split ? 8 : 4;
}

// Threads of a block in every kernel. Eight warps share one carry per tile.
constexpr int kBlockThreads = 256;
constexpr int kBlockWarps = kBlockThreads / 32;
constexpr int kBlockSteps = 3;  // of a shuffled scan over the warps
static_assert(kBlockWarps == 1 << kBlockSteps);

// Blocks per multiprocessor that the registers of a kernel must leave room for: 128 a thread.
constexpr int kBlocksPerMultiprocessor = 2;

// The same of tiles: one where samples are moved one by one, where a thread holds 8 chunks, which
// take more than 128 and more than half of what 7.5 has of shared memory, and where the gradient
// takes more on 12.0: in float32 over a warp or more.
constexpr int tile_blocks(int64_t sample_bytes, int chunks, int team, bool aligned, bool gradient) {
  const bool many = gradient && sample_bytes == 4 && team > 8;
  return !aligned || chunks > 4 || many ? 1 : kBlocksPerMultiprocessor;
}

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

// Blocks that share the tiles of split rows, at most: more than any machine holds at once, so that
// each takes several. What starts later finds no tile left.
constexpr int64_t kSplitBlocks = 1024;

// Time-strided rows: samples that a thread takes of each of its rows per tile, each from a line of
// its own, so that 128 bytes are in flight; half as many float64 where two tensors are, for want of
// registers. Halves that move 16 bytes at a time share what a tile costs among more, as many as
// there are registers for: a thread has eight rows of them.
constexpr int lane_steps(int64_t sample_bytes, bool aligned, bool gradient) {
  if (sample_bytes == 2 && aligned) return gradient ? 12 : 16;
  return gradient && sample_bytes == 8 ? 4 : 8;
}

// How many of these of the forward's x are on their way at once: beside twelve samples of eight
// adjoints a third, the next while one is summed.
constexpr int lane_part(int steps) { return steps > 8 ? steps / 3 : steps; }

// Rows of a block, where each thread has `rows` of them: so many threads across that they read 256
// or 512 bytes at a time, and that what they share stays below 48 kB.
constexpr int lanes_per_block(int rows, bool gradient) {
  return rows == 1 ? 32 : rows == 2 || gradient ? 64 : 128;
}

// The fewest threads across, and from how many bytes of neighbouring rows on they count as side by
// side: below two sectors of 32 bytes most of what is read would be thrown away either way.
constexpr int kLaneColumns = 4;
constexpr int64_t kLaneBytes = 64;

// Tiles of time-strided rows between anchors: each row reads that many messages per tile, which are
// a hundredth of its samples.
constexpr int64_t kLaneLookBack = 8;

// Coefficients that vary in time: samples of a thread, of which two tensors are held at once,
// beside an adjoint's other three. They share what a scan costs per thread, and a look-back where
// there is one. As float64 sixteen of 4 bytes and eight of 8, twice as many beside a look-back, as
// far as there are registers; halves, as float32, four times as many, an adjoint's twice. What is
// moved sample by sample is slower by more than that.
constexpr int varying_items(int64_t sample_bytes, bool aligned, bool adjoint, bool split) {
  if (!aligned) return 8;
  if (sample_bytes == 2) return adjoint ? 32 : 64;
  return (sample_bytes == 8 ? 8 : 16) * (split && !adjoint ? 2 : 1);
}

// Blocks per multiprocessor, which leave 128 registers a thread, or 255 where they are needed: by
// thirty-two samples, by sixteen of the four tensors of an adjoint, beside a look-back, and by the
// addresses of an adjoint whose rows are moved sample by sample.
constexpr int varying_blocks(int items, bool adjoint, bool split, bool scattered) {
  return split || items > 16 || (adjoint && (items > 8 || scattered)) ? 1 : 2;
}

// Terms of a broadcast sum that a warp adds up, 128 to each lane: what it leaves behind is a
// thousandth of what it reads. The sums of such chunks are summed likewise. Changes results in
// their last bits.
constexpr int64_t kSumTerms = 4096;

// With fewer results than this a warp along them would be half empty, as one along a shorter run of
// terms.
constexpr int64_t kSumColumns = 16;

// Blocks of a sum at most; each then takes several items.
constexpr int64_t kSumBlocks = int64_t{1} << 20;

}  // namespace ema_ext::cuda
