// Rows that lie side by side in memory, as in (batch, time, channels) scanned over time:
// neighbouring threads take neighbouring rows, 16 bytes of them each, and nothing is transposed.
//
// A block takes `columns` threads across and kThreads / columns slots along time, kSteps samples
// each: together a tile. It goes from tile to tile with the state of each row in shared memory; or,
// with kSplit, each tile is a block of its own, with messages and tickets as in split_rows.cuh:
// where there are few rows.
#pragma once

#include <type_traits>

#include "cuda/lane_tables.cuh"
#include "cuda/messages.cuh"
#include "cuda/tile.cuh"
#include "cuda/walk.cuh"

namespace ema_ext::cuda {

// The first tile whose message tile `tile` folds, an anchor.
__device__ inline int64_t lane_anchor_before(int64_t tile) {
  return (tile - 1) / kLaneLookBack * kLaneLookBack;
}

template <class Storage, bool kVector, bool kGradient, bool kSplit>
struct Lanes {
  using Sample = typename Storage::Sample;
  using Acc = typename Storage::Acc;
  using Value = typename Joint<Storage>::Value;
  using Factor = typename Joint<Storage>::Factor;
  static constexpr bool kHalf = sizeof(Sample) == 2, kWide = sizeof(Acc) == 8;
  static constexpr int kThreads = kBlockThreads;
  static constexpr int kMinBlocks = 1;  // more fit where shared memory is not that of 7.5
  static constexpr int kW = kVector ? Chunk<Storage>::kSamples : 1;  // rows of a thread
  static constexpr int kMessages = sizeof(Acc) == 8 ? 2 : 1;         // a state and its error
  static constexpr int kSteps = lane_steps(sizeof(Sample), kVector, kGradient);
  static constexpr int kMostLanes = lanes_per_block(kW, kGradient);
  using Tables = LaneTables<Storage, kSteps, kMostLanes, kW>;
  static constexpr int kG = Tables::kG;

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
    Uninitialized<Tables> tables;
    alignas(16) Value aggregates[2][kBlockWarps][kMostLanes];
    alignas(16) Value warps[kGradient ? 5 : 1][kBlockWarps][kGradient ? kMostLanes : 1];
    Uninitialized<AlphaSums> sums[kGradient ? kMostLanes : 1];
    int64_t ticket;
    int64_t row;  // the first
    int count;    // rows that there are
    bool unfit;   // whether a row must be walked
  };

  static __device__ void run(const Arguments& arguments, Shared& shared) {
    if (thread() == 0) {
      shared.unfit = false;
      shared.ticket = kSplit ? static_cast<int64_t>(atomicAdd(arguments.ticket, 1ull))
                             : static_cast<int64_t>(blockIdx.x) * arguments.tiles;
      const Scan& scan = arguments.scan;
      const int64_t group = shared.ticket / arguments.tiles;
      const int64_t width = scan.sizes[scan.ndim - 1], lanes = arguments.columns * kW;
      const int64_t per_width = (width + lanes - 1) / lanes, first = group % per_width * lanes;
      shared.row = group / per_width * width + first;
      shared.count = static_cast<int>(width - first < lanes ? width - first : lanes);
    }
    __syncthreads();
    Lanes(arguments, shared).scan();
  }

 private:
  __device__ Lanes(const Arguments& arguments, Shared& shared)
      : arguments_(arguments),
        shared_(shared),
        tables_(shared.tables.value()),
        lane_(thread() % arguments.columns * kW) {}

  __device__ int lanes() const { return arguments_.columns * kW; }
  __device__ int tile_steps() const { return kSteps * arguments_.slots; }
  __device__ int slots_per_warp() const { return arguments_.slots / kBlockWarps; }
  __device__ int slot() const { return thread() * arguments_.slots / kThreads; }
  // Of this block's rows, the one that this thread looks after.
  __device__ RowOffsets own_row() const {
    return RowOffsets(arguments_.scan, shared_.row + min(thread(), shared_.count - 1));
  }
  __device__ bool owns_row() const { return thread() < shared_.count; }

  __device__ void scan() {
    const Scan& scan = arguments_.scan;
    const int64_t first_tile = kSplit ? shared_.ticket % arguments_.tiles : 0;
    if (thread() < lanes()) {
      const RowOffsets at = own_row();
      const Row<Storage> row(scan, at);
      if (!row.scans()) shared_.unfit = true;
      tables_.set(thread(), row, lanes(), slots_per_warp(),
                  first_tile == 0 && owns_row() ? row.start(scan, at) : 0);
      if constexpr (kGradient) new (&shared_.sums[thread()].value()) AlphaSums;
    }
    __syncthreads();
    if (shared_.unfit) {
      if (first_tile == 0 && owns_row()) walk();
      return;
    }
    const int64_t end = kSplit ? first_tile + 1 : arguments_.tiles;
    place(first_tile);
    int64_t tile = first_tile;
#pragma unroll 1
    while (tile < end) {
      if (!is_inner(tile)) scan_tile<false>(tile++);
#pragma unroll 1
      for (; tile < end && is_inner(tile); ++tile) scan_tile<true>(tile);
    }
    __syncthreads();
    if (owns_row()) finish(end == arguments_.tiles);
  }

  // A row sample by sample, where the coefficient of one asks for it.
  __device__ void walk() {
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
    row.write_state(scan, at, tables_.last[thread()]);
    if (kGradient && !kSplit) row.write_gradient(scan, at, shared_.sums[thread()].value());
  }

  // Where a tensor has this thread's first sample of a tile, and how far apart they are, in bytes.
  struct Place {
    // Of 16 bytes at a time below 2^31: see is_lane_aligned.
    using Step = std::conditional_t<kVector, int, int64_t>;
    char* first;
    Step step;

    __device__ __forceinline__ char* at(int i) const {
      return first + static_cast<int64_t>(step) * i;
    }
  };
  __device__ __forceinline__ Place place_of(const View& view, int64_t offset, int64_t tile) const {
    constexpr int64_t kBytes = sizeof(Sample);
    const int64_t n = tile * tile_steps() + slot() * kSteps;
    return {static_cast<char*>(const_cast<void*>(view.data)) +
                (offset + lane_ + n * view.time_stride) * kBytes,
            static_cast<typename Place::Step>(view.time_stride * kBytes)};
  }
  __device__ void place(int64_t tile) {
    const Scan& scan = arguments_.scan;
    const RowOffsets at(scan, shared_.row);
    x_ = place_of(scan.x, at.x, tile);
    y_ = place_of(scan.y, at.y, tile);
    if constexpr (kGradient) forward_x_ = place_of(scan.forward_x, at.forward_x, tile);
    if constexpr (kWide) {
#pragma unroll
      for (int w = 0; w < kW; ++w) {
        const int64_t row = shared_.row + min(lane_ + w, shared_.count - 1);
        here_[w] = Row<Storage>(scan, RowOffsets(scan, row))
                       .decay.over(static_cast<int64_t>(slot()) * kSteps);
      }
    }
  }
  // To the next tile.
  __device__ __forceinline__ void move(Place& place) const {
    place.first += static_cast<int64_t>(place.step) * tile_steps();
  }

  struct Samples {
    using Line = Acc[kW];
    Line of[kSteps];
    __device__ __forceinline__ Line& operator[](int i) { return of[i]; }
    __device__ __forceinline__ const Line& operator[](int i) const { return of[i]; }
  };
  // Of the forward's x, which comes by parts, for want of registers.
  static constexpr int kPart = lane_part(kSteps);
  using Part = Acc[kPart][kW];
  // On their way.
  template <int kCount>
  struct Raw {
    std::conditional_t<kVector, uint4, Sample> of[kCount];
  };

  // From each row's sample `first` on, 0 from the `mine`th on.
  template <int kCount>
  __device__ __forceinline__ Raw<kCount> fetch(const Place& from, int first, int mine) const {
    Raw<kCount> raw;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool there = first + i < mine;
      if constexpr (kVector)
        raw.of[i] = there ? *reinterpret_cast<const uint4*>(from.at(first + i)) : uint4{0, 0, 0, 0};
      else
        raw.of[i] = there ? *reinterpret_cast<const Sample*>(from.at(first + i)) : Storage::put(0);
    }
    return raw;
  }
  template <int kCount>
  static __device__ __forceinline__ void unpack(const Raw<kCount>& raw, Acc (&to)[kCount][kW]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if constexpr (kVector)
        Chunk<Storage>::unpack(raw.of[i], to[i]);
      else
        to[i][0] = Storage::get(raw.of[i]);
    }
  }
  __device__ __forceinline__ void store(const Samples& from, int mine) const {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (i >= mine) continue;
      if constexpr (kVector)
        *reinterpret_cast<uint4*>(y_.at(i)) = Chunk<Storage>::pack(from[i]);
      else
        *reinterpret_cast<Sample*>(y_.at(i)) = Storage::put(from[i][0]);
    }
  }

  // What the tables have of this thread's rows.
  template <class T>
  struct Own {
    T of[kW];
    __device__ __forceinline__ explicit Own(const T* from) {
#pragma unroll
      for (int w = 0; w < kW; ++w) of[w] = from[w];
    }
    __device__ __forceinline__ const T& operator[](int w) const { return of[w]; }
  };
  template <class T>
  __device__ __forceinline__ Own<T> own(const T (&table)[kMostLanes]) const {
    return Own<T>(table + lane_);
  }
  // Over so many slots of a warp.
  __device__ __forceinline__ Own<Factor> over_slots(int slots) const {
    return Own<Factor>(tables_.slots + slots * lanes() + lane_);
  }

  // Whether neither the row's first sample is in the tile, nor its last.
  __device__ __forceinline__ bool is_inner(int64_t tile) const {
    return tile > 0 && (tile + 1) * tile_steps() < arguments_.scan.length;
  }

  template <bool kInner>
  __device__ __forceinline__ void scan_tile(int64_t tile) {
    const Scan& scan = arguments_.scan;
    const int64_t n = tile * tile_steps() + slot() * kSteps, left = scan.length - n;
    const bool there = lane_ < shared_.count;
    const int mine = kInner || left >= kSteps ? kSteps : left <= 0 ? 0 : static_cast<int>(left);
    const bool starts = !kInner && n == 0,
               copies = starts && scan.op == Op::kEma && scan.start.data == nullptr;
    const int parity = static_cast<int>(tile & 1);

    Samples s;
    Raw<kPart> forward_x;
    Sums sums;
    Value ends[kW] = {};
    if (there) {
      unpack(fetch<kSteps>(x_, 0, mine), s.of);
      scan_groups(s, starts, copies, ends);
    } else {  // or nvcc would keep registers for them from tile to tile
      s = {};
      forward_x = {};
      sums = {};
      asm volatile("");  // here, and not before the branch
    }
    Value states[kW];  // before this slot; first from zero before the warp
    scan_warp(ends, parity, states);
    __syncthreads();
    constexpr bool kEarly = kInner || kPart == kSteps;  // while there are registers
    if constexpr (kGradient && kEarly)
      if (there) forward_x = fetch<kPart>(forward_x_, kSteps - kPart, mine);
    if constexpr (kSplit)
      look_back(tile, parity);
    else if (thread() < lanes())
      advance(parity);
    join_states(parity, states);
    if (there) {
      if constexpr (kGradient && !kEarly)
        forward_x = fetch<kPart>(forward_x_, kSteps - kPart, mine);
      add_states(states, s, copies);
      if (!kInner && mine > 0 && left <= kSteps) end(s, mine);
      if constexpr (kGradient) add_up<kInner>(forward_x, s, mine, sums);
      if constexpr (!kInner)
        if (left <= kSteps && scan.op == Op::kEmaBackward && !scan.has_initial_state)
          to_lambda(s, left);
      store(s, mine);
    }
    move(x_);
    move(y_);
    if constexpr (kGradient) {
      move(forward_x_);
      join<kInner>(sums, there ? mine : 0);
      __syncthreads();
      fold(scan.length - tile * tile_steps());
    }
  }

  // q[i], s[i] from zero, in place of x[i], and what they end at.
  __device__ __forceinline__ void scan_groups(Samples& q, bool starts, bool copies,
                                              Value (&ends)[kW]) {
    const Own<Acc> in = own(tables_.in), ratio = own(tables_.powers[0]),
                   group = own(tables_.powers[kG - 1]);
#pragma unroll
    for (int w = 0; w < kW; ++w) {
      Acc aggregate = 0;
#pragma unroll
      for (int g = 0; g < kSteps; g += kG) {
        const Acc x = q[g][w];
        q[g][w] = in[w] * x;
        if (g == 0 && starts) q[g][w] += tables_.added_first[lane_ + w];
        if (g == 0 && copies) {
          tables_.first[lane_ + w] = x;
          if (!finite(x)) q[g][w] = x;
        }
#pragma unroll
        for (int i = g + 1; i < g + kG; ++i) q[i][w] = fma(ratio[w], q[i - 1][w], in[w] * q[i][w]);
        aggregate = g == 0 ? q[kG - 1][w] : fma(group[w], aggregate, q[g + kG - 1][w]);
      }
      ends[w] = aggregate;
    }
  }

  // s[i] in place of q[i], from the states before the slot; float64 and float32 by no more than two
  // groups, halves from one to the next.
  __device__ __forceinline__ void add_states(const Value (&states)[kW], Samples& q,
                                             bool copies) const {
#pragma unroll
    for (int w = 0; w < kW; ++w) {
      const Acc state = static_cast<Acc>(states[w]);
      Acc before = state, from_zero = 0;
#pragma unroll
      for (int g = 0; g < kSteps; g += kG) {
        if (g > 0 && !kHalf) before = fma(tables_.powers[kG - 1][lane_ + w], state, from_zero);
        from_zero = q[g + kG - 1][w];
#pragma unroll
        for (int i = 0; i < kG; ++i)
          q[g + i][w] = fma(tables_.powers[i][lane_ + w], before, q[g + i][w]);
        if (kHalf) before = q[g + kG - 1][w];
      }
      if (copies) q[0][w] = tables_.first[lane_ + w];
    }
  }
  static_assert(kHalf || kSteps <= 2 * kG);

  // The rows end at this thread's sample `count` - 1.
  __device__ __forceinline__ void end(const Samples& s, int count) const {
#pragma unroll
    for (int w = 0; w < kW; ++w) {
      Acc last = s[0][w];
#pragma unroll
      for (int i = 1; i < kSteps; ++i)
        if (i < count) last = s[i][w];
      tables_.last[lane_ + w] = last;
    }
  }

  // The row's last sample, of the thread's `left` before its end.
  __device__ __forceinline__ void to_lambda(Samples& s, int64_t left) const {
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
      if (i + 1 == left) {
#pragma unroll
        for (int w = 0; w < kW; ++w) s[i][w] *= tables_.to_lambda[lane_ + w];
      }
  }

  // From what each slot ends at, the states before this one, from zero before the warp.
  __device__ __forceinline__ void scan_warp(Value (&ends)[kW], int parity, Value (&before)[kW]) {
    const int columns = arguments_.columns, member = thread() % kWarp;
#pragma unroll 1
    for (int slots = 1; slots < slots_per_warp(); slots *= 2) {
      const Own<Factor> power = over_slots(slots);
#pragma unroll
      for (int w = 0; w < kW; ++w) {
        const Value from = __shfl_up_sync(kAllLanes, ends[w], slots * columns);
        if (member >= slots * columns) ends[w] = power[w].join(ends[w], from);
      }
    }
#pragma unroll
    for (int w = 0; w < kW; ++w) {
      const Value past = __shfl_up_sync(kAllLanes, ends[w], columns);
      before[w] = member < columns ? 0 : past;
    }
    if (member < kWarp - columns) return;
#pragma unroll
    for (int w = 0; w < kW; ++w) shared_.aggregates[parity][thread() / kWarp][lane_ + w] = ends[w];
  }

  // The states before this slot, from those from zero before the warp.
  __device__ __forceinline__ void join_states(int parity, Value (&states)[kW]) const {
    Value past[kW];  // of the warps before
    const Own<Value> before = own(tables_.before[parity]);
#pragma unroll
    for (int w = 0; w < kW; ++w) past[w] = kWide ? 0 : before[w];
    const Own<Factor> warp = own(tables_.warp);
#pragma unroll 1
    for (int i = 0; i < thread() / kWarp; ++i) {
      const Own<Value> aggregate = own(shared_.aggregates[parity][i]);
#pragma unroll
      for (int w = 0; w < kW; ++w) past[w] = warp[w].join(aggregate[w], past[w]);
    }
    const Own<Factor> slots(tables_.slots + thread() % kWarp * kW);
#pragma unroll
    for (int w = 0; w < kW; ++w) {
      states[w] = slots[w].join(states[w], past[w]);
      // By one power, for the sake of its one rounding.
      if constexpr (kWide) states[w] = here_[w].join(states[w], before[w]);
    }
  }

  __device__ __forceinline__ Value aggregate_of_tile(int lane, int parity) const {
    const Factor warp = tables_.warp[lane];
    Value aggregate = 0;
#pragma unroll 1
    for (int i = 0; i < kBlockWarps; ++i)
      aggregate = warp.join(shared_.aggregates[parity][i][lane], aggregate);
    return aggregate;
  }

  // The state after the tile, of each row by one thread.
  __device__ __forceinline__ void advance(int parity) {
    State<Acc>& state = tables_.state[thread()];
    state.advance(aggregate_of_tile(thread(), parity), tables_.tile[thread()]);
    tables_.before[parity ^ 1][thread()] = static_cast<Value>(state.value);
  }

  // Of a split scan: the state before the tile, of each row by one thread.
  __device__ __forceinline__ void look_back(int64_t tile, int parity) {
    const int own = thread();
    if (owns_row()) {
      Message* const messages =
          arguments_.messages + ((shared_.ticket - tile) * lanes() + own) * kMessages;
      const auto message = [&](int64_t t) { return messages + t * lanes() * kMessages; };
      const bool anchor = tile % kLaneLookBack == 0, ends = tile + 1 == arguments_.tiles;
      const double aggregate = ends ? 0 : aggregate_of_tile(own, parity);
      if (!anchor && !ends) send(*message(tile), aggregate);
      State<Acc> state = tables_.state[own];
      if (tile > 0) {
        int64_t t = lane_anchor_before(tile);
        state = {receive(*message(t)), 0};
        if constexpr (kMessages > 1) state.error = receive(message(t)[1]);
#pragma unroll 1
        for (++t; t < tile; ++t) state.advance(receive(*message(t)), tables_.tile[own]);
        tables_.before[parity][own] = static_cast<Value>(state.value);
      }
      if (anchor && !ends) {
        state.advance(aggregate, tables_.tile[own]);
        send(*message(tile), state.value);
        if constexpr (kMessages > 1) send(message(tile)[1], state.error);
      }
    }
    __syncthreads();
  }

  // AlphaSums of some of this thread's rows, but for their decay.
  struct Sums {
    Value reference[kW], share[kW], weight[kW], aggregate[kW];
  };

  // As tile.cuh's Stretch, of the first `count` samples; the last part of x is on its way.
  template <bool kInner>
  __device__ __forceinline__ void add_up(Raw<kPart> raw, const Samples& s, int count,
                                         Sums& sums) const {
    const Own<Acc> ratio = own(tables_.powers[0]), alpha = own(tables_.alpha);
    Acc reference[kW] = {}, former[kW] = {}, share[kW] = {}, innovation[kW] = {},
        aggregate[kW] = {};
#pragma unroll
    for (int part = kSteps - kPart; part >= 0; part -= kPart) {
      const Raw<kPart> here = raw;
      if (part > 0) raw = fetch<kPart>(forward_x_, part - kPart, count);
#pragma unroll
      for (int w = 0; w < kW; ++w) {
        Part x;
        unpack(here, x);
#pragma unroll
        for (int i = kPart - 1; i >= 0; --i) {
          const bool begins = part + i == count - 1;  // anew: what was before is not there
          if (begins) {
            reference[w] = former[w] = x[i][w];
            share[w] = innovation[w] = aggregate[w] = 0;
          }
          if constexpr (kHalf) {  // by differences
            innovation[w] = fma(ratio[w], innovation[w], x[i][w] - former[w]);
            former[w] = x[i][w];
          } else {
            innovation[w] = x[i][w] - reference[w] - aggregate[w];
            aggregate[w] = fma(alpha[w], innovation[w], aggregate[w]);
          }
          share[w] = fma(s[part + i][w], innovation[w], share[w]);
        }
      }
    }
#pragma unroll
    for (int w = 0; w < kW; ++w) {
      Acc weight = s[0][w];
#pragma unroll
      for (int i = 1; i < kSteps; ++i) weight = i < count ? fma(ratio[w], weight, s[i][w]) : weight;
      sums.reference[w] = reference[w];
      sums.share[w] = share[w];
      sums.weight[w] = weight;
      sums.aggregate[w] =
          kHalf ? fma(-ratio[w], innovation[w], former[w] - reference[w]) : aggregate[w];
    }
  }

  // Those of this thread's samples, `mine` of each row, with those of its warp, to the warp's first
  // slot. Their decay is known where all are there.
  template <bool kInner>
  __device__ __forceinline__ void join(Sums& sums, int mine) {
    const int member = thread() % kWarp, columns = arguments_.columns;
    Value decay[kW];
#pragma unroll
    for (int w = 0; w < kW; ++w) {
      decay[w] = tables_.slot_decay[lane_ + w];
      if (!kInner && mine < kSteps) decay[w] = power(tables_.powers[0][lane_ + w], mine);
    }
#pragma unroll 1
    for (int by = columns; by < kWarp; by *= 2) {
      const auto later = [by](Value value) { return __shfl_down_sync(kAllLanes, value, by); };
      const bool joins =
          (kInner || __shfl_down_sync(kAllLanes, mine, by) > 0) && member + by < kWarp;
#pragma unroll
      for (int w = 0; w < kW; ++w) {
        const Value reference = later(sums.reference[w]), share = later(sums.share[w]),
                    weight = later(sums.weight[w]), aggregate = later(sums.aggregate[w]),
                    past = kInner ? decay[w] : later(decay[w]);
        if (!joins) continue;  // else as AlphaSums::prepend
        const Value gap = reference - sums.reference[w], change = aggregate + gap;
        sums.share[w] += fma(-change, sums.weight[w], share);
        sums.aggregate[w] += fma(decay[w], change, -gap);
        sums.weight[w] = fma(past, sums.weight[w], weight);
        sums.reference[w] = reference;
        decay[w] *= past;
      }
    }
    if (member >= columns) return;
#pragma unroll
    for (int w = 0; w < kW; ++w) {
      const auto put = [&](int i, Value value) {
        shared_.warps[i][thread() / kWarp][lane_ + w] = value;
      };
      put(0, sums.reference[w]);
      put(1, sums.share[w]);
      put(2, sums.weight[w]);
      put(3, sums.aggregate[w]);
      if (!kInner) put(4, decay[w]);
    }
  }
  static __device__ Acc power(Acc ratio, int count) {
    Acc power = 1;
#pragma unroll 1
    for (int i = 0; i < count; ++i) power *= ratio;
    return power;
  }
  // Those of the tile, which has `steps` samples, to the row's.
  __device__ __forceinline__ void fold(int64_t steps) {
    if (!owns_row()) return;
    AlphaSums& sums = shared_.sums[thread()].value();
    const int most = slots_per_warp() * kSteps;
#pragma unroll 1
    for (int w = 0; w < kBlockWarps && w * most < steps; ++w) {
      const auto got = [&](int i) { return shared_.warps[i][w][thread()]; };
      const bool whole = (w + 1) * most <= steps;
      const AlphaSums past{got(0), got(1), got(2), got(3),
                           whole ? tables_.warp_decay[thread()] : got(4)};
      if (w == 0 && kSplit)
        sums = past;
      else
        sums.prepend(past);
    }
  }

  const Arguments& arguments_;
  Shared& shared_;
  Tables& tables_;
  const int lane_;  // the first of this thread's rows
  Place x_, y_, forward_x_;
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
