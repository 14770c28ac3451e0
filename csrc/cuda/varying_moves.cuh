// Samples of a coefficient that varies in time, and of what goes with it, between global memory and
// the kItems consecutive samples of a thread, as float64.
//
// Three ways, of which each has
//   kTeam     threads per row, in ranks along time; kRows, rows of a block
//   Raw       a tensor's samples on their way
//   fetch     from a tensor of Storage's dtype, or (fetch_any) of any
//   spread    to the threads' own samples, 0 beyond the row
//   put       to a tensor of Storage's dtype, or (put_any) of any
// whose samples n are those from the team's tile on, of which the row has `count` or (above a tile)
// more. Rows end where a multiple of kUnit samples does. fetch_next and spread_next get the sample
// after each.
#pragma once

#include "cuda/maps.cuh"
#include "cuda/scan.h"

namespace ema_ext::cuda {

// Calls f with the Storage of a dtype.
template <class F>
__device__ __forceinline__ void with_storage(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat64:
      return f(Float64{});
    case Dtype::kFloat32:
      return f(Float32{});
    case Dtype::kFloat16:
      return f(Float16{});
    case Dtype::kBFloat16:
      return f(BFloat16{});
  }
}

// One row of a tensor from a sample on.
struct Samples {
  const View& view;
  int64_t first;  // offset in elements

  __device__ Samples(const View& view, int64_t row, int64_t n)
      : view(view), first(row + n * view.time_stride) {}

  template <class Storage>
  __device__ __forceinline__ typename Storage::Sample* at(int64_t n) const {
    return static_cast<typename Storage::Sample*>(view.data) + first + n * view.time_stride;
  }
  // The n'th in memory, whichever way time runs.
  template <class Storage>
  __device__ __forceinline__ typename Storage::Sample* at_contiguous(int64_t n) const {
    return static_cast<typename Storage::Sample*>(view.data) + first + n;
  }
  template <class Storage>
  __device__ __forceinline__ double get(int64_t n) const {
    return Storage::get(*at<Storage>(n));
  }
  template <class Storage>
  __device__ __forceinline__ void set(int64_t n, double value) const {
    *at<Storage>(n) = Storage::put(static_cast<typename Storage::Acc>(value));
  }
};

// Rows whose chunks lie on multiples of 16 bytes, along time, in every tensor; the length is a
// multiple of a chunk. A coefficient that is constant has a time stride of 0 and any dtype.
//
// Chunks pass through shared memory, where those of a thread are each in a bank group of its own.
template <class Storage, int kThreads, int kOwn>
class AlignedRows {
 public:
  static constexpr int kTeam = kThreads, kRows = 1, kItems = kOwn;
  static constexpr bool kScattered = false;
  static constexpr int kLanes = kTeam < kWarp ? kTeam : kWarp;
  static constexpr int kC = Chunk<Storage>::kSamples, kUnit = kC;
  static constexpr int kChunks = kItems / kC;
  using Scan = MapScan<kLanes, kTeam / kLanes, kRows>;
  struct Raw {
    uint4 chunks[kChunks];
  };
  struct Shared {
    uint4 chunks[kBlockWarps][kWarp * kChunks];
  };

  __device__ explicit AlignedRows(Shared& shared)
      : shared_(shared.chunks[threadIdx.x / kWarp]),
        lane_(threadIdx.x % kWarp),
        member_(threadIdx.x % kLanes) {}

  static __device__ __forceinline__ int row() { return threadIdx.x / kTeam; }
  static __device__ __forceinline__ int rank() { return threadIdx.x % kTeam; }

  __device__ __forceinline__ Raw fetch(const Samples& from, int count) const {
    const int left = count - own_chunk() * kC;
    const uint4* const source = address(from);
    Raw raw;
#pragma unroll
    for (int j = 0; j < kChunks; ++j)
      raw.chunks[j] = j * kLanes * kC < left ? source[j * step(from)] : uint4{0, 0, 0, 0};
    return raw;
  }
  __device__ __forceinline__ Raw fetch_any(const Samples& from, int count) const {
    return from.view.time_stride != 0 ? fetch(from, count) : Raw{};
  }
  __device__ __forceinline__ Raw fetch_next(const Samples& from, int count) const {
    return fetch(from, count);
  }

  __device__ __forceinline__ void spread_any(const Raw& raw, const Samples& from,
                                             double* to) const {
    if (from.view.time_stride != 0) return spread(raw, from, to);
    const double value = read(from.view.data, from.view.dtype, from.first);
#pragma unroll
    for (int i = 0; i < kItems; ++i) to[i] = value;
  }
  __device__ __forceinline__ void spread(const Raw& raw, const Samples& from, double* to) const {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kChunks; ++j)
      shared_[moved(j)] = Chunk<Storage>::turned(raw.chunks[j], order(from));
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      typename Storage::Acc items[kC];
      Chunk<Storage>::unpack(shared_[own(j)], items);
#pragma unroll
      for (int i = 0; i < kC; ++i) to[j * kC + i] = items[i];
    }
  }

  // The last of the lanes' is read once more, where it is not of this team's tile or warp.
  __device__ __forceinline__ void spread_next(const Raw& raw, const Samples& from, int count,
                                              double* to) const {
    spread(raw, from, to);
    const double next = __shfl_down_sync(kAllLanes, to[0], 1, kLanes);
    const int n = (rank() + 1) * kItems;
#pragma unroll
    for (int i = 1; i < kItems; ++i) to[i - 1] = to[i];
    to[kItems - 1] = next;
    if (member_ == kLanes - 1 && n < count) to[kItems - 1] = from.template get<Storage>(n);
  }

  __device__ __forceinline__ void put(const double* items, const Samples& to, int count) const {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      typename Storage::Acc values[kC];
#pragma unroll
      for (int i = 0; i < kC; ++i)
        values[i] = static_cast<typename Storage::Acc>(items[j * kC + i]);
      shared_[own(j)] = Chunk<Storage>::turned(Chunk<Storage>::pack(values), order(to));
    }
    __syncwarp();
    const int left = count - own_chunk() * kC;
    uint4* const target = address(to);
#pragma unroll
    for (int j = 0; j < kChunks; ++j)
      if (j * kLanes * kC < left) target[j * step(to)] = shared_[moved(j)];
  }
  __device__ __forceinline__ void put_any(const double* items, const Samples& to, int count) const {
    put(items, to, count);
  }

 private:
  // Where in the warp's stage the j'th chunk lies that this thread moves, and the j'th of its own.
  // Each eight of them, which one access takes, are in different banks both ways.
  __device__ __forceinline__ int moved(int j) const {
    if constexpr (kLanes == kWarp)
      return (lane_ ^ (lane_ / 8 % kChunks)) + j * kWarp;
    else
      return (lane_ / 8 * kChunks + j) * 8 + (member_ ^ j);
  }
  __device__ __forceinline__ int own(int j) const {
    return (lane_ * kChunks + lane_ * kChunks / 8 % kChunks) ^ j;
  }
  static_assert(kLanes == kWarp || kLanes == 8);
  static_assert(kChunks == 1 || kChunks == 2 || kChunks == 4);

  static __device__ __forceinline__ unsigned order(const Samples& of) {
    return Chunk<Storage>::order(of.view.time_stride < 0);
  }

  // Of the team's tile, the first chunk that this thread moves; the others are each kLanes later.
  __device__ __forceinline__ int own_chunk() const {
    return rank() / kLanes * kLanes * kChunks + member_;
  }
  __device__ __forceinline__ uint4* address(const Samples& of) const {
    const int n = own_chunk() * kC;
    return reinterpret_cast<uint4*>(
        of.template at_contiguous<Storage>(of.view.time_stride < 0 ? -n - (kC - 1) : n));
  }
  static __device__ __forceinline__ int step(const Samples& of) {
    return of.view.time_stride < 0 ? -kLanes : kLanes;
  }

  uint4* shared_;
  int lane_, member_;
};

// Rows of any strides and of a coefficient of any dtype, sample by sample, neighbouring threads
// taking neighbouring samples of a row.
template <class Storage, int kThreads, int kOwn>
class AnyRows {
 public:
  static constexpr int kTeam = kThreads, kRows = 1, kItems = kOwn, kUnit = 1;
  static constexpr bool kScattered = true;  // each row's samples are moved one by one
  static constexpr int kLanes = kTeam < kWarp ? kTeam : kWarp;
  using Scan = MapScan<kLanes, kTeam / kLanes, kRows>;
  struct Raw {
    double samples[kItems];
  };
  struct Shared {
    double samples[kBlockWarps][kWarp * (kItems + 1)];
  };

  __device__ explicit AnyRows(Shared& shared)
      : shared_(shared.samples[threadIdx.x / kWarp] +
                threadIdx.x % kWarp / kLanes * kLanes * (kItems + 1)),
        member_(threadIdx.x % kLanes) {}

  static __device__ __forceinline__ int row() { return threadIdx.x / kTeam; }
  static __device__ __forceinline__ int rank() { return threadIdx.x % kTeam; }

  __device__ __forceinline__ Raw fetch(const Samples& from, int count) const {
    return fetch_as<Storage>(from, count);
  }
  __device__ __forceinline__ Raw fetch_any(const Samples& from, int count) const {
    Raw raw;
    with_storage(from.view.dtype,
                 [&](auto storage) { raw = fetch_as<decltype(storage)>(from, count); });
    return raw;
  }
  __device__ __forceinline__ Raw fetch_next(const Samples& from, int count) const {
    return fetch(Samples(from.view, from.first, 1), count - 1);
  }

  __device__ __forceinline__ void spread_any(const Raw& raw, const Samples& from,
                                             double* to) const {
    spread(raw, from, to);
  }
  __device__ __forceinline__ void spread(const Raw& raw, const Samples&, double* to) const {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kItems; ++j) shared_[place(j * kLanes + member_)] = raw.samples[j];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kItems; ++i) to[i] = shared_[place(member_ * kItems + i)];
  }
  __device__ __forceinline__ void spread_next(const Raw& raw, const Samples& from, int,
                                              double* to) const {
    spread(raw, from, to);
  }

  __device__ __forceinline__ void put(const double* items, const Samples& to, int count) const {
    stage(items);
    put_as<Storage>(to, count);
  }
  __device__ __forceinline__ void put_any(const double* items, const Samples& to, int count) const {
    stage(items);
    with_storage(to.view.dtype, [&](auto storage) { put_as<decltype(storage)>(to, count); });
  }

 private:
  static __device__ __forceinline__ int place(int n) { return n + n / kItems; }
  __device__ __forceinline__ int sample(int j) const {
    return (rank() / kLanes * kItems + j) * kLanes + member_;
  }

  template <class Other>
  __device__ __forceinline__ Raw fetch_as(const Samples& from, int count) const {
    Raw raw;
#pragma unroll
    for (int j = 0; j < kItems; ++j)
      raw.samples[j] = sample(j) < count ? from.template get<Other>(sample(j)) : 0;
    return raw;
  }
  __device__ __forceinline__ void stage(const double* items) const {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kItems; ++i) shared_[place(member_ * kItems + i)] = items[i];
    __syncwarp();
  }
  template <class Other>
  __device__ __forceinline__ void put_as(const Samples& to, int count) const {
#pragma unroll
    for (int j = 0; j < kItems; ++j)
      if (sample(j) < count)
        to.template set<Other>(sample(j), shared_[place(j * kLanes + member_)]);
  }

  double* shared_;
  int member_;
};

// Rows side by side: a warp's lanes are rows, the warps of a block follow one another in time.
template <class Storage, int kOwn>
class Columns {
 public:
  static constexpr int kTeam = kBlockWarps, kRows = kWarp, kItems = kOwn, kUnit = 1;
  static constexpr bool kScattered = false;
  using Scan = MapScan<1, kBlockWarps, kRows>;
  struct Raw {
    double samples[kItems];
  };
  struct Shared {};

  __device__ explicit Columns(Shared&) {}

  static __device__ __forceinline__ int row() { return threadIdx.x % kWarp; }
  static __device__ __forceinline__ int rank() { return threadIdx.x / kWarp; }

  __device__ __forceinline__ Raw fetch(const Samples& from, int count) const {
    return fetch_as<Storage>(from, count);
  }
  __device__ __forceinline__ Raw fetch_any(const Samples& from, int count) const {
    Raw raw;
    with_storage(from.view.dtype,
                 [&](auto storage) { raw = fetch_as<decltype(storage)>(from, count); });
    return raw;
  }
  __device__ __forceinline__ Raw fetch_next(const Samples& from, int count) const {
    return fetch(Samples(from.view, from.first, 1), count - 1);
  }

  __device__ __forceinline__ void spread_any(const Raw& raw, const Samples& from,
                                             double* to) const {
    spread(raw, from, to);
  }
  __device__ __forceinline__ void spread(const Raw& raw, const Samples&, double* to) const {
#pragma unroll
    for (int i = 0; i < kItems; ++i) to[i] = raw.samples[i];
  }
  __device__ __forceinline__ void spread_next(const Raw& raw, const Samples& from, int,
                                              double* to) const {
    spread(raw, from, to);
  }

  __device__ __forceinline__ void put(const double* items, const Samples& to, int count) const {
    put_as<Storage>(items, to, count);
  }
  __device__ __forceinline__ void put_any(const double* items, const Samples& to, int count) const {
    with_storage(to.view.dtype, [&](auto storage) { put_as<decltype(storage)>(items, to, count); });
  }

 private:
  static __device__ __forceinline__ int sample(int i) { return rank() * kItems + i; }

  template <class Other>
  __device__ __forceinline__ Raw fetch_as(const Samples& from, int count) const {
    Raw raw;
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      raw.samples[i] = sample(i) < count ? from.template get<Other>(sample(i)) : 0;
    return raw;
  }
  template <class Other>
  __device__ __forceinline__ void put_as(const double* items, const Samples& to, int count) const {
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      if (sample(i) < count) to.template set<Other>(sample(i), items[i]);
  }
};

}  // namespace ema_ext::cuda
