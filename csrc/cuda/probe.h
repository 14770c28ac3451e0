// Whether the CUDA kernels of this library run on this machine.
#pragma once

namespace ema_ext::cuda {

// The number of CUDA devices on which a kernel of this library ran; 0 without a driver or GPU.
int probe();

}  // namespace ema_ext::cuda
