// The scan of a tile: the samples that a team of threads holds at once, kItems consecutive ones
// each.
//
// Four steps, after Blelloch (1990) with the coefficient's powers known beforehand:
//   groups  each thread scans groups of kGroup samples from zero, in Acc, with products of c
//   thread  the groups' last samples joined by c^kGroup: the thread's aggregate
//   team    aggregates scanned over the warp by shuffles, over the block by shared memory, in
//   float64 carry   y[i] = q[i] + c^(i + 1) * s, s the state before the group
// Only groups and their joints are rounded to Acc, so the error grows with neither length nor
// 1 / alpha.
#pragma once

#include "cuda/row.cuh"
#include "cuda/stage.cuh"

namespace ema_ext::cuda {

// The chunks of a thread, of `left` from its first one on: kThreadChunks only of the last that
// there is, more where others follow.
__device__ __forceinline__ int own_chunks(int64_t left) {
  return static_cast<int>(left > kThreadChunks ? kThreadChunks + 1 : left < 0 ? 0 : left);
}

template <class Storage>
constexpr int kGroup = Chunk<Storage>::kSamples < 4 ? Chunk<Storage>::kSamples : 4;

template <class Storage, int kTeam>
struct TileShape {
  static constexpr int kItems = kThreadChunks * Chunk<Storage>::kSamples;
  static constexpr int kLanes = kTeam < kWarp ? kTeam : kWarp;
  static constexpr int kWarps = kTeam / kLanes;
  static constexpr int kTile = kTeam * kItems;
  static constexpr int kSteps = kLanes == 32 ? 5 : kLanes == 16 ? 4 : 3;
  static_assert(kLanes == 1 << kSteps);
};

// The powers of a row's coefficient, shared by the threads of its team.
template <class Storage, int kTeam>
struct TilePowers {
  using Acc = typename Storage::Acc;
  using Shape = TileShape<Storage, kTeam>;

  Acc in, out;
  Acc alpha;                        // of an average
  Acc powers[kGroup<Storage> + 1];  // c^i
  double steps[Shape::kSteps];      // c^(kItems 2^i): over the lanes of a shuffle
  double warp;                      // c^(kItems kLanes): over a warp
  double tile, drop;                // over a tile, and 1 less it
  bool forgets;                     // c = 0

  __device__ explicit TilePowers(const Row<Storage>& row)
      : in(static_cast<Acc>(row.in)),
        out(static_cast<Acc>(row.out)),
        alpha(static_cast<Acc>(row.decay.complement())),
        warp(row.decay.power(Shape::kItems * Shape::kLanes)),
        tile(row.decay.power(Shape::kTile)),
        drop(row.decay.drop(Shape::kTile)),
        forgets(row.decay.ratio() == 0) {
#pragma unroll 1
    for (int i = 0; i <= kGroup<Storage>; ++i) powers[i] = static_cast<Acc>(row.decay.power(i));
#pragma unroll 1
    for (int i = 0; i < Shape::kSteps; ++i) steps[i] = row.decay.power(Shape::kItems << i);
  }

  // From the first sample of `threads` threads to the first after them.
  __device__ double over_threads(int threads, const Decay<Acc>& decay) const {
    return decay.power(static_cast<int64_t>(threads) * Shape::kItems);
  }

  // Over the first chunks of a thread, fewer than it has room for.
  __device__ double over_chunks(int chunks) const {
    double chunk = 1;
#pragma unroll
    for (int g = 0; g < Chunk<Storage>::kSamples; g += kGroup<Storage>)
      chunk *= powers[kGroup<Storage>];
    double power = 1;
#pragma unroll
    for (int c = 0; c < kThreadChunks; ++c)
      if (c < chunks) power *= chunk;
    return power;
  }

  // power * state, as step by step: a power that underflows leaves an infinite state infinite.
  __device__ __forceinline__ double carried(double power, double state) const {
    if (finite(state)) return power * state;
    return (forgets ? 0 : copysign(1.0, power)) * state;
  }
};

// q[i]: each group scanned from zero. `drive` is the first sample's, as `in` does not apply to it
// at the start of a row. Returns the thread's aggregate.
template <class Storage, int kTeam>
__device__ __forceinline__ typename Storage::Acc scan_groups(const typename Storage::Acc* x,
                                                             typename Storage::Acc first,
                                                             const TilePowers<Storage, kTeam>& k,
                                                             typename Storage::Acc* q) {
  constexpr int kG = kGroup<Storage>;
  typename Storage::Acc aggregate = 0;
#pragma unroll
  for (int g = 0; g < TileShape<Storage, kTeam>::kItems; g += kG) {
    q[g] = g == 0 ? first : k.in * x[g];
#pragma unroll
    for (int i = 1; i < kG; ++i) q[g + i] = fma(k.powers[1], q[g + i - 1], k.in * x[g + i]);
    aggregate = fma(k.powers[kG], aggregate, q[g + kG - 1]);
  }
  return aggregate;
}

// s[i] in place of q[i], from the state before the thread's first sample.
template <class Storage, int kTeam>
__device__ __forceinline__ void add_state(typename Storage::Acc state,
                                          const TilePowers<Storage, kTeam>& k,
                                          typename Storage::Acc* q) {
  constexpr int kG = kGroup<Storage>;
#pragma unroll
  for (int g = 0; g < TileShape<Storage, kTeam>::kItems; g += kG) {
#pragma unroll
    for (int i = 0; i < kG; ++i) q[g + i] = fma(k.powers[i + 1], state, q[g + i]);
    state = q[g + kG - 1];
  }
}

// The state before each thread's first sample, and after the tile, were it zero before the tile.
struct FromZero {
  double before;
  double tile;
};

// Teams of a warp or less: no barrier.
template <class Storage, int kTeam>
__device__ __forceinline__ FromZero scan_lanes(double aggregate,
                                               const TilePowers<Storage, kTeam>& k) {
  using K = TileShape<Storage, kTeam>;
  const int rank = thread() % K::kLanes;
#pragma unroll
  for (int i = 0; i < K::kSteps; ++i) {
    const double before = __shfl_up_sync(kAllLanes, aggregate, 1 << i, K::kLanes);
    if (rank >= 1 << i) aggregate += k.carried(k.steps[i], before);
  }
  const double before = __shfl_up_sync(kAllLanes, aggregate, 1, K::kLanes);
  return {rank == 0 ? 0 : before, __shfl_sync(kAllLanes, aggregate, K::kLanes - 1, K::kLanes)};
}

// The whole block: one barrier. `aggregates` is left alone until the next call but one.
template <class Storage, int kTeam>
__device__ __forceinline__ FromZero scan_block(double aggregate, double lane_power,
                                               const TilePowers<Storage, kTeam>& k,
                                               double* aggregates) {
  using K = TileShape<Storage, kTeam>;
  const int warp = thread() / kWarp;
  FromZero zero = scan_lanes(aggregate, k);
  if (thread() % kWarp == 0) aggregates[warp] = zero.tile;
  __syncthreads();
  double before = 0;
  zero.tile = 0;
#pragma unroll
  for (int w = 0; w < K::kWarps; ++w) {
    if (w == warp) before = zero.tile;
    zero.tile = aggregates[w] + k.carried(k.warp, zero.tile);
  }
  zero.before += k.carried(lane_power, before);
  return zero;
}

// The gradient to alpha of a thread's samples, from their adjoints s (in units of alpha * lambda)
// and the forward's x, of which `chunks` chunks are there. Against the scan's time, from the last
// sample to the first, x runs through the average itself.
template <class Storage, int kTeam>
__device__ __forceinline__ AlphaSums alpha_sums(const typename Storage::Acc* x,
                                                const typename Storage::Acc* s, int chunks,
                                                const TilePowers<Storage, kTeam>& k) {
  using Acc = typename Storage::Acc;
  constexpr int kG = kGroup<Storage>, kC = Chunk<Storage>::kSamples;
  constexpr int kItems = TileShape<Storage, kTeam>::kItems;
  AlphaSums sums;
  Acc reference = x[kC - 1];
#pragma unroll
  for (int c = 1; c < kThreadChunks; ++c)
    if (c < chunks) reference = x[c * kC + kC - 1];
  Acc weight = 0, q = 0;
#pragma unroll
  for (int g = 0; g < kItems; g += kG) {
    if (g / kC < chunks) {
      Acc w = s[g];
#pragma unroll
      for (int i = 1; i < kG; ++i) w = fma(k.powers[1], w, s[g + i]);
      weight = fma(k.powers[kG], weight, w);
    }
  }
#pragma unroll
  for (int g = kItems - kG; g >= 0; g -= kG) {
    if (g / kC < chunks) {
      Acc share = 0, own = 0;  // own: the group's average from zero
#pragma unroll
      for (int i = kG - 1; i >= 0; --i) {
        const Acc from_reference = x[g + i] - reference;
        const Acc before = fma(k.powers[kG - 1 - i], q, own);
        share = fma(s[g + i], from_reference - before, share);
        own = fma(k.powers[1], own, k.alpha * from_reference);
      }
      q = fma(k.powers[kG], q, own);
      sums.share += share;
    }
  }
  sums.reference = reference;
  sums.weight = weight;
  sums.aggregate = q;
  sums.decay = chunks >= kThreadChunks ? k.steps[0] : k.over_chunks(chunks);
  return sums;
}

__device__ __forceinline__ AlphaSums shuffle_down(const AlphaSums& sums, int by, int width) {
  return {__shfl_down_sync(kAllLanes, sums.reference, by, width),
          __shfl_down_sync(kAllLanes, sums.share, by, width),
          __shfl_down_sync(kAllLanes, sums.weight, by, width),
          __shfl_down_sync(kAllLanes, sums.aggregate, by, width),
          __shfl_down_sync(kAllLanes, sums.decay, by, width)};
}

// The stretches of the first `count` threads of a team of kLanes, joined in the first.
template <int kLanes>
__device__ __forceinline__ AlphaSums join_lanes(AlphaSums sums, int count) {
  const int rank = thread() % kLanes;
#pragma unroll
  for (int by = 1; by < kLanes; by *= 2) {
    const AlphaSums past = shuffle_down(sums, by, kLanes);
    if (rank + by < count) sums.prepend(past);
  }
  return sums;
}

}  // namespace ema_ext::cuda
