// What a block knows of the rows that it scans side by side.
#pragma once

#include "cuda/row.cuh"
#include "cuda/tuning.h"

namespace ema_ext::cuda {

// What a stretch of samples does to the state before it, as Power, but in what neighbours tell each
// other of it: halves in float32, whose rounding they do not show.
template <class Storage, bool kHalf = sizeof(typename Storage::Sample) == 2>
struct Joint {
  using Value = double;
  using Factor = Power<typename Storage::Acc>;
};
template <class Storage>
struct Joint<Storage, true> {
  using Value = float;
  // By its root, twice: bfloat16 reaches as far as float32.
  struct Factor {
    float root;  // of the sign of the power

    Factor() = default;
    __device__ Factor(const Decay<float>& decay, int64_t k) {
      constexpr double kLeast = 0x1p-149;
      const double power = decay.power(k), size = sqrt(fabs(power));
      const double least = decay.ratio() != 0 && size < kLeast ? kLeast : size;
      root = static_cast<float>(copysign(least, power));
    }
    __device__ __forceinline__ float join(float aggregate, float state) const {
      return fma(fabsf(root), root * state, aggregate);
    }
  };
};

// What the threads of a block know of its kRows rows, kW of them to a thread: the powers of their
// coefficients and what goes from tile to tile. Each is by row, so that a thread reads those of
// neighbouring rows at once, and neighbouring threads from neighbouring banks.
template <class Storage, int kSteps, int kRows, int kW>
struct alignas(16) LaneTables {
  using Acc = typename Storage::Acc;
  using Value = typename Joint<Storage>::Value;
  using Factor = typename Joint<Storage>::Factor;
  static constexpr int kG = 4;  // samples that are scanned by c itself

  Acc powers[kG][kRows];  // c^(i + 1)
  Acc in[kRows], alpha[kRows];
  Value before[2][kRows];    // the state before the tile, by the tile's parity
  Factor slots[kWarp * kW];  // over i slots of a warp, at i * rows + row
  Factor warp[kRows];        // over the slots of a warp
  Power<Acc> tile[kRows];    // over a tile
  State<Acc> state[kRows];   // before the tile, of the thread that looks after the row
  Value slot_decay[kRows];   // c^kSteps
  double warp_decay[kRows];  // over the slots of a warp
  Acc added_first[kRows], to_lambda[kRows];
  Acc last[kRows];   // s, after the last sample
  Acc first[kRows];  // x[0], where that is y[0]

  // Of `rows` that the block has, each with `slots_per_warp`.
  __device__ void set(int row, const Row<Storage>& from, int rows, int slots_per_warp,
                      double start) {
    const Decay<Acc>& decay = from.decay;
#pragma unroll 1
    for (int i = 0; i < kG; ++i) powers[i][row] = static_cast<Acc>(decay.power(i + 1));
    in[row] = static_cast<Acc>(from.in);
    alpha[row] = static_cast<Acc>(decay.complement());
    before[0][row] = before[1][row] = static_cast<Value>(start);  // both, of what is not there
#pragma unroll 1
    for (int i = 0; i < slots_per_warp; ++i)
      slots[i * rows + row] = Factor(decay, static_cast<int64_t>(i) * kSteps);
    warp[row] = Factor(decay, static_cast<int64_t>(kSteps) * slots_per_warp);
    tile[row] = decay.over(static_cast<int64_t>(kSteps) * slots_per_warp * kBlockWarps);
    state[row] = {start, 0};
    slot_decay[row] = static_cast<Value>(decay.power(kSteps));
    warp_decay[row] = decay.power(static_cast<int64_t>(kSteps) * slots_per_warp);
    added_first[row] = static_cast<Acc>(from.added_first);
    to_lambda[row] = static_cast<Acc>(from.to_lambda);
    last[row] = static_cast<Acc>(start);
  }
};

}  // namespace ema_ext::cuda
