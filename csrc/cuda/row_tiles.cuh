// Many rows: a team of threads takes a row from end to end, tile by tile, the next tile on its way
// while one is scanned. Teams of 8 or 32 need no barrier; a team of a whole block one per tile.
#pragma once

#include "cuda/team_row.cuh"

namespace ema_ext::cuda {

template <class Storage, int kTeam, bool kAligned, bool kGradient>
struct RowTiles {
  using Sample = typename Storage::Sample;
  using Acc = typename Storage::Acc;
  using Shape = TileShape<Storage, kTeam>;
  using Powers = TilePowers<Storage, kTeam>;
  using Moves = Stage<Storage, Shape::kLanes, kAligned>;
  using Raw = typename Moves::Raw;
  static constexpr int kThreads = kBlockThreads;
  static constexpr int kMinBlocks = kGradient || !kAligned ? kGradientBlocks : kScanBlocks;
  static constexpr int kTeams = kThreads / kTeam;
  static constexpr int kC = Chunk<Storage>::kSamples;
  static constexpr int kItems = Shape::kItems;
  static constexpr int kWarpChunks = Shape::kLanes * kThreadChunks;
  static constexpr int kTileChunks = kTeam * kThreadChunks;
  static constexpr bool kBlock = kTeam > kWarp;

  struct Arguments {
    Scan scan;
  };

  using TeamRow = cuda::TeamRow<Storage, kTeam, kAligned, kGradient>;

  struct Shared {
    WarpStage stage[kThreads / kWarp];
    Uninitialized<TeamRow> teams[kTeams];
    double aggregates[2][kBlock ? Shape::kWarps : 1];
    Uninitialized<AlphaSums> sums[2][kBlock && kGradient ? Shape::kWarps : 1];
  };

  static __device__ void run(const Arguments& arguments, Shared& shared) {
    const Scan& scan = arguments.scan;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kTeams;
    int turn = 0;
    // All teams of a warp take the same turns: they shuffle together.
#pragma unroll 1
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * kTeams; first < scan.rows;
         first += step) {
      const int64_t index = first + thread() / kTeam;
      const bool there = index < scan.rows, leads = there && thread() % kTeam == 0;
      TeamRow& team = shared.teams[thread() / kTeam].value();
      if (thread() % kTeam == 0) new (&team) TeamRow(scan, there ? index : scan.rows - 1, there);
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
  __device__ RowTiles(const Scan& scan, Shared& shared, TeamRow& team, bool there, int turn)
      : scan_(scan),
        shared_(shared),
        team_(team),
        leads_(there && thread() % kTeam == 0),
        chunks_(there ? team.parts.chunks : 0),
        turn_(turn),
        moves_(shared.stage[thread() / kWarp]) {}

  static __device__ __forceinline__ void sync() {
    if constexpr (kBlock)
      __syncthreads();
    else
      __syncwarp();
  }

  // Where in the tile, in chunks, this warp's samples begin and this thread's.
  static __device__ __forceinline__ int warp_begin() {
    return thread() % kTeam / kWarp * kWarpChunks;
  }
  static __device__ __forceinline__ int begin() { return thread() % kTeam * kThreadChunks; }

  // This warp's share of a tile.
  template <class Pointer>
  __device__ __forceinline__ Run<Storage> run_of(Pointer samples, const View& view,
                                                 int64_t tile) const {
    const int64_t chunk = tile * kTileChunks + warp_begin(), left = chunks_ - chunk;
    return {const_cast<Sample*>(samples) + (team_.parts.head + chunk * kC) * view.time_stride,
            view.time_stride, static_cast<int>(left < kWarpChunks ? left : kWarpChunks)};
  }

  __device__ __forceinline__ int scan_tiles() {
    const int64_t most = kTeam < kWarp ? scan_.length / kC : chunks_;
    const int64_t tiles = (most + kTileChunks - 1) / kTileChunks;
    const Powers& k = team_.powers;
    const double lane_power = k.over_threads(thread() % Shape::kLanes, team_.row.decay);
    const double thread_power =
        kBlock ? k.over_threads(thread() % kTeam, team_.row.decay) : lane_power;
    State<Acc> state{team_.walk.state, 0};
    Acc last = 0;
    Raw raw = moves_.fetch(run_of(team_.row.x, scan_.x, 0)), raw_forward;
    if constexpr (kGradient)
      raw_forward = moves_.fetch(run_of(team_.row.forward_x, scan_.forward_x, 0));
    sync();  // the leader writes the walk below
#pragma unroll 1
    for (int64_t tile = 0; tile < tiles; ++tile) {
      Acc x[kItems], s[kItems];
      moves_.spread(raw, scan_.x.time_stride < 0, x);
      if (tile + 1 < tiles) raw = moves_.fetch(run_of(team_.row.x, scan_.x, tile + 1));

      const bool starts = tile == 0 && begin() == 0 && team_.parts.head == 0;
      const bool copies = starts && team_.row.copies_first;
      Acc first = k.in * x[0];
      if (starts) first = copies ? x[0] : first + static_cast<Acc>(team_.row.added_first);
      const FromZero zero = scan(scan_groups(x, first, k, s), lane_power);
      if (kGradient && kBlock && tile > 0) fold(kTileChunks);
      add_state(static_cast<Acc>(zero.before + k.carried(thread_power, state.value)), k, s);
      state.advance(zero.tile, k.carried(k.tile, state.value), k.drop);
      if (copies) s[0] = x[0];

      const Run<Storage> to = run_of(team_.row.y, scan_.y, tile);
      const int mine = own_chunks(chunks_ - tile * kTileChunks - begin());
#pragma unroll
      for (int c = 0; c < kThreadChunks; ++c)
        if (c < mine) last = s[c * kC + kC - 1];
      if constexpr (kGradient) {
        moves_.spread(raw_forward, scan_.forward_x.time_stride < 0, x);
        if (tile + 1 < tiles)
          raw_forward = moves_.fetch(run_of(team_.row.forward_x, scan_.forward_x, tile + 1));
        join(alpha_sums(x, s, mine, k), to.chunks);
      }
      team_.to_outputs(scan_, mine, tile + 1 == tiles, s);
      moves_.put(s, to);
    }
    if (chunks_ > 0) hand_on(last);
    return turn_;
  }

  __device__ __forceinline__ FromZero scan(double aggregate, double lane_power) {
    if constexpr (kBlock)
      return scan_block(aggregate, lane_power, team_.powers, shared_.aggregates[turn_ ^= 1]);
    return scan_lanes(aggregate, team_.powers);
  }

  // The tile's sums, to the leader; in a block by way of `fold`, after the next barrier.
  __device__ __forceinline__ void join(const AlphaSums& mine, int chunks) {
    const int threads = (chunks + kThreadChunks - 1) / kThreadChunks;
    const AlphaSums sums = join_lanes<Shape::kLanes>(mine, threads);
    if constexpr (kBlock) {
      if (thread() % kWarp == 0) shared_.sums[turn_][thread() / kWarp].value() = sums;
    } else if (leads_ && threads > 0) {
      team_.walk.sums.prepend(sums);
    }
  }
  // What `join` left behind in the tile before the last barrier, which had `chunks`.
  __device__ __forceinline__ void fold(int chunks) {
    if (!leads_) return;
#pragma unroll 1
    for (int w = 0; w * kWarpChunks < chunks; ++w)
      team_.walk.sums.prepend(shared_.sums[turn_ ^ 1][w].value());
  }

  // The last s of the row's chunks, from the thread that has it to the walk.
  __device__ __forceinline__ void hand_on(Acc last) {
    const int in_tile = static_cast<int>((chunks_ - 1) % kTileChunks);
    if (thread() % kTeam == in_tile / kThreadChunks) team_.walk.state = last;
    if constexpr (kBlock && kGradient) {
      turn_ ^= 1;
      __syncthreads();
      fold(in_tile + 1);
    }
  }

  const Scan& scan_;
  Shared& shared_;
  TeamRow& team_;
  const bool leads_;
  const int64_t chunks_;
  int turn_;
  const Moves moves_;
};

}  // namespace ema_ext::cuda
