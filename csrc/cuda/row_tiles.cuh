// Many rows: a team of threads takes a row from end to end, tile by tile, the next tile on its way
// while one is scanned. Teams of 8 or 32 need no barrier; a team of a whole block one per tile.
#pragma once

#include "cuda/team_row.cuh"

namespace ema_ext::cuda {

template <class T>
struct RowTiles {
  using Sample = typename T::Sample;
  using Acc = typename T::Acc;
  static constexpr int kThreads = kBlockThreads;
  static constexpr int kMinBlocks =
      tile_blocks(sizeof(typename T::Sample), T::kChunks, T::kTeam, T::kAligned, T::kGradient);
  static constexpr int kTeams = kThreads / T::kTeam;

  struct Arguments {
    Scan scan;
  };

  struct Shared {
    WarpStage<T> stage[kBlockWarps];
    Uninitialized<TeamRow<T>> teams[kTeams];
    typename ThreadPowers<T>::Room powers;
    double ends[2][T::kBlock ? kBlockWarps : 1];
    // For alpha's gradient, of each warp: its last reference, its drop and kappa after it.
    static constexpr int kSummed = T::kBlock && T::kGradient ? kBlockWarps : 1;
    Acc references[2][kSummed];
    typename T::Wide drops[2][kSummed];
    double weights[2][kSummed], sums[kSummed];
  };

  static __device__ void run(const Arguments& arguments, Shared& shared) {
    if (T::kAligned && arguments.scan.x.time_stride < 0)
      RowTiles<T>::template scan_rows<true>(arguments.scan, shared);
    else
      RowTiles<T>::template scan_rows<false>(arguments.scan, shared);
  }

 private:
  template <bool kBackward>
  static __device__ __forceinline__ void scan_rows(const Scan& scan, Shared& shared) {
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
      if (thread() % T::kTeam < kWarp) team.powers.fill(thread() % T::kTeam);
      turn = RowTiles(scan, shared, team, there, turn).template scan_tiles<kBackward>();
      sync();
      if (!leads) continue;
      team.finish(scan, team.walk);
      team.row.write_gradient(scan, team.at, team.walk.sums);
    }
  }

  __device__ __forceinline__ RowTiles(const Scan& scan, Shared& shared, TeamRow<T>& team,
                                      bool there, int turn)
      : scan_(scan),
        shared_(shared),
        team_(team),
        chunks_(there ? team.parts.chunks : 0),
        turn_(turn),
        powers_(shared.powers, team.row.decay) {}

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

  template <bool kBackward>
  __device__ __forceinline__ int scan_tiles() {
    const Stage<T, kBackward> moves(shared_.stage[thread() / kWarp]);
    const TilePowers<T>& k = team_.powers;
    State<Acc> state{team_.walk.state, 0};
    double kappa = team_.walk.sums.weight, gradient = 0;
    double kappa_before = 0;  // the thread's samples; of a block, from zero before the warp
    int joins = 0;            // the warps of the tile before, if this is the thread that joins them
    // Only of the row's first sample, which an average without an initial state copies. From one
    // that is not finite the scan starts at 0, and at the sample itself.
    const bool starts = thread() % T::kTeam == 0 && team_.parts.head == 0;
    bool copies = !T::kGradient && starts && team_.row.copies_first;
    Acc added = starts ? static_cast<Acc>(team_.row.added_first) : 0;
    Acc in = copies && team_.walk.state == 0 ? 1 : k.in;

    int64_t most = chunks_;
    if (T::kTeam < kWarp)  // as many for every team that has any
      most = (scan_.length - (team_.row.last_is_lambda ? 1 : 0)) / T::kSamples;
    // No memory holds 2^31 tiles. Each has so many chunks from this warp's first on, the last one
    // the rest; what is whole is so for each warp by itself.
    int tiles = static_cast<int>((most + T::kTileChunks - 1) / T::kTileChunks);
    const int full = chunks_ > 0 ? T::kTileChunks - warp_begin() : 0;
    const int rest =
        chunks_ > 0 ? full - static_cast<int>(int64_t{T::kTileChunks} * tiles - chunks_) : 0;
    int next = tiles > 1 ? full : rest;
    const auto run = [&](const Sample* samples, const View& view) {
      return moves.run(samples, team_.parts.head + warp_begin() * T::kSamples, view.time_stride);
    };
    Run<Sample> from = run(team_.row.x, scan_.x), to = run(team_.row.y, scan_.y), from_own;
    auto raw = moves.fetch(from, T::kAhead && next >= T::kWarpChunks);
    if constexpr (T::kGradient) {
      from_own = run(team_.row.forward_x, scan_.forward_x);
      reference_ = last_reference_ = static_cast<Acc>(team_.walk.sums.reference);
    }
    sync();  // before the walk is written
    int mine = 0;
    Acc s[T::kItems];
#pragma unroll 1
    for (; tiles > 0; --tiles) {
      const int now = next;
      const bool whole = now >= T::kWarpChunks;
      mine = now - thread() % T::kLanes * T::kChunks;  // or more, if others follow
      if constexpr (!T::kAhead) raw = moves.fetch(from, whole);
      moves.spread(from, whole, now, raw, T::kGradient ? &from_own : nullptr,
                   [&] { clear<T>(moves, mine > 0 ? mine : 0, 0); });
#pragma unroll
      for (int c = 0; c < T::kChunks; ++c) moves.get(c, s + c * T::kSamples);

      const Acc copied = s[0];
      const double end = scan_groups(fma(in, s[0], added), k, s);
      if constexpr (T::kGradient) {
        moves.spread(from_own, whole, now, raw, nullptr,
                     [&] { end_chunks<T>(moves, mine, last_reference_); });
        moves.advance(from_own);
        last_reference_ = moves.last_of(T::kChunks - 1);
      }
      next = tiles > 2 ? full : tiles > 1 ? rest : 0;
      moves.advance(from);
      if constexpr (T::kAhead) raw = moves.fetch(from, next >= T::kWarpChunks);

      const FromZero zero = scan(end);
      add_state(powers_.of_tile().join(zero.before, state.value), k, s);
      if (copies) s[0] = copied;
      copies = false;
      added = 0;
      in = k.in;
      if constexpr (T::kGradient) {
        if constexpr (T::kBlock) {
          join_warps(turn_ ^ 1, joins, kappa, gradient);
          joins = thread() == 0 ? kBlockWarps : 0;
        }
        const Stretch<T> stretch(moves, s, last_reference_, k);
        const Weights<T> weights(stretch.weight, k);
        const auto whole_drop = stretch.drop(reference_before());
        const auto drop = mine > 0 ? whole_drop : 0;
        if constexpr (T::kBlock) {
          kappa_before = weights.before;
          leave(drop, weights.after);
        } else {
          kappa_before = powers_.of_tile().join(weights.before, kappa);
          const auto after = __shfl_sync(kAllLanes, weights.after, T::kLanes - 1, T::kLanes);
          kappa = k.tile.join(after, kappa);
        }
        gradient += mine > 0 ? stretch.share - drop * kappa_before : 0;
      }
      state.advance(zero.tile, k.tile);
      set_chunks<T>(moves, s);
      moves.put(to, whole, now);
      moves.advance(to);
    }
    if constexpr (T::kGradient && !T::kBlock) gradient = sum_over_lanes<T::kLanes>(gradient);
    if (chunks_ > 0 && mine > 0 && mine <= T::kChunks) {  // others have no row, or not its end
      team_.walk.state = last_of<T>(s, mine);
      if constexpr (T::kGradient)
        team_.walk.sums = {last_reference_, team_.walk.sums.share + (T::kBlock ? 0 : gradient),
                           kappa_after<T>(s, mine, kappa_before, team_.row.decay), 0, 1};
    }
    if constexpr (T::kGradient && T::kBlock) {
      gradient = sum_over_block(gradient, shared_.sums);
      if (thread() == 0 && chunks_ > 0) join_last_tile(rest, kappa, gradient);
    }
    return turn_;
  }

  // What this warp's samples of the tile leave to join_warps.
  __device__ __forceinline__ void leave(typename T::Wide drop, double weight) {
    const auto sum = drop_of_warp<T>(drop, powers_.of_warp());
    if (thread() % kWarp != kWarp - 1) return;
    shared_.drops[turn_][thread() / kWarp] = sum;
    shared_.weights[turn_][thread() / kWarp] = weight;
  }

  // The first so many warps of a tile, after the next barrier, by one thread: from kappa before
  // them to that after, and what they lack of the gradient.
  __device__ __forceinline__ void join_warps(int turn, int warps, double& kappa,
                                             double& gradient) const {
#pragma unroll 1
    for (int w = 0; w < warps; ++w) {
      gradient -= shared_.drops[turn][w] * kappa;
      kappa = team_.powers.warps.powers[0].join(shared_.weights[turn][w], kappa);
    }
  }

  // Those of the row's last tile, which has so many chunks.
  __device__ __forceinline__ void join_last_tile(int chunks, double kappa, double gradient) {
    AlphaSums& sums = team_.walk.sums;
    const int whole = (chunks - 1) / T::kWarpChunks;
    join_warps(turn_, whole, kappa, gradient);
    sums.share += gradient - shared_.drops[turn_][whole] * kappa;
    const int64_t samples = (chunks - whole * T::kWarpChunks) * T::kSamples;
    sums.weight = team_.row.decay.over(samples).join(sums.weight, kappa);
  }

  // One barrier, if the team is a block.
  __device__ __forceinline__ FromZero scan(double end) {
    if constexpr (T::kBlock) {
      turn_ ^= 1;
      if (T::kGradient && thread() % kWarp == kWarp - 1)
        shared_.references[turn_][thread() / kWarp] = last_reference_;
      return scan_block(end, powers_.of_warp(), team_.powers, shared_.ends[turn_]);
    } else {
      return scan_lanes(end, team_.powers);
    }
  }

  // The reference of the samples before this thread's; moves on to the next tile.
  __device__ __forceinline__ Acc reference_before() {
    Acc other = __shfl_up_sync(kAllLanes, last_reference_, 1, T::kLanes);
    if constexpr (T::kBlock) {
      const Acc* const references = shared_.references[turn_];
      const int warp = thread() / kWarp;
      if (thread() % kWarp == 0) other = warp == 0 ? reference_ : references[warp - 1];
      reference_ = references[kBlockWarps - 1];
    } else {
      if (thread() % T::kTeam == 0) other = reference_;
      reference_ = __shfl_sync(kAllLanes, last_reference_, T::kTeam - 1, T::kTeam);
    }
    return other;
  }

  const Scan& scan_;
  Shared& shared_;
  TeamRow<T>& team_;
  const int64_t chunks_;
  int turn_;
  ThreadPowers<T> powers_;
  // Of alpha's gradient: the last sample before the tile, and of this thread's latest.
  Acc reference_, last_reference_;
};

}  // namespace ema_ext::cuda
