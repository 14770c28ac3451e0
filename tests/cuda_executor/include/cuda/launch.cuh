// Stands in for csrc/cuda/launch.cuh, whose contract it keeps: kernels start on the executor.
#pragma once

#include <typeinfo>

#include "executor.h"
#include "intrinsics.h"

namespace ema_ext::cuda {

struct Grid {
  int64_t blocks;
  cudaStream_t stream;
};

template <class Kernel>
cudaError_t launch(const Grid& grid, const typename Kernel::Arguments& arguments) {
  static_assert(Kernel::kThreads % 32 == 0 && Kernel::kThreads <= 1024 && Kernel::kMinBlocks > 0);
  static_assert(sizeof(typename Kernel::Shared) <= 48 << 10, "more than static shared memory has");
  if (grid.blocks < 1 || grid.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto body = [](const void* given, void* shared) {
    Kernel::run(*static_cast<const typename Kernel::Arguments*>(given),
                *static_cast<typename Kernel::Shared*>(shared));
  };
  cuda_executor::run({typeid(Kernel).name(), body, &arguments, sizeof(arguments),
                      sizeof(typename Kernel::Shared), Kernel::kThreads, grid.blocks});
  return cudaSuccess;
}

}  // namespace ema_ext::cuda
