// How a Problem and a Sum are run on a GPU, free of torch: any axes, any size, on a given stream.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>

#include "cuda/device.h"
#include "problem.h"
#include "sum.h"

namespace ema_ext::cuda {

// Global memory of the stream's device, uninitialised, at least until `run` returns and until what
// it has put on the stream is done; aligned to 16 bytes.
using Allocate = std::function<void*(int64_t bytes)>;

// Throw std::runtime_error with CUDA's own message if a launch fails.
void run(Problem& problem, const Device& device, cudaStream_t stream, const Allocate& allocate);
void sum(const Sum& sum, const Device& device, cudaStream_t stream, const Allocate& allocate);

}  // namespace ema_ext::cuda
