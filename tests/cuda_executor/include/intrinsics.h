// What the toolkit's headers offer to device code only, for kernels that g++ compiles; included
// before everything else. The rest (vector types, half types, cudaStream_t) is the toolkit's own.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifndef __launch_bounds__
#define __launch_bounds__(...)
#endif
#undef __forceinline__
#define __forceinline__ inline __attribute__((always_inline))

// A line of the kernel, by default arguments.
#define CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace cuda_executor {

// The same all through a thread, so that the compiler may ask once.
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) dim3 block_size();
__attribute__((const)) dim3 grid_size();

enum class Collective { kSync, kShuffle, kUp, kDown, kXor, kBallot };

void sync_threads(const char* file, int line);
uint64_t meet(Collective kind, unsigned mask, uint64_t value, int lane, int width, const char* file,
              int line);
void fence(const char* file, int line);
void step_back();

template <class T>
T atomic_add(T* address, T value, CALLER);

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Of a value that is small, as an int, as CUDA's overloads have it.
template <class T, class Wide = decltype(+T())>
inline Wide shuffle(Collective kind, unsigned mask, T value, int lane, int width, const char* file,
                    int line) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(Wide) == 4 || sizeof(Wide) == 8));
  using Bits = std::conditional_t<sizeof(Wide) == 4, uint32_t, uint64_t>;
  const Wide wide = value;
  const uint64_t result = meet(kind, mask, bits<Bits>(wide), lane, width, file, line);
  return bits<Wide>(static_cast<Bits>(result));
}

}  // namespace cuda_executor

#define threadIdx (::cuda_executor::thread_index())
#define blockIdx (::cuda_executor::block_index())
#define blockDim (::cuda_executor::block_size())
#define gridDim (::cuda_executor::grid_size())

inline void __syncthreads(CALLER) { cuda_executor::sync_threads(file, line); }
inline void __syncwarp(unsigned mask = ~0u, CALLER) {
  cuda_executor::meet(cuda_executor::Collective::kSync, mask, 0, 0, 32, file, line);
}

#define SHUFFLE(NAME, KIND, OPERAND)                                               \
  template <class T>                                                               \
  inline auto NAME(unsigned mask, T value, OPERAND lane, int width = 32, CALLER) { \
    return cuda_executor::shuffle(cuda_executor::Collective::KIND, mask, value,    \
                                  static_cast<int>(lane), width, file, line);      \
  }
SHUFFLE(__shfl_sync, kShuffle, int)
SHUFFLE(__shfl_up_sync, kUp, unsigned)
SHUFFLE(__shfl_down_sync, kDown, unsigned)
SHUFFLE(__shfl_xor_sync, kXor, int)
#undef SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int vote, CALLER) {
  return static_cast<unsigned>(
      cuda_executor::meet(cuda_executor::Collective::kBallot, mask, vote != 0, 0, 32, file, line));
}
inline int __any_sync(unsigned mask, int vote, CALLER) {
  return __ballot_sync(mask, vote, file, line) != 0;
}
inline int __all_sync(unsigned mask, int vote, CALLER) {
  return __ballot_sync(mask, vote, file, line) == mask;
}

inline void __threadfence(CALLER) { cuda_executor::fence(file, line); }
inline void __nanosleep(unsigned) { cuda_executor::step_back(); }

#undef CALLER

#define atomicAdd ::cuda_executor::atomic_add

template <class A, class B>
inline std::common_type_t<A, B> min(A a, B b) {
  const std::common_type_t<A, B> one = a, other = b;
  return other < one ? other : one;
}
template <class A, class B>
inline std::common_type_t<A, B> max(A a, B b) {
  const std::common_type_t<A, B> one = a, other = b;
  return one < other ? other : one;
}

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> 4 * i;
    unsigned byte = both >> 8 * (pick & 7) & 0xFF;
    if (pick & 8) byte = byte & 0x80 ? 0xFF : 0;
    result |= byte << 8 * i;
  }
  return result;
}

inline unsigned __float_as_uint(float x) { return cuda_executor::bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return cuda_executor::bits<float>(x); }
inline int __float_as_int(float x) { return cuda_executor::bits<int>(x); }
inline float __int_as_float(int x) { return cuda_executor::bits<float>(x); }
inline long long __double_as_longlong(double x) { return cuda_executor::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return cuda_executor::bits<double>(x); }
inline double __hiloint2double(int high, int low) {
  return __longlong_as_double(static_cast<long long>(high) << 32 | static_cast<unsigned>(low));
}
inline int __double2hiint(double x) { return static_cast<int>(__double_as_longlong(x) >> 32); }
inline int __double2loint(double x) { return static_cast<int>(__double_as_longlong(x)); }
