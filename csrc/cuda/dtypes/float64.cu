// The CUDA kernels for float64 samples.

#include "cuda/dispatch.cuh"

namespace ema_ext::cuda {

const Kernels kKernelsFloat64 = kKernelsOf<Float64>;

}  // namespace ema_ext::cuda
