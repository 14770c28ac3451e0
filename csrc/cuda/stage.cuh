// Samples between global memory, where neighbouring threads read neighbouring 16 bytes, and
// registers, where a thread holds chunks that follow one another in time.
//
// A warp passes them through shared memory, where one chunk in nine is left out, so that both sides
// go without bank conflicts.
#pragma once

#include "cuda/tiling.cuh"

namespace ema_ext::cuda {

template <class T>
struct WarpStage {
  static constexpr int kBanks = 8;  // of 16 bytes
  static constexpr __host__ __device__ int place(int chunk) { return chunk + chunk / kBanks; }
  uint4 chunks[place(kWarp * T::kChunks)];
};

// Where a thread finds the samples of a tile that it moves: the first of them in memory.
template <class Sample>
struct Run {
  Sample* first;
  int64_t stride;
};

// How samples are moved. Aligned: 16 bytes at a time; the stride is 1, or -1 with kBackward, and
// each chunk lies on a multiple of 16 bytes. Otherwise sample by sample, for any stride.
template <class T, bool kBackward>
class Stage {
 public:
  using Sample = typename T::Sample;
  using Acc = typename T::Acc;
  using C = Chunk<typename T::Storage>;
  using Place = WarpStage<T>;

  // What is on its way from global memory to the registers of this warp.
  struct Raw {
    __device__ Raw() {}
    uint4 chunks[T::kAligned ? T::kChunks : 1];
    Sample samples[T::kAligned ? 1 : T::kItems];
  };

  __device__ __forceinline__ explicit Stage(WarpStage<T>& shared)
      : shared_(shared),
        blocked_(shared.chunks + Place::place(thread() % kWarp * T::kChunks)),
        striped_(shared.chunks + Place::place(team() + member())) {}

  // Of a tensor's row whose tile begins at `begin`, as far as this warp, or this team if it is
  // smaller, is concerned.
  __device__ __forceinline__ Run<Sample> run(const Sample* row, int64_t begin,
                                             int64_t stride) const {
    auto* const samples = const_cast<Sample*>(row);
    if constexpr (!T::kAligned) return {samples + (begin + member()) * stride, stride};
    begin += T::kSamples * member();
    return {samples + (kBackward ? -begin - (T::kSamples - 1) : begin), stride};
  }
  // That of the next tile.
  static __device__ __forceinline__ void advance(Run<Sample>& run) {
    run.first += T::kAligned ? (kBackward ? -T::kTile : T::kTile) : run.stride * T::kTile;
  }

  // That of the tile so many after.
  static __device__ __forceinline__ Run<Sample> at(const Run<Sample>& run, int64_t tile) {
    return {run.first +
                tile * (T::kAligned ? (kBackward ? -T::kTile : T::kTile) : run.stride * T::kTile),
            run.stride};
  }

  // A tile ahead of its `spread`, if it is whole; undefined if it is not.
  __device__ __forceinline__ Raw fetch(const Run<Sample>& run, bool whole = true) const {
    Raw raw;
    if (!whole) return raw;
    if constexpr (T::kAligned) {
#pragma unroll
      for (int j = 0; j < T::kChunks; ++j) raw.chunks[j] = *chunk(run, j);
    } else {
#pragma unroll
      for (int j = 0; j < T::kItems; ++j) raw.samples[j] = run.first[j * T::kLanes * run.stride];
    }
    return raw;
  }

  // To where the threads that own them can get at them: what was fetched, if the tile is whole,
  // else from memory the first `chunks` chunks; what is not there keeps some former value, for
  // `fill` to change. If the tile is whole, fetches that of `next` as well.
  template <class Fill>
  __device__ __forceinline__ void spread(const Run<Sample>& run, bool whole, int chunks, Raw& raw,
                                         const Run<Sample>* next, const Fill& fill) const {
    __syncwarp();
    if (whole) {
      if constexpr (T::kAligned) {
#pragma unroll
        for (int j = 0; j < T::kChunks; ++j) *striped(j) = raw.chunks[j];
      } else {
#pragma unroll
        for (int j = 0; j < T::kItems; ++j) *sample(j * T::kLanes + member()) = raw.samples[j];
      }
      if (next != nullptr) raw = fetch(*next);
      __syncwarp(lanes());
    } else {
      move(run, chunks, [](auto& stored, auto& in_memory) { stored = in_memory; });
      __syncwarp(lanes());
      fill();
    }
  }

  __device__ __forceinline__ void spread(const Run<Sample>& run, bool whole, int chunks,
                                         Raw raw) const {
    spread(run, whole, chunks, raw, nullptr, [] {});
  }

  // This thread's k'th chunk of what was spread.
  __device__ __forceinline__ void get(int k, Acc* items) const {
    C::template unpack<kTurned>(*blocked(k), items);
  }
  // In its place; the thread alone has read it.
  template <bool kMindsNaN = true>
  __device__ __forceinline__ void set(int k, const Acc* items) const {
    *blocked(k) = C::template pack<kTurned, kMindsNaN>(items);
  }
  // The last sample of a chunk.
  __device__ __forceinline__ Acc last_of(int k) const {
    const auto* const samples = reinterpret_cast<const Sample*>(blocked(k));
    return T::Storage::get(samples[kTurned ? 0 : T::kSamples - 1]);
  }

  // What was set, to memory.
  __device__ __forceinline__ void put(const Run<Sample>& run, bool whole, int chunks) const {
    __syncwarp();
    if (!whole) {
      move(run, chunks, [](auto& stored, auto& in_memory) { in_memory = stored; });
    } else if constexpr (T::kAligned) {
#pragma unroll
      for (int j = 0; j < T::kChunks; ++j) *chunk(run, j) = *striped(j);
    } else {
#pragma unroll
      for (int j = 0; j < T::kItems; ++j)
        run.first[j * T::kLanes * run.stride] = *sample(j * T::kLanes + member());
    }
  }

 private:
  // The chunks or samples that there are of a tile, one after the other.
  template <class Move>
  __device__ __forceinline__ void move(const Run<Sample>& run, int chunks,
                                       const Move& move_one) const {
    if constexpr (T::kAligned) {
#pragma unroll 1
      for (int j = 0; j < T::kChunks && j * T::kLanes + member() < chunks; ++j)
        move_one(*striped(j), *chunk(run, j));
    } else {
#pragma unroll 1
      for (int n = member(); n < T::kItems * T::kLanes && n < chunks * T::kSamples; n += T::kLanes)
        move_one(*sample(n), run.first[(n - member()) * run.stride]);
    }
  }

  static constexpr bool kTurned = T::kAligned && kBackward;  // chunks lie in memory's order

  static __device__ __forceinline__ uint4* chunk(const Run<Sample>& run, int j) {
    constexpr int kHop = T::kLanes * T::kSamples;
    return reinterpret_cast<uint4*>(run.first + j * (kBackward ? -kHop : kHop));
  }

  // Chunk k of this thread; chunk j of those that it moves; sample n of its team.
  __device__ __forceinline__ uint4* blocked(int k) const { return blocked_ + k; }
  __device__ __forceinline__ uint4* striped(int j) const {
    return striped_ + Place::place(j * T::kLanes);
  }
  __device__ __forceinline__ Sample* sample(int n) const {
    return reinterpret_cast<Sample*>(shared_.chunks + Place::place(team() + n / T::kSamples)) +
           n % T::kSamples;
  }
  static_assert(Place::kBanks % T::kChunks == 0 && T::kLanes % Place::kBanks == 0);

  // Those of this thread's team, which all have a whole tile or none.
  static __device__ __forceinline__ unsigned lanes() {
    if constexpr (T::kLanes == kWarp) return kAllLanes;
    return ((1u << T::kLanes % kWarp) - 1) << (thread() % kWarp - member());
  }

  // This thread in its team, and the team's first chunk in the warp.
  static __device__ __forceinline__ int member() { return thread() % T::kLanes; }
  static __device__ __forceinline__ int team() {
    return (thread() % kWarp - member()) * T::kChunks;
  }

  WarpStage<T>& shared_;
  uint4 *const blocked_, *const striped_;
};

}  // namespace ema_ext::cuda
