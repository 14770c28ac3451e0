// Samples of a coefficient that varies in time, and of what goes with it, between global memory and
// the kItems consecutive samples of a thread, as float64 or, of aligned halves, as float32.
//
// Three ways, of which each has
//   kTeam     threads per row, in ranks along time; kRows, rows of a block
//   Raw       a tensor's samples on their way
//   fetch     from a tensor of Storage's dtype, or (fetch_any) of a coefficient's
//   spread    to the threads' own samples; beyond the row they are `other`
//   put       to a tensor of Storage's dtype, or (put_any) of any
// whose samples n are those from the team's tile on, of which the row has an Extent. Rows end where
// a multiple of kUnit samples does. fetch_next and spread_next get the sample after each.
#pragma once

#include "cuda/maps.cuh"
#include "cuda/scan.h"
#include "cuda/tile.cuh"

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

// Samples that a row has from a tile on, up to one more than the tile; kInner: so many or none.
template <int kTile, bool kInner>
struct Extent {
  int count;
  __device__ __forceinline__ bool any() const { return count > 0; }
  __device__ __forceinline__ bool whole() const { return kInner || count >= kTile; }
  __device__ __forceinline__ bool has(int n) const { return kInner ? any() : n < count; }
  __device__ __forceinline__ Extent next() const { return {count - 1}; }  // a sample later
};

// One row of a tensor from a sample on.
struct Samples {
  const View& view;
  int64_t row;  // offset in elements
  int64_t first;

  template <class Storage>
  __device__ __forceinline__ typename Storage::Sample* at(int64_t n) const {
    return static_cast<typename Storage::Sample*>(view.data) + row + (first + n) * view.time_stride;
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
// multiple of a chunk; kBackward: time runs against memory.
template <class Storage_, int kThreads, int kOwn, bool kBackward>
class AlignedRows {
 public:
  // As a Tiling, for Stage.
  using Storage = Storage_;
  using Sample = typename Storage::Sample;
  using Acc = typename Storage::Acc;
  static constexpr bool kAligned = true;
  static constexpr int kTeam = kThreads, kItems = kOwn, kTile = kTeam * kItems;
  static constexpr int kLanes = kTeam < kWarp ? kTeam : kWarp;
  static constexpr int kSamples = Chunk<Storage>::kSamples, kChunks = kItems / kSamples;
  static constexpr int kWarpChunks = kLanes * kChunks;

  static constexpr int kRows = 1, kUnit = kSamples;
  static constexpr bool kScattered = false;
  using Scan = MapScan<kLanes, kTeam / kLanes, kRows>;
  struct Shared {
    WarpStage<AlignedRows> stage[kBlockWarps];
  };

  static __device__ __forceinline__ int row() { return thread() / kTeam; }
  static __device__ __forceinline__ int rank() { return thread() % kTeam; }

  using Mover = Stage<AlignedRows, kBackward>;
  using Raw = typename Mover::Raw;

  __device__ __forceinline__ explicit AlignedRows(Shared& shared)
      : stage_(shared.stage[thread() / kWarp]) {}

  template <class E>
  __device__ __forceinline__ Raw fetch(const Samples& from, const E& extent, float = 0) const {
    return fetch_if(extent.whole(), from, extent);
  }
  template <class E>
  __device__ __forceinline__ Raw fetch_any(const Samples& from, const E& extent, float) const {
    return fetch(from, extent);
  }
  template <class E>
  __device__ __forceinline__ Raw fetch_next(const Samples& from, const E& extent) const {
    return fetch(from, extent);
  }

  template <class E, class To>
  __device__ __forceinline__ void spread(const Raw& raw, const Samples& from, const E& extent,
                                         float other, To* to) const {
    stage_.spread(run(from), extent.whole(), chunks(extent.count), raw);
    if (!extent.whole()) {
      const int mine = extent.count / kSamples - rank() * kChunks;
      clear<AlignedRows>(stage_, mine > 0 ? mine : 0, other);
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      Acc items[kSamples];
      stage_.get(c, items);
#pragma unroll
      for (int i = 0; i < kSamples; ++i) to[c * kSamples + i] = items[i];
    }
  }

  // The last of the lanes' is read once more, where it is not of this team's tile or warp.
  template <class E, class To>
  __device__ __forceinline__ void spread_next(const Raw& raw, const Samples& from, const E& extent,
                                              To* to) const {
    spread(raw, from, extent, 0, to);
    const To next = __shfl_down_sync(kAllLanes, to[0], 1, kLanes);
    const int n = (rank() + 1) * kItems;
#pragma unroll
    for (int i = 1; i < kItems; ++i) to[i - 1] = to[i];
    to[kItems - 1] = next;
    if (thread() % kLanes == kLanes - 1 && extent.has(n))
      to[kItems - 1] = static_cast<To>(from.template get<Storage>(n));
  }

  template <class Item, class E>
  __device__ __forceinline__ void put(const Item* items, const Samples& to, const E& extent) const {
    __syncwarp();  // some may still be at a tensor before
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      Acc values[kSamples];
#pragma unroll
      for (int i = 0; i < kSamples; ++i) values[i] = static_cast<Acc>(items[c * kSamples + i]);
      stage_.set(c, values);
    }
    const bool whole = extent.whole() && (kLanes == kWarp || extent.any());
    stage_.put(run(to), whole, whole ? kTile : chunks(extent.count));
  }
  template <class Item, class E>
  __device__ __forceinline__ void put_any(const Item* items, const Samples& to,
                                          const E& extent) const {
    put(items, to, extent);
  }

 private:
  // Of what is not there zeros: of rows beside others in the warp, and, where many samples are held
  // at once, of a tile that is not whole, as what is undefined nvcc keeps in local memory.
  template <class E>
  __device__ __forceinline__ Raw fetch_if(bool whole, const Samples& from, const E& extent) const {
    if constexpr (kLanes == kWarp && sizeof(Sample) > 2) return stage_.fetch(run(from), whole);
    Raw raw;
#pragma unroll
    for (uint4& chunk : raw.chunks) chunk = {0, 0, 0, 0};
    return whole && extent.any() ? stage_.fetch(run(from), true) : raw;
  }
  // Of this warp's share of the tile, or the team's if it is smaller.
  static __device__ __forceinline__ int chunks(int count) {
    return count / kSamples - rank() / kLanes * kWarpChunks;
  }
  __device__ __forceinline__ Run<Sample> run(const Samples& of) const {
    const int64_t n = of.first + rank() / kLanes * (kWarpChunks * kSamples);
    Sample* const begin = static_cast<Sample*>(of.view.data) + of.row;
    return stage_.run(begin, n, kBackward ? -1 : 1);
  }

  const Mover stage_;
};

// Rows of any strides and of a coefficient of any dtype, sample by sample, neighbouring threads
// taking neighbouring samples of a row.
template <class Storage, int kThreads, int kOwn>
class AnyRows {
 public:
  static constexpr int kTeam = kThreads, kRows = 1, kItems = kOwn, kUnit = 1;
  static constexpr bool kAligned = false;
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

  template <class E>
  __device__ __forceinline__ Raw fetch(const Samples& from, const E& extent, float other) const {
    return fetch_as<Storage>(from, extent, other);
  }
  template <class E>
  __device__ __forceinline__ Raw fetch_any(const Samples& from, const E& extent,
                                           float other) const {
    Raw raw;
    with_storage(from.view.dtype,
                 [&](auto storage) { raw = fetch_as<decltype(storage)>(from, extent, other); });
    return raw;
  }
  template <class E>
  __device__ __forceinline__ Raw fetch_next(const Samples& from, const E& extent) const {
    return fetch({from.view, from.row, from.first + 1}, extent.next(), 0);
  }

  template <class E, class To>
  __device__ __forceinline__ void spread(const Raw& raw, const Samples&, const E&, float,
                                         To* to) const {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kItems; ++j) shared_[place(j * kLanes + member_)] = raw.samples[j];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kItems; ++i) to[i] = static_cast<To>(shared_[place(member_ * kItems + i)]);
  }
  template <class E, class To>
  __device__ __forceinline__ void spread_next(const Raw& raw, const Samples& from, const E& extent,
                                              To* to) const {
    spread(raw, from, extent, 0, to);
  }

  template <class Item, class E>
  __device__ __forceinline__ void put(const Item* items, const Samples& to, const E& extent) const {
    stage(items);
    put_as<Storage>(to, extent);
  }
  template <class E>
  __device__ __forceinline__ void put_any(const double* items, const Samples& to,
                                          const E& extent) const {
    stage(items);
    with_storage(to.view.dtype, [&](auto storage) { put_as<decltype(storage)>(to, extent); });
  }

 private:
  static __device__ __forceinline__ int place(int n) { return n + n / kItems; }
  __device__ __forceinline__ int sample(int j) const {
    return (rank() / kLanes * kItems + j) * kLanes + member_;
  }

  template <class Other, class E>
  __device__ __forceinline__ Raw fetch_as(const Samples& from, const E& extent, float other) const {
    Raw raw;
#pragma unroll
    for (int j = 0; j < kItems; ++j)
      raw.samples[j] = extent.has(sample(j)) ? from.template get<Other>(sample(j)) : other;
    return raw;
  }
  template <class Item>
  __device__ __forceinline__ void stage(const Item* items) const {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kItems; ++i) shared_[place(member_ * kItems + i)] = items[i];
    __syncwarp();
  }
  template <class Other, class E>
  __device__ __forceinline__ void put_as(const Samples& to, const E& extent) const {
#pragma unroll
    for (int j = 0; j < kItems; ++j)
      if (extent.has(sample(j)))
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
  static constexpr bool kAligned = false;
  static constexpr bool kScattered = false;
  using Scan = MapScan<1, kBlockWarps, kRows>;
  struct Raw {
    double samples[kItems];
  };
  struct Shared {};

  __device__ explicit Columns(Shared&) {}

  static __device__ __forceinline__ int row() { return threadIdx.x % kWarp; }
  static __device__ __forceinline__ int rank() { return threadIdx.x / kWarp; }

  template <class E>
  __device__ __forceinline__ Raw fetch(const Samples& from, const E& extent, float other) const {
    return fetch_as<Storage>(from, extent, other);
  }
  template <class E>
  __device__ __forceinline__ Raw fetch_any(const Samples& from, const E& extent,
                                           float other) const {
    Raw raw;
    with_storage(from.view.dtype,
                 [&](auto storage) { raw = fetch_as<decltype(storage)>(from, extent, other); });
    return raw;
  }
  template <class E>
  __device__ __forceinline__ Raw fetch_next(const Samples& from, const E& extent) const {
    return fetch({from.view, from.row, from.first + 1}, extent.next(), 0);
  }

  template <class E, class To>
  __device__ __forceinline__ void spread(const Raw& raw, const Samples&, const E&, float,
                                         To* to) const {
#pragma unroll
    for (int i = 0; i < kItems; ++i) to[i] = static_cast<To>(raw.samples[i]);
  }
  template <class E, class To>
  __device__ __forceinline__ void spread_next(const Raw& raw, const Samples& from, const E& extent,
                                              To* to) const {
    spread(raw, from, extent, 0, to);
  }

  template <class Item, class E>
  __device__ __forceinline__ void put(const Item* items, const Samples& to, const E& extent) const {
    put_as<Storage>(items, to, extent);
  }
  template <class E>
  __device__ __forceinline__ void put_any(const double* items, const Samples& to,
                                          const E& extent) const {
    with_storage(to.view.dtype,
                 [&](auto storage) { put_as<decltype(storage)>(items, to, extent); });
  }

 private:
  static __device__ __forceinline__ int sample(int i) { return rank() * kItems + i; }

  template <class Other, class E>
  __device__ __forceinline__ Raw fetch_as(const Samples& from, const E& extent, float other) const {
    Raw raw;
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      raw.samples[i] = extent.has(sample(i)) ? from.template get<Other>(sample(i)) : other;
    return raw;
  }
  template <class Other, class Item, class E>
  __device__ __forceinline__ void put_as(const Item* items, const Samples& to,
                                         const E& extent) const {
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      if (extent.has(sample(i))) to.template set<Other>(sample(i), items[i]);
  }
};

}  // namespace ema_ext::cuda
