// What a team of threads knows of the row that it scans: one thread, the leader, fills it in, in
// shared memory, and walks the samples before and after the whole chunks.
#pragma once

#include <new>

#include "cuda/tile.cuh"
#include "cuda/walk.cuh"

namespace ema_ext::cuda {

// A row in three parts: samples before the first chunk, whole chunks, samples after the last. The
// last sample of an adjoint that is all of lambda is left to the third.
struct Parts {
  int64_t head;
  int64_t chunks;

  // The head reaches to where chunks lie on 16 bytes, in every tensor alike.
  template <class T>
  static __device__ Parts of(const Row<typename T::Storage>& row, const Scan& scan) {
    constexpr int64_t kC = T::kSamples;
    int64_t head = 0;
    if constexpr (T::kAligned) {
      const auto at = reinterpret_cast<uintptr_t>(row.x) / sizeof(*row.x) % kC;
      head = scan.x.time_stride < 0 ? (at + 1) % kC : (kC - at) % kC;
    }
    const int64_t length = scan.length - (row.last_is_lambda ? 1 : 0);
    if (!row.scans() || head >= length) return {scan.length, 0};
    return {head, (length - head) / kC};
  }
};

template <class T>
struct TeamRow {
  RowOffsets at;
  Row<typename T::Storage> row;
  Parts parts;
  TilePowers<T> powers;
  Walk<typename T::Storage, T::kGradient> walk;

  // With `walks_head` the walk is where the chunks begin, otherwise at the row's start.
  __device__ TeamRow(const Scan& scan, int64_t index, bool walks_head)
      : at(scan, index),
        row(scan, at),
        parts(Parts::of<T>(row, scan)),
        powers(row),
        walk{walks_head ? row.start(scan, at) : 0, {}} {
    if (walks_head) walk.over(row, scan, 0, parts.head);
  }

  // From where the chunks end, and of what lies before the walk, to the row's end; hands on the
  // state.
  template <class Walk>
  __device__ void finish(const Scan& scan, Walk& walk) const {
    walk.over(row, scan, parts.head + parts.chunks * T::kSamples, scan.length);
    row.write_state(scan, at, walk.state);
  }
};

}  // namespace ema_ext::cuda
