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

// The chunks of a thread, of `left` from its first one on: T::kChunks only of the last that there
// is, more where others follow.
template <class T>
__device__ __forceinline__ int own_chunks(int64_t left) {
  return static_cast<int>(left > T::kChunks ? T::kChunks + 1 : left < 0 ? 0 : left);
}

// The last of a thread's samples that are there.
template <class T>
__device__ __forceinline__ typename T::Acc last_of(const typename T::Acc* items, int chunks) {
  typename T::Acc last = items[T::kSamples - 1];
#pragma unroll
  for (int c = 1; c < T::kChunks; ++c)
    if (c < chunks) last = items[c * T::kSamples + T::kSamples - 1];
  return last;
}

// The powers of a row's coefficient, shared by the threads of its team.
template <class T>
struct TilePowers {
  using Acc = typename T::Acc;

  Acc in;
  Acc alpha;                      // of an average
  Acc powers[T::kGroup + 1];      // c^i
  double groups[T::kGroups];      // c^(kGroup i)
  Power<Acc> lanes[T::kSteps];    // over kItems 2^i samples: the lanes of a shuffle
  Power<Acc> warps[kBlockSteps];  // over 2^i warps
  Power<Acc> tile;                // over a tile
  double chunks[T::kChunks + 1];  // c^(kSamples i)

  __device__ explicit TilePowers(const Row<typename T::Storage>& row)
      : in(static_cast<Acc>(row.in)),
        alpha(static_cast<Acc>(row.decay.complement())),
        tile(row.decay.over(T::kTile)) {
    const auto& decay = row.decay;
#pragma unroll 1
    for (int i = 0; i <= T::kGroup; ++i) powers[i] = static_cast<Acc>(decay.power(i));
#pragma unroll 1
    for (int i = 0; i < T::kGroups; ++i) groups[i] = decay.power(i * T::kGroup);
#pragma unroll 1
    for (int i = 0; i < T::kSteps; ++i) lanes[i] = decay.over(T::kItems << i);
#pragma unroll 1
    for (int i = 0; i < kBlockSteps; ++i)
      warps[i] = decay.over(static_cast<int64_t>(T::kItems * T::kLanes) << i);
#pragma unroll 1
    for (int i = 0; i <= T::kChunks; ++i) chunks[i] = decay.power(i * T::kSamples);
  }

  // From the first sample of `threads` threads to the first after them.
  static __device__ Power<Acc> over_threads(int64_t threads, const Decay<Acc>& decay) {
    return decay.over(threads * T::kItems);
  }
};

// q[i]: each group scanned from zero. `first` is the first sample's drive, to which `in` does not
// apply at the start of a row. Returns the thread's aggregate.
template <class T>
__device__ __forceinline__ typename T::Acc scan_groups(const typename T::Acc* x,
                                                       typename T::Acc first,
                                                       const TilePowers<T>& k, typename T::Acc* q) {
  typename T::Acc aggregate = 0;
#pragma unroll
  for (int g = 0; g < T::kItems; g += T::kGroup) {
    q[g] = g == 0 ? first : k.in * x[g];
#pragma unroll
    for (int i = 1; i < T::kGroup; ++i) q[g + i] = fma(k.powers[1], q[g + i - 1], k.in * x[g + i]);
    aggregate = fma(k.powers[T::kGroup], aggregate, q[g + T::kGroup - 1]);
  }
  return aggregate;
}

// s[i] in place of q[i], from the state before the thread's first sample. Each group takes it by a
// power of its own, so that roundings do not add up from group to group; float64, which has fewer
// groups and no wider format, goes from one to the next.
template <class T>
__device__ __forceinline__ void add_state(double state, const TilePowers<T>& k,
                                          typename T::Acc* q) {
  using Acc = typename T::Acc;
  Acc from_zero = 0, before = static_cast<Acc>(state);
#pragma unroll
  for (int g = 0; g < T::kItems; g += T::kGroup) {
    if (g > 0 && sizeof(Acc) == 4)
      before = static_cast<Acc>(fma(k.groups[g / T::kGroup], state, from_zero));
    from_zero = fma(k.powers[T::kGroup], from_zero, q[g + T::kGroup - 1]);
#pragma unroll
    for (int i = 0; i < T::kGroup; ++i) q[g + i] = fma(k.powers[i + 1], before, q[g + i]);
    if (sizeof(Acc) == 8) before = q[g + T::kGroup - 1];
  }
}

// The state before each thread's first sample, and after the tile, were it zero before the tile.
struct FromZero {
  double before;
  double tile;
};

// Scans one value of each of kWidth lanes; `powers` over 1, 2, 4, ... of them.
template <int kWidth, int kSteps, class Acc>
__device__ __forceinline__ double scan_shuffled(double value, const Power<Acc>* powers) {
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const double before = __shfl_up_sync(kAllLanes, value, 1 << i, kWidth);
    if (thread() % kWidth >= 1 << i) value = powers[i].join(value, before);
  }
  return value;
}

// Teams of a warp or less: no barrier.
template <class T>
__device__ __forceinline__ FromZero scan_lanes(double aggregate, const TilePowers<T>& k) {
  aggregate = scan_shuffled<T::kLanes, T::kSteps>(aggregate, k.lanes);
  const double before = __shfl_up_sync(kAllLanes, aggregate, 1, T::kLanes);
  return {thread() % T::kLanes == 0 ? 0 : before,
          __shfl_sync(kAllLanes, aggregate, T::kLanes - 1, T::kLanes)};
}

// The whole block: one barrier. `lane` is over the lanes before this one. `aggregates` is left
// alone until the next call but one.
template <class T>
__device__ __forceinline__ FromZero scan_block(double aggregate, const Power<typename T::Acc>& lane,
                                               const TilePowers<T>& k, double* aggregates) {
  FromZero zero = scan_lanes(aggregate, k);
  if (thread() % kWarp == 0) aggregates[thread() / kWarp] = zero.tile;
  __syncthreads();
  const double warps =
      scan_shuffled<kBlockWarps, kBlockSteps>(aggregates[thread() % kBlockWarps], k.warps);
  const int warp = thread() / kWarp;
  const double before = __shfl_sync(kAllLanes, warps, warp - 1, kBlockWarps);
  zero.tile = __shfl_sync(kAllLanes, warps, kBlockWarps - 1, kBlockWarps);
  if (warp > 0) zero.before = lane.join(zero.before, before);
  return zero;
}

// What a thread's samples contribute to the gradient to alpha, but for the samples after them.
//
// As alpha_sums.h, with kappa for the weight of all that comes later in the forward's time, that is
// earlier in the scan's: kappa[n] = lambda[n] + c * kappa[n+1]. It is scanned like lambda, and then
// every thread adds its own stretch to the gradient, as one put before all that is later.
template <class T>
struct Stretch {
  using Acc = typename T::Acc;
  double share = 0;
  Acc weight = 0, aggregate = 0, reference;

  // From the adjoints s (in units of alpha * lambda) and the forward's x, of which `chunks` chunks
  // are there. Against the scan's time, x runs through the average itself.
  __device__ __forceinline__ Stretch(const Acc* x, const Acc* s, int chunks, const TilePowers<T>& k)
      : reference(last_of<T>(x, chunks)) {
    constexpr int kC = T::kSamples;
#pragma unroll
    for (int c = T::kChunks - 1; c >= 0; --c) {
      if (c >= chunks) continue;
      Acc sum = 0;
#pragma unroll
      for (int i = c * kC + kC - 1; i >= c * kC; --i) {
        const Acc innovation = x[i] - reference - aggregate;
        sum = fma(s[i], innovation, sum);
        aggregate = fma(k.alpha, innovation, aggregate);
      }
      share += sum;
    }
#pragma unroll
    for (int c = 0; c < T::kChunks; ++c) {
      if (c >= chunks) continue;
#pragma unroll
      for (int i = c * kC; i < c * kC + kC; ++i) weight = fma(k.powers[1], weight, s[i]);
    }
  }

  // With kappa and the reference of the samples just before in the scan.
  __device__ __forceinline__ double gradient(double kappa, Acc other) const {
    return share - (aggregate + (static_cast<double>(reference) - other)) * kappa;
  }
};

__device__ __forceinline__ AlphaSums shuffle_down(const AlphaSums& sums, int by, int width) {
  return {__shfl_down_sync(kAllLanes, sums.reference, by, width),
          __shfl_down_sync(kAllLanes, sums.share, by, width),
          __shfl_down_sync(kAllLanes, sums.weight, by, width),
          __shfl_down_sync(kAllLanes, sums.aggregate, by, width),
          __shfl_down_sync(kAllLanes, sums.decay, by, width)};
}

// A sum over the threads of a team of a warp or less, in one order, to all of them.
template <int kLanes>
__device__ __forceinline__ double sum_over_lanes(double value) {
#pragma unroll
  for (int by = kLanes / 2; by > 0; by /= 2) value += __shfl_xor_sync(kAllLanes, value, by, kLanes);
  return value;
}

// The same over a block: one barrier. `warps` is left alone until the next.
__device__ __forceinline__ double sum_over_block(double value, double* warps) {
  value = sum_over_lanes<kWarp>(value);
  if (thread() % kWarp == 0) warps[thread() / kWarp] = value;
  __syncthreads();
  double sum = 0;
#pragma unroll
  for (int w = 0; w < kBlockWarps; ++w) sum += warps[w];
  return sum;
}

}  // namespace ema_ext::cuda
