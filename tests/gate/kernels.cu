// Kernels for the tests of tools/sass.py: one as it should be, and for each rule one that breaks
// it.
//
// All scale a row tile by tile, by a factor that the tile's sum and a status word go into.
#include "cuda/launch.cuh"

namespace ema_ext::cuda {
namespace {

struct Row {
  const float* x;
  float* y;
  int tiles;
  float c;
  unsigned* status;
};

constexpr int kBlock = 256, kVectors = 4;

// A break of one rule each; Good breaks none.
struct Good {};
struct Spills {};
struct Stack {};
struct Narrow {};
struct TwoBarriers {};
struct ReadsTwice {};
struct TooMany {};
struct Computes {};
struct Crowded {};

template <class Fault, class Other>
constexpr bool is = false;
template <class Fault>
constexpr bool is<Fault, Fault> = true;

template <class Fault>
struct Scale {
  using Arguments = Row;
  struct Shared {
    float sums[is<Fault, Crowded> ? 10000 : 2 * kBlock / 32];
  };
  static constexpr int kThreads = kBlock;
  static constexpr int kMinBlocks = is<Fault, Spills> ? 8 : is<Fault, Crowded> ? 6 : 2;

  static __device__ float4 load(const float* at) {
    if constexpr (is<Fault, Narrow>) return {at[0], at[kBlock], at[2 * kBlock], at[3 * kBlock]};
    return *reinterpret_cast<const float4*>(at);
  }

  static __device__ void run(const Row& row, Shared& shared) {
    constexpr int kItems = is<Fault, Spills> ? 4 * kVectors : kVectors;
    for (int tile = blockIdx.x; tile < row.tiles; tile += gridDim.x) {
      const int64_t first = (static_cast<int64_t>(tile) * kItems * kBlock + threadIdx.x) * 4;
      float4 v[kItems];
      float sum = 0;
      for (int i = 0; i < kItems; ++i) {
        v[i] = load(row.x + first + i * kBlock * 4);
        if constexpr (is<Fault, ReadsTwice>) {
          const float4 again = load(row.x + first + (i + kItems) * kBlock * 4);
          sum += again.x + again.y + again.z + again.w;
        }
        sum += v[i].x + v[i].y * row.c + v[i].z + v[i].w;
      }
      if constexpr (is<Fault, TooMany>)
        for (int i = 0; i < 400; ++i) sum = sum * sum + row.c;
      if constexpr (is<Fault, Computes>)
        if (sum > row.c)
#pragma unroll 1
          for (int i = 0; i < tile; ++i) sum = sum * sum + row.c;
      if constexpr (is<Fault, Stack>) {
        volatile float kept[16] = {};
        kept[tile & 15] = sum;
        sum += kept[static_cast<int>(sum) & 15];
      }
      shared.sums[threadIdx.x / 32 + (tile & 1) * 8] = sum;
      __syncthreads();
      sum = shared.sums[7 + (tile & 1) * 8];
      if constexpr (is<Fault, TwoBarriers>) __syncthreads();
      // Waits for the tile before.
      const volatile unsigned* status = row.status + tile;
      if (threadIdx.x == 0)
        while (*status == 0) continue;
      // Walks where a tile will not do.
      if (sum != sum)
        for (int i = 0; i < 1000; ++i) row.y[first + i] = sum = sum * row.c + row.x[first + i];
      for (int i = 0; i < kItems; ++i) {
        v[i].x += sum;
        v[i].y += sum * row.c;
        *reinterpret_cast<float4*>(row.y + first + i * kBlock * 4) = v[i];
      }
    }
  }
};

}  // namespace

template cudaError_t launch<Scale<Good>>(const Grid&, const Row&);
template cudaError_t launch<Scale<Spills>>(const Grid&, const Row&);
template cudaError_t launch<Scale<Stack>>(const Grid&, const Row&);
template cudaError_t launch<Scale<Narrow>>(const Grid&, const Row&);
template cudaError_t launch<Scale<TwoBarriers>>(const Grid&, const Row&);
template cudaError_t launch<Scale<ReadsTwice>>(const Grid&, const Row&);
template cudaError_t launch<Scale<TooMany>>(const Grid&, const Row&);
template cudaError_t launch<Scale<Computes>>(const Grid&, const Row&);
template cudaError_t launch<Scale<Crowded>>(const Grid&, const Row&);

}  // namespace ema_ext::cuda
