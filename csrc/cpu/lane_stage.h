// Rows that do not touch, brought side by side: samples of a few rows over a stretch of time, from
// wherever they lie into a buffer in L1 where each step of time has all rows in a line, and back.
//
// Rows contiguous in time are transposed in registers: blocks of E x E samples, E as many as 16
// bytes of the accumulate dtype hold, as many blocks at once as a vector has such parts.
#pragma once

#include "cpu/storage.h"

namespace ema_ext::cpu::EMA_EXT_LEVEL {

template <class Storage>
class LaneStage {
 public:
  using Acc = typename Storage::Acc;
  using Sample = typename Storage::Sample;

  // `rows` rows, to and from lines of kWidth.
  LaneStage(int64_t time_stride, int64_t row_stride, int rows)
      : time_stride_(time_stride), row_stride_(row_stride), rows_(rows) {}

  // `count` steps from `from` on.
  template <int kWidth>
  void gather(const Sample* from, int64_t count, Acc* to) const {
    move<kWidth>(From{from}, count, to);
  }

  // The inverse.
  template <int kWidth>
  void scatter(Acc* from, int64_t count, Sample* to) const {
    move<kWidth>(To{to}, count, from);
  }

 private:
  static constexpr int kN = kLanes<Acc>;
  static constexpr int kE = 16 / static_cast<int>(sizeof(Acc));
  static constexpr int kParts = kN / kE;
  using V = Vector<Acc, kN>;
  using Part = Vector<Acc, kE>;

  // The two ways between memory and lines. A part is kE samples of a row, a vector kE lanes' parts.
  struct From {
    const Sample* samples;
    EMA_EXT_INLINE From operator+(int64_t by) const { return {samples + by}; }
    EMA_EXT_INLINE void sample(Acc* line) const { *line = Storage::get(*samples); }
    void line(int rows, Acc* to) const { Storage::unpack(samples, rows, to); }
    template <int Direction, int kWidth>
    EMA_EXT_INLINE void block(int64_t row_stride, Acc* lines) const {
      V v[kE];
#pragma GCC unroll 4
      for (int i = 0; i < kE; ++i) v[i] = parts(samples + i * row_stride, kE * row_stride);
      transpose(v);
#pragma GCC unroll 4
      for (int i = 0; i < kE; ++i) store(lines + in_time<Direction>(i) * kWidth, v[i]);
    }
    static EMA_EXT_INLINE V parts(const Sample* from, int64_t step) {
      const auto part = [=](int p) __attribute__((always_inline)) {
        return Storage::template get_vector<kE>(from + p * step);
      };
      if constexpr (kParts == 1) return part(0);
      if constexpr (kParts == 2) return join<Acc, kE>(part(0), part(1));
      if constexpr (kParts == 4)
        return join<Acc, 2 * kE>(join<Acc, kE>(part(0), part(1)), join<Acc, kE>(part(2), part(3)));
    }
  };
  struct To {
    Sample* samples;
    EMA_EXT_INLINE To operator+(int64_t by) const { return {samples + by}; }
    EMA_EXT_INLINE void sample(const Acc* line) const { *samples = Storage::put(*line); }
    void line(int rows, const Acc* from) const { Storage::pack(from, rows, samples); }
    template <int Direction, int kWidth>
    EMA_EXT_INLINE void block(int64_t row_stride, const Acc* lines) const {
      V v[kE];
#pragma GCC unroll 4
      for (int i = 0; i < kE; ++i) v[i] = load<V>(lines + in_time<Direction>(i) * kWidth);
      transpose(v);
#pragma GCC unroll 4
      for (int i = 0; i < kE; ++i) parts(v[i], samples + i * row_stride, kE * row_stride);
    }
    template <int N>
    static EMA_EXT_INLINE void parts(Vector<Acc, N> v, Sample* to, int64_t step) {
      if constexpr (N == kE) {
        Storage::template put_vector<kE>(v, to);
      } else {
        parts<N / 2>(half<0, Acc, N>(v), to, step);
        parts<N / 2>(half<1, Acc, N>(v), to + N / 2 / kE * step, step);
      }
    }
    static EMA_EXT_INLINE void parts(V v, Sample* to, int64_t step) { parts<kN>(v, to, step); }
  };

  template <int kWidth, class Way>
  void move(Way way, int64_t count, Acc* lines) const {
    if (row_stride_ == 1)
      for (int64_t t = 0; t < count; ++t) (way + t * time_stride_).line(rows_, lines + t * kWidth);
    else if (time_stride_ == 1)
      by_parts<1, kWidth>(count, way, lines);
    else if (time_stride_ == -1)
      by_parts<-1, kWidth>(count, way, lines);
    else
      by_samples<kWidth>(0, 0, count, way, lines);
  }

  // The order in time of a part's samples.
  template <int Direction>
  static EMA_EXT_INLINE constexpr int in_time(int i) {
    return Direction > 0 ? i : kE - 1 - i;
  }

  // Of rows contiguous in time: all of a few before the next, for the sake of the cache.
  template <int Direction, int kWidth, class Way>
  __attribute__((noinline)) void by_parts(int64_t count, Way way, Acc* lines) const {
    const int64_t row_stride = row_stride_, whole = count - count % kE;
    const int rows = rows_ - rows_ % kN;
    for (int row = 0; row < rows; row += kN) {
      const Way corner = way + (row * row_stride + (Direction > 0 ? 0 : 1 - kE));
      for (int64_t t = 0; t < whole; t += kE)
        (corner + Direction * t)
            .template block<Direction, kWidth>(row_stride, lines + t * kWidth + row);
    }
    if (whole < count)
      for (int row = 0; row < rows; ++row) by_samples_of<kWidth>(row, whole, count, way, lines);
    by_samples<kWidth>(rows, 0, count, way, lines);
  }

  template <int kWidth, class Way>
  void by_samples(int row, int64_t t, int64_t count, Way way, Acc* lines) const {
    for (; row < rows_; ++row) by_samples_of<kWidth>(row, t, count, way, lines);
  }
  template <int kWidth, class Way>
  EMA_EXT_INLINE void by_samples_of(int row, int64_t t, int64_t count, Way way, Acc* lines) const {
    const int64_t time_stride = time_stride_;
    for (way = way + row * row_stride_; t < count; ++t)
      (way + t * time_stride).sample(lines + t * kWidth + row);
  }

  // Each block of kE x kE: lane i of v[j] and lane j of v[i] change places.
  static EMA_EXT_INLINE void transpose(V* v) {
    if constexpr (kE == 2) {
      const V a = v[0], b = v[1];
      v[0] = interleave<1, 0>(a, b), v[1] = interleave<1, 1>(a, b);
    } else {
      const V a = interleave<1, 0>(v[0], v[1]), b = interleave<1, 1>(v[0], v[1]);
      const V c = interleave<1, 0>(v[2], v[3]), d = interleave<1, 1>(v[2], v[3]);
      v[0] = interleave<2, 0>(a, c), v[1] = interleave<2, 1>(a, c);
      v[2] = interleave<2, 0>(b, d), v[3] = interleave<2, 1>(b, d);
    }
  }

  // Within each 16 bytes: the lower (0) or upper (1) halves of a and b, by units of kUnit lanes in
  // turn.
  template <int kUnit, int kUpper>
  static EMA_EXT_INLINE V interleave(V a, V b) {
    return interleave<kUnit, kUpper>(a, b, typename MakeIndices<kN>::type{});
  }
  template <int kUnit, int kUpper, int... I>
  static EMA_EXT_INLINE V interleave(V a, V b, Indices<I...>) {
    return __builtin_shufflevector(a, b,
                                   (I / kE * kE + kUpper * kE / 2 + I % kE / (2 * kUnit) * kUnit +
                                    I % kUnit + I / kUnit % 2 * kN)...);
  }

  const int64_t time_stride_, row_stride_;
  const int rows_;
};

}  // namespace ema_ext::cpu::EMA_EXT_LEVEL
