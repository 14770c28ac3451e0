// Runs of whole tiles in memory, scanned one after the other.
#pragma once

#include "cpu/segment_end.h"
#include "cpu/tile.h"
#include "cpu/tuning.h"

namespace ema_ext::cpu::EMA_EXT_LEVEL {

enum class Output {
  kNone,  // only the aggregate is wanted
  kStored,
  kStreamed,  // past the caches
};

// What runs from tile to tile. The loops are not inlined: all dtypes with the same T share them.
template <class T>
struct TileScan {
  static constexpr int kT = kTile<T>;

  const TileCoefficients<T>& k;
  Carry carry;
  bool copies_first;  // the next sample is y[0] = x[0], bit by bit
  Carry aggregate;    // of what was scanned so far, as if from zero
  T last;             // sample written

  // Scans n samples, whole tiles, from x to y: lowest addresses, which may be the same.
  template <int Direction, Output kOutput>
  void run(const T* x, T* y, int64_t n) {
    if (__builtin_expect(!k.steep, 1))
      tiles<Direction, kOutput, false>(x, y, n);
    else
      tiles<Direction, kOutput == Output::kNone ? kOutput : Output::kStored, true>(x, y, n);
  }

 private:
  template <int Direction, Output kOutput, bool kSteep>
  __attribute__((noinline)) void tiles(const T* x, T* y, int64_t n) {
    if (n == 0) return;
    Carry carry = this->carry, aggregate = this->aggregate;
    // In registers throughout: to touch a streamed line again would cost more than the row.
    bool copies_first = this->copies_first;
    T last = this->last;
    for (int64_t t = 0; t < n; t += kT) {
      const int64_t low = Direction > 0 ? t : n - kT - t;
      TileVector<T> p[kTileVectors];
      scan_tile<T, Direction, kSteep>(x + low, p, k);
      const double decayed = rounded(k.ratio * static_cast<double>(last_sample<T, Direction>(p)));
      aggregate.advance(decayed, k.tile_decay, k.drop);
      if constexpr (kOutput != Output::kNone) {
        add_carry<T, Direction, kSteep>(p, carry.value, k);
        carry.advance(decayed, k.tile_decay, k.drop);
        last = last_sample<T, Direction>(p);
        if (__builtin_expect(copies_first, 0)) {
          set_first_sample<T, Direction>(p, x[Direction > 0 ? 0 : n - 1]);
          copies_first = false;
        }
#pragma GCC unroll 16
        for (int v = 0; v < kTileVectors; ++v) {
          if constexpr (kOutput == Output::kStreamed)
            stream(y + low + v * kLanes<T>, p[v]);
          else
            store(y + low + v * kLanes<T>, p[v]);
        }
      }
    }
    this->carry = carry;
    this->aggregate = aggregate;
    if constexpr (kOutput != Output::kNone) {
      this->copies_first = false;
      this->last = last;
    }
  }
};

// The gradient to alpha of a chunk of samples, tile by tile.
template <class T, int Direction>
struct AlphaScan {
  static constexpr int kN = kLanes<T>, kT = kTile<T>;
  static constexpr int kForward = -Direction;

  const TileCoefficients<T>& k;

  // y holds alpha * lambda and x the forward's samples, `count` of them, at most kChunkSamples; of
  // y what is missing to whole tiles at the end of the scan is there and finite, of x it is not
  // read. Lowest addresses. The chunk goes before `sums` in the forward's time.
  void prepend_chunk(const T* y, const T* x, int64_t count, AlphaSums& sums) const {
    if (__builtin_expect(!k.steep, 1))
      prepend_tiles<false>(y, x, count, sums);
    else
      prepend_tiles<true>(y, x, count, sums);
  }

 private:
  template <bool kSteep>
  __attribute__((noinline)) void prepend_tiles(const T* y, const T* x, int64_t count,
                                               AlphaSums& sums) const {
    // All of x first, before any tile is read at other offsets: a load across two stores that are
    // still on their way waits for both.
    const int64_t tiles = (count + kT - 1) / kT;
    alignas(64) T referred[kChunkSamples];
    T references[kChunkSamples / kT];
    for (int64_t i = 0; i < tiles; ++i) {
      const int valid = valid_in(i, count);
      references[i] = refer(x, referred + i * kT, valid);
      x += valid;
    }
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t i = Direction > 0 ? t : tiles - 1 - t;
      sums.prepend(sum<kSteep>(y + i * kT, referred + i * kT, references[i], valid_in(i, count)));
    }
  }

  // How many samples of the i-th tile are not padding.
  static EMA_EXT_INLINE int valid_in(int64_t i, int64_t count) {
    const int64_t rest = count % kT;
    const int64_t last = Direction > 0 ? count / kT : 0;
    return static_cast<int>(rest != 0 && i == last ? rest : kT);
  }

  // The `valid` samples of a tile less the first in the forward's time, which is returned, and 0
  // for the padding.
  static EMA_EXT_INLINE T refer(const T* x, T* tile, int valid) {
    const T reference = x[Direction > 0 ? valid - 1 : 0];
    if (__builtin_expect(valid == kT, 1)) {
      for (int i = 0; i < kT; ++i) tile[i] = x[i] - reference;
    } else {
      std::memset(tile, 0, kT * sizeof(T));
      for (int i = 0; i < valid; ++i) tile[Direction > 0 ? i : kT - valid + i] = x[i] - reference;
    }
    return reference;
  }

  template <bool kSteep>
  EMA_EXT_INLINE AlphaSums sum(const T* y, const T* x, T reference, int valid) const {
    const T* powers = k.template powers<kForward>() - kForward * (kT - valid);
    TileVector<T> p[kTileVectors];
    scan_tile<T, kForward, kSteep>(x, p, k);
    TileVector<T> share{}, weight{}, before{};
#pragma GCC unroll 16
    for (int v = 0; v < kTileVectors; ++v) {
      const int a = at<kForward>(v);
      const auto adjoint = load<TileVector<T>>(y + a * kN);
      const auto y_before = earlier_by<1, kForward, T, kN>(before, p[a]);
      share += adjoint * (load<TileVector<T>>(x + a * kN) - y_before);
      weight += adjoint * load<TileVector<T>>(powers + a * kN);
      before = p[a];
    }
    AlphaSums sums;
    sums.reference = reference;
    sums.share = sum_lanes<T, kN>(share);
    sums.weight = sum_lanes<T, kN>(weight);
    sums.aggregate = last_sample<T, kForward>(p);
    sums.decay = valid == kT ? k.tile_decay : k.decay.power(valid);
    return sums;
  }
};

}  // namespace ema_ext::cpu::EMA_EXT_LEVEL
