// The recurrence with a coefficient per sample, and the adjoints that need the forward's y.
//
// Each thread composes the maps of its samples, the team scans these in float64, and from the y
// before its first sample each thread then walks its own (stretch.cuh). So what is rounded is a y,
// and never a product of coefficients; these serve to find the y before a thread's samples.
//
// An adjoint scans what a sample hands on: mu[n] = a[n] * (mu[n-1] + g[n]), where mu[n-1] + g[n] is
// lambda[n]; so it needs no coefficient but a sample's own.
//
// A product of coefficients may overflow, or meet a zero, where the loop does not. Such a product
// is not finite, nor is what follows from it; threads that find that walk the tile from its start.
// Only an infinity within float64 makes more than one tile of a row slow: NaN stays NaN anyway.
//
// Few rows are split as in split_rows.cuh: tiles by tickets, and messages that every tile folds in
// one order. A tile sends its map when it has it, and the y after it when it knows it; one whose
// fold is not finite waits for the y of the tile before.
#pragma once

#include <new>
#include <type_traits>

#include "cuda/messages.cuh"
#include "cuda/row.cuh"
#include "cuda/stretch.cuh"
#include "cuda/varying_moves.cuh"

namespace ema_ext::cuda {

// One row: the y (or mu) after a sample from that before it.
template <class Storage, bool kAdjoint>
struct VaryingRow {
  const Scan& scan;
  const RowOffsets& at;
  const bool average, copies_first;

  __device__ VaryingRow(const Scan& scan, const RowOffsets& at)
      : scan(scan),
        at(at),
        average(scan.op == Op::kEma || scan.op == Op::kEmaBackward),
        copies_first(scan.op == Op::kEma && scan.start.data == nullptr) {}

  // With a coefficient of 1 for the first sample, -0 leaves it as it is, if need be -0.
  __device__ double start() const {
    return read_state<typename Storage::Acc>(scan.start, at.start, copies_first ? -0.0 : 0.0);
  }

  // The coefficient that leaves y as it is.
  __device__ __forceinline__ float neutral() const { return average ? 0 : 1; }

  // Calls f with whether this is an average, as a constant.
  template <class F>
  __device__ __forceinline__ void by_op(const F& f) const {
    if (average)
      f(std::true_type{});
    else
      f(std::false_type{});
  }

  // As the tile's threads do it.
  __device__ double step(int64_t n, double y) const {
    const double x = Samples{scan.x, at.x, n}.template get<Storage>(0);
    const double given = read(scan.coefficient.data, scan.coefficient.dtype,
                              at.coefficient + n * scan.coefficient.time_stride);
    const double c = copies_first && n == 0 ? 1 : given, a = average ? 1 - c : c;
    return kAdjoint ? a * (y + x) : a * y + (average ? c * x : x);
  }
};

// What a tile of a split row tells those after it: a map, and the y after the tile.
struct TileMessage {
  Message map[2], y;
};

template <class Storage, class Moves, bool kAdjoint, bool kSplit>
struct Varying {
  static constexpr int kThreads = kBlockThreads;
  static constexpr int kMinBlocks =
      varying_blocks(Moves::kItems, kAdjoint, kSplit, Moves::kScattered);
  using Acc = typename Storage::Acc;
  static constexpr int kItems = Moves::kItems;
  static constexpr int kRanks = Moves::kTeam;  // threads that share a row
  static constexpr int kTile = kRanks * kItems;
  static constexpr int kRows = kThreads / kRanks;  // of a block
  static_assert(!kSplit || kRanks * Moves::kRows == kThreads);
  static constexpr bool kWarpRow = kRanks == kWarp && Moves::kRows == 1;
  using Stretch =
      std::conditional_t<Moves::kAligned && sizeof(typename Storage::Sample) == 2,
                         GroupedStretch<Acc, kItems, kAdjoint>, WideStretch<Acc, kItems, kAdjoint>>;
  using Real = typename Stretch::Real;
  static constexpr int kGroup = kWarp / 2;  // tiles of a split row, and groups of a batch

  struct Arguments {
    Scan scan;
    int64_t tiles;               // per row
    unsigned long long* ticket;  // 0 before; of a split scan, as the two below
    TileMessage* messages;       // (group * tiles + tile) * kRows + row; 0 before
    double* sums;                // row * tiles + tile: the gradient to a constant coefficient
  };
  // What is known of a row beforehand.
  struct Known {
    RowOffsets at;
    double start, forward_start;
    double coefficient;  // where it is constant

    __device__ Known(const Scan& scan, int64_t index)
        : at(scan, index),
          start(VaryingRow<Storage, kAdjoint>(scan, at).start()),
          forward_start(read_state<Acc>(scan.forward_start, at.forward_start, 0)),
          coefficient(scan.coefficient.time_stride != 0
                          ? 0
                          : read(scan.coefficient.data, scan.coefficient.dtype, at.coefficient)) {}
  };
  struct Shared {
    typename Moves::Shared moves;
    typename Moves::Scan::Shared scan, history;
    Uninitialized<Known> rows[kRows];
    int64_t tickets[2];
  };

  static __device__ void run(const Arguments& arguments, Shared& shared) {
    if constexpr (kSplit)
      take_rows(arguments, shared);
    else
      take_row(arguments, shared, blockIdx.x, 0);
  }

 private:
  __device__ Varying(const Arguments& arguments, Shared& shared, const Known& known, int64_t group,
                     bool there)
      : arguments_(arguments),
        scan_(arguments.scan),
        group_(group),
        messages_(arguments.messages + group * arguments.tiles * kRows + Moves::row()),
        there_(there),
        known_(known),
        row_(scan_, known.at),
        maps_(shared.scan),
        history_(shared.history) {}

  static constexpr float kNothing = -0.0f;  // an x that leaves every y as it is

  static __device__ __forceinline__ int own() { return Moves::rank() * kItems; }
  static __device__ __forceinline__ bool leads() { return Moves::rank() == 0; }

  __device__ __forceinline__ Samples samples(const View& view, int64_t row, int64_t tile) const {
    return {view, row, tile * kTile};
  }

  // Samples that the row has from a tile on, or one more than a tile.
  __device__ __forceinline__ int count_from(int64_t tile) const {
    const int64_t left = there_ ? scan_.length - tile * kTile : 0;
    return left < 0 ? 0 : left <= kTile ? static_cast<int>(left) : kTile + 1;
  }

  // One row of each team, or their tiles from that of a ticket on. Returns the first ticket of
  // others.
  static __device__ __forceinline__ int64_t take_row(const Arguments& arguments, Shared& shared,
                                                     int64_t group, int64_t ticket) {
    const int64_t index = group * kRows + Moves::row();
    const bool there = index < arguments.scan.rows;
    Known& known = shared.rows[Moves::row()].value();
    if (Moves::rank() == 0) new (&known) Known(arguments.scan, there ? index : 0);
    __syncthreads();
    if (kWarpRow && !there) return 0;  // nobody waits for it
    Varying row(arguments, shared, known, group, there);
    return row.scan_tiles(shared, ticket);
  }

  // A row after the other, as tickets come.
  static __device__ __forceinline__ void take_rows(const Arguments& arguments, Shared& shared) {
    const int64_t groups = (arguments.scan.rows + kRows - 1) / kRows;
    if (thread() == 0) shared.tickets[0] = next_ticket(arguments);
    __syncthreads();
    int64_t ticket = shared.tickets[0];
#pragma unroll 1
    while (ticket < groups * arguments.tiles) {
      ticket = take_row(arguments, shared, ticket / arguments.tiles, ticket);
      __syncthreads();
    }
  }
  static __device__ __forceinline__ int64_t next_ticket(const Arguments& arguments) {
    return static_cast<int64_t>(atomicAdd(arguments.ticket, 1ull));
  }

  // Every team of the block takes as many, as they wait for each other.
  __device__ __forceinline__ int64_t scan_tiles(Shared& shared, int64_t ticket) {
    const Moves moves(shared.moves);
    const int64_t begin = kSplit ? group_ * arguments_.tiles : 0, last = arguments_.tiles - 1;
    int64_t tile = ticket - begin;
    Carry carry{known_.start, 0, 0, row_.copies_first && tile == 0 && leads()};
#pragma unroll 1
    while (tile < last) tile = scan_tile<true>(moves, shared, tile, carry);
    if (tile == last) {
      tile = scan_tile<false>(moves, shared, tile, carry);
      finish(carry);
    }
    return begin + tile;
  }

  // From tile to tile.
  struct Carry {
    double y;     // before the tile
    double own;   // after the thread's samples
    double sum;   // of the thread's gradient to a constant coefficient
    bool copies;  // whether the thread's next sample is the row's first, to be copied
  };

  // With kInner the row, if it is there, goes on after the tile. Returns the next one to take.
  template <bool kInner>
  __device__ __forceinline__ int64_t scan_tile(const Moves& moves, Shared& shared, int64_t tile,
                                               Carry& carry) {
    const bool there = kRows == 1 || kWarpRow || there_;
    const Extent<kTile, kInner> extent{!kInner ? count_from(tile) : there ? kTile + 1 : 0};
    const Samples coefficients = samples(scan_.coefficient, row_.at.coefficient, tile);
    const Samples given = samples(scan_.x, row_.at.x, tile);
    const auto raw_x = moves.fetch(given, extent, kNothing);
    Stretch stretch;
    if (kAdjoint && scan_.coefficient.time_stride == 0) {
      stretch.fill(known_.coefficient, row_.neutral(),
                   [&](int i) { return kInner || own() + i < extent.count; });
    } else {
      const auto raw_c = moves.fetch_any(coefficients, extent, row_.neutral());
      moves.spread(raw_c, coefficients, extent, row_.neutral(), stretch.c);
    }
    moves.spread(raw_x, given, extent, kNothing, stretch.x);
    if (carry.copies) stretch.c[0] = 1;
    carry.copies = false;
    Map map;
    row_.by_op([&](auto average) { map = stretch.template compose<average.value>(); });
    int64_t next = tile + 1;
    if (kSplit && thread() == 0) shared.tickets[maps_.turn() ^ 1] = next_ticket(arguments_);
    maps_.take(map);
    if constexpr (kSplit) {
      next = shared.tickets[maps_.turn()] - group_ * arguments_.tiles;
      carry.y = look_back(tile);
    }

    typename Moves::Scan::Ends y = maps_.follow(carry.y);
    if (!(finite(y.before) && finite(y.after)) && carry.y == carry.y)
      walk(tile, extent, carry.y, y);
    if (kSplit && kInner && leads() && there) send(message(tile).y, y.after);
    carry.y = y.after;
    Acc out[kItems];
    if constexpr (!kAdjoint) {
      carry.own = stretch.walk(y.before, out);
      // The state is the row's last y, as it was walked to.
      if constexpr (!kInner && Stretch::kGroup > 1)
        at_first(extent, [&](int i, bool is_first) {
          if (is_first) carry.own = out[i];
        });
    } else {
      row_.by_op([&](auto average) {
        carry.own = stretch.template walk_adjoint<average.value>(y.before, out);
      });
      // The forward's first sample was its initial state as well.
      if (row_.average && !scan_.has_initial_state)
        set_first(extent, out, [&](int i) { return static_cast<Acc>(stretch.x[i]); });
      if (scan_.grad_coefficient.data != nullptr)
        to_coefficient(moves, tile, extent, stretch.x, carry.sum);
    }
    moves.put(out, samples(scan_.y, row_.at.y, tile), extent);
    return next;
  }

  // What the threads found by products is not to be had by them.
  template <bool kInner>
  __device__ __forceinline__ void walk(int64_t tile, const Extent<kTile, kInner>& extent,
                                       double before, typename Moves::Scan::Ends& y) const {
    const int count = extent.whole() ? kTile : extent.count;
    const int mine = own() < count ? own() : count;
#pragma unroll 1
    for (int i = 0;; ++i) {
      if (i == mine) y.before = before;
      if (i == count) break;
      before = row_.step(tile * kTile + i, before);
    }
    if (!finite(y.after)) y.after = before;
  }

  // Which of the thread's samples is the row's last, the first one of the forward's time: below 0
  // or kItems if none is.
  static __device__ __forceinline__ int own_first(int count) {
    const int first = count - 1 - own();
    return first < 0 ? -1 : first < kItems ? first : kItems;
  }

  // Calls f with each of the thread's samples that may be that one, and whether it is.
  template <bool kInner, class F>
  static __device__ __forceinline__ void at_first(const Extent<kTile, kInner>& extent, const F& f) {
    if constexpr (kInner) return;
    const int first = own_first(extent.count);
#pragma unroll
    for (int i = Moves::kUnit - 1; i < kItems; i += Moves::kUnit) f(i, i == first);
  }

  // Puts value(i) in the place of that sample, the i'th, if the thread has it.
  template <bool kInner, class Item, class F>
  static __device__ __forceinline__ void set_first(const Extent<kTile, kInner>& extent, Item* items,
                                                   const F& value) {
    at_first(extent, [&](int i, bool is_first) { items[i] = is_first ? value(i) : items[i]; });
  }

  // The gradient to each sample's coefficient, or their sum where it is constant.
  template <bool kInner>
  __device__ __forceinline__ void to_coefficient(const Moves& moves, int64_t tile,
                                                 const Extent<kTile, kInner>& extent,
                                                 const Real* lambda, double& sum) {
    const Samples forward_x = samples(scan_.forward_x, row_.at.forward_x, tile);
    const Samples forward_y = samples(scan_.forward_y, row_.at.forward_y, tile);
    const auto raw_y = moves.fetch_next(forward_y, extent);
    typename Moves::Raw raw_x;
    if (row_.average) raw_x = moves.fetch(forward_x, extent, kNothing);
    Acc with[kItems];  // the forward's y before each sample, in its time, or what x is above it
    moves.spread_next(raw_y, forward_y, extent, with);
    set_first(extent, with,
              [start = known_.forward_start](int) { return static_cast<Acc>(start); });
    if (row_.average) {
      Acc x[kItems];
      moves.spread(raw_x, forward_x, extent, kNothing, x);
      if (scan_.forward_start.data == nullptr) set_first(extent, with, [&](int i) { return x[i]; });
#pragma unroll
      for (int i = 0; i < kItems; ++i) with[i] = x[i] - with[i];
    }
    Real by[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) by[i] = lambda[i] * with[i];
    if (scan_.varying) {
      moves.put_any(by, samples(scan_.grad_coefficient, row_.at.grad_coefficient, tile), extent);
    } else {
      const int first = own_first(extent.count);
#pragma unroll
      for (int i = 0; i < kItems; i += Stretch::kGroup)
        if (kInner || i <= first) sum += Stretch::sum(by + i);
      if constexpr (kSplit) {
        sum = maps_.sum(sum);
        if (there_ && leads())
          arguments_.sums[(group_ * kRows + Moves::row()) * arguments_.tiles + tile] = sum;
        sum = 0;
      }
    }
  }

  // Folds what the tiles before sent, and sends this one's map; the y before this tile.
  __device__ __forceinline__ double look_back(int64_t tile) {
    if constexpr (kRows == 1)
      return fold_groups(tile);
    else
      return fold_anchored(tile);
  }

  // As split_rows.cuh: each warp folds the y after a batch, the maps of the groups since and those
  // of the group's tiles.
  __device__ __forceinline__ double fold_groups(int64_t tile) {
    TileMessage* const mine = &message(tile);
    const int i = static_cast<int>(tile) & (kGroup - 1);
    const int g = static_cast<int>(tile) / kGroup & (kGroup - 1);
    const bool sends = thread() == kWarp - 1, ends_group = i == kGroup - 1;
    Map total;
    if (sends) total = maps_.total();
    if (sends && !ends_group) send_map(*mine, total);

    // The lanes in order of time: the batch and groups, then in the upper half tiles.
    const int lane = thread() % kWarp, between = kGroup - 1 - lane % kGroup;
    const bool of_tile = lane >= kGroup, of_batch = !of_tile && between == g;
    const int hops = of_tile ? between + 1 : between * kGroup + i + 1;
    Map map;
    if (of_batch)
      map = {0, hops <= tile ? receive(mine[-hops].y) : known_.start};
    else if (between < (of_tile ? i : g))
      map = receive_map(mine[-hops]);
    const double batch = map.drive;
#pragma unroll
    for (int by = 1; by < kGroup; by *= 2) map = map.after(shuffle_up(map, by));
    const double groups = __shfl_sync(kAllLanes, map.drive, kGroup - 1);
    if (sends && ends_group) send_map(*mine, total.after(map));
    const double before = __shfl_sync(kAllLanes, map(groups), kWarp - 1);
    if (finite(before)) return before;
    const double oldest = __shfl_sync(kAllLanes, batch, kGroup - 1 - g);
    return tile == 0 || oldest != oldest ? oldest : receive(mine[-1].y);
  }

  // Rows side by side: each rank has a message of its row. Each kRanks'th tile is an anchor, from
  // whose y the following ones fold.
  __device__ __forceinline__ double fold_anchored(int64_t tile) {
    if (leads() && there_ && tile % kRanks != 0 && tile + 1 < arguments_.tiles)
      send_map(message(tile), maps_.total());
    if (tile == 0) return known_.start;
    const int64_t anchor = (tile - 1) / kRanks * kRanks, from = anchor + Moves::rank();
    Map map;
    if (there_ && from < tile)
      map = from == anchor ? Map{0, receive(message(from).y)} : receive_map(message(from));
    history_.take(map);
    const double before = history_.follow(0).after;
    if (finite(before) || !there_) return before;
    const double y = receive(message(anchor).y);
    return y == y ? receive(message(tile - 1).y) : y;
  }

  static __device__ __forceinline__ void send_map(TileMessage& message, const Map& map) {
    send(message.map[0], map.ratio);
    send(message.map[1], map.drive);
  }
  static __device__ __forceinline__ Map receive_map(const TileMessage& message) {
    double values[2];
    receive(message.map, values);
    return {values[0], values[1]};
  }
  __device__ __forceinline__ TileMessage& message(int64_t tile) const {
    return messages_[tile * kRows];
  }

  // Whether the gradient to a coefficient is a sum over time.
  __device__ __forceinline__ bool sums_over_time() const {
    return kAdjoint && !scan_.varying && scan_.grad_coefficient.data != nullptr;
  }

  // After the last tile. The thread that has the row's last sample knows the state: what is read
  // beyond it left y as it was.
  __device__ __forceinline__ void finish(const Carry& carry) {
    const int last = own_first(count_from(arguments_.tiles - 1));
    if (last >= 0 && last < kItems && scan_.state.data != nullptr)
      write(scan_.state.data, scan_.state.dtype, row_.at.state, carry.own);
    if (kSplit || !sums_over_time()) return;
    const double sum = maps_.sum(carry.sum);
    if (there_ && leads())
      write(scan_.grad_coefficient.data, Dtype::kFloat64, row_.at.grad_coefficient, sum);
  }

  const Arguments& arguments_;
  const Scan& scan_;
  const int64_t group_;
  TileMessage* const messages_;  // of the row's first tile
  const bool there_;
  const Known& known_;
  const VaryingRow<Storage, kAdjoint> row_;
  typename Moves::Scan maps_, history_;
};

}  // namespace ema_ext::cuda
