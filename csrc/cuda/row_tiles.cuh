// Many rows: a team of threads takes a row from end to end, tile by tile, the next tile on its way
// while one is scanned. Teams of 8 or 32 need no barrier; a team of a whole block one per scan of a
// tile: lambda's and, for the gradient to alpha, kappa's.
#pragma once

#include "cuda/team_row.cuh"

namespace ema_ext::cuda {

template <class T>
struct RowTiles {
  using Sample = typename T::Sample;
  using Acc = typename T::Acc;
  using Raw = typename Stage<T>::Raw;
  static constexpr int kThreads = kBlockThreads;
  static constexpr int kMinBlocks = T::kAligned ? kBlocksPerMultiprocessor : 1;
  static constexpr int kTeams = kThreads / T::kTeam;

  struct Arguments {
    Scan scan;
  };

  struct Shared {
    WarpStage<T> stage[kBlockWarps];
    Uninitialized<TeamRow<T>> teams[kTeams];
    double aggregates[2][T::kBlock ? kBlockWarps : 1];
    Acc references[T::kBlock && T::kGradient ? kBlockWarps : 1];  // of each warp's last stretch
  };

  static __device__ void run(const Arguments& arguments, Shared& shared) {
    const Scan& scan = arguments.scan;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kTeams;
    int turn = 0;
    // All teams of a warp take the same turns: they shuffle together.
#pragma unroll 1
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * kTeams; first < scan.rows;
         first += step) {
      const int64_t index = first + thread() / T::kTeam;
      const bool there = index < scan.rows, leads = there && thread() % T::kTeam == 0;
      TeamRow<T>& team = shared.teams[thread() / T::kTeam].value();
      if (thread() % T::kTeam == 0)
        new (&team) TeamRow<T>(scan, there ? index : scan.rows - 1, there);
      sync();
      turn = RowTiles(scan, shared, team, there, turn).scan_tiles();
      sync();
      if (!leads) continue;
      team.walk_tail(scan);
      team.row.write_state(scan, team.at, team.walk.state);
      team.row.write_gradient(scan, team.at, team.walk.sums);
    }
  }

 private:
  __device__ RowTiles(const Scan& scan, Shared& shared, TeamRow<T>& team, bool there, int turn)
      : scan_(scan),
        shared_(shared),
        team_(team),
        chunks_(there ? team.parts.chunks : 0),
        turn_(turn),
        moves_(shared.stage[thread() / kWarp], scan.x.time_stride < 0),
        lane_(TilePowers<T>::over_threads(thread() % T::kLanes, team.row.decay)),
        thread_(TilePowers<T>::over_threads(thread() % T::kTeam, team.row.decay)) {}

  static __device__ __forceinline__ void sync() {
    if constexpr (T::kBlock)
      __syncthreads();
    else
      __syncwarp();
  }

  // Where in the tile, in chunks, this warp's samples begin and this thread's.
  static __device__ __forceinline__ int warp_begin() {
    return thread() % T::kTeam / kWarp * T::kWarpChunks;
  }
  static __device__ __forceinline__ int begin() { return thread() % T::kTeam * T::kChunks; }

  // This warp's share of the first tile, of which `chunks` are there.
  template <class Pointer>
  __device__ __forceinline__ Run<Sample> first_run(Pointer samples, const View& view) const {
    const int64_t n = team_.parts.head + warp_begin() * T::kSamples;
    return {const_cast<Sample*>(samples) + n * view.time_stride, view.time_stride,
            clamped(chunks_ - warp_begin())};
  }
  // The same of the next tile, `left` chunks before the row's end.
  __device__ __forceinline__ void advance(Run<Sample>& run, int64_t left) const {
    run.first += run.stride * (T::kTileChunks * T::kSamples);
    run.chunks = clamped(left - warp_begin());
  }
  static __device__ __forceinline__ int clamped(int64_t chunks) {
    return static_cast<int>(chunks < T::kWarpChunks ? chunks : T::kWarpChunks);
  }

  __device__ __forceinline__ int scan_tiles() {
    const TilePowers<T>& k = team_.powers;
    State<Acc> state{team_.walk.state, 0}, kappa{team_.walk.sums.weight, 0};
    double gradient = 0;
    bool copies = begin() == 0 && team_.parts.head == 0 && team_.row.copies_first;
    Acc added_first =
        begin() == 0 && team_.parts.head == 0 ? static_cast<Acc>(team_.row.added_first) : 0;

    int64_t left = chunks_, most = T::kTeam < kWarp ? scan_.length / T::kSamples : chunks_;
    Run<Sample> from = first_run(team_.row.x, scan_.x), to = first_run(team_.row.y, scan_.y), own;
    Raw raw, raw_own;
    if constexpr (T::kGradient) {
      own = first_run(team_.row.forward_x, scan_.forward_x);
      reference_ = static_cast<Acc>(team_.walk.sums.reference);
    } else {
      raw = moves_.fetch(from);  // ahead; with a second tensor there are no registers for that
    }
    sync();  // `hand_on` writes the walk
    int mine = 0;
    Acc x[T::kItems], s[T::kItems];
#pragma unroll 1
    for (; most > 0; most -= T::kTileChunks, left -= T::kTileChunks) {
      if constexpr (T::kGradient) {
        raw = moves_.fetch(from);
        raw_own = moves_.fetch(own);
        advance(own, left - T::kTileChunks);
      }
      moves_.spread(raw, x);
      advance(from, left - T::kTileChunks);
      if constexpr (!T::kGradient) raw = moves_.fetch(from);

      const Acc first = copies && !finite(x[0]) ? x[0] : k.in * x[0] + added_first;
      const FromZero zero = scan(scan_groups(x, first, k, s));
      add_state(thread_.join(zero.before, state.value), k, s);
      state.advance(zero.tile, k.tile);
      if (copies) s[0] = x[0];
      copies = false;
      added_first = 0;

      mine = own_chunks<T>(left - begin());
      if constexpr (T::kGradient) {
        moves_.spread(raw_own, x);
        gradient += gradient_of(Stretch<T>(x, s, mine, k), kappa, mine);
      }
      moves_.put(s, to);
      advance(to, left - T::kTileChunks);
    }
    if constexpr (T::kGradient && !T::kBlock) gradient = sum_over_lanes<T::kLanes>(gradient);
    if (chunks_ > 0) hand_on(last_of<T>(s, mine), gradient, mine > 0 && mine <= T::kChunks);
    return turn_;
  }

  __device__ __forceinline__ FromZero scan(double aggregate) {
    if constexpr (T::kBlock)
      return scan_block(aggregate, lane_, team_.powers, shared_.aggregates[turn_ ^= 1]);
    else
      return scan_lanes(aggregate, team_.powers);
  }

  // What this thread's stretch of a tile adds to the gradient to alpha; advances kappa over the
  // tile.
  __device__ __forceinline__ double gradient_of(const Stretch<T>& mine, State<Acc>& kappa,
                                                int chunks) {
    const TilePowers<T>& k = team_.powers;
    const int warp = thread() / kWarp;
    if (T::kBlock && thread() % kWarp == kWarp - 1) shared_.references[warp] = mine.reference;
    const FromZero zero = scan(mine.weight);
    const double before = thread_.join(zero.before, kappa.value);
    kappa.advance(zero.tile, k.tile);

    Acc other = __shfl_up_sync(kAllLanes, mine.reference, 1, T::kLanes);
    if constexpr (T::kBlock) {
      const Acc* const references = shared_.references;
      if (thread() % kWarp == 0) other = warp == 0 ? reference_ : references[warp - 1];
      reference_ = references[kBlockWarps - 1];
    } else {
      if (thread() % T::kTeam == 0) other = reference_;
      reference_ = __shfl_sync(kAllLanes, mine.reference, T::kTeam - 1, T::kTeam);
    }
    if (chunks == 0) return 0;
    last_reference_ = mine.reference;
    last_kappa_ = mine.weight + k.chunks[min(chunks, T::kChunks)] * before;
    return mine.gradient(before, other);
  }

  // Where the row's chunks end, to the walk: by the thread that has the last one.
  __device__ __forceinline__ void hand_on(Acc last, double gradient, bool ends) {
    if constexpr (T::kGradient && T::kBlock)
      gradient = sum_over_block(gradient, shared_.aggregates[turn_ ^= 1]);
    if (!ends) return;
    team_.walk.state = last;
    if constexpr (T::kGradient)
      team_.walk.sums = {last_reference_, team_.walk.sums.share + gradient, last_kappa_, 0, 1};
  }

  const Scan& scan_;
  Shared& shared_;
  TeamRow<T>& team_;
  const int64_t chunks_;
  int turn_;
  const Stage<T> moves_;
  // From the first sample of the warp, and of the tile, to the thread's.
  const Power<Acc> lane_, thread_;
  // Of alpha's gradient: the reference of the last tile's last stretch, and of this thread's last
  // stretch its reference and the kappa after it.
  Acc reference_, last_reference_;
  double last_kappa_;
};

}  // namespace ema_ext::cuda
