// Few long rows: each tile of a row is a block of its own, and gets the state before it from the
// messages of the tiles before it (decoupled look-back: Merrill and Garland 2016; here every tile
// folds the same messages in the same order, so that the bits do not depend on the schedule).
//
// Tile t sends its aggregate from zero; every kLookBack'th tile, an anchor, sends the state after
// it. The state before tile t is the last anchor's message and those of the tiles since, each times
// the power of c over the tiles in between. Which tile a block takes comes from a ticket: those it
// waits for belong to blocks that run already, so no order of blocks and no number of resident
// blocks can keep it waiting for ever.
#pragma once

#include "cuda/messages.cuh"
#include "cuda/team_row.cuh"

namespace ema_ext::cuda {

// Messages that a tile folds at most, one by each thread.
constexpr int kLookBack = kBlockThreads;

// The first tile whose message tile `tile` folds: an anchor.
__device__ inline int64_t anchor_before(int64_t tile) { return (tile - 1) / kLookBack * kLookBack; }

template <class T>
struct SplitRows {
  static constexpr int kThreads = kBlockThreads;
  static constexpr int kMinBlocks = T::kAligned ? kBlocksPerMultiprocessor : 1;
  static constexpr bool kGradient = T::kGradient;
  using Sample = typename T::Sample;
  using Acc = typename T::Acc;
  using Team = TeamRow<T>;
  static_assert(T::kTeam == kThreads);

  // Of a row that have samples; one at least.
  static __device__ int64_t tiles(const Parts& parts) {
    const int64_t count = (parts.chunks + T::kTileChunks - 1) / T::kTileChunks;
    return count > 1 ? count : 1;
  }

  struct Arguments {
    Scan scan;
    int64_t tiles;               // blocks per row, some of which may find no samples
    unsigned long long* ticket;  // 0 before
    Message* messages;           // row * tiles + tile; 0 before
    Uninitialized<Team>* teams;  // per row: from SplitHeads
    AlphaSums* sums;             // row * tiles + tile; for SplitSums
  };
  struct Shared {
    WarpStage<T> stage[kBlockWarps];
    Uninitialized<Team> team;
    double aggregates[2][kBlockWarps], sums[3][kBlockWarps];
    Acc references[kBlockWarps];   // of each warp's last stretch
    double last;                   // s, after the last sample of the row's chunks
    Uninitialized<AlphaSums> end;  // of the tile's last stretch: reference and weight
    int64_t ticket;
  };

  static __device__ void run(const Arguments& arguments, Shared& shared) {
    const Scan& scan = arguments.scan;
    Team& team = shared.team.value();
    if (thread() == 0) shared.ticket = static_cast<int64_t>(atomicAdd(arguments.ticket, 1ull));
    __syncthreads();
    const int64_t index = shared.ticket / arguments.tiles, tile = shared.ticket % arguments.tiles;
    copy(arguments.teams[index], shared.team);
    __syncthreads();
    const int64_t last = tiles(team.parts) - 1;
    if (tile > last) return;
    if (team.parts.chunks > 0) SplitRows(arguments, shared, tile, tile == last).scan_tile();
    __syncthreads();
    if (thread() != 0) return;
    if (tile == last) {
      if (team.parts.chunks > 0) team.walk.state = shared.last;
      team.walk_tail(scan);
      team.row.write_state(scan, team.at, team.walk.state);
    }
    if constexpr (kGradient) arguments.sums[shared.ticket] = team.walk.sums;
  }

 private:
  __device__ SplitRows(const Arguments& arguments, Shared& shared, int64_t tile, bool ends)
      : arguments_(arguments),
        shared_(shared),
        team_(shared.team.value()),
        tile_(tile),
        ends_(ends),
        moves_(shared.stage[thread() / kWarp], arguments.scan.x.time_stride < 0),
        lane_(TilePowers<T>::over_threads(thread() % kWarp, team_.row.decay)),
        thread_(TilePowers<T>::over_threads(thread(), team_.row.decay)) {}

  template <class Pointer>
  __device__ __forceinline__ Run<Sample> run_of(Pointer samples, const View& view) const {
    const int64_t chunk = tile_ * T::kTileChunks + thread() / kWarp * T::kWarpChunks;
    const int64_t left = team_.parts.chunks - chunk;
    return {
        const_cast<Sample*>(samples) + (team_.parts.head + chunk * T::kSamples) * view.time_stride,
        view.time_stride, static_cast<int>(left < T::kWarpChunks ? left : T::kWarpChunks)};
  }

  static __device__ __forceinline__ void copy(const Uninitialized<Team>& from,
                                              Uninitialized<Team>& to) {
    static_assert(sizeof(Team) % sizeof(uint2) == 0);
    for (size_t i = thread(); i < sizeof(Team) / sizeof(uint2); i += kThreads)
      reinterpret_cast<uint2*>(to.bytes)[i] = reinterpret_cast<const uint2*>(from.bytes)[i];
  }

  __device__ __forceinline__ void scan_tile() {
    const Scan& scan = arguments_.scan;
    const auto& k = team_.powers;
    Acc x[T::kItems], s[T::kItems];
    moves_.spread(moves_.fetch(run_of(team_.row.x, scan.x)), x);
    typename Stage<T>::Raw raw_own;
    if constexpr (kGradient) raw_own = moves_.fetch(run_of(team_.row.forward_x, scan.forward_x));

    const bool starts = tile_ == 0 && thread() == 0 && team_.parts.head == 0;
    const bool copies = starts && team_.row.copies_first;
    Acc first = k.in * x[0];
    if (starts) first += static_cast<Acc>(team_.row.added_first);
    if (copies && !finite(x[0])) first = x[0];
    const FromZero zero = scan_block(scan_groups(x, first, k, s), lane_, k, shared_.aggregates[0]);
    const double before = state_before(arguments_.messages, team_.walk.state, zero.tile);
    add_state(thread_.join(zero.before, before), k, s);
    if (copies) s[0] = x[0];

    const int mine =
        own_chunks<T>(team_.parts.chunks - tile_ * T::kTileChunks - thread() * T::kChunks);
    if (mine > 0 && mine <= T::kChunks && ends_) shared_.last = last_of<T>(s, mine);
    if constexpr (kGradient) {
      moves_.spread(raw_own, x);
      join(Stretch<T>(x, s, mine, k), mine);
    }
    moves_.put(s, run_of(team_.row.y, scan.y));
  }

  // Folds what was sent before the tile, and sends. `start` is the state before the first one.
  __device__ __forceinline__ double state_before(Message* messages, double start,
                                                 double aggregate) {
    messages += shared_.ticket - tile_;
    const bool anchor = tile_ % kLookBack == 0;
    if (thread() == 0 && !anchor && !ends_) send(messages[tile_], aggregate);
    double state = start;
    if (tile_ > 0) {
      const int64_t from = anchor_before(tile_) + thread();
      double share = 0;
      if (from < tile_) {
        const int64_t threads = (tile_ - 1 - from) * kThreads;
        share =
            team_.powers.over_threads(threads, team_.row.decay).join(0, receive(messages[from]));
      }
      state = sum_over_block(share, shared_.sums[0]);
    }
    if (thread() == 0 && anchor && !ends_)
      send(messages[tile_], team_.powers.tile.join(aggregate, state));
    return state;
  }

  // The tile's sums, to the walk. Within the tile kappa starts from zero: what later samples weigh
  // comes in when the tiles are joined.
  __device__ __forceinline__ void join(const Stretch<T>& stretch, int mine) {
    const auto& k = team_.powers;
    const int warp = thread() / kWarp;
    if (thread() % kWarp == kWarp - 1) shared_.references[warp] = stretch.reference;
    const bool last = mine > 0 && mine <= T::kChunks;  // of the tile's stretches, or the row's
    const bool ends_tile = mine > 0 && (last || thread() == kThreads - 1);
    AlphaSums& end = shared_.end.value();
    if (ends_tile) end.reference = stretch.reference;
    const FromZero zero = scan_block(stretch.weight, lane_, k, shared_.aggregates[1]);
    Acc other = __shfl_up_sync(kAllLanes, stretch.reference, 1);
    if (thread() % kWarp == 0) other = warp == 0 ? stretch.reference : shared_.references[warp - 1];
    double gradient = 0, aggregate = 0;
    if (mine > 0) {
      gradient = stretch.gradient(zero.before, other);
      const double decay = k.chunks[min(mine, T::kChunks)];
      const double power = team_.row.decay.power(static_cast<int64_t>(thread()) * T::kItems);
      if (ends_tile) end.weight = stretch.weight + decay * zero.before;
      if (ends_tile) end.decay = power * decay;
      const double gap = stretch.reference - end.reference;
      aggregate = power * (stretch.aggregate + gap * (1 - decay));
    }
    end_sums(sum_over_block(gradient, shared_.sums[1]), sum_over_block(aggregate, shared_.sums[2]));
  }
  __device__ __forceinline__ void end_sums(double share, double aggregate) {
    if (thread() != 0) return;
    const AlphaSums& end = shared_.end.value();
    const AlphaSums tile{end.reference, share, end.weight, aggregate, end.decay};
    if (tile_ == 0)
      team_.walk.sums.prepend(tile);
    else
      team_.walk.sums = tile;
  }

  const Arguments& arguments_;
  Shared& shared_;
  Team& team_;
  const int64_t tile_;
  const bool ends_;
  const Stage<T> moves_;
  // From the first sample of the warp, and of the tile, to the thread's.
  const Power<Acc> lane_, thread_;
};

// Before SplitRows, a thread per row: its team's knowledge, and the walk to where its chunks begin.
template <class T>
struct SplitHeads {
  static constexpr int kThreads = kWarp;
  static constexpr int kMinBlocks = 1;
  using Split = SplitRows<T>;
  using Arguments = typename Split::Arguments;
  struct Shared {};

  static __device__ void run(const Arguments& arguments, Shared&) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + thread();
    if (index < arguments.scan.rows)
      new (arguments.teams + index) typename Split::Team(arguments.scan, index, true);
  }
};

// The stretches of the first `count` lanes, joined in the first.
__device__ __forceinline__ AlphaSums join_lanes(AlphaSums sums, int count) {
#pragma unroll 1
  for (int by = 1; by < kWarp; by *= 2) {
    const AlphaSums past = shuffle_down(sums, by, kWarp);
    if (thread() % kWarp + by < count) sums.prepend(past);
  }
  return sums;
}

// The gradient to alpha of each split row, from the sums of its tiles: a block per row.
template <class T>
struct SplitSums {
  static constexpr int kThreads = kBlockThreads;
  static constexpr int kMinBlocks = 1;
  using Split = SplitRows<T>;
  using Arguments = typename Split::Arguments;
  struct Shared {
    Uninitialized<AlphaSums> sums[kThreads / kWarp];
  };

  static __device__ void run(const Arguments& arguments, Shared& shared) {
    const Scan& scan = arguments.scan;
    const int64_t index = blockIdx.x;
    const auto& team = arguments.teams[index].value();
    const int64_t tiles = Split::tiles(team.parts);
    const int64_t each = (tiles + kThreads - 1) / kThreads, begin = thread() * each;
    const AlphaSums* const from = arguments.sums + index * arguments.tiles;
    AlphaSums mine;
#pragma unroll 1
    for (int64_t t = begin; t < begin + each && t < tiles; ++t) {
      if (t == begin)
        mine = from[t];
      else
        mine.prepend(from[t]);
    }
    const int64_t threads = (tiles + each - 1) / each;  // that have some
    const int lanes = static_cast<int>(threads - thread() / kWarp * kWarp);
    mine = join_lanes(mine, lanes);
    if (thread() % kWarp == 0) shared.sums[thread() / kWarp].value() = mine;
    __syncthreads();
    if (thread() != 0) return;
#pragma unroll 1
    for (int w = 1; w * kWarp < threads; ++w) mine.prepend(shared.sums[w].value());
    team.row.write_gradient(scan, team.at, mine);
  }
};

}  // namespace ema_ext::cuda
