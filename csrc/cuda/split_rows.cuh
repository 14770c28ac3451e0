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

template <class Storage, bool kAligned, bool kGradient>
struct SplitRows {
  static constexpr int kThreads = kBlockThreads;
  static constexpr int kMinBlocks = kGradient || !kAligned ? kGradientBlocks : kScanBlocks;
  static constexpr int kC = Chunk<Storage>::kSamples;
  static constexpr int kWarpChunks = kWarp * kThreadChunks;
  static constexpr int kTileChunks = kThreads * kThreadChunks;
  using Sample = typename Storage::Sample;
  using Acc = typename Storage::Acc;
  using Shape = TileShape<Storage, kThreads>;
  using Team = TeamRow<Storage, kThreads, kAligned, kGradient>;
  using Moves = Stage<Storage, kWarp, kAligned>;

  // Of a row that have samples; one at least.
  static __device__ int64_t tiles(const Parts& parts) {
    const int64_t count = (parts.chunks + kTileChunks - 1) / kTileChunks;
    return count > 1 ? count : 1;
  }

  struct Arguments {
    Scan scan;
    int64_t tiles;               // blocks per row, some of which may find no samples
    unsigned long long* ticket;  // 0 before
    Message* messages;           // row * tiles + tile; 0 before
    AlphaSums* sums;             // the same; for SplitSums
  };
  struct Shared {
    WarpStage stage[kThreads / kWarp];
    Uninitialized<Team> team;
    double aggregates[Shape::kWarps], folded[Shape::kWarps];
    Uninitialized<AlphaSums> sums[kGradient ? Shape::kWarps : 1];
    double last;  // s, after the tile's samples of the row
    int64_t ticket;
  };

  static __device__ void run(const Arguments& arguments, Shared& shared) {
    const Scan& scan = arguments.scan;
    const int64_t count = arguments.tiles;
    Team& team = shared.team.value();
    if (thread() == 0) {
      shared.ticket = static_cast<int64_t>(atomicAdd(arguments.ticket, 1ull));
      new (&team) Team(scan, shared.ticket / count, shared.ticket % count == 0);
    }
    __syncthreads();
    const int64_t tile = shared.ticket % count, last = tiles(team.parts) - 1;
    if (tile > last) return;
    if (team.parts.chunks > 0) SplitRows(arguments, shared, tile, tile == last).scan_tile();
    __syncthreads();
    if (thread() != 0) return;
    if (tile == last) {
      if (team.parts.chunks > 0) team.walk.state = shared.last;
      team.walk_tail(scan);
      team.row.write_state(scan, team.at, team.walk.state);
    }
    if (kGradient) arguments.sums[shared.ticket] = team.walk.sums;
  }

 private:
  __device__ SplitRows(const Arguments& arguments, Shared& shared, int64_t tile, bool ends)
      : arguments_(arguments),
        shared_(shared),
        team_(shared.team.value()),
        tile_(tile),
        ends_(ends),
        moves_(shared.stage[thread() / kWarp]) {}

  template <class Pointer>
  __device__ __forceinline__ Run<Storage> run_of(Pointer samples, const View& view) const {
    const int64_t chunk = tile_ * kTileChunks + thread() / kWarp * kWarpChunks;
    const int64_t left = team_.parts.chunks - chunk;
    return {const_cast<Sample*>(samples) + (team_.parts.head + chunk * kC) * view.time_stride,
            view.time_stride, static_cast<int>(left < kWarpChunks ? left : kWarpChunks)};
  }

  __device__ __forceinline__ void scan_tile() {
    const Scan& scan = arguments_.scan;
    const auto& k = team_.powers;
    Acc x[Shape::kItems], s[Shape::kItems];
    moves_.spread(moves_.fetch(run_of(team_.row.x, scan.x)), scan.x.time_stride < 0, x);
    typename Moves::Raw raw_forward;
    if constexpr (kGradient)
      raw_forward = moves_.fetch(run_of(team_.row.forward_x, scan.forward_x));

    const bool starts = tile_ == 0 && thread() == 0 && team_.parts.head == 0;
    const bool copies = starts && team_.row.copies_first;
    Acc first = k.in * x[0];
    if (starts) first = copies ? x[0] : first + static_cast<Acc>(team_.row.added_first);
    const double lane_power = k.over_threads(thread() % kWarp, team_.row.decay);
    const FromZero zero =
        scan_block(scan_groups(x, first, k, s), lane_power, k, shared_.aggregates);
    const double before = state_before(zero.tile);
    const double thread_power = k.over_threads(thread(), team_.row.decay);
    add_state(static_cast<Acc>(zero.before + k.carried(thread_power, before)), k, s);
    if (copies) s[0] = x[0];

    const Run<Storage> to = run_of(team_.row.y, scan.y);
    const int mine =
        own_chunks(team_.parts.chunks - tile_ * kTileChunks - thread() * kThreadChunks);
    if constexpr (kGradient) {
      moves_.spread(raw_forward, scan.forward_x.time_stride < 0, x);
      join(alpha_sums(x, s, mine, k), to.chunks);
    }
    if (ends_) hand_on(s, mine);
    team_.to_outputs(scan, mine, ends_, s);
    moves_.put(s, to);
  }

  // Folds what was sent before, and sends.
  __device__ __forceinline__ double state_before(double aggregate) {
    Message* const messages = arguments_.messages + shared_.ticket - tile_;
    const bool anchor = tile_ % kLookBack == 0;
    if (thread() == 0 && !anchor && !ends_) send(messages[tile_], aggregate);
    double state = team_.walk.state;
    if (tile_ > 0) {
      const int64_t from = anchor_before(tile_) + thread();
      double share = 0;
      if (from < tile_) {
        const double power = team_.row.decay.power((tile_ - 1 - from) * Shape::kTile);
        share = team_.powers.carried(power, receive(messages[from]));
      }
      state = sum_over_block<kThreads>(share, shared_.folded);
    }
    if (thread() == 0 && anchor && !ends_)
      send(messages[tile_], aggregate + team_.powers.carried(team_.powers.tile, state));
    return state;
  }

  __device__ __forceinline__ void join(const AlphaSums& mine, int chunks) {
    const int warp = thread() / kWarp, threads = (chunks + kThreadChunks - 1) / kThreadChunks;
    const AlphaSums sums = join_lanes<kWarp>(mine, threads);
    if (thread() % kWarp == 0) shared_.sums[warp].value() = sums;
    __syncthreads();
    if (thread() != 0) return;
    const int64_t left = team_.parts.chunks - tile_ * kTileChunks;
#pragma unroll 1
    for (int w = 0; w < Shape::kWarps && w * kWarpChunks < left; ++w) {
      if (w == 0 && tile_ > 0)
        team_.walk.sums = shared_.sums[w].value();
      else
        team_.walk.sums.prepend(shared_.sums[w].value());
    }
  }

  // The last s of the row's chunks, to the leader.
  __device__ __forceinline__ void hand_on(const Acc* s, int mine) {
    const int64_t left = team_.parts.chunks - tile_ * kTileChunks;
    if (thread() != (left - 1) / kThreadChunks) return;
    Acc last = s[kC - 1];
#pragma unroll
    for (int c = 1; c < kThreadChunks; ++c)
      if (c < mine) last = s[c * kC + kC - 1];
    shared_.last = last;
  }

  const Arguments& arguments_;
  Shared& shared_;
  Team& team_;
  const int64_t tile_;
  const bool ends_;
  const Moves moves_;
};

// The gradient to alpha of each split row, from the sums of its tiles: a block per row.
template <class Storage, bool kAligned>
struct SplitSums {
  static constexpr int kThreads = kBlockThreads;
  static constexpr int kMinBlocks = 1;
  using Split = SplitRows<Storage, kAligned, true>;
  using Arguments = typename Split::Arguments;
  struct Shared {
    Uninitialized<AlphaSums> sums[kThreads / kWarp];
  };

  static __device__ void run(const Arguments& arguments, Shared& shared) {
    const Scan& scan = arguments.scan;
    const int64_t index = blockIdx.x, stride = arguments.tiles;
    const RowOffsets at(scan, index);
    const Row<Storage> row(scan, at);
    const int64_t tiles =
        row.decay.fits() ? Split::tiles(Parts::of<Storage, kAligned>(row, scan)) : 1;
    const int64_t each = (tiles + kThreads - 1) / kThreads, begin = thread() * each;
    const AlphaSums* const from = arguments.sums + index * stride;
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
    mine = join_lanes<kWarp>(mine, lanes);
    if (thread() % kWarp == 0) shared.sums[thread() / kWarp].value() = mine;
    __syncthreads();
    if (thread() != 0) return;
#pragma unroll 1
    for (int w = 1; w * kWarp < threads; ++w) mine.prepend(shared.sums[w].value());
    row.write_gradient(scan, at, mine);
  }
};

}  // namespace ema_ext::cuda
