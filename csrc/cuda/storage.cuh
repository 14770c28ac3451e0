// How samples lie in memory and what they are computed in: one traits struct per dtype, and the 16
// bytes that a thread moves at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "problem.h"

namespace ema_ext::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

// This thread's number in its block.
static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }

// A Storage has Sample (in memory), Acc (accumulate dtype: the sample is exact in it), get and put.
template <class T>
struct Native {
  using Sample = T;
  using Acc = T;
  static __device__ __forceinline__ T get(T sample) { return sample; }
  static __device__ __forceinline__ T put(T value) { return value; }
};

using Float32 = Native<float>;
using Float64 = Native<double>;

struct Float16 {
  using Sample = __half;
  using Acc = float;
  static __device__ __forceinline__ float get(__half sample) { return __half2float(sample); }
  static __device__ __forceinline__ __half put(float value) { return __float2half_rn(value); }
};

struct BFloat16 {
  using Sample = __nv_bfloat16;
  using Acc = float;
  static __device__ __forceinline__ float get(__nv_bfloat16 sample) {
    return __bfloat162float(sample);
  }
  static __device__ __forceinline__ __nv_bfloat16 put(float value) {
    return __float2bfloat16_rn(value);
  }
};

// The samples of 16 bytes, in the order of time.
template <class Storage>
struct Chunk {
  using Sample = typename Storage::Sample;
  using Acc = typename Storage::Acc;
  static constexpr int kSamples = 16 / sizeof(Sample);

  static __device__ __forceinline__ void unpack(const uint4& chunk, Acc* to) {
    Sample samples[kSamples];
    memcpy(static_cast<void*>(samples), &chunk, sizeof chunk);
#pragma unroll
    for (int i = 0; i < kSamples; ++i) to[i] = Storage::get(samples[i]);
  }
  static __device__ __forceinline__ uint4 pack(const Acc* from) {
    Sample samples[kSamples];
#pragma unroll
    for (int i = 0; i < kSamples; ++i) samples[i] = Storage::put(from[i]);
    uint4 chunk;
    memcpy(&chunk, samples, sizeof chunk);
    return chunk;
  }

  // For `turned`: the chunk as it is, or its samples from last to first.
  static __device__ __forceinline__ unsigned order(bool backward) {
    return !backward ? 0x3210 : sizeof(Sample) == 2 ? 0x5476 : 0x7654;
  }
  static __device__ __forceinline__ uint4 turned(const uint4& chunk, unsigned order) {
    if constexpr (sizeof(Sample) == 8)
      return {__byte_perm(chunk.x, chunk.z, order), __byte_perm(chunk.y, chunk.w, order),
              __byte_perm(chunk.z, chunk.x, order), __byte_perm(chunk.w, chunk.y, order)};
    return {__byte_perm(chunk.x, chunk.w, order), __byte_perm(chunk.y, chunk.z, order),
            __byte_perm(chunk.z, chunk.y, order), __byte_perm(chunk.w, chunk.x, order)};
  }
};

// The scalar at an offset in elements.
static __device__ __forceinline__ double read(const void* data, Dtype dtype, int64_t offset) {
  switch (dtype) {
    case Dtype::kFloat64:
      return static_cast<const double*>(data)[offset];
    case Dtype::kFloat32:
      return static_cast<const float*>(data)[offset];
    case Dtype::kFloat16:
      return __half2float(static_cast<const __half*>(data)[offset]);
    case Dtype::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[offset]);
  }
  return 0;
}

static __device__ __forceinline__ void write(void* data, Dtype dtype, int64_t offset,
                                             double value) {
  switch (dtype) {
    case Dtype::kFloat64:
      static_cast<double*>(data)[offset] = value;
      break;
    case Dtype::kFloat32:
      static_cast<float*>(data)[offset] = static_cast<float>(value);
      break;
    case Dtype::kFloat16:
      static_cast<__half*>(data)[offset] = __float2half_rn(static_cast<float>(value));
      break;
    case Dtype::kBFloat16:
      static_cast<__nv_bfloat16*>(data)[offset] = __float2bfloat16_rn(static_cast<float>(value));
      break;
  }
}

// Shared memory for a T, which is made where it is needed.
template <class T>
struct Uninitialized {
  alignas(T) unsigned char bytes[sizeof(T)];
  __device__ __forceinline__ T& value() { return *reinterpret_cast<T*>(bytes); }
  __device__ __forceinline__ const T& value() const { return *reinterpret_cast<const T*>(bytes); }
};

static __device__ __forceinline__ bool finite(double value) {
  return (__double2hiint(value) & 0x7ff00000) != 0x7ff00000;
}

}  // namespace ema_ext::cuda
