// The one way in which kernels are started.
//
// A kernel is a struct with
//   struct Arguments;               plain data, passed by value
//   struct Shared;                  what the threads of a block share
//   constexpr int kThreads;         of a block, a multiple of the warp
//   constexpr int kMinBlocks;       per multiprocessor: what limits its registers
//   static __device__ void run(const Arguments&, Shared&);
// so that its body knows nothing of how it came to run. Grids and blocks have one dimension.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace ema_ext::cuda {

struct Grid {
  int64_t blocks;  // up to 2^31 - 1
  cudaStream_t stream;
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    entry(const __grid_constant__ typename Kernel::Arguments arguments) {
  __shared__ typename Kernel::Shared shared;
  Kernel::run(arguments, shared);
}

// The launch's own error, if any; a kernel's fault shows at a later call, as everywhere in CUDA.
template <class Kernel>
cudaError_t launch(const Grid& grid, const typename Kernel::Arguments& arguments) {
  entry<Kernel>
      <<<static_cast<unsigned>(grid.blocks), Kernel::kThreads, 0, grid.stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace ema_ext::cuda
