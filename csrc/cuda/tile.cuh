// The scan of a tile: the samples that a team of threads holds at once, kItems consecutive ones
// each.
//
// Four steps, after Blelloch (1990) with the coefficient's powers known beforehand:
//   groups  each thread scans groups of kGroup samples from zero, in Acc, with products of c
//   thread  the groups' last samples joined by c^kGroup: the thread's aggregate
//   team    aggregates scanned over the warp by shuffles, over the block by shared memory, in
//           float64
//   carry   y[i] = q[i] + c^(i + 1) * s, s the state before the group
// Only groups and their joints are rounded to Acc, so the error grows with neither length nor
// 1 / alpha.
//
// For the gradient to alpha (alpha_sums.h) kappa is scanned beside: the weight of all that comes
// later in the forward's time, that is earlier in the scan's, kappa[n] = s[n] + c * kappa[n-1].
// Over k samples a state before them adds c^k to the state after and k * c^k to the kappa after, so
// both are scanned at once, before either is known.
#pragma once

#include <type_traits>

#include "cuda/row.cuh"
#include "cuda/stage.cuh"

namespace ema_ext::cuda {

// The last of a thread's samples that are there, in `chunks` chunks.
template <class T>
__device__ __forceinline__ typename T::Acc last_of(const typename T::Acc* items, int chunks) {
  typename T::Acc last = items[T::kSamples - 1];
#pragma unroll
  for (int c = 1; c < T::kChunks; ++c)
    if (c < chunks) last = items[c * T::kSamples + T::kSamples - 1];
  return last;
}

// What a stretch of samples, scanned from zero, ends at; kappa only where T::kGradient.
template <class Value>
struct Ends {
  Value state, kappa;
};

// `past` before `later`, which has `samples`, by the power of as many.
template <class T, class Join>
__device__ __forceinline__ Ends<double> joined(const Ends<double>& later, const Ends<double>& past,
                                               double samples, const Join& join) {
  Ends<double> ends;
  ends.state = join(later.state, past.state);
  if constexpr (T::kGradient) ends.kappa = join(later.kappa, fma(samples, past.state, past.kappa));
  return ends;
}
template <class T>
__device__ __forceinline__ Ends<double> joined(const Ends<double>& later, const Ends<double>& past,
                                               double samples,
                                               const Power<typename T::Acc>& power) {
  return joined<T>(later, past, samples,
                   [&](double aggregate, double state) { return power.join(aggregate, state); });
}

// Powers for a scan over kWidth lanes that end at `samples` samples each: by products where that
// is safe, that is for finite values and powers that do not underflow; else by Power's laws.
template <class Acc, int kWidth, int kSteps, bool kTable>
struct LanePowers {
  // Over 1, 2, 4, ... lanes; with kTable of each lane up to the middle one, which stands for those
  // after it, and 0 where there are none so many before it.
  static constexpr int kLast = kTable ? kWidth / 2 : 0;
  double products[kSteps][kLast + 1];
  Power<Acc> powers[kSteps];
  bool underflow;

  __device__ LanePowers(const Decay<Acc>& decay, int64_t samples) {
    constexpr double kLeast = 1e-290;
#pragma unroll 1
    for (int i = 0; i < kSteps; ++i) {
      powers[i] = decay.over(samples << i);
      products[i][kLast] = decay.power(samples << i);
    }
    underflow = sizeof(Acc) == 8 && fabs(products[kSteps - 1][kLast]) < kLeast;
  }

  // The constructor's last lane, to another one.
  __device__ void fill(int lane) {
    if constexpr (kTable) {
      if (lane >= kLast) return;
#pragma unroll 1
      for (int i = 0; i < kSteps; ++i) products[i][lane] = lane >= 1 << i ? products[i][kLast] : 0;
    }
  }

  __device__ __forceinline__ double product(int i, int lane) const {
    if constexpr (kTable) return products[i][lane < kLast ? lane : kLast];
    return lane >= 1 << i ? products[i][0] : 0;
  }
};

// The powers of a row's coefficient, shared by the threads of its team.
template <class T>
struct TilePowers {
  using Acc = typename T::Acc;
  using Warps = LanePowers<Acc, kBlockWarps, kBlockSteps, true>;
  // Whether each group takes the state before the thread by a power of its own: see add_state.
  static constexpr bool kOwnPowers = sizeof(typename T::Sample) == 4;
  struct None {
    __device__ None(const Decay<Acc>&, int64_t) {}
    __device__ void fill(int) {}
  };

  Acc in;
  Acc alpha;                                                        // of an average
  Acc powers[T::kGroup + 1];                                        // c^i
  double groups[kOwnPowers ? T::kGroups : 1];                       // c^(kGroup i)
  LanePowers<Acc, T::kLanes, T::kSteps, T::kLanes == kWarp> lanes;  // small where teams are many
  std::conditional_t<T::kBlock, Warps, None> warps;
  Power<Acc> tile;  // over a tile

  __device__ explicit TilePowers(const Row<typename T::Storage>& row)
      : in(static_cast<Acc>(row.in)),
        alpha(static_cast<Acc>(row.decay.complement())),
        lanes(row.decay, T::kItems),
        warps(row.decay, T::kItems * T::kLanes),
        tile(row.decay.over(T::kTile)) {
    const auto& decay = row.decay;
#pragma unroll 1
    for (int i = 0; i <= T::kGroup; ++i) powers[i] = static_cast<Acc>(decay.power(i));
#pragma unroll 1
    for (int i = 0; i < (kOwnPowers ? T::kGroups : 1); ++i) groups[i] = decay.power(i * T::kGroup);
  }

  // What is left to each lane of a warp, or of the team if that is smaller.
  __device__ void fill(int lane) {
    lanes.fill(lane);
    warps.fill(lane);
  }

  // From the first sample of `threads` threads to the first after them.
  static __device__ Power<Acc> over_threads(int64_t threads, const Decay<Acc>& decay) {
    return decay.over(threads * T::kItems);
  }
};

// The powers from the first sample of the warp, and of the tile, to a thread's. Where registers are
// short each thread keeps its own in shared memory.
template <class T>
class ThreadPowers {
 public:
  using Acc = typename T::Acc;
  static constexpr bool kShared = T::kBlock && T::kGradient;
  struct Room {
    Power<Acc> threads[kShared ? kBlockThreads : 1];
  };

  __device__ __forceinline__ ThreadPowers(Room& room, const Decay<Acc>& decay) : room_(room) {
    own() = TilePowers<T>::over_threads(thread() % T::kTeam, decay);
    if constexpr (!kShared) lane_ = TilePowers<T>::over_threads(thread() % T::kLanes, decay);
  }
  // The first warp's threads begin in the tile where other warps' do in theirs: after a barrier.
  __device__ __forceinline__ const Power<Acc>& of_warp() const {
    if constexpr (kShared) return room_.threads[thread() % T::kLanes];
    return lane_;
  }
  __device__ __forceinline__ const Power<Acc>& of_tile() const {
    if constexpr (kShared) return room_.threads[thread()];
    return thread_;
  }

 private:
  __device__ __forceinline__ Power<Acc>& own() {
    if constexpr (kShared) return room_.threads[thread()];
    return thread_;
  }

  Room& room_;
  Power<Acc> lane_, thread_;
};

// q[i] in place of x[i]: each group scanned from zero. `first` is the first sample's drive, that of
// others in * x[i]. Returns what the thread's samples end at.
template <class T>
__device__ __forceinline__ Ends<double> scan_groups(typename T::Acc first, const TilePowers<T>& k,
                                                    typename T::Acc* q) {
  Ends<typename T::Acc> ends = {0, 0};
#pragma unroll
  for (int g = 0; g < T::kItems; g += T::kGroup) {
    q[g] = g == 0 ? first : k.in * q[g];
#pragma unroll
    for (int i = 1; i < T::kGroup; ++i) q[g + i] = fma(k.powers[1], q[g + i - 1], k.in * q[g + i]);
    if constexpr (T::kGradient) {
      typename T::Acc own = q[g];
#pragma unroll
      for (int i = 1; i < T::kGroup; ++i) own = fma(k.powers[1], own, q[g + i]);
      const typename T::Acc past = fma(typename T::Acc{T::kGroup}, ends.state, ends.kappa);
      ends.kappa = g == 0 ? own : fma(k.powers[T::kGroup], past, own);
    }
    ends.state =
        g == 0 ? q[T::kGroup - 1] : fma(k.powers[T::kGroup], ends.state, q[g + T::kGroup - 1]);
  }
  return {static_cast<double>(ends.state), static_cast<double>(ends.kappa)};
}

// s[i] in place of q[i], from the state before the thread's first sample. In float32 each group
// takes it by a power of its own, so that roundings do not add up from group to group; float64,
// which has fewer groups and no wider format, and halves, whose samples are coarser than that, go
// from one to the next.
template <class T>
__device__ __forceinline__ void add_state(double state, const TilePowers<T>& k,
                                          typename T::Acc* q) {
  using Acc = typename T::Acc;
  Acc from_zero = 0, before = static_cast<Acc>(state);
#pragma unroll
  for (int g = 0; g < T::kItems; g += T::kGroup) {
    if constexpr (TilePowers<T>::kOwnPowers) {
      if (g > 0) before = static_cast<Acc>(fma(k.groups[g / T::kGroup], state, double{from_zero}));
      from_zero =
          g == 0 ? q[T::kGroup - 1] : fma(k.powers[T::kGroup], from_zero, q[g + T::kGroup - 1]);
    }
#pragma unroll
    for (int i = 0; i < T::kGroup; ++i) q[g + i] = fma(k.powers[i + 1], before, q[g + i]);
    if constexpr (!TilePowers<T>::kOwnPowers) before = q[g + T::kGroup - 1];
  }
}

// What lies before each thread's first sample, and what the tile ends at, were both zero before
// the tile.
struct FromZero {
  Ends<double> before;
  Ends<double> tile;
};

template <class T>
__device__ __forceinline__ Ends<double> shuffle_up(const Ends<double>& ends, int by, int width) {
  return {__shfl_up_sync(kAllLanes, ends.state, by, width),
          T::kGradient ? __shfl_up_sync(kAllLanes, ends.kappa, by, width) : 0};
}
template <class T>
__device__ __forceinline__ Ends<double> shuffle(const Ends<double>& ends, int from, int width) {
  return {__shfl_sync(kAllLanes, ends.state, from, width),
          T::kGradient ? __shfl_sync(kAllLanes, ends.kappa, from, width) : 0};
}

// Scans the ends of each of kWidth lanes of `samples` samples.
template <class T, int kWidth, int kSteps, bool kTable>
__device__ __forceinline__ Ends<double> scan_shuffled(
    const Ends<double>& own, const LanePowers<typename T::Acc, kWidth, kSteps, kTable>& k,
    double samples) {
  const int lane = thread() % kWidth;
  Ends<double> ends = own;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const double power = k.product(i, lane);
    ends = joined<T>(ends, shuffle_up<T>(ends, 1 << i, kWidth), samples * (1 << i),
                     [&](double aggregate, double state) { return fma(power, state, aggregate); });
  }
  constexpr bool kWide = sizeof(typename T::Acc) == 8;
  const Ends<double> plain = ends;
  bool again = !finite(ends.state);
  if (kWide) again = again || k.underflow;
  again = __any_sync(kAllLanes, again);  // teams of a warp shuffle together
#pragma unroll 1
  for (int i = again ? 0 : kSteps; i < kSteps; ++i) {
    if (i == 0) ends = own;
    const Ends<double> past = shuffle_up<T>(ends, 1 << i, kWidth);
    if (lane >= 1 << i) ends = joined<T>(ends, past, samples * (1 << i), k.powers[i]);
  }
  // What is not finite leaves the bits of the samples before it alone. (Beside float32 the two laws
  // differ by less than is kept.)
  return kWide && !k.underflow && finite(plain.state) ? plain : ends;
}

// What the lanes before this one end at.
template <class T>
__device__ __forceinline__ Ends<double> before_lane(const Ends<double>& ends) {
  const Ends<double> before = shuffle_up<T>(ends, 1, T::kLanes);
  return thread() % T::kLanes == 0 ? Ends<double>{0, 0} : before;
}

// Teams of a warp or less: no barrier.
template <class T>
__device__ __forceinline__ FromZero scan_lanes(const Ends<double>& own, const TilePowers<T>& k) {
  const Ends<double> ends = scan_shuffled<T>(own, k.lanes, T::kItems);
  return {before_lane<T>(ends), shuffle<T>(ends, T::kLanes - 1, T::kLanes)};
}

// The whole block: one barrier. `lane` is over the lanes before this one. `warps` is left alone
// until the next call but one.
template <class T>
__device__ __forceinline__ FromZero scan_block(const Ends<double>& own,
                                               const Power<typename T::Acc>& lane,
                                               const TilePowers<T>& k, Ends<double>* warps) {
  const Ends<double> lanes = scan_shuffled<T>(own, k.lanes, T::kItems);
  const int warp = thread() / kWarp;
  if (thread() % kWarp == kWarp - 1) warps[warp] = lanes;
  FromZero zero;
  zero.before = before_lane<T>(lanes);
  __syncthreads();
  constexpr int kWarpSamples = T::kItems * kWarp;
  const Ends<double> ends = scan_shuffled<T>(warps[thread() % kBlockWarps], k.warps, kWarpSamples);
  zero.tile = shuffle<T>(ends, kBlockWarps - 1, kBlockWarps);
  const Ends<double> before = shuffle<T>(ends, warp - 1, kBlockWarps);
  if (warp > 0) zero.before = joined<T>(zero.before, before, thread() % kWarp * T::kItems, lane);
  return zero;
}

// What a thread's samples contribute to the gradient to alpha, as those of alpha_sums.h but for the
// weight, which is scanned beforehand.
template <class T>
struct Stretch {
  using Acc = typename T::Acc;
  double share = 0;
  Acc aggregate = 0, reference;

  // Whether the innovation goes from sample to sample by their differences, in one instruction
  // less. That takes c as rounded to float32 instead of alpha, which only samples of 2 bytes
  // forgive.
  static constexpr bool kByDifferences = sizeof(typename T::Sample) == 2;

  // From the adjoints s (in units of alpha * lambda) and the forward's x, which was spread. Against
  // the scan's time, x runs through the average itself. Chunks that are not there have s of 0 and
  // x of the reference, and so add nothing.
  template <class Stage>
  __device__ __forceinline__ Stretch(const Stage& x, const Acc* s, Acc reference,
                                     const TilePowers<T>& k)
      : reference(reference) {
    constexpr int kC = T::kSamples, kSummed = 16;  // by 16 in Acc, and these in float64
    Acc sum = 0, innovation = 0, former = reference;
#pragma unroll
    for (int c = T::kChunks - 1; c >= 0; --c) {
      Acc items[kC];
      x.get(c, items);
#pragma unroll
      for (int i = kC - 1; i >= 0; --i) {
        if constexpr (kByDifferences) {
          innovation = fma(k.powers[1], innovation, items[i] - former);
          former = items[i];
        } else {
          innovation = items[i] - reference - aggregate;
          aggregate = fma(k.alpha, innovation, aggregate);
        }
        sum = fma(s[c * kC + i], innovation, sum);
      }
      if (c * kC % kSummed != 0) continue;
      share += sum;
      sum = 0;
    }
    if constexpr (kByDifferences) aggregate = fma(-k.powers[1], innovation, former - reference);
  }

  // With kappa and the reference of the samples just before in the scan.
  __device__ __forceinline__ double gradient(double kappa, Acc other) const {
    return share - (aggregate + (static_cast<double>(reference) - other)) * kappa;
  }
};

// Gives this thread's chunks from the `mine`th on this value.
template <class T, class Stage>
__device__ __forceinline__ void clear(const Stage& moves, int mine, typename T::Acc value) {
  typename T::Acc items[T::kSamples];
#pragma unroll
  for (int i = 0; i < T::kSamples; ++i) items[i] = value;
#pragma unroll 1
  for (int c = mine; c < T::kChunks; ++c) moves.set(c, items);
}

// Of the forward's x: what is not there repeats the last sample, or `former` if there is none.
// Returns it.
template <class T, class Stage>
__device__ __forceinline__ typename T::Acc end_chunks(const Stage& moves, int mine,
                                                      typename T::Acc former) {
  if (mine > 0) former = moves.last_of((mine < T::kChunks ? mine : T::kChunks) - 1);
  clear<T>(moves, mine > 0 ? mine : 0, former);
  return former;
}

// kappa after the first `chunks` chunks of a thread's s, from that before them.
template <class T>
__device__ __forceinline__ double kappa_after(const typename T::Acc* s, int chunks, double kappa,
                                              const Decay<typename T::Acc>& decay) {
  double weight = 0;
#pragma unroll
  for (int i = 0; i < T::kItems; ++i)
    if (i < chunks * T::kSamples) weight = fma(decay.ratio(), weight, double{s[i]});
  return decay.over(chunks * T::kSamples).join(weight, kappa);
}

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
