// The scan of one tile: kTileVectors vectors of consecutive samples, in T = float or double.
//
// Three steps, none of them serial in the samples. Write w_k[n] for the sum of in * c^j * x[n-j]
// over j < k, where samples before the tile count as zero.
//   windows   w_4 by four unaligned loads, then w_8 = w_4 + c^4 * (w_4 four samples earlier), and
//             likewise up to the lanes of a vector
//   vertical  vectors are scanned as wholes, p[v] = w[v] + c^lanes * p[v-1]: now p is the tile
//             scanned from zero, and its last sample is the tile's aggregate
//   carry     y[i] = p[i] + c^i * carry, where carry is what the past contributes to the tile's
//             first sample
// From tile to tile the carry runs in float64 with compensation (Carry), so that its error does not
// grow with the length or with 1/alpha. After Hillis and Steele (1986) and Blelloch (1990).
#pragma once

#include "cpu/segment_end.h"
#include "cpu/simd.h"
#include "decay.h"

namespace ema_ext::cpu::EMA_EXT_LEVEL {

constexpr int kTileVectors = 8;  // as many as leave registers for the constants

template <class T>
constexpr int kTile = kTileVectors * kLanes<T>;

// The largest decay over one tile that a power in T still holds with room for any finite sample.
template <class T>
constexpr double kSmallestPower = sizeof(T) == 4 ? 0x1p-100 : 0x1p-900;

// What a tile needs to know of the decay and of the factor on the input.
template <class T>
struct TileCoefficients {
  static constexpr int kN = kLanes<T>;
  static constexpr int kTaps = kN < 4 ? kN : 4;
  using V = Vector<T, kN>;

  Decay decay;
  double ratio;       // c
  double tile_decay;  // c^tile
  double drop;        // 1 - c^tile
  // Each in all lanes, as an operand in memory takes no instruction of its own.
  V taps[kTaps];                          // in * c^j: the first window
  V window[2];                            // c^kTaps, c^(2 kTaps): from one window to the next
  V hop, hop2;                            // c^lanes, c^(2 lanes)
  V hops[kTileVectors];                   // c^(lanes v)
  alignas(64) double lane_powers[2][kN];  // c^i by lane, with time towards higher and lower lanes
  bool steep;                             // c^tile falls below kSmallestPower
  // c^i over a tile, between zeros: read from an offset, it leaves out what lies outside the tile.
  T sample_powers[2][2 * kTile<T>];

  // Whether powers of this decay serve at all: if even c^lanes is too small (and c is not 0), the
  // sequential kernel does the row.
  static bool fit(const Decay& decay) {
    return decay.ratio >= 0 && decay.ratio <= 1 &&
           (decay.ratio == 0 || decay.power(kN) >= kSmallestPower<T>);
  }

  // sample_powers are left out unless asked for: they take longer than the rest.
  TileCoefficients(const Decay& decay, double in, bool with_sample_powers)
      : TileCoefficients(decay, in, decay.power(kTile<T>), decay.power_complement(kTile<T>)) {
    if (with_sample_powers) fill_sample_powers();
  }

  // Of every other sample, from the second on, with its factor on the input applied; the carry
  // stays what comes to the first.
  TileCoefficients of_pairs() const {
    TileCoefficients k({ratio * ratio, decay.complement * (1 + ratio)}, 1, tile_decay * tile_decay,
                       drop * (1 + tile_decay));
    k.ratio = ratio;
    for (auto& powers : k.lane_powers)
      for (double& power : powers) power *= ratio;
    return k;
  }

  // Where c^0 lies for time towards higher addresses (Direction 1); for -1, where c^(tile - 1)
  // does.
  template <int Direction>
  EMA_EXT_INLINE const T* powers() const {
    return Direction > 0 ? sample_powers[0] + kTile<T> : sample_powers[1];
  }

 private:
  TileCoefficients(const Decay& decay, double in, double tile_decay, double drop)
      : decay(decay), ratio(decay.ratio), tile_decay(tile_decay), drop(drop) {
    double power[kN + 1];
    fill_powers(decay, power);
    for (int j = 0; j < kTaps; ++j) taps[j] = all(in * power[j]);
    for (int i = 0, k = kTaps; k < kN; k *= 2, ++i) window[i] = all(power[k]);
    for (int i = 0; i < kN; ++i) lane_powers[0][i] = lane_powers[1][kN - 1 - i] = power[i];
    for (int v = 0; v < kTileVectors; ++v) hops[v] = all(hop_power(decay, power[kN], v));
    hop = hops[1];
    hop2 = hops[2];
    steep = tile_decay < kSmallestPower<T>;
  }

  static V all(double value) { return V{} + static_cast<T>(value); }

  void fill_sample_powers() {
    constexpr int kT = kTile<T>;
    for (int i = 0; i < kT; ++i) {
      const T power = static_cast<T>(decay.power(i));
      sample_powers[0][kT + i] = sample_powers[1][kT - 1 - i] = power;
      sample_powers[0][i] = sample_powers[1][kT + i] = 0;
    }
  }

  // For float, products of float64 do; float64 itself takes each power from its logarithm.
  static void fill_powers(const Decay& decay, double* power) {
    power[0] = 1;
    for (int k = 1; k <= kN; ++k)
      power[k] = sizeof(T) == 4 ? power[k - 1] * decay.ratio : decay.power(k);
  }

  static double hop_power(const Decay& decay, double hop, int v) {
    if (sizeof(T) == 8) return decay.power(static_cast<double>(v) * kN);
    double power = 1;
    while (v-- > 0) power *= hop;
    return power;
  }
};

template <class T>
using TileVector = Vector<T, kLanes<T>>;

// The address order of vector v in time.
template <int Direction>
EMA_EXT_INLINE constexpr int at(int v) {
  return Direction > 0 ? v : kTileVectors - 1 - v;
}

// Windows of one vector over all its lanes. `previous` holds the narrower windows of the vector
// before it, and is left holding those of this one.
template <class T, int Direction>
EMA_EXT_INLINE TileVector<T> widen_window(TileVector<T> w, TileVector<T>* previous,
                                          const TileCoefficients<T>& k) {
  constexpr int kN = kLanes<T>;
  if constexpr (kN > 4) {
    const auto narrow = w;
    w = narrow + k.window[0] * earlier_by<4, Direction, T, kN>(previous[0], narrow);
    previous[0] = narrow;
  }
  if constexpr (kN > 8) {
    const auto narrow = w;
    w = narrow + k.window[1] * earlier_by<8, Direction, T, kN>(previous[1], narrow);
    previous[1] = narrow;
  }
  return w;
}

// The first window of the tile's first vector, before which nothing is read.
template <class T, int Direction>
EMA_EXT_INLINE TileVector<T> first_window(TileVector<T> x, const TileCoefficients<T>& k) {
  constexpr int kN = kLanes<T>;
  const TileVector<T> zero{};
  auto w = rounded(k.taps[0] * x);
  w += k.taps[1] * earlier_by<1, Direction, T, kN>(zero, x);
  if constexpr (kN >= 4) {
    w += k.taps[2] * earlier_by<2, Direction, T, kN>(zero, x);
    w += k.taps[3] * earlier_by<3, Direction, T, kN>(zero, x);
  }
  return w;
}

// Scans the tile at x from zero into p, both in the order of addresses. kSteep is k.steep: asked
// within the tile, it would keep p in memory.
template <class T, int Direction, bool kSteep>
EMA_EXT_INLINE void scan_tile(const T* x, TileVector<T>* p, const TileCoefficients<T>& k) {
  constexpr int kN = kLanes<T>;
  TileVector<T> previous[2] = {};
#pragma GCC unroll 16
  for (int v = 0; v < kTileVectors; ++v) {
    const T* from = x + at<Direction>(v) * kN;
    const auto now = load<TileVector<T>>(from);
    TileVector<T> w;
    if (v == 0) {
      w = first_window<T, Direction>(now, k);
    } else {
      w = rounded(k.taps[0] * now);
      for (int j = 1; j < TileCoefficients<T>::kTaps; ++j)
        w += k.taps[j] * load<TileVector<T>>(from - Direction * j);
    }
    p[at<Direction>(v)] = widen_window<T, Direction>(w, previous, k);
  }
  if constexpr (kSteep) {
#pragma GCC unroll 16
    for (int v = 1; v < kTileVectors; ++v) p[at<Direction>(v)] += k.hop * p[at<Direction>(v - 1)];
    return;
  }
  // Odd vectors by pairs, then along the odd ones, then the even ones, to keep the chain of
  // dependent operations short.
#pragma GCC unroll 16
  for (int v = 1; v < kTileVectors; v += 2) p[at<Direction>(v)] += k.hop * p[at<Direction>(v - 1)];
#pragma GCC unroll 16
  for (int v = 3; v < kTileVectors; v += 2) p[at<Direction>(v)] += k.hop2 * p[at<Direction>(v - 2)];
#pragma GCC unroll 16
  for (int v = 2; v < kTileVectors; v += 2) p[at<Direction>(v)] += k.hop * p[at<Direction>(v - 1)];
}

// The last sample in time of a scanned tile.
template <class T, int Direction>
EMA_EXT_INLINE T last_sample(const TileVector<T>* p) {
  return Direction > 0 ? p[kTileVectors - 1][kLanes<T> - 1] : p[0][0];
}

template <class T, int Direction>
EMA_EXT_INLINE void set_first_sample(TileVector<T>* p, T value) {
  if constexpr (Direction > 0)
    p[0][0] = value;
  else
    p[kTileVectors - 1][kLanes<T> - 1] = value;
}

// Adds the carry's share to a tile scanned from zero.
template <class T, int Direction, bool kSteep>
EMA_EXT_INLINE void add_carry(TileVector<T>* p, double carry, const TileCoefficients<T>& k) {
  constexpr int kN = kLanes<T>;
  using Doubles = Vector<double, kN>;
  const auto powers = load<Doubles>(k.lane_powers[Direction > 0 ? 0 : 1]);
  auto share = __builtin_convertvector(powers * carry, TileVector<T>);
  if constexpr (!kSteep) {
#pragma GCC unroll 16
    for (int v = 0; v < kTileVectors; ++v) p[at<Direction>(v)] += k.hops[v] * share;
  } else {
#pragma GCC unroll 16
    for (int v = 0; v < kTileVectors; ++v) {
      p[at<Direction>(v)] += share;
      share *= k.hop;
    }
  }
}

}  // namespace ema_ext::cpu::EMA_EXT_LEVEL
