// Rows that lie side by side in memory, as in (batch, time, channels) scanned over time:
// neighbouring threads take neighbouring rows, 16 bytes of them each, and nothing is transposed.
//
// A block takes `columns` threads across and kThreads / columns slots along time, kSteps samples
// each: together a tile. It goes from tile to tile with the state of each row in shared memory; or,
// with kSplit, each tile is a block of its own, with messages and tickets as in split_rows.cuh:
// where there are few rows.
#pragma once

#include <type_traits>

#include "cuda/messages.cuh"
#include "cuda/tile.cuh"
#include "cuda/walk.cuh"

namespace ema_ext::cuda {

// The first tile whose message tile `tile` folds, an anchor.
__device__ inline int64_t lane_anchor_before(int64_t tile) {
  return (tile - 1) / kLaneLookBack * kLaneLookBack;
}

// One row of a block: the powers of its coefficient and what goes from tile to tile.
template <class Storage, int kSteps>
struct alignas(16) Lane {
  using Acc = typename Storage::Acc;
  static constexpr int kG = 4;  // samples that are scanned by c itself

  Acc powers[kG + 1];  // c^i
  Acc in, to_lambda, alpha;
  double slot_decay;    // c^kSteps
  Power<Acc> slots[3];  // over kSteps 2^i samples
  Power<Acc> warp;      // over the slots of a warp
  Power<Acc> tile;      // over a tile
  double added_first;
  State<Acc> states[2];  // before the tile, by the tile's parity
  double last;           // s, after the last sample
  Acc first;             // x[0], where that is y[0]

  __device__ Lane(const Row<Storage>& row, int slots_per_warp, double start)
      : in(static_cast<Acc>(row.in)),
        to_lambda(static_cast<Acc>(row.to_lambda)),
        alpha(static_cast<Acc>(row.decay.complement())),
        slot_decay(row.decay.power(kSteps)),
        slots{row.decay.over(kSteps), row.decay.over(2 * kSteps), row.decay.over(4 * kSteps)},
        warp(row.decay.over(kSteps * slots_per_warp)),
        tile(row.decay.over(kSteps * slots_per_warp * kBlockWarps)),
        added_first(row.added_first),
        last(start) {
#pragma unroll 1
    for (int i = 0; i <= kG; ++i) powers[i] = static_cast<Acc>(row.decay.power(i));
    states[0] = states[1] = {start, 0};  // the second for columns that are not there
  }

  // q[i], s[i] from zero, in place of a thread's x[i] of row w; returns the last s.
  template <int kW>
  __device__ __forceinline__ Acc scan_groups(Acc (&q)[kSteps][kW], int w, bool starts,
                                             bool copies) {
    if (copies) first = q[0][w];
    Acc aggregate = 0;
#pragma unroll
    for (int g = 0; g < kSteps; g += kG) {
      Acc x = q[g][w];
      q[g][w] = in * x;
      if (g == 0 && starts) q[g][w] += static_cast<Acc>(added_first);
      if (g == 0 && copies && !finite(x)) q[g][w] = x;
#pragma unroll
      for (int i = g + 1; i < g + kG; ++i) q[i][w] = fma(powers[1], q[i - 1][w], in * q[i][w]);
      aggregate = fma(powers[kG], aggregate, q[g + kG - 1][w]);
    }
    return aggregate;
  }
  // As tile.cuh's: s[i] in place of q[i].
  template <int kW>
  __device__ __forceinline__ void add_state(Acc state, Acc (&q)[kSteps][kW], int w,
                                            bool copies) const {
    Acc from_zero = 0;
#pragma unroll
    for (int g = 0; g < kSteps; g += kG) {
      const Acc before = g == 0 ? state : fma(powers[kG], state, from_zero);
      from_zero = q[g + kG - 1][w];
#pragma unroll
      for (int i = 0; i < kG; ++i) q[g + i][w] = fma(powers[i + 1], before, q[g + i][w]);
    }
    if (copies) q[0][w] = first;
  }
  static_assert(kSteps <= 2 * kG);

  // As tile.cuh's, of the first `count` samples, which are one or more.
  template <int kW>
  __device__ __forceinline__ AlphaSums alpha_sums(const Acc (&x)[kSteps][kW],
                                                  const Acc (&s)[kSteps][kW], int w,
                                                  int count) const {
    AlphaSums sums;
    Acc reference = x[0][w], share = 0, weight = 0, aggregate = 0;
#pragma unroll
    for (int i = 1; i < kSteps; ++i)
      if (i < count) reference = x[i][w];
#pragma unroll
    for (int i = kSteps - 1; i >= 0; --i) {
      if (i >= count) continue;
      const Acc innovation = x[i][w] - reference - aggregate;
      share = fma(s[i][w], innovation, share);
      aggregate = fma(alpha, innovation, aggregate);
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (i >= count) continue;
      weight = fma(powers[1], weight, s[i][w]);
      if (count < kSteps) sums.decay *= powers[1];
    }
    if (count == kSteps) sums.decay = slot_decay;
    sums.reference = reference;
    sums.share = share;
    sums.weight = weight;
    sums.aggregate = aggregate;
    return sums;
  }
};

template <class Storage, bool kVector, bool kGradient, bool kSplit>
struct Lanes {
  using Sample = typename Storage::Sample;
  using Acc = typename Storage::Acc;
  static constexpr int kThreads = kBlockThreads;
  static constexpr int kMinBlocks = 1;  // more fit where shared memory is not that of 7.5
  static constexpr int kW = kVector ? Chunk<Storage>::kSamples : 1;  // rows of a thread
  static constexpr int kMessages = sizeof(Acc) == 8 ? 2 : 1;         // a state and its error
  static constexpr int kSteps = lane_steps(sizeof(Sample), kGradient);
  static constexpr int kMostLanes = lanes_per_block(kW, kGradient);

  struct Arguments {
    Scan scan;                   // the last axis is that along which rows touch
    int columns;                 // a power of two, from 4 to kMostLanes / kW
    int slots;                   // kThreads / columns
    int64_t tiles;               // per row
    unsigned long long* ticket;  // 0 before; of a split scan, as the two below
    Message* messages;  // kMessages of each (group * tiles + tile) * lanes + lane; 0 before
    AlphaSums* sums;    // (group * tiles + tile) * lanes + lane; for LaneSums
  };
  struct Shared {
    Uninitialized<Lane<Storage, kSteps>> lanes[kMostLanes];
    double aggregates[2][kBlockWarps][kMostLanes];
    Uninitialized<AlphaSums> warps[kGradient ? kBlockWarps : 1][kGradient ? kMostLanes : 1];
    Uninitialized<AlphaSums> sums[kGradient ? kMostLanes : 1];
    int64_t ticket;
    bool unfit;  // whether a row must be walked
  };

  static __device__ void run(const Arguments& arguments, Shared& shared) {
    if (thread() == 0) shared.unfit = false;
    if (thread() == 0)
      shared.ticket = kSplit ? static_cast<int64_t>(atomicAdd(arguments.ticket, 1ull))
                             : static_cast<int64_t>(blockIdx.x) * arguments.tiles;
    __syncthreads();
    const int64_t ticket = shared.ticket;
    Lanes(arguments, shared, ticket / arguments.tiles, ticket % arguments.tiles).scan();
  }

 private:
  // The rows of a group, and this thread's place among them.
  __device__ Lanes(const Arguments& arguments, Shared& shared, int64_t group, int64_t first_tile)
      : arguments_(arguments),
        shared_(shared),
        group_(group),
        first_tile_(first_tile),
        column_(thread() % arguments.columns),
        slot_(thread() / arguments.columns),
        slots_per_warp_(kWarp / arguments.columns),
        slot_in_warp_(thread() % kWarp / arguments.columns) {
    const Scan& scan = arguments.scan;
    const int64_t width = scan.sizes[scan.ndim - 1], lanes = arguments.columns * kW;
    const int64_t per_width = (width + lanes - 1) / lanes;
    const int64_t first = group % per_width * lanes;
    row_ = group / per_width * width + first;
    count_ = static_cast<int>(width - first < lanes ? width - first : lanes);
  }

  __device__ int lanes() const { return arguments_.columns * kW; }
  __device__ int tile_steps() const { return kSteps * arguments_.slots; }
  __device__ __forceinline__ Lane<Storage, kSteps>& lane(int w) const {
    return shared_.lanes[column_ * kW + w].value();
  }
  // Of this block's rows, the one that thread `i` looks after.
  __device__ RowOffsets own_row() const { return RowOffsets(arguments_.scan, row_ + thread()); }
  __device__ bool owns_row() const { return thread() < count_; }

  __device__ void scan() {
    const Scan& scan = arguments_.scan;
    if (thread() < lanes()) {
      const RowOffsets at(scan, row_ + min(thread(), count_ - 1));
      const Row<Storage> row(scan, at);
      if (!row.scans()) shared_.unfit = true;
      new (&shared_.lanes[thread()].value()) Lane<Storage, kSteps>(
          row, slots_per_warp_, first_tile_ == 0 && owns_row() ? row.start(scan, at) : 0);
      if constexpr (kGradient) new (&shared_.sums[thread()].value()) AlphaSums;
    }
    __syncthreads();
    if (shared_.unfit) return walk();
    const int64_t end = kSplit ? first_tile_ + 1 : arguments_.tiles;
    place();
    int64_t tile = first_tile_;
#pragma unroll 1
    while (tile < end) {
      if (!is_inner(tile)) scan_tile<false>(tile++);
#pragma unroll 1
      for (; tile < end && is_inner(tile); ++tile) scan_tile<true>(tile);
    }
    __syncthreads();
    if (owns_row()) finish(end == arguments_.tiles);
  }

  // All rows sample by sample, where the coefficient of one asks for it.
  __device__ void walk() {
    if (first_tile_ > 0 || !owns_row()) return;
    const Scan& scan = arguments_.scan;
    const RowOffsets at = own_row();
    const Row<Storage> row(scan, at);
    Walk<Storage, kGradient> walk{row.start(scan, at), {}};
    walk.over(row, scan, 0, scan.length);
    row.write_state(scan, at, walk.state);
    row.write_gradient(scan, at, walk.sums);
  }

  __device__ void finish(bool ends) {
    const Scan& scan = arguments_.scan;
    if (kGradient && kSplit)
      arguments_.sums[shared_.ticket * lanes() + thread()] = shared_.sums[thread()].value();
    if (!ends) return;
    const RowOffsets at = own_row();
    const Row<Storage> row(scan, at);
    row.write_state(scan, at, shared_.lanes[thread()].value().last);
    if (kGradient && !kSplit) row.write_gradient(scan, at, shared_.sums[thread()].value());
  }

  using Samples = Acc[kSteps][kW];
  // On their way.
  struct Raw {
    std::conditional_t<kVector, uint4, Sample> of[kSteps];
  };

  // This thread's first row, and from the tile's first sample to this slot's.
  __device__ void place() {
    const RowOffsets at(arguments_.scan, row_);
    x_ = at.x + column_ * kW;
    y_ = at.y + column_ * kW;
    forward_x_ = at.forward_x + column_ * kW;
    if constexpr (sizeof(Acc) == 8) {
#pragma unroll
      for (int w = 0; w < kW; ++w) {
        const int64_t row = row_ + min(column_ * kW + w, count_ - 1);
        here_[w] = Row<Storage>(arguments_.scan, RowOffsets(arguments_.scan, row))
                       .decay.over(static_cast<int64_t>(slot_) * kSteps);
      }
    }
  }

  // The first `mine` samples of each row, 0 for the others.
  __device__ __forceinline__ Raw fetch(const View& view, int64_t offset, int64_t n,
                                       int mine) const {
    const Sample* from = static_cast<const Sample*>(view.data) + offset + n * view.time_stride;
    Raw raw;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const Sample* const at = from + i * view.time_stride;
      if constexpr (kVector)
        raw.of[i] = i < mine ? *reinterpret_cast<const uint4*>(at) : uint4{0, 0, 0, 0};
      else
        raw.of[i] = i < mine ? *at : Storage::put(0);
    }
    return raw;
  }
  static __device__ __forceinline__ void unpack(const Raw& raw, Samples& to) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if constexpr (kVector)
        Chunk<Storage>::unpack(raw.of[i], to[i]);
      else
        to[i][0] = Storage::get(raw.of[i]);
    }
  }
  __device__ __forceinline__ void store(const Samples& from, int64_t n, int mine) const {
    const View& view = arguments_.scan.y;
    Sample* const to = static_cast<Sample*>(view.data) + y_ + n * view.time_stride;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (i >= mine) continue;
      if constexpr (kVector)
        *reinterpret_cast<uint4*>(to + i * view.time_stride) = Chunk<Storage>::pack(from[i]);
      else
        to[i * view.time_stride] = Storage::put(from[i][0]);
    }
  }

  // Whether neither the row's first sample is in the tile, nor its last.
  __device__ __forceinline__ bool is_inner(int64_t tile) const {
    return tile > 0 && (tile + 1) * tile_steps() < arguments_.scan.length;
  }

  template <bool kInner>
  __device__ __forceinline__ void scan_tile(int64_t tile) {
    const Scan& scan = arguments_.scan;
    const int64_t n = tile * tile_steps() + slot_ * kSteps, left = scan.length - n;
    const bool column_there = column_ * kW < count_;
    const int there = kInner || left >= kSteps ? kSteps : left <= 0 ? 0 : static_cast<int>(left);
    const int mine = column_there ? there : 0;
    const bool starts = !kInner && n == 0,
               copies = starts && scan.op == Op::kEma && scan.start.data == nullptr;
    const int parity = static_cast<int>(tile & 1);

    Samples s, forward_x;
    unpack(fetch(scan.x, x_, n, mine), s);
    double ends[kW];
    Acc states[kW];  // before this slot; first from zero before the warp
#pragma unroll
    for (int w = 0; w < kW; ++w) ends[w] = lane(w).scan_groups(s, w, starts, copies);
    scan_warp(ends, parity, states);
    __syncthreads();
    Raw raw;
    if constexpr (kGradient) raw = fetch(scan.forward_x, forward_x_, n, mine);
    if constexpr (kSplit) look_back(tile, parity);

    if (!kSplit && slot_ == 0) advance(parity);
    join_states(parity, states);
    if constexpr (kGradient) unpack(raw, forward_x);
#pragma unroll
    for (int w = 0; w < kW; ++w) {
      Lane<Storage, kSteps>& k = lane(w);
      k.add_state(states[w], s, w, copies);
      if (!kInner && mine > 0 && left <= kSteps) k.last = last_of(s, w, mine);
      if constexpr (kGradient)
        join(k.alpha_sums(forward_x, s, w, kInner ? kSteps : mine), mine > 0, w);
      if constexpr (!kInner)
        if (scan.op == Op::kEmaBackward && !scan.has_initial_state) to_lambda(s, w, left);
    }
    store(s, n, mine);
    if constexpr (kGradient) {
      __syncthreads();
      fold(scan.length - tile * tile_steps());
    }
  }

  // The row's last sample, of the thread's `left` before its end.
  __device__ __forceinline__ void to_lambda(Samples& s, int w, int64_t left) const {
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
      if (i + 1 == left) s[i][w] *= lane(w).to_lambda;
  }

  static __device__ __forceinline__ Acc last_of(const Samples& s, int w, int count) {
    Acc last = s[0][w];
#pragma unroll
    for (int i = 1; i < kSteps; ++i)
      if (i < count) last = s[i][w];
    return last;
  }

  // From what each slot ends at, the states before this one, from zero before the warp.
  __device__ __forceinline__ void scan_warp(double (&ends)[kW], int parity, Acc (&before)[kW]) {
    const int columns = arguments_.columns, member = thread() % kWarp;
    int step = 0;
#pragma unroll 1
    for (int by = columns; by < kWarp; by *= 2, ++step) {
#pragma unroll
      for (int w = 0; w < kW; ++w) {
        const double from = __shfl_up_sync(kAllLanes, ends[w], by);
        if (member >= by) ends[w] = lane(w).slots[step].join(ends[w], from);
      }
    }
#pragma unroll
    for (int w = 0; w < kW; ++w) {
      const double past = __shfl_up_sync(kAllLanes, ends[w], columns);
      before[w] = member < columns ? 0 : static_cast<Acc>(past);
    }
    if (member < kWarp - columns) return;
#pragma unroll
    for (int w = 0; w < kW; ++w)
      shared_.aggregates[parity][thread() / kWarp][column_ * kW + w] = ends[w];
  }

  // The first slot keeps the states after the tile.
  __device__ __forceinline__ void advance(int parity) {
#pragma unroll 1
    for (int w = 0; w < kW; ++w) {
      Lane<Storage, kSteps>& k = lane(w);
      State<Acc> state = k.states[parity];
      state.advance(aggregate_of_tile(column_ * kW + w, parity), k.tile);
      k.states[parity ^ 1] = state;
    }
  }

  // The states before this slot, from those from zero before the warp.
  __device__ __forceinline__ void join_states(int parity, Acc (&states)[kW]) const {
    constexpr bool kWide = sizeof(Acc) == 8;
    double past[kW];  // of the warps before
#pragma unroll
    for (int w = 0; w < kW; ++w) past[w] = kWide ? 0 : lane(w).states[parity].value;
#pragma unroll 1
    for (int i = 0; i < thread() / kWarp; ++i) {
#pragma unroll
      for (int w = 0; w < kW; ++w)
        past[w] = lane(w).warp.join(shared_.aggregates[parity][i][column_ * kW + w], past[w]);
    }
    int step = 0;
#pragma unroll 1
    for (int slots = slot_in_warp_; slots != 0; slots >>= 1, ++step) {
      if ((slots & 1) == 0) continue;
#pragma unroll
      for (int w = 0; w < kW; ++w) past[w] = lane(w).slots[step].join(0, past[w]);
    }
#pragma unroll
    for (int w = 0; w < kW; ++w) {
      const double state = states[w] + past[w];
      if constexpr (kWide)  // by one power, for the sake of its one rounding
        states[w] = here_[w].join(state, lane(w).states[parity].value);
      else
        states[w] = static_cast<Acc>(state);
    }
  }

  __device__ __forceinline__ double aggregate_of_tile(int lane, int parity) const {
    const Lane<Storage, kSteps>& k = shared_.lanes[lane].value();
    double aggregate = 0;
#pragma unroll 1
    for (int i = 0; i < kBlockWarps; ++i)
      aggregate = k.warp.join(shared_.aggregates[parity][i][lane], aggregate);
    return aggregate;
  }

  // Of a split scan: the state before the tile, of each row by one thread.
  __device__ __forceinline__ void look_back(int64_t tile, int parity) {
    const int own = thread();
    if (own < count_) {
      Lane<Storage, kSteps>& k = shared_.lanes[own].value();
      Message* const messages =
          arguments_.messages + ((shared_.ticket - tile) * lanes() + own) * kMessages;
      const auto message = [&](int64_t t) { return messages + t * lanes() * kMessages; };
      const bool anchor = tile % kLaneLookBack == 0, ends = tile + 1 == arguments_.tiles;
      const double aggregate = ends ? 0 : aggregate_of_tile(own, parity);
      if (!anchor && !ends) send(*message(tile), aggregate);
      if (tile > 0) {
        int64_t t = lane_anchor_before(tile);
        State<Acc> state{receive(*message(t)), 0};
        if constexpr (kMessages > 1) state.error = receive(message(t)[1]);
#pragma unroll 1
        for (++t; t < tile; ++t) state.advance(receive(*message(t)), k.tile);
        k.states[parity] = state;
      }
      if (anchor && !ends) {
        State<Acc> after = k.states[parity];
        after.advance(aggregate, k.tile);
        send(*message(tile), after.value);
        if constexpr (kMessages > 1) send(message(tile)[1], after.error);
      }
    }
    __syncthreads();
  }

  // The sums of this thread's samples with those of its warp, to the warp's first slot.
  __device__ __forceinline__ void join(AlphaSums sums, bool there, int w) {
    const int columns = arguments_.columns;
#pragma unroll 1
    for (int by = columns; by < kWarp; by *= 2) {
      const AlphaSums past = shuffle_down(sums, by, kWarp);
      const bool past_there = __shfl_down_sync(kAllLanes, static_cast<int>(there), by) != 0;
      if (past_there && thread() % kWarp + by < kWarp) sums.prepend(past);
    }
    if (thread() % kWarp < columns)
      shared_.warps[thread() / kWarp][column_ * kW + w].value() = sums;
  }
  // Those of the tile, which has `steps` samples, to the row's.
  __device__ __forceinline__ void fold(int64_t steps) {
    if (!owns_row()) return;
    AlphaSums& sums = shared_.sums[thread()].value();
#pragma unroll 1
    for (int w = 0; w < kBlockWarps && w * slots_per_warp_ * kSteps < steps; ++w) {
      if (w == 0 && kSplit)
        sums = shared_.warps[w][thread()].value();
      else
        sums.prepend(shared_.warps[w][thread()].value());
    }
  }

  const Arguments& arguments_;
  Shared& shared_;
  const int64_t group_, first_tile_;
  const int column_, slot_, slots_per_warp_, slot_in_warp_;
  int64_t row_;
  int count_;  // rows that there are
  int64_t x_, y_, forward_x_;
  Power<Acc> here_[sizeof(Acc) == 8 ? kW : 1];
};

// The gradient to alpha of a split scan, from the sums of its tiles: a thread per row.
template <class Storage, bool kVector>
struct LaneSums {
  static constexpr int kThreads = kBlockThreads;
  static constexpr int kMinBlocks = 1;
  using Split = Lanes<Storage, kVector, true, true>;
  using Arguments = typename Split::Arguments;
  struct Shared {};

  static __device__ void run(const Arguments& arguments, Shared&) {
    const Scan& scan = arguments.scan;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + thread();
    if (index >= scan.rows) return;
    const RowOffsets at(scan, index);
    const Row<Storage> row(scan, at);
    const int64_t width = scan.sizes[scan.ndim - 1], lanes = arguments.columns * Split::kW;
    const int64_t per_width = (width + lanes - 1) / lanes, outer = index / width;
    const int64_t group = outer * per_width + index % width / lanes;
    // Rows that share a block with an unfit one were walked, to the end.
    for (int64_t i = 0; i < lanes && index % width / lanes * lanes + i < width; ++i) {
      const int64_t other = outer * width + index % width / lanes * lanes + i;
      if (!Row<Storage>(scan, RowOffsets(scan, other)).scans()) return;
    }
    const AlphaSums* from =
        arguments.sums + group * arguments.tiles * lanes + index % width % lanes;
    AlphaSums sums = *from;
#pragma unroll 1
    for (int64_t t = 1; t < arguments.tiles; ++t) sums.prepend(from[t * lanes]);
    row.write_gradient(scan, at, sums);
  }
};

}  // namespace ema_ext::cuda
