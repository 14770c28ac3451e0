// The recurrence with a coefficient per sample, and the adjoints that need the forward's y.
//
// Each thread composes the maps of its samples, the team scans these, and from the y before its
// first sample each thread then walks its own, all in float64. So what is rounded is a y, and never
// a product of coefficients; these serve to find the y before a thread's samples.
//
// An adjoint scans what a sample hands on: mu[n] = a[n] * (mu[n-1] + g[n]), where mu[n-1] + g[n] is
// lambda[n]; so it needs no coefficient but a sample's own.
//
// A product of coefficients may overflow, or meet a zero, where the loop does not. Such a product
// is not finite, nor is what follows from it; threads that find that walk the tile from its start.
// Only an infinity within float64 makes more than one tile of a row slow: NaN stays NaN anyway.
//
// Few rows are split as in split_rows.cuh: a block per tile, tickets, and messages that every tile
// folds in one order. A tile sends its map when it has it, and the y after it when it knows it.
// Each kRanks'th tile is an anchor, from whose y the following ones fold; one whose fold is not
// finite waits for the y of the tile before.
#pragma once

#include <new>
#include <type_traits>

#include "cuda/messages.cuh"
#include "cuda/row.cuh"
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

// What is kept of a value: all but the coefficient's share if that is an average's.
template <bool kAverage>
__device__ __forceinline__ double kept(double coefficient, double value) {
  return kAverage ? fma(-coefficient, value, value) : coefficient * value;
}

// What a tile of a split row tells those after it.
struct TileMessage {
  Message ratio, drive, y;
};

template <class Storage, class Kind, bool kAdjoint, bool kSplit>
struct Varying {
  static constexpr int kThreads = kBlockThreads;
  static constexpr int kMinBlocks =
      varying_blocks(Kind::kItems, kAdjoint, kSplit, Kind::kScattered);
  static constexpr int kItems = Kind::kItems;
  static constexpr int kRanks = Kind::kTeam;  // threads that share a row
  static constexpr int kTile = kRanks * kItems;
  static constexpr int kRows = kThreads / kRanks;  // of a block
  static_assert(!kSplit || kRanks * Kind::kRows == kThreads);
  static constexpr bool kWarpRow = kRanks == kWarp && Kind::kRows == 1;

  struct Arguments {
    Scan scan;
    int64_t tiles;               // per row
    unsigned long long* ticket;  // 0 before; of a split scan, as the two below
    TileMessage* messages;       // (group * tiles + tile) * kRows + row; 0 before
    double* sums;                // row * tiles + tile: the gradient to a constant coefficient
  };
  struct Shared {
    typename Kind::Shared moves;
    typename Kind::Scan::Shared scan, history;
    Uninitialized<RowOffsets> at[kRows];
    int64_t ticket;
  };

  static __device__ void run(const Arguments& arguments, Shared& shared) {
    int64_t group = blockIdx.x, tile = 0;
    if constexpr (kSplit) {
      if (threadIdx.x == 0) shared.ticket = static_cast<int64_t>(atomicAdd(arguments.ticket, 1ull));
      __syncthreads();
      group = shared.ticket / arguments.tiles;
      tile = shared.ticket % arguments.tiles;
    }
    const int64_t index = group * kRows + Kind::row();
    const bool there = index < arguments.scan.rows;
    RowOffsets& at = shared.at[Kind::row()].value();
    if (Kind::rank() == 0) new (&at) RowOffsets(arguments.scan, there ? index : 0);
    __syncthreads();
    if (kWarpRow && !there) return;  // nobody waits for it
    const int64_t end = kSplit ? tile + 1 : arguments.tiles;
    Varying row(arguments, shared, at, group, there);
    if (Kind::kAligned && arguments.scan.x.time_stride < 0)
      row.template scan_tiles<true>(shared, tile, end);
    else
      row.template scan_tiles<false>(shared, tile, end);
  }

 private:
  __device__ Varying(const Arguments& arguments, Shared& shared, const RowOffsets& at,
                     int64_t group, bool there)
      : arguments_(arguments),
        scan_(arguments.scan),
        group_(group),
        there_(there),
        row_(scan_, at),
        maps_(shared.scan),
        history_(shared.history) {}

  static constexpr float kNothing = -0.0f;  // an x that leaves every y as it is

  static __device__ __forceinline__ int own() { return Kind::rank() * kItems; }
  static __device__ __forceinline__ bool leads() { return Kind::rank() == 0; }

  __device__ __forceinline__ Samples samples(const View& view, int64_t row, int64_t tile) const {
    return {view, row, tile * kTile};
  }

  // Samples that the row has from a tile on, or one more than a tile.
  __device__ __forceinline__ int count_from(int64_t tile) const {
    const int64_t left = there_ ? scan_.length - tile * kTile : 0;
    return left < 0 ? 0 : left <= kTile ? static_cast<int>(left) : kTile + 1;
  }

  // Every team of the block takes as many, as they wait for each other.
  template <bool kBackward>
  __device__ __forceinline__ void scan_tiles(Shared& shared, int64_t tile, int64_t end) {
    const typename Kind::template Moves<kBackward> moves(shared.moves);
    Carry carry{row_.start(), 0, 0, row_.copies_first && tile == 0 && leads()};
    const int64_t inner_end = end < arguments_.tiles ? end : arguments_.tiles - 1;
#pragma unroll 1
    for (; tile < inner_end; ++tile) scan_tile<true>(moves, tile, carry);
    if (tile < end) scan_tile<false>(moves, tile++, carry);
    finish(tile, carry);
  }

  // From tile to tile.
  struct Carry {
    double y;     // before the tile
    double own;   // after the thread's samples
    double sum;   // of the thread's gradient to a constant coefficient
    bool copies;  // whether the thread's next sample is the row's first, to be copied
  };

  // With kInner the row, if it is there, goes on after the tile.
  template <bool kInner, class Moves>
  __device__ __forceinline__ void scan_tile(const Moves& moves, int64_t tile, Carry& carry) {
    const Extent<kTile, kInner> extent{!kInner                            ? count_from(tile)
                                       : kRows == 1 || kWarpRow || there_ ? kTile + 1
                                                                          : 0};
    const Samples coefficients = samples(scan_.coefficient, row_.at.coefficient, tile);
    const Samples given = samples(scan_.x, row_.at.x, tile);
    const auto raw_x = moves.fetch(given, extent, kNothing);
    typename Moves::Raw raw_c;
    double c[kItems], x[kItems];
    if constexpr (kAdjoint || !Kind::kAligned) {
      raw_c = moves.fetch_any(coefficients, extent, row_.neutral());
      moves.spread_any(raw_c, coefficients, extent, row_.neutral(), c);
    } else {
      raw_c = moves.fetch(coefficients, extent, row_.neutral());
      moves.spread(raw_c, coefficients, extent, row_.neutral(), c);
    }
    moves.spread(raw_x, given, extent, kNothing, x);
    if (carry.copies) c[0] = 1;
    carry.copies = false;
    Map map;
    row_.by_op([&](auto average) { map = compose<average.value>(c, x); });
    maps_.take(map);
    if constexpr (kSplit) carry.y = look_back(tile, carry.y);

    typename Kind::Scan::Ends y = maps_.follow(carry.y);
    if (!(finite(y.before) && finite(y.after)) && carry.y == carry.y)
      walk(tile, extent, carry.y, y);
    if (kSplit && leads() && there_ && tile + 1 < arguments_.tiles) send(message(tile).y, y.after);
    carry.y = y.after;
    carry.own = y.before;
    if constexpr (!kAdjoint) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) x[i] = carry.own = c[i] * carry.own + x[i];
    } else {
      row_.by_op([&](auto average) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          x[i] += carry.own;
          carry.own = kept<average.value>(c[i], x[i]);
        }
      });
      if (scan_.grad_coefficient.data != nullptr) to_coefficient(moves, tile, extent, x, carry.sum);
      if (row_.average) {
        // The forward's first sample was its initial state as well.
        if (!scan_.has_initial_state) at_first(extent, [&](int i) { c[i] = 1; });
#pragma unroll
        for (int i = 0; i < kItems; ++i) x[i] *= c[i];
      }
    }
    moves.put(x, samples(scan_.y, row_.at.y, tile), extent);
  }

  // The map of the thread's samples. A forward's become ratios and drives.
  template <bool kAverage>
  static __device__ __forceinline__ Map compose(double* c, double* x) {
    Map map;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if constexpr (kAdjoint) {
        map.drive = kept<kAverage>(c[i], map.drive + x[i]);
        map.ratio = kept<kAverage>(c[i], map.ratio);
        continue;
      }
      if constexpr (kAverage) {
        x[i] *= c[i];
        c[i] = 1 - c[i];
      }
      map.drive = c[i] * map.drive + x[i];
      map.ratio *= c[i];
    }
    return map;
  }

  // What the threads found by products is not to be had by them.
  template <bool kInner>
  __device__ __forceinline__ void walk(int64_t tile, const Extent<kTile, kInner>& extent,
                                       double before, typename Kind::Scan::Ends& y) const {
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

  // Calls f with the constant index of that sample, if the thread has it.
  template <bool kInner, class F>
  static __device__ __forceinline__ void at_first(const Extent<kTile, kInner>& extent, const F& f) {
    if constexpr (kInner) return;
    const int first = own_first(extent.count);
#pragma unroll
    for (int i = Kind::kUnit - 1; i < kItems; i += Kind::kUnit)  // where a row may end
      if (i == first) f(i);
  }

  // The gradient to each sample's coefficient, or their sum where it is constant.
  template <bool kInner, class Moves>
  __device__ __forceinline__ void to_coefficient(const Moves& moves, int64_t tile,
                                                 const Extent<kTile, kInner>& extent,
                                                 const double* lambda, double& sum) const {
    const Samples forward_x = samples(scan_.forward_x, row_.at.forward_x, tile);
    const Samples forward_y = samples(scan_.forward_y, row_.at.forward_y, tile);
    const auto raw_y = moves.fetch_next(forward_y, extent);
    typename Moves::Raw raw_x;
    if (row_.average) raw_x = moves.fetch(forward_x, extent, kNothing);
    double by[kItems];  // the forward's y before each sample, in its time
    moves.spread_next(raw_y, forward_y, extent, by);
    at_first(extent, [&](int i) {
      by[i] = read_state<typename Storage::Acc>(scan_.forward_start, row_.at.forward_start, 0);
    });
    if (row_.average) {
      double x[kItems];
      moves.spread(raw_x, forward_x, extent, kNothing, x);
      if (scan_.forward_start.data == nullptr) at_first(extent, [&](int i) { by[i] = x[i]; });
#pragma unroll
      for (int i = 0; i < kItems; ++i) by[i] = x[i] - by[i];
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) by[i] *= lambda[i];
    if (scan_.varying) {
      moves.put_any(by, samples(scan_.grad_coefficient, row_.at.grad_coefficient, tile), extent);
    } else {
      const int first = own_first(extent.count);
#pragma unroll
      for (int i = 0; i < kItems; ++i)
        if (kInner || i <= first) sum += by[i];
    }
  }

  // Folds what the tiles before sent, and sends this one's map; the y before this tile.
  __device__ __forceinline__ double look_back(int64_t tile, double start) {
    if (leads() && there_ && tile % kRanks != 0 && tile + 1 < arguments_.tiles) {
      const Map total = maps_.total();
      send(message(tile).ratio, total.ratio);
      send(message(tile).drive, total.drive);
    }
    if (tile == 0) return start;
    const int64_t anchor = (tile - 1) / kRanks * kRanks, from = anchor + Kind::rank();
    Map map;
    if (there_ && from < tile)
      map = from == anchor ? Map{0, receive(message(from).y)}
                           : Map{receive(message(from).ratio), receive(message(from).drive)};
    history_.take(map);
    const double before = history_.follow(0).after;
    if (finite(before) || !there_) return before;
    const double y = receive(message(anchor).y);
    return y == y ? receive(message(tile - 1).y) : y;
  }
  __device__ __forceinline__ TileMessage& message(int64_t tile) const {
    return arguments_.messages[(group_ * arguments_.tiles + tile) * kRows + Kind::row()];
  }

  // After the tiles before `end`. The thread that has the row's last sample knows the state: what
  // is read beyond it left y as it was.
  __device__ __forceinline__ void finish(int64_t end, const Carry& carry) {
    const int last = own_first(count_from(end - 1));
    if (last >= 0 && last < kItems && scan_.state.data != nullptr)
      write(scan_.state.data, scan_.state.dtype, row_.at.state, carry.own);
    if (!kAdjoint || scan_.varying || scan_.grad_coefficient.data == nullptr) return;
    const double sum = maps_.sum(carry.sum);
    if (!there_ || !leads()) return;
    if (kSplit)
      arguments_.sums[(group_ * kRows + Kind::row()) * arguments_.tiles + end - 1] = sum;
    else
      write(scan_.grad_coefficient.data, Dtype::kFloat64, row_.at.grad_coefficient, sum);
  }

  const Arguments& arguments_;
  const Scan& scan_;
  const int64_t group_;
  const bool there_;
  const VaryingRow<Storage, kAdjoint> row_;
  typename Kind::Scan maps_, history_;
};

}  // namespace ema_ext::cuda
