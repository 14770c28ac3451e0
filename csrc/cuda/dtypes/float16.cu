// The CUDA kernels for float16 samples.

#include "cuda/dispatch.cuh"

namespace ema_ext::cuda {

const Kernels kKernelsFloat16 = kKernelsOf<Float16>;

}  // namespace ema_ext::cuda
