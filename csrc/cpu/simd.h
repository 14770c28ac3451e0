// Vectors of N lanes on GCC's vector extension, and the few operations that it has no operator for.
//
// Included only by the level units (levels/*.cpp), each of which compiles it for its own
// instruction set inside its own namespace EMA_EXT_LEVEL. No standard template with a body may be
// used here: the linker keeps one copy of it for all levels.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#define EMA_EXT_INLINE inline __attribute__((always_inline))

namespace ema_ext::cpu::EMA_EXT_LEVEL {

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * N)));
};

template <class T, int N>
using Vector = typename VectorOf<T, N>::type;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

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
  static_assert(sizeof v == kVectorBytes);
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)v);
#elif defined(__AVX__)
  _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)v);
#else
  _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)v);
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

template <class V>
EMA_EXT_INLINE double sum_lanes(V v) {
  double sum = 0;
  for (size_t i = 0; i < sizeof(v) / sizeof(v[0]); ++i) sum += v[i];
  return sum;
}

}  // namespace ema_ext::cpu::EMA_EXT_LEVEL
