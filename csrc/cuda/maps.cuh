// The scan of maps y -> ratio * y + drive by the threads that share a row, each of which has the
// map of its own samples. Maps compose: (r2, d2) after (r1, d1) is (r2 r1, r2 d1 + d2).
#pragma once

#include "cuda/stage.cuh"

namespace ema_ext::cuda {

struct Map {
  double ratio = 1;
  double drive = -0.0;  // so that a map of no samples leaves -0 as it is

  __device__ __forceinline__ double operator()(double y) const { return ratio * y + drive; }
  __device__ __forceinline__ Map after(const Map& first) const {
    return {ratio * first.ratio, ratio * first.drive + drive};
  }
};

__device__ __forceinline__ Map shuffle_up(const Map& map, int by, int width = kWarp) {
  return {__shfl_up_sync(kAllLanes, map.ratio, by, width),
          __shfl_up_sync(kAllLanes, map.drive, by, width)};
}

// Teams of kLanes neighbouring threads, times the kWarps of a block; kRows teams share the latter,
// side by side. With kWarps > 1 all threads of the block must call.
template <int kLanes, int kWarps, int kRows>
class MapScan {
 public:
  struct Shared {
    Map maps[2][kWarps > 1 ? kWarps : 1][kRows];
  };
  struct Ends {
    double before;  // the thread's first sample
    double after;   // the team's last one
  };

  __device__ explicit MapScan(Shared& shared) : shared_(shared) {}

  // Takes each thread's map: one barrier. What is shared lasts until the next call but one.
  __device__ __forceinline__ void take(Map map) {
#pragma unroll
    for (int by = 1; by < kLanes; by *= 2) {
      const Map first = shuffle_up(map, by, kLanes);
      if (lane() >= by) map = map.after(first);
    }
    through_ = map;
    share(map);
  }

  // Which of two places what is shared has taken.
  __device__ __forceinline__ int turn() const { return turn_; }

  // The whole team's map; of teams that are blocks.
  __device__ __forceinline__ Map total() const {
    Map total = shared_.maps[turn_][0][row()];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) total = shared_.maps[turn_][w][row()].after(total);
    return total;
  }

  // From the y before the team's first sample.
  __device__ __forceinline__ Ends follow(double y) const {
    double before = y, after = y;
    if constexpr (kWarps > 1) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if (w == warp()) before = after;
        after = shared_.maps[turn_][w][row()](after);
      }
    }
    if constexpr (kLanes > 1) {
      const double own = through_(before);
      if constexpr (kWarps == 1) after = __shfl_sync(kAllLanes, own, kLanes - 1, kLanes);
      const double past = __shfl_up_sync(kAllLanes, own, 1, kLanes);
      if (lane() > 0) before = past;
    }
    return {before, after};
  }

  // The sum of a value of each thread, in one order.
  __device__ __forceinline__ double sum(double value) {
#pragma unroll
    for (int by = kLanes / 2; by > 0; by /= 2)
      value += __shfl_xor_sync(kAllLanes, value, by, kLanes);
    if constexpr (kWarps > 1) {
      share({0, value});
      value = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) value += shared_.maps[turn_][w][row()].drive;
    }
    return value;
  }

 private:
  static __device__ __forceinline__ int lane() { return threadIdx.x % kLanes; }
  static __device__ __forceinline__ int warp() { return kWarps > 1 ? threadIdx.x / kWarp : 0; }
  static __device__ __forceinline__ int row() { return kRows > 1 ? threadIdx.x % kRows : 0; }

  // The last lane's map, to the warps of the team.
  __device__ __forceinline__ void share(const Map& map) {
    if constexpr (kWarps > 1) {
      turn_ ^= 1;
      if (lane() == kLanes - 1) shared_.maps[turn_][warp()][row()] = map;
      __syncthreads();
    }
  }

  Shared& shared_;
  Map through_;  // from the warp's first sample to the thread's last
  int turn_ = 0;
};

}  // namespace ema_ext::cuda
