// The scan of one segment of a row, from memory to memory.
#pragma once

#include "cpu/pairs.h"
#include "cpu/row.h"

namespace ema_ext::cpu::EMA_EXT_LEVEL {

template <class Storage, bool kWrite>
class Segment {
 public:
  using T = typename Storage::Acc;

  // From sample `begin` of the row on. `pairs` are there unless Storage::kDirect.
  Segment(const Problem& problem, const TileCoefficients<T>& k, const PairCoefficients* pairs,
          const Row<Storage>& row, int64_t begin, const Carry& carry)
      : problem_(problem),
        pairs_(pairs),
        row_(row),
        begin_(begin),
        scan_{k,
              carry,
              begin == 0 && problem.op == Op::kEma && problem.start.data == nullptr,
              {},
              0} {}

  SegmentEnd run(int64_t n) {
    const int64_t x_stride = problem_.x.time_stride, y_stride = problem_.y.time_stride;
    if constexpr (Storage::kDirect) {
      if ((x_stride == 1 || x_stride == -1) && (!kWrite || x_stride == y_stride)) {
        x_stride == 1 ? directly<1>(n) : directly<-1>(n);
        return {last_, scan_.aggregate, alpha_};
      }
    }
    x_stride == -1 ? through_buffer<-1>(n) : through_buffer<1>(n);
    return {last_, scan_.aggregate, alpha_};
  }

 private:
  using Sample = typename Storage::Sample;
  static constexpr int kT = kTile<T>;
  static constexpr Output kOutput = kWrite ? Output::kStored : Output::kNone;

  bool with_alpha() const { return kWrite && row_.forward_x != nullptr; }

  // Samples of stride Direction in x and y, read and written where they are.
  template <int Direction>
  void directly(int64_t n) {
    const Sample* x = row_.x + begin_ * Direction;
    Sample* y = row_.y + begin_ * Direction;
    const int64_t whole = n - n % kT;
    const auto past = reinterpret_cast<uintptr_t>(y + (Direction > 0 ? 0 : 1));
    // A line is lost where a streamed store meets an ordinary one: in the tail and between rows.
    const bool streamed = streams_stores(problem_) && past % kVectorBytes == 0 && !with_alpha() &&
                          (n == whole || n >= kChunkSamples);
    // The gradient to alpha reads y again, chunk by chunk.
    const int64_t step = with_alpha() ? kChunkSamples : whole;
    for (int64_t done = 0; done < whole; done += step) {
      const int64_t count = whole - done < step ? whole - done : step;
      const int64_t low = Direction > 0 ? done : 1 - done - count;  // the lowest address
      if (kWrite && streamed)
        scan_.template run<Direction, Output::kStreamed>(x + low, y + low, count);
      else
        scan_.template run<Direction, kOutput>(x + low, y + low, count);
      if (with_alpha()) add_alpha<Direction>(y + low, done, count);
    }
    last_ = scan_.last;
    if (n > whole) tail<Direction>(x, y, whole, static_cast<int>(n - whole));
  }

  // The last `count` samples, less than a tile, of a segment that is scanned directly.
  template <int Direction>
  void tail(const T* x, T* y, int64_t done, int count) {
    alignas(64) T buffer[kT] = {};
    T* samples = Direction > 0 ? buffer : buffer + kT - count;
    const int64_t low = Direction > 0 ? done : 1 - done - count;
    std::memcpy(samples, x + low, count * sizeof(T));
    scan_.template run<Direction, kOutput>(buffer, buffer, kT);
    if (with_alpha()) add_alpha<Direction>(buffer, done, count);
    if (kWrite) std::memcpy(y + low, samples, count * sizeof(T));
    last_ = Direction > 0 ? samples[count - 1] : samples[0];
  }

  // Samples of any stride and dtype. Direction is that of time in the buffer: down for samples that
  // lie in memory one below the other, else up.
  template <int Direction>
  void through_buffer(int64_t n) {
    int64_t done = 0;
    if constexpr (!Storage::kDirect) {
      // Asked of the row, not of this segment, whose aggregate alone may be wanted.
      const bool starts = finite(static_cast<float>(row_.start / scan_.k.ratio));
      if (pairs_->fit && starts && row_.forward_x == nullptr) done = by_pairs<Direction>(n);
    }
    by_chunks<Direction>(done, n);
  }

  // Whole tiles by pairs; returns how many samples of the first n these are.
  template <int Direction>
  int64_t by_pairs(int64_t n) {
    const int64_t whole = n - n % kPairTile;
    const int64_t x_stride = problem_.x.time_stride, y_stride = problem_.y.time_stride;
    const bool direct = x_stride == Direction && (!kWrite || y_stride == Direction);
    PairRun<Storage> pairs{*pairs_, scan_};
    alignas(64) Sample buffer[kChunkSamples];
    for (int64_t done = 0; done < whole; done += kChunkSamples) {
      const int64_t count = whole - done < kChunkSamples ? whole - done : kChunkSamples;
      const Sample* x = row_.x + (begin_ + done) * x_stride;
      Sample* y = row_.y + (begin_ + done) * y_stride;
      if (direct) {
        const int64_t low = Direction > 0 ? 0 : 1 - count;  // the lowest address
        pairs.template run<Direction, kWrite>(x + low, y + low, count);
        continue;
      }
      for (int64_t i = 0; i < count; ++i)
        buffer[Direction > 0 ? i : count - 1 - i] = x[i * x_stride];
      pairs.template run<Direction, kWrite>(buffer, buffer, count);
      for (int64_t i = 0; kWrite && i < count; ++i)
        y[i * y_stride] = buffer[Direction > 0 ? i : count - 1 - i];
    }
    if (kWrite && whole > 0 && scan_.copies_first) {
      *row_.y = *row_.x;
      scan_.copies_first = false;
    }
    last_ = scan_.last;
    return whole;
  }

  // Samples from `done` to n, through a buffer in L1.
  template <int Direction>
  void by_chunks(int64_t done, int64_t n) {
    alignas(64) T buffer[kChunkSamples];
    for (; done < n; done += kChunkSamples) {
      const int64_t count = n - done < kChunkSamples ? n - done : kChunkSamples;
      const int64_t padded = (count + kT - 1) / kT * kT;
      T* samples = Direction > 0 ? buffer : buffer + padded - count;
      unpack<Direction>(row_.x, problem_.x.time_stride, begin_ + done, count, samples);
      std::memset(Direction > 0 ? buffer + count : buffer, 0, (padded - count) * sizeof(T));
      scan_.template run<Direction, kOutput>(buffer, buffer, padded);
      if (with_alpha()) add_alpha<Direction>(buffer, done, count);
      if (kWrite) pack<Direction>(samples, count, begin_ + done);
      last_ = Direction > 0 ? samples[count - 1] : samples[0];
    }
  }

  // The chunk of `count` samples after `done`, padded to whole tiles at the end of the scan: y
  // holds its alpha * lambda.
  template <int Direction>
  void add_alpha(const T* y, int64_t done, int64_t count) {
    const AlphaScan<T, Direction> alpha{scan_.k};
    const int64_t stride = problem_.forward_x.time_stride;
    if constexpr (Storage::kDirect) {
      if (stride == Direction) {
        const Sample* x = row_.forward_x + (begin_ + done) * stride;
        return alpha.prepend_chunk(y, Direction > 0 ? x : x - (count - 1), count, alpha_);
      }
    }
    alignas(64) T x[kChunkSamples];
    unpack<Direction>(row_.forward_x, stride, begin_ + done, count, x);
    alpha.prepend_chunk(y, x, count, alpha_);
  }

  // `count` samples from `first` on, into the order of addresses that Direction stands for.
  template <int Direction>
  static void unpack(const Sample* from, int64_t stride, int64_t first, int64_t count, T* to) {
    from += first * stride;
    if (stride == Direction) {
      Storage::unpack(Direction > 0 ? from : from - (count - 1), count, to);
    } else {
      for (int64_t i = 0; i < count; ++i)
        to[Direction > 0 ? i : count - 1 - i] = Storage::get(from[i * stride]);
    }
  }

  template <int Direction>
  void pack(const T* from, int64_t count, int64_t first) const {
    const int64_t stride = problem_.y.time_stride;
    Sample* to = row_.y + first * stride;
    if (stride == Direction) {
      Storage::pack(from, count, Direction > 0 ? to : to - (count - 1));
    } else {
      for (int64_t i = 0; i < count; ++i)
        to[i * stride] = Storage::put(from[Direction > 0 ? i : count - 1 - i]);
    }
  }

  const Problem& problem_;
  const PairCoefficients* const pairs_;
  const Row<Storage>& row_;
  const int64_t begin_;
  TileScan<T> scan_;
  T last_ = 0;
  AlphaSums alpha_;
};

}  // namespace ema_ext::cpu::EMA_EXT_LEVEL
