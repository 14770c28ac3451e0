// Vectors of N lanes on GCC's vector extension, and the few operations that it has no operator for.
//
// Included only by the level units (levels/*.cpp), each of which compiles it for its own
// instruction set inside its own namespace EMA_EXT_LEVEL. No standard template with a body may be
// used here: the linker keeps one copy of it for all levels. Nor do the compiler's macros tell the
// instruction set: GCC has read the whole unit before it obeys the unit's target pragma. The unit
// says EMA_EXT_VECTOR_BYTES instead: 16 with SSE2, 32 with AVX2, FMA and F16C, 64 with AVX-512.
#pragma once

// GCC 12 warns of the undefined vectors that AVX-512 intrinsics start from.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#define EMA_EXT_INLINE inline __attribute__((always_inline))

namespace ema_ext::cpu::EMA_EXT_LEVEL {

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * N)));
};

template <class T, int N>
using Vector = typename VectorOf<T, N>::type;

constexpr int kVectorBytes = EMA_EXT_VECTOR_BYTES;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class V>
EMA_EXT_INLINE V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
EMA_EXT_INLINE void store(void* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

// Stores past the caches; `to` is aligned to the vector. A store fence must follow the last one.
template <class V>
EMA_EXT_INLINE void stream(void* to, V v) {
  static_assert(sizeof v == 16 || sizeof v == 32 || sizeof v == 64);
  static_assert(sizeof v <= kVectorBytes);
  if constexpr (sizeof v == 16) _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)v);
#if EMA_EXT_VECTOR_BYTES >= 32
  if constexpr (sizeof v == 32) _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)v);
#endif
#if EMA_EXT_VECTOR_BYTES >= 64
  if constexpr (sizeof v == 64) _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)v);
#endif
}

template <int... I>
struct Indices {};

template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};

template <int... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};

template <int K, class V, int... I>
EMA_EXT_INLINE V shift_lanes(V earlier, V later, Indices<I...>) {
  constexpr int kCount = sizeof...(I);
  return __builtin_shufflevector(earlier, later, (kCount - K + I)...);
}

// The N lanes that lie K samples before those of `vector`; `neighbour` is the vector before it.
// Time runs towards higher lanes for Direction 1, towards lower ones for -1.
template <int K, int Direction, class T, int N>
EMA_EXT_INLINE Vector<T, N> earlier_by(Vector<T, N> neighbour, Vector<T, N> vector) {
  using Lanes = typename MakeIndices<N>::type;
  if constexpr (Direction > 0)
    return shift_lanes<K>(neighbour, vector, Lanes{});
  else
    return shift_lanes<N - K>(vector, neighbour, Lanes{});
}

// Two vectors as one, and a vector's lower (0) or upper (1) half.
template <class T, int N, int... I>
EMA_EXT_INLINE Vector<T, 2 * N> join(Vector<T, N> low, Vector<T, N> high, Indices<I...>) {
  return __builtin_shufflevector(low, high, I...);
}
template <class T, int N>
EMA_EXT_INLINE Vector<T, 2 * N> join(Vector<T, N> low, Vector<T, N> high) {
  return join<T, N>(low, high, typename MakeIndices<2 * N>::type{});
}
template <int kHalf, class T, int N, int... I>
EMA_EXT_INLINE Vector<T, N / 2> half(Vector<T, N> v, Indices<I...>) {
  return __builtin_shufflevector(v, v, (kHalf * N / 2 + I)...);
}
template <int kHalf, class T, int N>
EMA_EXT_INLINE Vector<T, N / 2> half(Vector<T, N> v) {
  return half<kHalf, T, N>(v, typename MakeIndices<N / 2>::type{});
}

// Between float and float64 lanes. (GCC 12 splits its own conversion of 4 or 8 lanes in two.)
template <int N>
EMA_EXT_INLINE Vector<double, N> widen(Vector<float, N> v) {
#if EMA_EXT_VECTOR_BYTES >= 32
  if constexpr (N == 4) return (Vector<double, N>)_mm256_cvtps_pd((__m128)v);
#endif
#if EMA_EXT_VECTOR_BYTES >= 64
  if constexpr (N == 8) return (Vector<double, N>)_mm512_cvtps_pd((__m256)v);
#endif
  return __builtin_convertvector(v, Vector<double, N>);
}
template <int N>
EMA_EXT_INLINE Vector<double, N> widen(Vector<double, N> v) {
  return v;
}

template <class T, int N>
EMA_EXT_INLINE Vector<T, N> narrow(Vector<double, N> v) {
  if constexpr (sizeof(T) == 8) return v;
#if EMA_EXT_VECTOR_BYTES >= 32
  else if constexpr (N == 4)
    return (Vector<T, N>)_mm256_cvtpd_ps((__m256d)v);
#endif
#if EMA_EXT_VECTOR_BYTES >= 64
  else if constexpr (N == 8)
    return (Vector<T, N>)_mm512_cvtpd_ps((__m512d)v);
#endif
  else
    return __builtin_convertvector(v, Vector<T, N>);
}

// The sum over the lanes in float64, by halves.
template <class T, int N>
EMA_EXT_INLINE double sum_lanes(Vector<T, N> v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    return sum_lanes<double, N / 2>(widen<N / 2>(half<0, T, N>(v)) +
                                    widen<N / 2>(half<1, T, N>(v)));
  }
}

}  // namespace ema_ext::cpu::EMA_EXT_LEVEL
