// What a team of threads knows of the row that it scans: one thread, the leader, fills it in, in
// shared memory, and walks the samples before and after the whole chunks.
#pragma once

#include <new>

#include "cuda/tile.cuh"
#include "cuda/walk.cuh"

namespace ema_ext::cuda {

// A row in three parts: samples before the first chunk, whole chunks, samples after the last.
struct Parts {
  int64_t head;
  int64_t chunks;

  // The head reaches to where chunks lie on 16 bytes, in every tensor alike.
  template <class Storage, bool kAligned>
  static __device__ Parts of(const Row<Storage>& row, const Scan& scan) {
    constexpr int64_t kC = Chunk<Storage>::kSamples;
    int64_t head = 0;
    if constexpr (kAligned) {
      const auto at = reinterpret_cast<uintptr_t>(row.x) / sizeof(*row.x) % kC;
      head = scan.x.time_stride < 0 ? (at + 1) % kC : (kC - at) % kC;
      if (head > scan.length) head = scan.length;
    }
    return {head, (scan.length - head) / kC};
  }
};

template <class Storage, int kTeam, bool kAligned, bool kGradient>
struct TeamRow {
  RowOffsets at;
  Row<Storage> row;
  Parts parts;
  TilePowers<Storage, kTeam> powers;
  Walk<Storage, kGradient> walk;

  // With `walks_head` the walk is where the chunks begin, otherwise at the row's start.
  __device__ TeamRow(const Scan& scan, int64_t index, bool walks_head)
      : at(scan, index),
        row(scan, at),
        parts(row.decay.fits() ? Parts::of<Storage, kAligned>(row, scan) : Parts{scan.length, 0}),
        powers(row),
        walk{row.start, {}} {
    if (walks_head) walk.over(row, scan, 0, parts.head);
  }

  // To the row's end, from where the chunks end.
  __device__ void walk_tail(const Scan& scan) {
    walk.over(row, scan, parts.head + parts.chunks * Chunk<Storage>::kSamples, scan.length);
  }

  // s to y, of a tile of which this thread has `mine` chunks (own_chunks). If it `ends` the row,
  // the last sample may be all of lambda.
  __device__ __forceinline__ void to_outputs(const Scan& scan, int mine, bool ends,
                                             typename Storage::Acc* s) const {
    constexpr int kC = Chunk<Storage>::kSamples;
    const bool to_lambda =
        ends && row.last_is_lambda && parts.head + parts.chunks * kC == scan.length;
#pragma unroll
    for (int i = 0; i < kThreadChunks * kC; ++i) {
      const bool last = i % kC == kC - 1 && to_lambda && i / kC + 1 == mine;
      s[i] *= last ? static_cast<typename Storage::Acc>(row.to_lambda) : powers.out;
    }
  }
};

}  // namespace ema_ext::cuda
