// Runs of samples of a half dtype in memory, scanned by pairs of neighbours.
//
// A pair lies in 32 bits, out of which its samples come, and into which they go, side by side with
// those of other pairs. With e and l the earlier and the later sample of a pair,
//   the later    are scanned as tiles (tiles.h) of ratio c^2 of in * l + in * c * e: half as many
//   the earlier  follow from the later one before them, y_e = in * e + c * y_l
#pragma once

#include "cpu/storage.h"
#include "cpu/tiles.h"

namespace ema_ext::cpu::EMA_EXT_LEVEL {

constexpr int64_t kPairTile = 2 * kTile<float>;
static_assert(kChunkSamples % kPairTile == 0);

struct PairCoefficients {
  bool fit;                           // whether powers of c^2 serve, as in TileCoefficients
  TileVector<float> in, ratio, both;  // in all lanes; both is their product
  TileCoefficients<float> later;

  PairCoefficients(const TileCoefficients<float>& k, double in)
      : fit(k.decay.ratio > 0 && k.decay.power(2 * kLanes<float>) >= kSmallestPower<float>),
        in(TileVector<float>{} + static_cast<float>(in)),
        ratio(TileVector<float>{} + static_cast<float>(k.ratio)),
        both(TileVector<float>{} + static_cast<float>(in * k.ratio)),
        later(k.of_pairs()) {}
};

template <class Storage>
struct PairRun {
  using Sample = typename Storage::Sample;

  const PairCoefficients& k;
  TileScan<float>& scan;  // its carry, aggregate and last are moved on

  // Scans n samples, whole tiles and at most kChunkSamples, from x to y: lowest addresses, which
  // may be the same.
  template <int Direction, bool kWrite>
  void run(const Sample* x, Sample* y, int64_t n) {
    // All of the later samples first: a load across two stores that are still on their way waits
    // for both.
    alignas(64) float buffer[kN + kChunkSamples / 2 + kN];
    float* const later = buffer + kN;
    read<Direction>(x, n, later);
    later[Direction > 0 ? -1 : n / 2] = static_cast<float>(scan.carry.value / scan.k.ratio);
    TileScan<float> tiles{k.later, scan.carry, false, scan.aggregate, scan.last};
    tiles.template run<Direction, kWrite ? Output::kStored : Output::kNone>(later, later, n / 2);
    if (kWrite) write<Direction>(x, later, n, y);
    scan.carry = tiles.carry;
    scan.aggregate = tiles.aggregate;
    scan.last = tiles.last;
  }

 private:
  static constexpr int kN = kLanes<float>;
  using V = TileVector<float>;

  template <int Direction>
  __attribute__((noinline)) void read(const Sample* x, int64_t n, float* later) const {
    for (int64_t i = 0; i < n / 2; i += kN) {
      const Pairs pairs = Storage::split(load<PairBits>(x + 2 * i));
      const V l = Direction > 0 ? pairs.high : pairs.low;
      const V e = Direction > 0 ? pairs.low : pairs.high;
      store(later + i, k.in * l + rounded(k.both * e));
    }
  }

  template <int Direction>
  __attribute__((noinline)) void write(const Sample* x, const float* later, int64_t n,
                                       Sample* y) const {
    for (int64_t i = 0; i < n / 2; i += kN) {
      const Pairs pairs = Storage::split(load<PairBits>(x + 2 * i));
      const V decayed = rounded(k.ratio * load<V>(later + i - Direction)), now = load<V>(later + i);
      if constexpr (Direction > 0)
        store(y + 2 * i, Storage::unite({k.in * pairs.low + decayed, now}));
      else
        store(y + 2 * i, Storage::unite({now, k.in * pairs.high + decayed}));
    }
  }
};

}  // namespace ema_ext::cpu::EMA_EXT_LEVEL
