// The CUDA kernels for float32 samples.

#include "cuda/dispatch.cuh"

namespace ema_ext::cuda {

const Kernels kKernelsFloat32 = kKernelsOf<Float32>;

}  // namespace ema_ext::cuda
