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

// A Storage has Sample (in memory), Acc (accumulate dtype: the sample is exact in it), get and put;
// one of 2 bytes has get_pair and put_pair as well, for the two samples of a word; where kMindsNaN,
// put_pair<false> is quicker, and wrong for a NaN made by arithmetic.
template <class T>
struct Native {
  using Sample = T;
  using Acc = T;
  static constexpr bool kMindsNaN = false;
  static __device__ __forceinline__ T get(T sample) { return sample; }
  static __device__ __forceinline__ T put(T value) { return value; }
};

using Float32 = Native<float>;
using Float64 = Native<double>;

struct Float16 {
  using Sample = __half;
  using Acc = float;
  static constexpr bool kMindsNaN = false;
  static __device__ __forceinline__ float get(__half sample) { return __half2float(sample); }
  static __device__ __forceinline__ __half put(float value) { return __float2half_rn(value); }

  static __device__ __forceinline__ void get_pair(unsigned word, float& low, float& high) {
    __half2 pair;
    memcpy(static_cast<void*>(&pair), &word, sizeof word);
    low = __low2float(pair);
    high = __high2float(pair);
  }
  template <bool>
  static __device__ __forceinline__ unsigned put_pair(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    unsigned word;
    memcpy(&word, &pair, sizeof word);
    return word;
  }
};

struct BFloat16 {
  using Sample = __nv_bfloat16;
  using Acc = float;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  static constexpr bool kMindsNaN = true;
#else
  static constexpr bool kMindsNaN = false;
#endif
  static __device__ __forceinline__ float get(__nv_bfloat16 sample) {
    return __bfloat162float(sample);
  }
  static __device__ __forceinline__ __nv_bfloat16 put(float value) {
    return __float2bfloat16_rn(value);
  }

  static __device__ __forceinline__ void get_pair(unsigned word, float& low, float& high) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000);
  }
  template <bool kMinds>
  static __device__ __forceinline__ unsigned put_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    return __byte_perm(rounded<kMinds>(low), rounded<kMinds>(high), 0x7632);
#else
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    unsigned word;
    memcpy(&word, &pair, sizeof word);
    return word;
#endif
  }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  // To the nearest, ties to even, in the upper half: for machines that have no instruction for it.
  // A NaN made by arithmetic, which is the largest positive integer, must not be carried into the
  // sign: with kMinds; one that was read has zeros below and stays as it is.
  template <bool kMinds>
  static __device__ __forceinline__ unsigned rounded(float value) {
    constexpr int kNaN = 0x7fff0000;
    const int given = static_cast<int>(__float_as_uint(value));
    const auto bits = static_cast<unsigned>(!kMinds || given < kNaN ? given : kNaN);
    // bits + 0x7fff + (bits >> 16 & 1) in two instructions: as the product of 1 and the halves of a
    // word. The constant comes from a register, as no instruction takes two.
    unsigned halves;
    asm("lop3.b32 %0, %1, 0x10000, %2, 0xea;" : "=r"(halves) : "r"(bits), "r"(0x7fff));
    return __dp2a_lo(halves, 0x0101u, bits);
  }
#endif
};

// The samples of 16 bytes, in the order of time.
template <class Storage>
struct Chunk {
  using Sample = typename Storage::Sample;
  using Acc = typename Storage::Acc;
  static constexpr int kSamples = 16 / sizeof(Sample);

  // The samples' order is that of memory, or with kBackward the opposite.
  template <bool kBackward = false>
  static __device__ __forceinline__ void unpack(const uint4& chunk, Acc* to) {
    if constexpr (sizeof(Sample) == 2) {
      const unsigned words[] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
      for (int i = 0; i < kSamples; i += 2)
        Storage::get_pair(words[i / 2], to[place<kBackward>(i)], to[place<kBackward>(i + 1)]);
    } else {
      Sample samples[kSamples];
      memcpy(static_cast<void*>(samples), &chunk, sizeof chunk);
#pragma unroll
      for (int i = 0; i < kSamples; ++i) to[place<kBackward>(i)] = Storage::get(samples[i]);
    }
  }
  template <bool kBackward = false, bool kMindsNaN = true>
  static __device__ __forceinline__ uint4 pack(const Acc* from) {
    uint4 chunk;
    if constexpr (sizeof(Sample) == 2) {
      unsigned words[kSamples / 2];
#pragma unroll
      for (int i = 0; i < kSamples; i += 2)
        words[i / 2] = Storage::template put_pair<kMindsNaN>(from[place<kBackward>(i)],
                                                             from[place<kBackward>(i + 1)]);
      memcpy(&chunk, words, sizeof chunk);
    } else {
      Sample samples[kSamples];
#pragma unroll
      for (int i = 0; i < kSamples; ++i) samples[i] = Storage::put(from[place<kBackward>(i)]);
      memcpy(&chunk, samples, sizeof chunk);
    }
    return chunk;
  }

 private:
  template <bool kBackward>
  static constexpr __host__ __device__ int place(int i) {
    return kBackward ? kSamples - 1 - i : i;
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
