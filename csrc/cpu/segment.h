// The scan of one segment of a row, tile by tile.
#pragma once

#include "cpu/row.h"
#include "cpu/segment_end.h"
#include "cpu/tile.h"
#include "cpu/tuning.h"

namespace ema_ext::cpu::EMA_EXT_LEVEL {

template <class Storage, bool kWrite>
struct Segment {
  using T = typename Storage::Acc;
  using Sample = typename Storage::Sample;
  static constexpr int kN = kLanes<T>;
  static constexpr int kT = kTile<T>;

  const Problem& problem;
  const TileCoefficients<T>& k;
  const Row<Storage>& row;
  int64_t begin;  // of the segment, in samples
  Carry carry;
  bool stream_stores;
  SegmentEnd end;

  // Samples of stride Direction in x and y, read and written where they are.
  template <int Direction>
  void directly(int64_t n) {
    const Sample* x = row.x + begin * Direction;
    Sample* y = row.y + begin * Direction;
    const int64_t whole = n - n % kT;
    const bool aligned =
        reinterpret_cast<uintptr_t>(y + (Direction > 0 ? 0 : 1)) % kVectorBytes == 0;
    // The gradient to alpha reads y again, chunk by chunk.
    const int64_t step = row.forward_x == nullptr ? whole : kChunkSamples;
    for (int64_t done = 0; done < whole; done += step) {
      const int64_t count = whole - done < step ? whole - done : step;
      const int64_t low = Direction > 0 ? done : 1 - done - count;  // the lowest address
      if (stream_stores && aligned && row.forward_x == nullptr)
        tiles<Direction, true>(x + low, y + low, count);
      else
        tiles<Direction, false>(x + low, y + low, count);
      if (kWrite && row.forward_x != nullptr)
        add_alpha_sums<Direction>(y + low, begin + done, count);
    }
    if (whole > 0) end.last = y[(whole - 1) * Direction];
    if (n > whole) {
      alignas(64) T buffer[kT] = {};
      const int count = static_cast<int>(n - whole);
      T* in_buffer = Direction > 0 ? buffer : buffer + kT - count;
      const int64_t low = Direction > 0 ? whole : 1 - n;
      std::memcpy(in_buffer, x + low, count * sizeof(T));
      tiles<Direction, false>(buffer, buffer, kT);
      if (kWrite && row.forward_x != nullptr)
        add_alpha_sums<Direction>(buffer, begin + whole, count);
      if (kWrite) std::memcpy(y + low, in_buffer, count * sizeof(T));
      end.last = Direction > 0 ? in_buffer[count - 1] : in_buffer[0];
    }
  }

  // Samples of any stride and dtype, through buffers in L1. Direction is that of time in the
  // buffers: down for samples that lie in memory one below the other, else up.
  template <int Direction>
  void by_chunks(int64_t n) {
    alignas(64) T buffer[kChunkSamples];
    for (int64_t done = 0; done < n; done += kChunkSamples) {
      const int64_t count = n - done < kChunkSamples ? n - done : kChunkSamples;
      const int64_t padded = (count + kT - 1) / kT * kT;
      T* samples = Direction > 0 ? buffer : buffer + padded - count;
      T* padding = Direction > 0 ? buffer + count : buffer;
      unpack<Direction>(row.x, problem.x.time_stride, begin + done, count, samples);
      std::memset(padding, 0, (padded - count) * sizeof(T));
      tiles<Direction, false>(buffer, buffer, padded);
      if (kWrite && row.forward_x != nullptr)
        add_alpha_sums<Direction>(buffer, begin + done, count);
      if (kWrite) pack<Direction>(samples, count, begin + done);
      end.last = Direction > 0 ? samples[count - 1] : samples[0];
    }
  }

 private:
  // Scans n samples, whole tiles, from x to y; both are lowest addresses, and may be the same.
  template <int Direction, bool kStream>
  EMA_EXT_INLINE void tiles(const T* x, T* y, int64_t n) {
    Carry carry = this->carry, aggregate = end.aggregate;
    for (int64_t t = 0; t < n; t += kT) {
      const int64_t low = Direction > 0 ? t : n - kT - t;
      TileVector<T> p[kTileVectors];
      scan_tile<T, Direction>(x + low, p, k);
      const double decayed = rounded(k.ratio * static_cast<double>(last_sample<T, Direction>(p)));
      aggregate.advance(decayed, k.drop);
      if constexpr (kWrite) {
        add_carry<T, Direction>(p, carry.value, k);
        carry.advance(decayed, k.drop);
#pragma GCC unroll 16
        for (int v = 0; v < kTileVectors; ++v) {
          if constexpr (kStream)
            stream(y + low + v * kN, p[v]);
          else
            store(y + low + v * kN, p[v]);
        }
      }
    }
    this->carry = carry;
    end.aggregate = aggregate;
  }

  // The gradient to alpha of the chunk [first, first + count), whose alpha * lambda is in y, padded
  // to whole tiles at the end of the scan.
  template <int Direction>
  void add_alpha_sums(const T* y, int64_t first, int64_t count) {
    // Laid out for the whole chunk before any tile is read again at other offsets: a load across
    // two stores still on their way waits for both.
    alignas(64) T forward[kChunkSamples];
    const int64_t padded = (count + kT - 1) / kT * kT;
    T* samples = Direction > 0 ? forward : forward + padded - count;
    unpack<Direction>(row.forward_x, problem.forward_x.time_stride, first, count, samples);
    T references[kChunkSamples / kT];
    for (int64_t i = 0; i < padded / kT; ++i)
      references[i] =
          measure_from_reference<Direction>(forward + i * kT, valid_in<Direction>(i, count));
    for (int64_t t = 0; t < padded / kT; ++t) {
      const int64_t i = Direction > 0 ? t : padded / kT - 1 - t;
      end.alpha.prepend(alpha_sums<Direction>(y + i * kT, forward + i * kT, references[i],
                                              valid_in<Direction>(i, count)));
    }
  }

  // How many samples of the i-th tile of a padded chunk are not padding.
  template <int Direction>
  static EMA_EXT_INLINE int valid_in(int64_t i, int64_t count) {
    const int64_t rest = count % kT;
    const int64_t last = Direction > 0 ? count / kT : 0;
    return static_cast<int>(rest != 0 && i == last ? rest : kT);
  }

  // Subtracts the first sample in the forward's time from all, and returns it; padding becomes 0.
  template <int Direction>
  static EMA_EXT_INLINE T measure_from_reference(T* tile, int valid) {
    T* samples = Direction > 0 ? tile : tile + kT - valid;
    const T reference = Direction > 0 ? samples[valid - 1] : samples[0];
    if (valid == kT) {
      for (int i = 0; i < kT; ++i) tile[i] -= reference;
    } else {
      for (int i = 0; i < valid; ++i) samples[i] -= reference;
      std::memset(Direction > 0 ? tile + valid : tile, 0, (kT - valid) * sizeof(T));
    }
    return reference;
  }

  // Of one tile: y holds alpha * lambda, `forward` the forward's samples less their reference.
  template <int Direction>
  EMA_EXT_INLINE AlphaSums alpha_sums(const T* y, const T* forward, T reference, int valid) const {
    constexpr int kForward = -Direction;
    const T* powers = k.template powers<kForward>() - kForward * (kT - valid);
    TileVector<T> p[kTileVectors];
    scan_tile<T, kForward>(forward, p, k);
    TileVector<T> share{}, weight{}, before{};
#pragma GCC unroll 16
    for (int v = 0; v < kTileVectors; ++v) {
      const int a = at<kForward>(v);
      const auto adjoint = load<TileVector<T>>(y + a * kN);
      const auto y_before = earlier_by<1, kForward, T, kN>(before, p[a]);
      share += adjoint * (load<TileVector<T>>(forward + a * kN) - y_before);
      weight += adjoint * load<TileVector<T>>(powers + a * kN);
      before = p[a];
    }
    AlphaSums sums;
    sums.reference = reference;
    sums.share = sum_lanes<T, kN>(share);
    sums.weight = sum_lanes<T, kN>(weight);
    sums.aggregate = last_sample<T, kForward>(p);
    sums.decay = 1 - (valid == kT ? k.drop : k.decay.power_complement(valid));
    return sums;
  }

  // `count` samples from `first` on, into the order of addresses that Direction stands for.
  template <int Direction>
  EMA_EXT_INLINE void unpack(const Sample* from, int64_t stride, int64_t first, int64_t count,
                             T* to) const {
    from += first * stride;
    if (stride == Direction) {
      Storage::unpack(Direction > 0 ? from : from - (count - 1), count, to);
    } else {
      for (int64_t i = 0; i < count; ++i)
        to[Direction > 0 ? i : count - 1 - i] = Storage::get(from[i * stride]);
    }
  }

  template <int Direction>
  EMA_EXT_INLINE void pack(const T* from, int64_t count, int64_t first) const {
    const int64_t stride = problem.y.time_stride;
    Sample* to = row.y + first * stride;
    if (stride == Direction) {
      Storage::pack(from, count, Direction > 0 ? to : to - (count - 1));
    } else {
      for (int64_t i = 0; i < count; ++i)
        to[i * stride] = Storage::put(from[Direction > 0 ? i : count - 1 - i]);
    }
  }
};

}  // namespace ema_ext::cpu::EMA_EXT_LEVEL
