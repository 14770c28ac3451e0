// The sum over broadcast axes (sum.h): a warp or a thread's column per chunk of a result's terms.
//
// Term t belongs to strand t % kWarp; a strand is summed in order, then strand s and s + 16, then s
// and s + 8, ... So the bits follow from the sizes alone, whichever of the two kernels runs: that
// whose neighbouring threads read neighbouring addresses.
#pragma once

#include "cuda/stage.cuh"
#include "cuda/tuning.h"
#include "sum.h"

namespace ema_ext::cuda {

// Where the index'th element lies in the terms and in the result.
struct Place {
  int64_t from = 0, to = 0;

  __device__ Place(const Axes& axes, int64_t index) {
#pragma unroll 1
    for (int d = axes.ndim - 1; d >= 0; --d) {
      const int64_t size = axes.sizes[d];
      int64_t rest, at;
      if (((index | size) >> 32) == 0) {  // four times as quick
        rest = static_cast<uint32_t>(index) / static_cast<uint32_t>(size);
        at = static_cast<uint32_t>(index) % static_cast<uint32_t>(size);
      } else {
        rest = index / size;
        at = index % size;
      }
      index = rest;
      from += at * axes.from[d];
      to += at * axes.to[d];
    }
  }
};

// Every kStep'th term of a result, several loads in flight at a time.
template <class Storage, int kStep>
class Terms {
 public:
  using Sample = typename Storage::Sample;

  // Terms first, first + kStep, ... below `end`, in kSums turns to kSums sums.
  template <int kSums>
  static __device__ __forceinline__ void add(const Axes& axes, const Sample* from, int64_t first,
                                             int64_t end, double* sums) {
    Terms terms(axes, from, first, end);
#pragma unroll 1
    for (; terms.at_ < end;) {
      const Sample* addresses[kFlight];
#pragma unroll
      for (int i = 0; i < kFlight; ++i) addresses[i] = terms.next();
      double values[kFlight];
#pragma unroll
      for (int i = 0; i < kFlight; ++i)
        values[i] = addresses[i] != nullptr ? static_cast<double>(Storage::get(*addresses[i])) : 0;
#pragma unroll
      for (int i = 0; i < kFlight; ++i) sums[i % kSums] += values[i];
    }
  }

 private:
  static constexpr int kFlight = 8;

  __device__ Terms(const Axes& axes, const Sample* from, int64_t first, int64_t end)
      : axes_(axes),
        from_(from),
        at_(first),
        end_(end),
        run_(axes.ndim > 0 ? axes.sizes[axes.ndim - 1] : 1),
        step_(axes.ndim > 0 ? axes.from[axes.ndim - 1] : 0) {
    if (at_ < end_) locate();
  }

  __device__ __forceinline__ void locate() {
    offset_ = Place(axes_, at_).from;
    in_run_ = at_ % run_;
  }

  // nullptr after the last one.
  __device__ __forceinline__ const Sample* next() {
    if (at_ >= end_) return nullptr;
    const Sample* const address = from_ + offset_;
    at_ += kStep;
    in_run_ += kStep;
    offset_ += kStep * step_;
    if (in_run_ >= run_ && at_ < end_) locate();
    return address;
  }

  const Axes& axes_;
  const Sample* from_;
  int64_t at_, end_, run_, step_, offset_ = 0, in_run_ = 0;
};

// to[result's place + chunk] = the sum of the chunk'th kSumTerms terms of the result.
struct SumArguments {
  Sum sum;
  int64_t chunks;

  __device__ int64_t end(int64_t chunk) const {
    const int64_t end = (chunk + 1) * kSumTerms;
    return end < sum.summed.elements ? end : sum.summed.elements;
  }
  __device__ void put(double total, const Place& place, int64_t chunk) const {
    write(sum.to, sum.to_dtype, place.to + chunk, total);
  }
};

// A warp per chunk, its lanes along the terms.
template <class Storage>
struct SumAlongTerms {
  using Arguments = SumArguments;
  struct Shared {};
  static constexpr int kThreads = kBlockThreads;
  static constexpr int kMinBlocks = 2;
  static constexpr int kItems = kBlockThreads / kWarp;  // of a block

  static __device__ void run(const Arguments& arguments, Shared&) {
    const Sum& sum = arguments.sum;
    const int lane = threadIdx.x % kWarp;
    const int64_t results = sum.kept.elements, items = results * arguments.chunks;
#pragma unroll 1
    for (int64_t item = static_cast<int64_t>(blockIdx.x) * kItems + threadIdx.x / kWarp;
         item < items; item += static_cast<int64_t>(gridDim.x) * kItems) {
      const int64_t chunk = item / results;
      const Place place(sum.kept, item % results);
      double total = 0;
      Terms<Storage, kWarp>::template add<1>(
          sum.summed, static_cast<const typename Storage::Sample*>(sum.from) + place.from,
          chunk * kSumTerms + lane, arguments.end(chunk), &total);
#pragma unroll
      for (int by = kWarp / 2; by > 0; by /= 2) total += __shfl_xor_sync(kAllLanes, total, by);
      if (lane == 0) arguments.put(total, place, chunk);
    }
  }
};

// A block per chunk of a warp of neighbouring results, its lanes along them.
template <class Storage>
struct SumAlongResults {
  using Arguments = SumArguments;
  static constexpr int kThreads = kBlockThreads;
  static constexpr int kMinBlocks = 2;
  static constexpr int kItems = 1;
  static constexpr int kStrands = kWarp / kBlockWarps;  // of a thread
  static_assert(kStrands == 4);
  struct Shared {
    double sums[2][kBlockWarps][kWarp];
  };

  static __device__ void run(const Arguments& arguments, Shared& shared) {
    const Sum& sum = arguments.sum;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t results = sum.kept.elements, groups = (results + kWarp - 1) / kWarp;
    int turn = 0;
#pragma unroll 1
    for (int64_t item = blockIdx.x; item < groups * arguments.chunks; item += gridDim.x) {
      const int64_t chunk = item / groups, result = item % groups * kWarp + lane;
      const bool there = result < results;
      const Place place(sum.kept, there ? result : 0);
      double strands[kStrands] = {};
      Terms<Storage, kBlockWarps>::template add<kStrands>(
          sum.summed, static_cast<const typename Storage::Sample*>(sum.from) + place.from,
          chunk * kSumTerms + warp, there ? arguments.end(chunk) : 0, strands);
      shared.sums[turn][warp][lane] = (strands[0] + strands[2]) + (strands[1] + strands[3]);
      __syncthreads();
      if (warp == 0 && there) {
        double totals[kBlockWarps];
#pragma unroll
        for (int w = 0; w < kBlockWarps; ++w) totals[w] = shared.sums[turn][w][lane];
#pragma unroll
        for (int by = kBlockWarps / 2; by > 0; by /= 2)
#pragma unroll
          for (int w = 0; w < by; ++w) totals[w] += totals[w + by];
        arguments.put(totals[0], place, chunk);
      }
      turn ^= 1;
    }
  }
};

}  // namespace ema_ext::cuda
