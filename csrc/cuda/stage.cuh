// Samples between global memory, where neighbouring threads read neighbouring 16 bytes, and
// registers, where a thread holds kThreadChunks chunks that follow one another in time.
//
// A warp passes them through shared memory, whose chunks are swizzled so that both sides go without
// bank conflicts. Teams of kTeam threads, 32 or fewer, each serve a row of their own.
#pragma once

#include "cuda/storage.cuh"
#include "cuda/tuning.h"

namespace ema_ext::cuda {

struct WarpStage {
  uint4 chunks[kWarp * kThreadChunks];
};

__device__ inline int swizzled(int chunk) { return chunk ^ ((chunk >> 3) & (kThreadChunks - 1)); }

// Of one warp: the samples [0, chunks * Chunk::kSamples) from `first` on, `stride` apart.
template <class Storage>
struct Run {
  using Sample = typename Storage::Sample;
  Sample* first;
  int64_t stride;
  int chunks;  // may be below 0, or more than there is room for
};

// How samples are moved. Aligned: 16 bytes at a time; the stride is 1 or -1, and each chunk lies on
// a multiple of 16 bytes. Otherwise sample by sample, for any stride.
template <class Storage, int kTeam, bool kAligned>
class Stage {
 public:
  using Sample = typename Storage::Sample;
  using Acc = typename Storage::Acc;
  static constexpr int kChunk = Chunk<Storage>::kSamples;
  static constexpr int kItems = kThreadChunks * kChunk;  // of a thread

  // What is on its way from global memory to the registers of this warp.
  struct Raw {
    uint4 chunks[kAligned ? kThreadChunks : 1];
    Sample samples[kAligned ? 1 : kItems];
  };

  __device__ explicit Stage(WarpStage& shared)
      : shared_(shared.chunks),
        lane_(thread() % kWarp),
        member_(thread() % kTeam),
        base_(lane_ / kTeam * kTeam * kThreadChunks) {}

  // Chunks that are not there count as zeros.
  __device__ __forceinline__ Raw fetch(const Run<Storage>& run) const {
    Raw raw;
    if constexpr (kAligned) {
#pragma unroll
      for (int j = 0; j < kThreadChunks; ++j) {
        const int chunk = j * kTeam + member_;
        raw.chunks[j] = chunk < run.chunks ? *address(run, chunk) : uint4{0, 0, 0, 0};
      }
    } else {
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
        const int n = j * kTeam + member_;
        raw.samples[j] = n < run.chunks * kChunk ? run.first[n * run.stride] : Storage::put(0);
      }
    }
    return raw;
  }

  // To the threads' own samples, zero beyond the run.
  __device__ __forceinline__ void spread(const Raw& raw, bool backward, Acc* items) const {
    __syncwarp();
    if constexpr (kAligned) {
#pragma unroll
      for (int j = 0; j < kThreadChunks; ++j)
        shared_[swizzled(base_ + j * kTeam + member_)] =
            Chunk<Storage>::turned(raw.chunks[j], backward);
    } else {
#pragma unroll
      for (int j = 0; j < kItems; ++j) *sample(j * kTeam + member_) = raw.samples[j];
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kThreadChunks; ++k)
      Chunk<Storage>::unpack(shared_[swizzled(lane_ * kThreadChunks + k)], items + k * kChunk);
  }

  __device__ __forceinline__ void put(const Acc* items, const Run<Storage>& run) const {
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kThreadChunks; ++k)
      shared_[swizzled(lane_ * kThreadChunks + k)] = Chunk<Storage>::pack(items + k * kChunk);
    __syncwarp();
    if constexpr (kAligned) {
#pragma unroll
      for (int j = 0; j < kThreadChunks; ++j) {
        const int chunk = j * kTeam + member_;
        if (chunk < run.chunks)
          *address(run, chunk) =
              Chunk<Storage>::turned(shared_[swizzled(base_ + chunk)], run.stride < 0);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
        const int n = j * kTeam + member_;
        if (n < run.chunks * kChunk) run.first[n * run.stride] = *sample(n);
      }
    }
  }

 private:
  static __device__ __forceinline__ uint4* address(const Run<Storage>& run, int chunk) {
    const int64_t n = static_cast<int64_t>(chunk) * kChunk;
    return reinterpret_cast<uint4*>(run.first + (run.stride < 0 ? -n - (kChunk - 1) : n));
  }

  // Sample n of this team in the stage.
  __device__ __forceinline__ Sample* sample(int n) const {
    return reinterpret_cast<Sample*>(shared_ + swizzled(base_ + n / kChunk)) + n % kChunk;
  }

  uint4* shared_;
  int lane_, member_, base_;
};

}  // namespace ema_ext::cuda
