// The launchers of one dtype, as function pointers; dtypes/*.cu define one table each.
#pragma once

#include <cuda_runtime.h>

#include "cuda/scan.h"
#include "cuda/strategy.h"
#include "sum.h"

namespace ema_ext::cuda {

// Global memory that a plan's kernels need besides the tensors.
struct Workspace {
  int64_t bytes = 0;
  int64_t cleared = 0;  // of those, the first ones, which must be 0 before the launch
  // Where the scan leaves one float64 per tile of each row, whose sums are the gradient to the
  // coefficient; 0 if it does not.
  int64_t sums = 0;
};

struct Kernels {
  Workspace (*workspace)(const Scan&, const Plan&);
  // On the stream; the launch's own error.
  cudaError_t (*scan)(const Scan&, const Plan&, void* workspace, cudaStream_t);
  // The sums of chunks of terms of this dtype, as sum_terms.cuh leaves them.
  cudaError_t (*sum)(const Sum&, int64_t chunks, bool along_terms, cudaStream_t);
};

extern const Kernels kKernelsFloat32, kKernelsFloat64, kKernelsFloat16, kKernelsBFloat16;

}  // namespace ema_ext::cuda
