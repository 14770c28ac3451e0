// The recurrence with a coefficient per sample, and the adjoints that need the forward's y:
// forward, backward, in one pass, for every dtype and stride.
//
// Samples pass through buffers of float64 in L1, chunk by chunk, so one kernel serves all dtypes
// and neither 1 - alpha nor a product of coefficients is rounded to less. A chunk is kSteps samples
// of W rows side by side: of one row, whose samples are then scanned by vectors (PairScan), or of
// many, where a vector holds as many rows.
#pragma once

#include "cpu/pair_scan.h"
#include "cpu/row.h"
#include "cpu/tuning.h"

namespace ema_ext::cpu::EMA_EXT_LEVEL {

// Vectors of float64 between memory and the buffers; `stride` is in elements and may be negative.
template <class Storage>
struct Transfer {
  using Sample = typename Storage::Sample;
  using Acc = typename Storage::Acc;
  static constexpr int kN = kLanes<double>;
  using D = Vector<double, kN>;

  static void load_run(const Sample* from, int64_t stride, int64_t count, double* to) {
    int64_t i = 0;
    if (stride == 1) {
      for (; i + kN <= count; i += kN)
        store(to + i, widen<kN>(Storage::template get_vector<kN>(from + i)));
    } else if (stride == -1) {
      for (; i + kN <= count; i += kN)
        store(to + i, flipped(widen<kN>(Storage::template get_vector<kN>(from - i - (kN - 1)))));
    } else if (stride == 0) {
      const D value = D{} + Storage::get(*from);
      for (; i + kN <= count; i += kN) store(to + i, value);
    }
    for (; i < count; ++i) to[i] = Storage::get(from[i * stride]);
  }

  static void store_run(const double* from, int64_t stride, int64_t count, Sample* to) {
    int64_t i = 0;
    if (stride == 1) {
      for (; i + kN <= count; i += kN)
        Storage::template put_vector<kN>(narrow<Acc, kN>(load<D>(from + i)), to + i);
    } else if (stride == -1) {
      for (; i + kN <= count; i += kN)
        Storage::template put_vector<kN>(narrow<Acc, kN>(flipped(load<D>(from + i))),
                                         to - i - (kN - 1));
    }
    for (; i < count; ++i) to[i * stride] = Storage::put(static_cast<Acc>(from[i]));
  }

 private:
  static EMA_EXT_INLINE D flipped(D v) { return flip(v, typename MakeIndices<kN>::type{}); }
  template <int... I>
  static EMA_EXT_INLINE D flip(D v, Indices<I...>) {
    return __builtin_shufflevector(v, v, (kN - 1 - I)...);
  }
};

// `count` elements of an operand from `offset` on.
inline void load_run(const Operand& operand, int64_t offset, int64_t stride, int64_t count,
                     double* to) {
  switch (operand.dtype) {
    case Dtype::kFloat64:
      return Transfer<Float64>::load_run(static_cast<const double*>(operand.data) + offset, stride,
                                         count, to);
    case Dtype::kFloat32:
      return Transfer<Float32>::load_run(static_cast<const float*>(operand.data) + offset, stride,
                                         count, to);
    case Dtype::kFloat16:
      return Transfer<Float16>::load_run(static_cast<const uint16_t*>(operand.data) + offset,
                                         stride, count, to);
    case Dtype::kBFloat16:
      return Transfer<BFloat16>::load_run(static_cast<const uint16_t*>(operand.data) + offset,
                                          stride, count, to);
  }
}

inline void store_run(const double* from, const Operand& operand, int64_t offset, int64_t stride,
                      int64_t count) {
  switch (operand.dtype) {
    case Dtype::kFloat64:
      return Transfer<Float64>::store_run(from, stride, count,
                                          static_cast<double*>(operand.data) + offset);
    case Dtype::kFloat32:
      return Transfer<Float32>::store_run(from, stride, count,
                                          static_cast<float*>(operand.data) + offset);
    case Dtype::kFloat16:
      return Transfer<Float16>::store_run(from, stride, count,
                                          static_cast<uint16_t*>(operand.data) + offset);
    case Dtype::kBFloat16:
      return Transfer<BFloat16>::store_run(from, stride, count,
                                           static_cast<uint16_t*>(operand.data) + offset);
  }
}

// Calls f(i) for i = 0, kLanes, ... until `count` elements are done, with those that fill the last
// vector.
template <class F>
EMA_EXT_INLINE void for_vectors(int64_t count, F f) {
  for (int64_t i = 0; i < count; i += kLanes<double>) f(i);
}

// `rows` neighbouring rows along the innermost axis, at most W, from end to end.
template <int W>
class VaryingRows {
 public:
  VaryingRows(const Problem& problem, const RowOffsets& at, int64_t rows)
      : problem_(problem), at_(at), rows_(rows) {
    if (rows == W) return;
    for (double* lanes : {ratio_, drive_, y_}) std::memset(lanes, 0, kSize * sizeof(double));
  }

  void scan() {
    for_rows([&](int64_t w, const RowOffsets& at) {
      // The adjoint starts from the gradient of the state, an average without a start from x[0].
      state_[w] = problem_.start.data != nullptr ? rounded_state(problem_.start, at.start) : 0;
    });
    const int64_t length = W == 1 && problem_.varying ? segment_length(problem_) : problem_.length;
    for (int64_t n = 0; n < problem_.length; n += length) {
      const double start = state_[0];
      map_ = {};
      walk(n, n + length);
      // As where threads share the segments.
      const double next = follow(map_, start);
      if (n + length < problem_.length && finite(state_[0]) && finite(next)) state_[0] = next;
    }
    finish();
  }

  // Of one row that is cut: the y before the first segment,
  double start() const {
    return problem_.start.data != nullptr ? rounded_state(problem_.start, at_.start) : 0;
  }
  // what the segment from sample `begin` on does to the y before it (not the last segment),
  Affine map_of_segment(int64_t begin) {
    Affine map;
    for (int64_t n = begin; n < begin + segment_length(problem_); n += kSteps) {
      prepare(n, kSteps);
      PairScan<kVaryingChunk>::compose(ratio_, drive_, kSteps, map);
    }
    return map;
  }
  // and its scan from that y, which returns its last.
  double scan_segment(int64_t begin, double before) {
    state_[0] = before;
    walk(begin, begin + segment_length(problem_));
    if (begin + segment_length(problem_) >= problem_.length) finish();
    return state_[0];
  }

  static double follow(const Affine& map, double y) { return map.ratio * y + map.drive; }

 private:
  static constexpr int kN = kLanes<double>;
  using D = Vector<double, kN>;
  static constexpr int64_t kSteps = kVaryingChunk / W;
  static constexpr int64_t kSize = kSteps * W;

  // Samples [begin, end), or those that there are.
  void walk(int64_t begin, int64_t end) {
    if (end > problem_.length) end = problem_.length;
    for (int64_t n = begin; n < end; n += kSteps) {
      const int64_t steps = end - n < kSteps ? end - n : kSteps;
      prepare(n, steps);
      advance(steps);
      is_adjoint(problem_.op) ? put_adjoint(n, steps) : put_forward(n, steps);
    }
  }

  void finish() {
    for_rows([&](int64_t w, const RowOffsets& at) {
      write(problem_.state, at.state, state_[w]);
      if (!problem_.varying) write(problem_.grad_coefficient, at.grad_coefficient, sum_[w]);
    });
  }

  // The ratios and drives of samples [n, n + steps).
  void prepare(int64_t n, int64_t steps) {
    if (is_adjoint(problem_.op)) return prepare_adjoint(n, steps);
    fetch(problem_.coefficient, at_.coefficient, n, steps, ratio_);
    fetch(problem_.x, at_.x, n, steps, drive_);
    if (problem_.op == Op::kEma) {
      double first[W];
      std::memcpy(first, drive_, sizeof first);
      for_vectors(steps * W, [&](int64_t i) {
        const D weight = load<D>(ratio_ + i);
        store(drive_ + i, load<D>(drive_ + i) * weight);
        store(ratio_ + i, 1 - weight);
      });
      if (n == 0 && problem_.start.data == nullptr) {
        std::memcpy(drive_, first, sizeof first);
        for (int64_t w = 0; w < W; ++w) ratio_[w] = 0;
      }
    }
  }

  void put_forward(int64_t n, int64_t steps) const {
    put(y_, problem_.y, at_.y, n, steps);
    if (n == 0 && problem_.op == Op::kEma && problem_.start.data == nullptr) copy_first();
  }

  // Here time runs against the forward's: the y before a sample is the next one's.
  void prepare_adjoint(int64_t n, int64_t steps) {
    const bool average = problem_.op == Op::kEmaBackward;
    double* const own = ratio_ + W;  // each sample's coefficient; that of the one before it: ratio_
    if (n == 0)
      fetch(problem_.coefficient, at_.coefficient, 0, steps, own);
    else
      fetch(problem_.coefficient, at_.coefficient, n - 1, steps + 1, ratio_);
    fetch(problem_.x, at_.x, n, steps, drive_);
    for (int64_t w = 0; w < W; ++w) {
      const double coefficient = own[(steps - 1) * W + w];
      end_ratio_[w] = average ? 1 - coefficient : coefficient;
    }
    if (average) std::memcpy(own_, own, steps * W * sizeof(double));
    if (average)
      for_vectors(steps * W, [&](int64_t i) { store(ratio_ + i, 1 - load<D>(ratio_ + i)); });
    if (n == 0)
      for (int64_t w = 0; w < W; ++w) ratio_[w] = 1;
  }

  void put_adjoint(int64_t n, int64_t steps) {
    const bool average = problem_.op == Op::kEmaBackward, last = n + steps == problem_.length;
    if (problem_.grad_coefficient.data != nullptr) to_coefficient(n, steps, last);
    if (average) {
      for_vectors(steps * W,
                  [&](int64_t i) { store(own_ + i, load<D>(own_ + i) * load<D>(y_ + i)); });
      if (last && !problem_.has_initial_state)
        std::memcpy(own_ + (steps - 1) * W, y_ + (steps - 1) * W, W * sizeof(double));
    }
    put(average ? own_ : y_, problem_.y, at_.y, n, steps);
    if (last)
      for (int64_t w = 0; w < W; ++w) state_[w] *= end_ratio_[w];
  }

  // The gradient to each sample's coefficient, or their sum where it is constant.
  void to_coefficient(int64_t n, int64_t steps, bool last) {
    const bool average = problem_.op == Op::kEmaBackward;
    double* const before = drive_;  // the forward's y before each sample
    fetch(problem_.forward_y, at_.forward_y, n + 1, steps - last, before);
    if (average) fetch(problem_.forward_x, at_.forward_x, n, steps, ratio_);
    if (last) {
      double* const first = before + (steps - 1) * W;
      for_rows([&](int64_t w, const RowOffsets& at) {
        if (problem_.forward_start.data != nullptr)
          first[w] = rounded_state(problem_.forward_start, at.forward_start);
        else
          first[w] = average ? ratio_[(steps - 1) * W + w] : 0;
      });
    }
    for_vectors(steps * W, [&](int64_t i) {
      const D y = load<D>(before + i), by = average ? load<D>(ratio_ + i) - y : y;
      store(before + i, load<D>(y_ + i) * by);
    });
    if (problem_.varying)
      return put(before, problem_.grad_coefficient, at_.grad_coefficient, n, steps);
    if constexpr (W == 1) {
      D sum{};
      int64_t i = 0;
      for (; i + kN <= steps; i += kN) sum += load<D>(before + i);
      for (; i < steps; ++i) sum_[0] += before[i];
      sum_[0] += sum_lanes<double, kN>(sum);
    } else {
      for (int64_t t = 0; t < steps; ++t)
        for (int w = 0; w < W; w += kN)
          store(sum_ + w, load<D>(sum_ + w) + load<D>(before + t * W + w));
    }
  }

  void advance(int64_t steps) {
    if constexpr (W == 1) {
      state_[0] = PairScan<kVaryingChunk>::run(ratio_, drive_, steps, state_[0], y_, map_);
    } else {
      D state[W / kN];
      std::memcpy(state, state_, sizeof state);
      for (int64_t t = 0; t < steps; ++t) {
#pragma GCC unroll 16
        for (int v = 0; v < W / kN; ++v) {
          const int64_t i = t * W + v * kN;
          state[v] = load<D>(ratio_ + i) * state[v] + load<D>(drive_ + i);
          store(y_ + i, state[v]);
        }
      }
      std::memcpy(state_, state, sizeof state);
    }
  }

  // Samples [n, n + steps) of all rows, between an operand and a buffer.
  void fetch(const Operand& operand, int64_t offset, int64_t n, int64_t steps, double* to) const {
    offset += n * operand.time_stride;
    if (W == 1) return load_run(operand, offset, operand.time_stride, steps, to);
    const int64_t lane = operand.row_strides[problem_.ndim - 1];
    for (int64_t t = 0; t < steps; ++t)
      load_run(operand, offset + t * operand.time_stride, lane, rows_, to + t * W);
  }
  void put(const double* from, const Operand& operand, int64_t offset, int64_t n,
           int64_t steps) const {
    offset += n * operand.time_stride;
    if (W == 1) return store_run(from, operand, offset, operand.time_stride, steps);
    const int64_t lane = operand.row_strides[problem_.ndim - 1];
    for (int64_t t = 0; t < steps; ++t)
      store_run(from + t * W, operand, offset + t * operand.time_stride, lane, rows_);
  }

  // y[0] = x[0], bit by bit.
  void copy_first() const {
    const int64_t bytes = bytes_of(problem_.x.dtype);
    for_rows([&](int64_t, const RowOffsets& at) {
      std::memcpy(static_cast<char*>(problem_.y.data) + at.y * bytes,
                  static_cast<const char*>(problem_.x.data) + at.x * bytes, bytes);
    });
  }

  template <class Visit>
  EMA_EXT_INLINE void for_rows(Visit visit) const {
    RowOffsets at = at_;
    for (int64_t w = 0; w < rows_; ++w) {
      visit(w, at);
      if (problem_.ndim > 0) at.move(problem_, problem_.ndim - 1, 1);
    }
  }

  // In the accumulate dtype, as states are handed on.
  double rounded_state(const Operand& operand, int64_t offset) const {
    const double value = read(operand, offset);
    return problem_.x.dtype == Dtype::kFloat64 ? value : static_cast<float>(value);
  }

  const Problem& problem_;
  const RowOffsets at_;
  const int64_t rows_;
  alignas(64) double state_[W] = {};
  double sum_[W] = {};
  double end_ratio_[W];  // from the last sample to the initial state
  Affine map_;           // of the segment so far
  // Lanes without a row are finite, and mean nothing.
  alignas(64) double ratio_[kSize + W];
  alignas(64) double drive_[kSize];
  alignas(64) double y_[kSize];
  alignas(64) double own_[kSize];  // of the adjoint of an average: its coefficients
};

// Rows [begin, end), one by one.
inline void scan_varying_rows(const Problem& problem, int64_t begin, int64_t end) {
  RowCursor cursor(problem, begin);
  for (; begin < end; ++begin, cursor.advance()) VaryingRows<1>(problem, cursor.at(), 1).scan();
}

// Few long rows on several threads: the segments of all rows as items of their own. These four in
// turn give bit for bit what scan_varying_rows gives.
template <class Visit>
EMA_EXT_INLINE void for_varying_items(const Problem& problem, int64_t begin, int64_t end,
                                      Visit visit) {
  const int64_t count = segments(problem);
  for (int64_t item = begin; item < end; ++item) {
    const RowCursor cursor(problem, item / count);
    VaryingRows<1> row(problem, cursor.at(), 1);
    visit(row, item, item % count);
  }
}

inline void find_maps(const Problem& problem, int64_t begin, int64_t end, Affine* maps) {
  for_varying_items(problem, begin, end, [&](VaryingRows<1>& row, int64_t item, int64_t index) {
    if (index + 1 < segments(problem))  // nothing follows the last
      maps[item] = row.map_of_segment(index * segment_length(problem));
  });
}

// The y before each segment; NaN in the first for a row that must be scanned from end to end.
inline void fold_maps(const Problem& problem, int64_t begin, int64_t end, const Affine* maps,
                      double* before) {
  const int64_t count = segments(problem);
  for (int64_t row = begin; row < end; ++row) {
    const RowCursor cursor(problem, row);
    double y = VaryingRows<1>(problem, cursor.at(), 1).start();
    double* const to = before + row * count;
    bool known = finite(y);
    for (int64_t i = 0; i < count; ++i) {
      to[i] = y;
      if (i + 1 == count) break;
      y = VaryingRows<1>::follow(maps[row * count + i], y);
      known = known && finite(y);
    }
    if (!known) to[0] = __builtin_nan("");
  }
}

// Leaves in maps[item].drive the segment's last y.
inline void scan_varying_segments(const Problem& problem, int64_t begin, int64_t end,
                                  const double* before, Affine* maps) {
  for_varying_items(problem, begin, end, [&](VaryingRows<1>& row, int64_t item, int64_t index) {
    if (finite(before[item - index]))
      maps[item] = {0, row.scan_segment(index * segment_length(problem), before[item])};
  });
}

// A y that is not finite stays so: it may have been passed over where a segment's map is finite.
inline void finish_varying_rows(const Problem& problem, int64_t begin, int64_t end,
                                const double* before, const Affine* maps) {
  const int64_t count = segments(problem);
  for (; begin < end; ++begin) {
    bool known = finite(before[begin * count]);
    for (int64_t i = 0; i + 1 < count; ++i) known = known && finite(maps[begin * count + i].drive);
    if (!known) scan_varying_rows(problem, begin, begin + 1);
  }
}

template <int W>
void scan_varying_blocks(const Problem& problem, int64_t begin, int64_t end) {
  const int64_t width = problem.sizes[problem.ndim - 1], blocks = (width + W - 1) / W;
  for (; begin < end; ++begin) {
    const int64_t first = begin % blocks * W, left = width - first;
    const RowCursor cursor(problem, begin / blocks * width + first);
    VaryingRows<W>(problem, cursor.at(), left < W ? left : W).scan();
  }
}

// Items [begin, end): each varying_lanes neighbouring rows, or those left of the innermost axis.
inline void scan_varying_lanes(const Problem& problem, int64_t begin, int64_t end) {
  switch (varying_lanes(problem.sizes[problem.ndim - 1])) {
    case 64:
      return scan_varying_blocks<64>(problem, begin, end);
    case 32:
      return scan_varying_blocks<32>(problem, begin, end);
    default:
      return scan_varying_blocks<16>(problem, begin, end);
  }
}

}  // namespace ema_ext::cpu::EMA_EXT_LEVEL
