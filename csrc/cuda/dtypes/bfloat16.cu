// The CUDA kernels for bfloat16 samples.

#include "cuda/dispatch.cuh"

namespace ema_ext::cuda {

const Kernels kKernelsBFloat16 = kKernelsOf<BFloat16>;

}  // namespace ema_ext::cuda
