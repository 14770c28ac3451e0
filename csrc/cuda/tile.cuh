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
// The gradient to alpha (alpha_sums.h) takes kappa as well, the weight of all that comes later in
// the forward's time, that is earlier in the scan's: kappa[n] = s[n] + c * kappa[n-1]. It is
// scanned over the lanes of a warp, once s is known; from warp to warp what each of them sums up is
// joined.
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

// What the 1, 2, 4, ... lanes before one count for in a scan over kWidth lanes of `samples` samples
// each. Where there are not so many, and where a power underflows, that is kLeast: it adds nothing
// to what is there, but leaves what is not finite as it is.
template <int kWidth, int kSteps, bool kTable>
struct LaneFactors {
  static constexpr double kLeast = 1e-300;
  // With kTable of each lane up to the middle one, which stands for those after it.
  static constexpr int kLast = kTable ? kWidth / 2 : 0;
  double factors[kSteps][kLast + 1];

  template <class Acc>
  __device__ LaneFactors(const Decay<Acc>& decay, int64_t samples) {
#pragma unroll 1
    for (int i = 0; i < kSteps; ++i) {
      const double power = decay.power(samples << i);
      const bool underflows = decay.ratio() != 0 && fabs(power) < kLeast;
      factors[i][kLast] = underflows ? copysign(kLeast, power) : power;
    }
  }

  // The constructor's last lane, to another one.
  __device__ void fill(int lane) {
    if constexpr (kTable) {
      if (lane >= kLast) return;
#pragma unroll 1
      for (int i = 0; i < kSteps; ++i)
        factors[i][lane] = lane >= 1 << i ? factors[i][kLast] : kLeast;
    }
  }

  __device__ __forceinline__ double of(int lane, int i) const {
    if constexpr (kTable) return factors[i][lane < kLast ? lane : kLast];
    return lane >= 1 << i ? factors[i][0] : kLeast;
  }
};

// Powers for a scan over kWidth lanes that end at `samples` samples each: plain factors, but by
// Power's laws where one of float64 underflows.
template <class Acc, int kWidth, int kSteps, bool kTable>
struct LanePowers {
  static constexpr bool kUnderflows = sizeof(Acc) == 8;
  LaneFactors<kWidth, kSteps, kTable> factors;
  Power<Acc> powers[kUnderflows ? kSteps : 1];  // over 1, 2, 4, ... lanes
  bool underflow;

  __device__ LanePowers(const Decay<Acc>& decay, int64_t samples) : factors(decay, samples) {
    constexpr double kLeast = 1e-290;
#pragma unroll 1
    for (int i = 0; i < (kUnderflows ? kSteps : 1); ++i) powers[i] = decay.over(samples << i);
    underflow = kUnderflows && fabs(factors.factors[kSteps - 1][factors.kLast]) < kLeast;
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
  Acc joint;                                                        // over T::kWeighed samples
  LanePowers<Acc, T::kLanes, T::kSteps, T::kLanes == kWarp> lanes;  // small where teams are many
  std::conditional_t<T::kBlock, Warps, None> warps;
  Power<Acc> tile;  // over a tile

  __device__ explicit TilePowers(const Row<typename T::Storage>& row)
      : in(static_cast<Acc>(row.in)),
        alpha(static_cast<Acc>(row.decay.complement())),
        joint(static_cast<Acc>(row.decay.power(T::kWeighed))),
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
    lanes.factors.fill(lane);
    if constexpr (T::kBlock) warps.factors.fill(lane);
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
__device__ __forceinline__ double scan_groups(typename T::Acc first, const TilePowers<T>& k,
                                              typename T::Acc* q) {
  typename T::Acc state = 0;
#pragma unroll
  for (int g = 0; g < T::kItems; g += T::kGroup) {
    q[g] = g == 0 ? first : k.in * q[g];
#pragma unroll
    for (int i = 1; i < T::kGroup; ++i) q[g + i] = fma(k.powers[1], q[g + i - 1], k.in * q[g + i]);
    state = g == 0 ? q[T::kGroup - 1] : fma(k.powers[T::kGroup], state, q[g + T::kGroup - 1]);
  }
  return static_cast<double>(state);
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

// The states before each thread's first sample and after the tile, were that before the tile zero.
struct FromZero {
  double before, tile;
};

// Scans what each of kWidth lanes ends at.
template <class T, int kWidth, int kSteps, bool kTable>
__device__ __forceinline__ double scan_shuffled(
    double own, const LanePowers<typename T::Acc, kWidth, kSteps, kTable>& k) {
  const int lane = thread() % kWidth;
  double end = own;
#pragma unroll
  for (int i = 0; i < kSteps; ++i)
    end = fma(k.factors.of(lane, i), __shfl_up_sync(kAllLanes, end, 1 << i, kWidth), end);
  if constexpr (!k.kUnderflows) return end;
  const double plain = end;
  const bool again = __any_sync(kAllLanes, k.underflow);  // teams of a warp shuffle together
#pragma unroll 1
  for (int i = again ? 0 : kSteps; i < kSteps; ++i) {
    if (i == 0) end = own;
    const double past = __shfl_up_sync(kAllLanes, end, 1 << i, kWidth);
    if (lane >= 1 << i) end = k.powers[i].join(end, past);
  }
  return k.underflow ? end : plain;
}

// What the lanes before this one end at.
template <class T>
__device__ __forceinline__ double before_lane(double end) {
  const double before = __shfl_up_sync(kAllLanes, end, 1, T::kLanes);
  return thread() % T::kLanes == 0 ? 0 : before;
}

// Teams of a warp or less: no barrier.
template <class T>
__device__ __forceinline__ FromZero scan_lanes(double own, const TilePowers<T>& k) {
  const double end = scan_shuffled<T>(own, k.lanes);
  return {before_lane<T>(end), __shfl_sync(kAllLanes, end, T::kLanes - 1, T::kLanes)};
}

// The whole block: one barrier. `lane` is over the lanes before this one. `warps` is left alone
// until the next call but one.
template <class T>
__device__ __forceinline__ FromZero scan_block(double own, const Power<typename T::Acc>& lane,
                                               const TilePowers<T>& k, double* warps) {
  const double lanes = scan_shuffled<T>(own, k.lanes);
  const int warp = thread() / kWarp;
  if (thread() % kWarp == kWarp - 1) warps[warp] = lanes;
  FromZero zero;
  zero.before = before_lane<T>(lanes);
  __syncthreads();
  const double end = scan_shuffled<T>(warps[thread() % kBlockWarps], k.warps);
  zero.tile = __shfl_sync(kAllLanes, end, kBlockWarps - 1, kBlockWarps);
  const double before = __shfl_sync(kAllLanes, end, warp - 1, kBlockWarps);
  if (warp > 0) zero.before = lane.join(zero.before, before);
  return zero;
}

// A sum over the threads of a team of a warp or less, in one order, to all of them.
template <int kLanes, class Value>
__device__ __forceinline__ Value sum_over_lanes(Value value) {
#pragma unroll
  for (int by = kLanes / 2; by > 0; by /= 2) value += __shfl_xor_sync(kAllLanes, value, by, kLanes);
  return value;
}

// What a thread's samples contribute to the gradient to alpha, as those of alpha_sums.h.
template <class T>
struct Stretch {
  using Acc = typename T::Acc;
  using Wide = typename T::Wide;
  Wide share = 0;
  double weight;  // kappa after the stretch, from zero before it
  Acc aggregate = 0, reference;

  // Whether the innovation goes from sample to sample by their differences, in one instruction
  // less. That takes c as rounded to float32 instead of alpha, which only samples of 2 bytes
  // forgive.
  static constexpr bool kByDifferences = sizeof(typename T::Sample) == 2;

  // From the adjoints s (in units of alpha * lambda) and the forward's x, which was spread. Against
  // the scan's time, x runs through the average itself. Chunks that are not there have x of the
  // reference, and so add nothing to the share.
  template <class Stage>
  __device__ __forceinline__ Stretch(const Stage& x, const Acc* s, Acc reference,
                                     const TilePowers<T>& k)
      : weight(kappa(s, k)), reference(reference) {
    constexpr int kC = T::kSamples, kSummed = 16;  // by 16 in Acc, and these in Wide
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

  // By which kappa before the stretch enters, negated, with the reference of the samples just
  // before in the scan.
  __device__ __forceinline__ Wide drop(Acc other) const {
    return aggregate + (static_cast<Wide>(reference) - other);
  }

 private:
  static __device__ __forceinline__ double kappa(const Acc* s, const TilePowers<T>& k) {
    Acc weight = 0;
#pragma unroll
    for (int g = 0; g < T::kItems; g += T::kWeighed) {
      Acc own = s[g];
#pragma unroll
      for (int i = 1; i < T::kWeighed; ++i) own = fma(k.powers[1], own, s[g + i]);
      weight = g == 0 ? own : fma(k.joint, weight, own);
    }
    return weight;
  }
};

// kappa before each lane's samples and after them, from zero before the first lane. In float64:
// what the drops of many lanes add up to is much less than they are.
template <class T>
struct Weights {
  double before, after;

  __device__ __forceinline__ Weights(double own, const TilePowers<T>& k) : after(own) {
    const int lane = thread() % T::kLanes;
#pragma unroll
    for (int i = 0; i < T::kSteps; ++i)
      after = fma(k.lanes.factors.of(lane, i), __shfl_up_sync(kAllLanes, after, 1 << i, T::kLanes),
                  after);
    before = before_lane<T>(after);
  }
};

// The drop of a whole warp, from those of its threads; `lane` is over the lanes before this one.
template <class T>
__device__ __forceinline__ typename T::Wide drop_of_warp(typename T::Wide drop,
                                                         const Power<typename T::Acc>& lane) {
  if constexpr (sizeof(typename T::Wide) < sizeof(double))
    drop *= static_cast<typename T::Wide>(lane.value);
  else
    drop = lane.join(0, drop);
  return sum_over_lanes<kWarp>(drop);
}

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
template <class T, class Stage>
__device__ __forceinline__ void end_chunks(const Stage& moves, int mine, typename T::Acc former) {
  if (mine > 0) former = moves.last_of((mine < T::kChunks ? mine : T::kChunks) - 1);
  clear<T>(moves, mine > 0 ? mine : 0, former);
}

// A thread's samples, to where it got them. A NaN stays to the last of them, so that only a thread
// whose last is one must mind it; but the first may be a copy of one that was read.
template <class T, class Stage>
__device__ __forceinline__ void set_chunks(const Stage& moves, typename T::Acc* s) {
  using Acc = typename T::Acc;
#pragma unroll
  for (int c = 0; c < T::kChunks; ++c) moves.template set<false>(c, s + c * T::kSamples);
  if constexpr (T::Storage::kMindsNaN) {
    // Turned by a chunk each time, as registers have no index.
    const bool minds = isnan(s[T::kItems - 1]);
#pragma unroll 1
    for (int c = minds ? 0 : T::kChunks; c < T::kChunks; ++c) {
      moves.template set<true>(c, s);
      Acc first[T::kSamples];
#pragma unroll
      for (int i = 0; i < T::kSamples; ++i) first[i] = s[i];
#pragma unroll
      for (int i = 0; i < T::kItems - T::kSamples; ++i) s[i] = s[i + T::kSamples];
#pragma unroll
      for (int i = 0; i < T::kSamples; ++i) s[T::kItems - T::kSamples + i] = first[i];
    }
  }
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

// The same as sum_over_lanes, over a block: one barrier. `warps` is left alone until the next.
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
