// Samples between global memory, where neighbouring threads read neighbouring 16 bytes, and
// registers, where a thread holds chunks that follow one another in time.
//
// A warp passes them through shared memory, whose chunks are swizzled so that both sides go without
// bank conflicts.
#pragma once

#include "cuda/tiling.cuh"

namespace ema_ext::cuda {

template <class T>
struct WarpStage {
  uint4 chunks[kWarp * T::kChunks];
};

// Of one warp, or of one team if that is smaller: the chunks from `first` on, `stride` apart.
template <class Sample>
struct Run {
  Sample* first;
  int64_t stride;
  int chunks;  // may be below 0, or more than there is room for
};

// How samples are moved. Aligned: 16 bytes at a time; the stride is 1 or -1, and each chunk lies on
// a multiple of 16 bytes. Otherwise sample by sample, for any stride.
template <class T>
class Stage {
 public:
  using Sample = typename T::Sample;
  using Acc = typename T::Acc;
  using C = Chunk<typename T::Storage>;

  // What is on its way from global memory to the registers of this warp.
  struct Raw {
    uint4 chunks[T::kAligned ? T::kChunks : 1];
    Sample samples[T::kAligned ? 1 : T::kItems];
  };

  __device__ __forceinline__ Stage(WarpStage<T>& shared, bool backward)
      : shared_(shared.chunks),
        lane_(thread() % kWarp),
        member_(thread() % T::kLanes),
        hop_(backward ? -kChunkBytes * T::kLanes : kChunkBytes * T::kLanes),
        first_((backward ? -kChunkBytes : kChunkBytes) * member_ -
               (backward ? kChunkBytes - static_cast<int>(sizeof(Sample)) : 0)),
        order_(C::order(backward)) {}

  // Chunks that are not there count as zeros.
  __device__ __forceinline__ Raw fetch(const Run<Sample>& run) const {
    Raw raw;
    if constexpr (T::kAligned) {
      const char* at = reinterpret_cast<const char*>(run.first) + first_;
#pragma unroll
      for (int j = 0; j < T::kChunks; ++j, at += hop_) {
        raw.chunks[j] = {0, 0, 0, 0};
        if (j * T::kLanes + member_ < run.chunks)
          raw.chunks[j] = *reinterpret_cast<const uint4*>(at);
      }
    } else {
#pragma unroll
      for (int j = 0; j < T::kItems; ++j) {
        const int n = j * T::kLanes + member_;
        raw.samples[j] =
            n < run.chunks * T::kSamples ? run.first[n * run.stride] : T::Storage::put(0);
      }
    }
    return raw;
  }

  // To the threads' own samples, zero beyond the run.
  __device__ __forceinline__ void spread(const Raw& raw, Acc* items) const {
    __syncwarp();
    if constexpr (T::kAligned) {
#pragma unroll
      for (int j = 0; j < T::kChunks; ++j) *striped(j) = C::turned(raw.chunks[j], order_);
    } else {
#pragma unroll
      for (int j = 0; j < T::kItems; ++j) *sample(j * T::kLanes + member_) = raw.samples[j];
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < T::kChunks; ++k) C::unpack(*blocked(k), items + k * T::kSamples);
  }

  // After a `spread`: each thread overwrites what it alone has read.
  __device__ __forceinline__ void put(const Acc* items, const Run<Sample>& run) const {
#pragma unroll
    for (int k = 0; k < T::kChunks; ++k) *blocked(k) = C::pack(items + k * T::kSamples);
    __syncwarp();
    if constexpr (T::kAligned) {
      char* at = reinterpret_cast<char*>(run.first) + first_;
#pragma unroll
      for (int j = 0; j < T::kChunks; ++j, at += hop_) {
        if (j * T::kLanes + member_ < run.chunks)
          *reinterpret_cast<uint4*>(at) = C::turned(*striped(j), order_);
      }
    } else {
#pragma unroll
      for (int j = 0; j < T::kItems; ++j) {
        const int n = j * T::kLanes + member_;
        if (n < run.chunks * T::kSamples) run.first[n * run.stride] = *sample(n);
      }
    }
  }

 private:
  static constexpr int kChunkBytes = 16;

  static __device__ __forceinline__ int swizzled(int chunk) {
    return chunk ^ ((chunk >> 3) & (T::kChunks - 1));
  }
  // Chunk k of this thread; chunk j of those that it moves; sample n of its team.
  __device__ __forceinline__ uint4* blocked(int k) const {
    return shared_ + swizzled(lane_ * T::kChunks + k);
  }
  __device__ __forceinline__ uint4* striped(int j) const {
    return shared_ + swizzled(team() + j * T::kLanes + member_);
  }
  __device__ __forceinline__ Sample* sample(int n) const {
    return reinterpret_cast<Sample*>(shared_ + swizzled(team() + n / T::kSamples)) +
           n % T::kSamples;
  }
  __device__ __forceinline__ int team() const { return (lane_ - member_) * T::kChunks; }

  uint4* shared_;
  int lane_, member_;
  int hop_, first_;  // in bytes, of this thread's chunks in global memory
  unsigned order_;
};

}  // namespace ema_ext::cuda
