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
        copies_first(scan.op == Op::kEma && scan.start.data == nullptr),
        sign_(average ? -1 : 1),
        base_(average ? 1 : -0.0) {}

  // With a coefficient of 1 for the first sample, -0 leaves it as it is, if need be -0.
  __device__ double start() const {
    return read_state<typename Storage::Acc>(scan.start, at.start, copies_first ? -0.0 : 0.0);
  }

  __device__ __forceinline__ double ratio(double coefficient) const {
    return fma(sign_, coefficient, base_);  // 1 - coefficient, or as it is
  }

  // As the tile's threads do it, over the samples [n, end).
  __device__ double walk(int64_t n, int64_t end, double y) const {
#pragma unroll 1
    for (; n < end; ++n) {
      const double x = Samples(scan.x, at.x, n).template get<Storage>(0);
      const double given = read(scan.coefficient.data, scan.coefficient.dtype,
                                at.coefficient + n * scan.coefficient.time_stride);
      const double c = copies_first && n == 0 ? 1 : given, a = ratio(c);
      y = kAdjoint ? a * (y + x) : a * y + (average ? c * x : x);
    }
    return y;
  }

 private:
  const double sign_, base_;
};

// What a tile of a split row tells those after it.
struct TileMessage {
  Message ratio, drive, y;
};

template <class Storage, class Moves, bool kAdjoint, bool kSplit>
struct Varying {
  static constexpr int kThreads = kBlockThreads;
  static constexpr int kMinBlocks =
      varying_blocks(Moves::kItems, kAdjoint, kSplit, Moves::kScattered);
  static constexpr int kItems = Moves::kItems;
  static constexpr int kRanks = Moves::kTeam;  // threads that share a row
  static constexpr int kTile = kRanks * kItems;
  static constexpr int kRows = kThreads / kRanks;  // of a block
  static_assert(!kSplit || kRanks * Moves::kRows == kThreads);

  struct Arguments {
    Scan scan;
    int64_t tiles;               // per row
    unsigned long long* ticket;  // 0 before; of a split scan, as the two below
    TileMessage* messages;       // (group * tiles + tile) * kRows + row; 0 before
    double* sums;                // row * tiles + tile: the gradient to a constant coefficient
  };
  struct Shared {
    typename Moves::Shared moves;
    typename Moves::Scan::Shared scan, history;
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
    const int64_t index = group * kRows + Moves::row();
    const bool there = index < arguments.scan.rows;
    RowOffsets& at = shared.at[Moves::row()].value();
    if (Moves::rank() == 0) new (&at) RowOffsets(arguments.scan, there ? index : 0);
    __syncthreads();
    Varying(arguments, shared, at, group, there)
        .scan_tiles(tile, kSplit ? tile + 1 : arguments.tiles);
  }

 private:
  __device__ Varying(const Arguments& arguments, Shared& shared, const RowOffsets& at,
                     int64_t group, bool there)
      : arguments_(arguments),
        scan_(arguments.scan),
        group_(group),
        there_(there),
        length_(there ? scan_.length : 0),
        row_(scan_, at),
        moves_(shared.moves),
        maps_(shared.scan),
        history_(shared.history) {}

  static __device__ __forceinline__ int own() { return Moves::rank() * kItems; }
  static __device__ __forceinline__ bool leads() { return Moves::rank() == 0; }

  __device__ __forceinline__ Samples samples(const View& view, int64_t row, int64_t tile) const {
    return {view, row, tile * kTile};
  }

  // Samples that the row has from a tile on, or one more than a tile.
  __device__ __forceinline__ int count_from(int64_t tile) const {
    const int64_t left = length_ - tile * kTile;
    return left < 0 ? 0 : left <= kTile ? static_cast<int>(left) : kTile + 1;
  }

  // Every team of the block takes as many, as they wait for each other.
  __device__ __forceinline__ void scan_tiles(int64_t tile, int64_t end) {
    double before = row_.start(), last = 0, sum = 0;
#pragma unroll 1
    for (; tile < end; ++tile) {
      const int count = count_from(tile);
      const Raw raw_x = moves_.fetch(samples(scan_.x, row_.at.x, tile), count);
      const Samples coefficients = samples(scan_.coefficient, row_.at.coefficient, tile);
      const Raw raw_c = moves_.fetch_any(coefficients, count);
      double c[kItems], x[kItems];
      if constexpr (kAdjoint)
        moves_.spread_any(raw_c, coefficients, c);
      else
        moves_.spread(raw_c, coefficients, c);
      moves_.spread(raw_x, samples(scan_.x, row_.at.x, tile), x);
      if (row_.copies_first && tile == 0 && leads()) c[0] = 1;
      maps_.take(compose(c, x));
      if constexpr (kSplit) before = look_back(tile, before);

      typename Moves::Scan::Ends y = maps_.follow(before);
      if (!(finite(y.before) && finite(y.after)) && before == before) walk(tile, before, y);
      if (kSplit && leads() && there_ && tile + 1 < arguments_.tiles)
        send(message(tile).y, y.after);
      before = y.after;
      to_outputs(tile, count, y.before, c, x, last, sum);
    }
    finish(tile, last, sum);
  }

  using Raw = typename Moves::Raw;

  // The map of the thread's samples. A forward's become ratios and drives.
  __device__ __forceinline__ Map compose(double* c, double* x) const {
    if (!kAdjoint && row_.average) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        x[i] *= c[i];
        c[i] = row_.ratio(c[i]);
      }
    }
    Map map;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const double a = kAdjoint ? row_.ratio(c[i]) : c[i];
      map.drive = kAdjoint ? a * (map.drive + x[i]) : a * map.drive + x[i];
      map.ratio *= a;
    }
    return map;
  }

  // What the threads found by products is not to be had by them.
  __device__ __forceinline__ void walk(int64_t tile, double before,
                                       typename Moves::Scan::Ends& y) const {
    const int64_t begin = tile * kTile, end = length_ < begin + kTile ? length_ : begin + kTile;
    const int64_t mine = begin + own() < end ? begin + own() : end;
    y.before = row_.walk(begin, mine, before);
    if (!finite(y.after)) y.after = row_.walk(mine, end, y.before);
  }

  // Which of the thread's samples is the row's last, the first one of the forward's time: below 0
  // or kItems if none is.
  static __device__ __forceinline__ int own_first(int count) {
    const int first = count - 1 - own();
    return first < 0 ? -1 : first < kItems ? first : kItems;
  }

  // Whether a row may end with a thread's i'th sample.
  static constexpr bool may_end(int i) { return i % Moves::kUnit == Moves::kUnit - 1; }

  // From the y before the thread's samples, to what is wanted of them; `last` becomes the y after
  // the row's last one.
  __device__ __forceinline__ void to_outputs(int64_t tile, int count, double y, double* c,
                                             double* x, double& last, double& sum) const {
    const int first = own_first(count);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if constexpr (kAdjoint) {
        x[i] += y;
        y = row_.ratio(c[i]) * x[i];
      } else {
        x[i] = y = c[i] * y + x[i];
      }
      if (may_end(i) && i == first) last = y;
    }
    if constexpr (kAdjoint) {
      if (scan_.grad_coefficient.data != nullptr) to_coefficient(tile, count, x, sum);
      if (row_.average) {
        // The forward's first sample was its initial state as well.
        const int whole = scan_.has_initial_state ? kItems : first;
#pragma unroll
        for (int i = 0; i < kItems; ++i)
          if (!may_end(i) || i != whole) x[i] *= c[i];
      }
    }
    moves_.put(x, samples(scan_.y, row_.at.y, tile), count);
  }

  // The gradient to each sample's coefficient, or their sum where it is constant.
  __device__ __forceinline__ void to_coefficient(int64_t tile, int count, const double* lambda,
                                                 double& sum) const {
    const Samples forward_x = samples(scan_.forward_x, row_.at.forward_x, tile);
    const Samples forward_y = samples(scan_.forward_y, row_.at.forward_y, tile);
    const Raw raw_y = moves_.fetch_next(forward_y, count);
    Raw raw_x = {};
    if (row_.average) raw_x = moves_.fetch(forward_x, count);
    const bool from_itself = row_.average && scan_.forward_start.data == nullptr;
    double by[kItems];  // the forward's y before each sample, in its time
    moves_.spread_next(raw_y, forward_y, count, by);
    const int first = own_first(count);
    const double start =
        read_state<typename Storage::Acc>(scan_.forward_start, row_.at.forward_start, 0);
    double x[kItems];
    if (row_.average) moves_.spread(raw_x, forward_x, x);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (may_end(i) && i == first) by[i] = from_itself ? x[i] : start;
      if (row_.average) by[i] = x[i] - by[i];
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) by[i] *= lambda[i];
    if (scan_.varying) {
      moves_.put_any(by, samples(scan_.grad_coefficient, row_.at.grad_coefficient, tile), count);
    } else {
#pragma unroll
      for (int i = 0; i < kItems; ++i)
        if (i <= first) sum += by[i];
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
    const int64_t anchor = (tile - 1) / kRanks * kRanks, from = anchor + Moves::rank();
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
    return arguments_.messages[(group_ * arguments_.tiles + tile) * kRows + Moves::row()];
  }

  // After the tiles before `end`. The thread that has the row's last sample knows the state: beyond
  // it y stays as it is.
  __device__ __forceinline__ void finish(int64_t end, double last, double sum) {
    const int last_sample = own_first(count_from(end - 1));
    if (last_sample >= 0 && last_sample < kItems && scan_.state.data != nullptr)
      write(scan_.state.data, scan_.state.dtype, row_.at.state, last);
    if (!kAdjoint || scan_.varying || scan_.grad_coefficient.data == nullptr) return;
    sum = maps_.sum(sum);
    if (!there_ || !leads()) return;
    if (kSplit)
      arguments_.sums[(group_ * kRows + Moves::row()) * arguments_.tiles + end - 1] = sum;
    else
      write(scan_.grad_coefficient.data, Dtype::kFloat64, row_.at.grad_coefficient, sum);
  }

  const Arguments& arguments_;
  const Scan& scan_;
  const int64_t group_;
  const bool there_;
  const int64_t length_;
  const VaryingRow<Storage, kAdjoint> row_;
  const Moves moves_;
  typename Moves::Scan maps_, history_;
};

}  // namespace ema_ext::cuda
