// A kernel that writes one number, run on every device; see probe.h.

#include <cuda_runtime.h>

#include "cuda/probe.h"

namespace ema_ext::cuda {
namespace {

constexpr int kAnswer = 42;

__global__ void write_answer(int* answer) { *answer = kAnswer; }

bool runs_here() {
  int* answer = nullptr;
  int seen = 0;
  if (cudaMalloc(&answer, sizeof(int)) != cudaSuccess) return false;
  write_answer<<<1, 1>>>(answer);
  const bool ran = cudaGetLastError() == cudaSuccess &&
                   cudaMemcpy(&seen, answer, sizeof(int), cudaMemcpyDeviceToHost) == cudaSuccess;
  cudaFree(answer);
  return ran && seen == kAnswer;
}

}  // namespace

int probe() {
  int devices = 0, before = 0, passed = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return 0;
  cudaGetDevice(&before);
  for (int device = 0; device < devices; ++device) {
    if (cudaSetDevice(device) == cudaSuccess && runs_here()) ++passed;
  }
  cudaSetDevice(before);
  return passed;
}

}  // namespace ema_ext::cuda
