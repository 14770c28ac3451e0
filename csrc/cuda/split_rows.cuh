// Few long rows: tiles of a row are shared out among blocks, and the state before a tile comes from
// the messages of the tiles before it (decoupled look-back: Merrill and Garland 2016; here every
// tile folds the same messages in the same order, so that the bits do not depend on the schedule).
//
// Tiles come in groups of kGroup and groups in batches of kGroup. A tile sends what it ends at from
// zero; the last of a group sends that of the group, and the last of a batch the state after it. So
// the state before a tile is the last batch's message, those of the groups since and those of the
// group's tiles, each times the power of c over the tiles in between: no more than a warp has
// lanes, and each warp folds them for itself. Which tile a block takes next comes from a ticket:
// those it waits for belong to blocks that run already and that took them before, so no order of
// blocks and no number of resident blocks can keep it waiting for ever.
#pragma once

#include "cuda/messages.cuh"
#include "cuda/team_row.cuh"

namespace ema_ext::cuda {

// What a tile contributes to the gradient to alpha: what its warps do, each from a kappa of zero.
struct TileSums {
  double shares[kBlockWarps], drops[kBlockWarps];
  double weights[kBlockWarps];  // kappa after them
  double first, last;           // references of its first stretch and of its last
};

template <class Tiling>
struct SplitRows {
  using T = typename Tiling::Split;
  static constexpr int kThreads = kBlockThreads;
  static constexpr int kMinBlocks =
      tile_blocks(sizeof(typename T::Sample), T::kChunks, T::kTeam, T::kAligned, T::kGradient);
  static constexpr bool kGradient = T::kGradient;
  static constexpr int kGroup = 16, kBatch = kGroup * kGroup;
  static_assert(1 + 2 * (kGroup - 1) <= kWarp && T::kTeam == kThreads);
  using Sample = typename T::Sample;
  using Acc = typename T::Acc;

  struct Team;
  struct Arguments {
    Scan scan;
    int64_t tiles;               // per row, some of which may have no samples
    unsigned long long* ticket;  // 0 before
    Message* messages;           // of each row's start and of each of its tiles; 0 before
    Uninitialized<Team>* teams;  // per row: from SplitHeads
    TileSums* sums;              // row * tiles + tile; for SplitSums
    AlphaSums* ends;             // per row: of what lies after its tiles; for SplitSums
  };

  // What is known of a row.
  struct Team : TeamRow<T> {
    int64_t begin;   // its first tile's ticket
    int64_t last;    // its last tile with samples; -1 if there is none
    Message* start;  // where its chunks begin; those of its tiles follow
    TileSums* sums;  // of its tiles

    __device__ Team(const Arguments& arguments, int64_t index)
        : TeamRow<T>(arguments.scan, index, true),
          begin(index * arguments.tiles),
          last((this->parts.chunks + T::kTileChunks - 1) / T::kTileChunks - 1),
          start(arguments.messages + begin + index),
          sums(arguments.sums + begin) {
#pragma unroll 1
      for (int lane = 0; lane < kWarp; ++lane) this->powers.fill(lane);
    }
  };
  struct Shared {
    WarpStage<T> stage[kBlockWarps];
    Uninitialized<Team> team;
    typename ThreadPowers<T>::Room powers;
    Power<Acc> tiles[kBatch];  // over so many
    double ends[2][kBlockWarps];
    Acc references[2][kBlockWarps];  // of each warp's last stretch
    int64_t tickets[2];
    Uninitialized<decltype(Team::walk)> walk;  // of the thread that ends the row
  };

  static __device__ void run(const Arguments& arguments, Shared& shared) {
    if (T::kAligned && arguments.scan.x.time_stride < 0)
      take_rows<true>(arguments, shared);
    else
      take_rows<false>(arguments, shared);
  }

 private:
  // A row after the other, as tickets come.
  template <bool kBackward>
  static __device__ __forceinline__ void take_rows(const Arguments& arguments, Shared& shared) {
    int turn = 0;
    if (thread() == 0) shared.tickets[turn] = next_ticket(arguments);
    __syncthreads();
    int64_t ticket = shared.tickets[turn];
#pragma unroll 1
    while (ticket < arguments.scan.rows * arguments.tiles) {
      const int64_t index = ticket / arguments.tiles;
      copy(arguments.teams[index], shared.team);
      __syncthreads();
      SplitRows row(arguments, shared, index, turn);
      ticket = row.team_.begin + row.template scan_tiles<kBackward>(ticket - row.team_.begin);
      turn = row.turn_;
      const bool passes = ticket < (index + 1) * arguments.tiles;  // that tile has no samples
      if (passes && thread() == 0) shared.tickets[turn ^ 1] = next_ticket(arguments);
      __syncthreads();
      if (passes) ticket = shared.tickets[turn ^= 1];
    }
  }

  static __device__ __forceinline__ int64_t next_ticket(const Arguments& arguments) {
    return static_cast<int64_t>(atomicAdd(arguments.ticket, 1ull));
  }

  __device__ __forceinline__ SplitRows(const Arguments& arguments, Shared& shared, int64_t index,
                                       int turn)
      : arguments_(arguments),
        shared_(shared),
        team_(shared.team.value()),
        index_(index),
        turn_(turn),
        powers_(shared.powers, team_.row.decay) {
    for (int i = thread(); i < kBatch; i += kThreads)
      shared.tiles[i] = team_.row.decay.over(int64_t{T::kTile} * i);
  }

  static __device__ __forceinline__ void copy(const Uninitialized<Team>& from,
                                              Uninitialized<Team>& to) {
    static_assert(sizeof(Team) % sizeof(uint2) == 0);
    for (size_t i = thread(); i < sizeof(Team) / sizeof(uint2); i += kThreads)
      reinterpret_cast<uint2*>(to.bytes)[i] = reinterpret_cast<const uint2*>(from.bytes)[i];
  }

  // Where this warp's share of the row's first tile begins.
  template <class Stage>
  __device__ __forceinline__ Run<Sample> run(const Stage& moves, const Sample* samples,
                                             const View& view) const {
    return moves.run(samples, team_.parts.head + thread() / kWarp * (T::kWarpChunks * T::kSamples),
                     view.time_stride);
  }

  // From this tile on, while tickets are for this row. Returns the first that is not, counted on.
  template <bool kBackward>
  __device__ __forceinline__ int64_t scan_tiles(int64_t tile) {
    const Scan& scan = arguments_.scan;
    const auto& k = team_.powers;
    const Stage<T, kBackward> moves(shared_.stage[thread() / kWarp]);
    // Only of the row's first sample: as in RowTiles.
    const bool starts = tile == 0 && thread() == 0 && team_.parts.head == 0;
    bool copies = !kGradient && starts && team_.row.copies_first;
    Acc added = starts ? static_cast<Acc>(team_.row.added_first) : 0;
    Acc in = copies && team_.walk.state == 0 ? 1 : k.in;

    const Run<Sample> from = run(moves, team_.row.x, scan.x), to = run(moves, team_.row.y, scan.y);
    Run<Sample> from_own;
    if constexpr (kGradient) from_own = run(moves, team_.row.forward_x, scan.forward_x);
    // The last tile has so many chunks from this warp's first on; what is whole is so for each warp
    // by itself.
    const int warp_begin = thread() / kWarp * T::kWarpChunks;
    const int rest =
        static_cast<int>(team_.parts.chunks - team_.last * T::kTileChunks) - warp_begin;
    const int64_t whole_tiles = team_.last + (rest < T::kWarpChunks ? 0 : 1);
    auto raw = moves.fetch(moves.at(from, tile), T::kAhead && tile < whole_tiles);
    int mine = 0;
    bool last = false;
    double kappa = 0;  // before this thread's samples, from zero before the warp
    Acc s[T::kItems];
#pragma unroll 1
    while (tile <= team_.last) {
      last = tile == team_.last;
      const int now = last ? rest : T::kTileChunks - warp_begin;
      const bool whole = now >= T::kWarpChunks;
      mine = now - thread() % kWarp * T::kChunks;
      if (thread() == 0) shared_.tickets[turn_ ^ 1] = next_ticket(arguments_) - team_.begin;
      if constexpr (!T::kAhead) raw = moves.fetch(moves.at(from, tile), whole);
      const Run<Sample> own = kGradient ? moves.at(from_own, tile) : from_own;
      moves.spread(moves.at(from, tile), whole, now, raw, kGradient ? &own : nullptr,
                   [&] { clear<T>(moves, mine > 0 ? mine : 0, 0); });
#pragma unroll
      for (int c = 0; c < T::kChunks; ++c) moves.get(c, s + c * T::kSamples);

      const Acc copied = s[0];
      const double end = scan_groups(fma(in, s[0], added), k, s);
      if constexpr (kGradient) {
        moves.spread(own, whole, now, raw, nullptr,
                     [&] { end_chunks<T>(moves, mine, reference_); });
        reference_ = moves.last_of(T::kChunks - 1);
      }
      turn_ ^= 1;
      if (kGradient && thread() % kWarp == kWarp - 1)
        shared_.references[turn_][thread() / kWarp] = reference_;
      const FromZero zero = scan_block(end, powers_.of_warp(), k, shared_.ends[turn_]);
      const int64_t next = shared_.tickets[turn_];
      if constexpr (T::kAhead) raw = moves.fetch(moves.at(from, next), next < whole_tiles);

      add_state(powers_.of_tile().join(zero.before, fold(tile, zero.tile)), k, s);
      if (copies) s[0] = copied;
      copies = false;
      added = 0;
      in = k.in;
      if constexpr (kGradient) {
        const Stretch<T> stretch(moves, s, reference_, k);
        const Weights<T> weights(stretch.weight, k);
        kappa = weights.before;
        add_up(team_.sums[tile], stretch, weights, mine);
      }
      set_chunks<T>(moves, s);
      moves.put(moves.at(to, tile), whole, now);
      tile = next;
    }
    if (last && mine > 0 && mine <= T::kChunks) end_row(s, mine, kappa);
    return tile;
  }

  // The state before the tile, from what was sent; sends what the tile ends at.
  __device__ __forceinline__ double fold(int64_t tile, double own) {
    Message* const mine = team_.start + 1 + tile;
    const int i = static_cast<int>(tile) & (kGroup - 1);
    const bool ends_group = i == kGroup - 1;
    if (thread() == 0 && !ends_group) send(*mine, own);

    // The lanes: a batch, then groups, in the upper half tiles; so many messages back.
    const int lane = thread() % kWarp, in_batch = static_cast<int>(tile) & (kBatch - 1);
    const int back = lane < kGroup ? in_batch + 1 - lane * kGroup : i - (lane - kGroup);
    double state = 0;
    if (back > 0) state = shared_.tiles[back - 1].join(0, receive(mine[-back]));
#pragma unroll
    for (int by = kGroup / 2; by > 0; by /= 2) state += __shfl_xor_sync(kAllLanes, state, by);
    const double before = state + __shfl_xor_sync(kAllLanes, state, kGroup);
    if (thread() == kGroup && ends_group)  // it has the sum of the group's tiles
      send(*mine, team_.powers.tile.join(own, in_batch == kBatch - 1 ? before : state));
    return before;
  }

  // Each warp its own, in a fixed order; the first stretch is as if the tile began with it.
  __device__ __forceinline__ void add_up(TileSums& sums, const Stretch<T>& stretch,
                                         const Weights<T>& weights, int mine) {
    const int warp = thread() / kWarp, lane = thread() % kWarp;
    Acc other = __shfl_up_sync(kAllLanes, reference_, 1);
    if (lane == 0) other = warp == 0 ? reference_ : shared_.references[turn_][warp - 1];
    const auto drop = mine > 0 ? stretch.drop(other) : 0;
    const auto share = mine > 0 ? stretch.share - drop * weights.before : 0;
    const double shares = sum_over_lanes<kWarp>(share);
    const double drops = drop_of_warp<T>(drop, powers_.of_warp());
    if (lane == kWarp - 1) {
      sums.shares[warp] = shares;
      sums.drops[warp] = drops;
      sums.weights[warp] = weights.after;
    }
    if (thread() == 0) sums.first = reference_;
    if (mine > 0 && mine <= T::kChunks) sums.last = reference_;
  }

  // By the thread that has the row's last chunk.
  __device__ __forceinline__ void end_row(const Acc* s, int mine, double kappa) {
    auto& walk = shared_.walk.value();
    walk = team_.walk;
    walk.state = last_of<T>(s, mine);
    if constexpr (kGradient) {  // from a kappa of zero before the warp; of samples, those after
      const int samples = (thread() % kWarp * T::kChunks + mine) * T::kSamples;
      walk.sums = {reference_, 0, kappa_after<T>(s, mine, kappa, team_.row.decay), 0,
                   team_.row.decay.power(samples)};
    }
    team_.finish(arguments_.scan, walk);
    if constexpr (kGradient) arguments_.ends[index_] = walk.sums;
  }

  const Arguments& arguments_;
  Shared& shared_;
  const Team& team_;
  const int64_t index_;
  int turn_;
  ThreadPowers<T> powers_;
  Acc reference_ = 0;  // this thread's latest last sample
};

// Before SplitRows, a thread per row: what is known of it, and the walk to where its chunks begin,
// which sends what it ends at; all of it, if it has none.
template <class Tiling>
struct SplitHeads {
  static constexpr int kThreads = kWarp;
  static constexpr int kMinBlocks = 1;
  using Split = SplitRows<Tiling>;
  using Arguments = typename Split::Arguments;
  struct Shared {};

  static __device__ void run(const Arguments& arguments, Shared&) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + thread();
    if (index >= arguments.scan.rows) return;
    auto& team = *new (arguments.teams + index) typename Split::Team(arguments, index);
    send(*team.start, team.walk.state);
    if (team.parts.chunks > 0) return;
    team.finish(arguments.scan, team.walk);
    if constexpr (Split::kGradient) arguments.ends[index] = team.walk.sums;
  }
};

// The gradient to alpha of each split row, from the sums of its tiles: a block per row.
template <class Tiling>
struct SplitSums {
  static constexpr int kThreads = kBlockThreads;
  static constexpr int kMinBlocks = 1;
  using Split = SplitRows<Tiling>;
  using Arguments = typename Split::Arguments;
  struct Shared {
    Uninitialized<AlphaSums> warps[kBlockWarps];
  };

  static __device__ void run(const Arguments& arguments, Shared& shared) {
    const int64_t index = blockIdx.x;
    const auto& team = arguments.teams[index].value();
    AlphaSums sums = sum_over_block(team, shared);
    if (thread() != 0) return;
    if (team.last < 0) {
      sums = arguments.ends[index];
    } else {
      const Warp last = Warp::of(team, warps(team));
      sums.share += last.share - last.drop * sums.weight;
      sums.reference = team.sums[team.last].last;
      sums.prepend(arguments.ends[index]);
    }
    team.row.write_gradient(arguments.scan, team.at, sums);
  }

 private:
  using T = typename Split::T;
  using Team = typename Split::Team;

  // Of the whole row, the warps before the one that ends it.
  static __device__ int64_t warps(const Team& team) {
    return (team.parts.chunks - 1) / T::kWarpChunks;
  }

  // What a warp of a tile left.
  struct Warp {
    double share, drop, weight;

    static __device__ Warp of(const Team& team, int64_t warp) {
      const int64_t t = warp / kBlockWarps;
      const int w = static_cast<int>(warp % kBlockWarps);
      const TileSums& tile = team.sums[t];
      double gap = 0;
      if (w == 0)
        gap = tile.first - (t > 0 ? team.sums[t - 1].last : double{team.walk.sums.reference});
      return {tile.shares[w], tile.drops[w] + gap, tile.weights[w]};
    }
  };

  // Of what lies before the warp that ends the row, measured from 0: each thread joins some warps
  // that follow one another. To the first thread.
  static __device__ AlphaSums sum_over_block(const Team& team, Shared& shared) {
    const int64_t count = team.last < 0 ? 0 : warps(team);
    const int64_t each = (count + kThreads - 1) / kThreads, begin = thread() * each;
    const double decay = team.row.decay.power(T::kWarpChunks * T::kSamples);
    AlphaSums sums;
    if (thread() == 0) sums = {0, team.walk.sums.share, team.walk.sums.weight, 0, 1};
#pragma unroll 1
    for (int64_t i = begin; i < begin + each && i < count; ++i) {
      const Warp warp = Warp::of(team, i);
      sums.prepend({0, warp.share, warp.weight, warp.drop, decay});
    }
#pragma unroll 1
    for (int by = 1; by < kWarp; by *= 2) {
      const AlphaSums past = shuffle_down(sums, by, kWarp);
      if (begin + by * each < count) sums.prepend(past);
    }
    if (thread() % kWarp == 0) shared.warps[thread() / kWarp].value() = sums;
    __syncthreads();
    if (thread() != 0) return sums;
#pragma unroll 1
    for (int w = 1; w < kBlockWarps && w * kWarp * each < count; ++w)
      sums.prepend(shared.warps[w].value());
    return sums;
  }
};

}  // namespace ema_ext::cuda
