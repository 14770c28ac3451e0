// How samples lie in memory and what they are computed in: one traits struct per dtype.
//
// A Storage has Sample (in memory), Acc (accumulate dtype: the sample is exact in it), kDirect
// (both are the same), get and put for one sample, and unpack and pack for a run of them.
#pragma once

#include "cpu/simd.h"

namespace ema_ext::cpu::EMA_EXT_LEVEL {

template <class T>
struct Native {
  using Sample = T;
  using Acc = T;
  static constexpr bool kDirect = true;

  static EMA_EXT_INLINE T get(T sample) { return sample; }
  static EMA_EXT_INLINE T put(T value) { return value; }
  template <int N>
  static EMA_EXT_INLINE Vector<T, N> get_vector(const T* from) {
    return load<Vector<T, N>>(from);
  }
  template <int N>
  static EMA_EXT_INLINE void put_vector(Vector<T, N> values, T* to) {
    store(to, values);
  }
  static EMA_EXT_INLINE void unpack(const T* from, int64_t n, T* to) {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
  }
  static EMA_EXT_INLINE void pack(const T* from, int64_t n, T* to) {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
  }
};

using Float32 = Native<float>;
using Float64 = Native<double>;

// Neighbouring samples: those at the lower addresses and those at the upper.
struct Pairs {
  using Lanes = Vector<float, kLanes<float>>;
  Lanes low, high;
};
using PairBits = Vector<uint32_t, kLanes<float>>;

struct BFloat16 {
  using Sample = uint16_t;
  using Acc = float;
  static constexpr bool kDirect = false;

  static EMA_EXT_INLINE float get(uint16_t sample) {
    const uint32_t bits = static_cast<uint32_t>(sample) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  // To nearest, ties to even; a NaN stays one.
  static EMA_EXT_INLINE uint16_t put(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t quiet = (bits >> 16) | 0x40u;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
  }
  template <int N>
  static EMA_EXT_INLINE Vector<float, N> get_vector(const uint16_t* from) {
    using Bits = Vector<uint32_t, N>;
#if EMA_EXT_VECTOR_BYTES >= 32
    if constexpr (N == 4) {
      const auto samples = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
      return (Vector<float, N>)((Bits)_mm_cvtepu16_epi32(samples) << 16);
    }
#endif
#if EMA_EXT_VECTOR_BYTES >= 32
    if constexpr (N == 8) {
      const auto samples = _mm256_cvtepu16_epi32(load<__m128i>(from));
      return (Vector<float, N>)_mm256_slli_epi32(samples, 16);
    }
#endif
    const auto bits = __builtin_convertvector(load<Vector<uint16_t, N>>(from), Bits) << 16;
    return load<Vector<float, N>>(&bits);
  }
  template <int N>
  static EMA_EXT_INLINE void put_vector(Vector<float, N> values, uint16_t* to) {
    const auto bits = load<Vector<uint32_t, N>>(&values);
    const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const auto quiet = (bits >> 16) | 0x40u;
    const auto nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const auto kept = nan ? quiet : rounded;
#if EMA_EXT_VECTOR_BYTES >= 32
    if constexpr (N == 4) {
      const auto packed = _mm_packus_epi32((__m128i)kept, (__m128i)kept);
      return _mm_storel_epi64(reinterpret_cast<__m128i*>(to), packed);
    }
    if constexpr (N == 8) {
      const auto packed = _mm256_packus_epi32((__m256i)kept, (__m256i)kept);
      return store(to, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
    }
#endif
    store(to, __builtin_convertvector(kept, Vector<uint16_t, N>));
  }
  static EMA_EXT_INLINE void unpack(const uint16_t* from, int64_t n, float* to) {
    constexpr int kN = kLanes<float>;
    int64_t i = 0;
    for (; i + kN <= n; i += kN) store(to + i, get_vector<kN>(from + i));
    for (; i < n; ++i) to[i] = get(from[i]);
  }
  static EMA_EXT_INLINE void pack(const float* from, int64_t n, uint16_t* to) {
    int64_t i = 0;
#if EMA_EXT_VECTOR_BYTES >= 32
    // Two vectors at a time, and NaN, which is rare, afterwards.
    __m256 strange{};
    for (; i + 16 <= n; i += 16) {
      const auto low = load<__m256>(from + i), high = load<__m256>(from + i + 8);
      const auto packed = _mm256_packus_epi32(round_number(low), round_number(high));
      store(to + i, _mm256_permute4x64_epi64(packed, 0xd8));
      strange = _mm256_or_ps(strange, _mm256_cmp_ps(low, high, _CMP_UNORD_Q));
    }
    if (_mm256_movemask_ps(strange) != 0) i = 0;
#endif
    for (; i < n; ++i) to[i] = put(from[i]);
  }
  // Between neighbouring samples as they lie in 32 bits and in float. What is no number may become
  // one in unite.
  static EMA_EXT_INLINE Pairs split(PairBits bits) {
    return {(Pairs::Lanes)(bits << 16), (Pairs::Lanes)(bits & 0xffff0000u)};
  }
  static EMA_EXT_INLINE PairBits unite(Pairs pairs) {
    const auto low = (PairBits)pairs.low, high = (PairBits)pairs.high;
    const auto lower = (low + 0x7fffu + ((low >> 16) & 1u)) >> 16;
    const auto upper = high + 0x7fffu + ((high >> 16) & 1u);
#if EMA_EXT_VECTOR_BYTES == 32
    return (PairBits)_mm256_blend_epi16((__m256i)lower, (__m256i)upper, 0xaa);
#else
    return lower | (upper & 0xffff0000u);
#endif
  }

 private:
#if EMA_EXT_VECTOR_BYTES >= 32
  // put for what is no NaN, each result in 32 bits.
  static EMA_EXT_INLINE __m256i round_number(__m256 values) {
    using Bits = Vector<uint32_t, 8>;
    const auto bits = (Bits)values;
    return (__m256i)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
#endif
};

struct Float16 {
  using Sample = uint16_t;
  using Acc = float;
  static constexpr bool kDirect = false;

  static EMA_EXT_INLINE float get(uint16_t sample) {
    _Float16 half;
    std::memcpy(&half, &sample, sizeof half);
    return static_cast<float>(half);
  }
  static EMA_EXT_INLINE uint16_t put(float value) {
    const _Float16 half = static_cast<_Float16>(value);
    uint16_t sample;
    std::memcpy(&sample, &half, sizeof sample);
    return sample;
  }
  template <int N>
  static EMA_EXT_INLINE Vector<float, N> get_vector(const uint16_t* from) {
    float values[N];
#if EMA_EXT_VECTOR_BYTES >= 32
    if constexpr (N == 4)
      _mm_storeu_ps(values, _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
    else if constexpr (N == 8)
      return (Vector<float, N>)_mm256_cvtph_ps(load<__m128i>(from));
    else
#endif
      unpack(from, N, values);
    return load<Vector<float, N>>(values);
  }
  template <int N>
  static EMA_EXT_INLINE void put_vector(Vector<float, N> values, uint16_t* to) {
#if EMA_EXT_VECTOR_BYTES >= 32
    if constexpr (N == 4) {
      const auto halves = _mm_cvtps_ph(load<__m128>(&values), _MM_FROUND_TO_NEAREST_INT);
      return _mm_storel_epi64(reinterpret_cast<__m128i*>(to), halves);
    }
    if constexpr (N == 8)
      return store(to, _mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT));
#endif
    pack(reinterpret_cast<const float*>(&values), N, to);
  }
  static EMA_EXT_INLINE void unpack(const uint16_t* from, int64_t n, float* to) {
    int64_t i = 0;
#if EMA_EXT_VECTOR_BYTES >= 32
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(load<__m128i>(from + i)));
#endif
    for (; i < n; ++i) to[i] = get(from[i]);
  }
  static EMA_EXT_INLINE void pack(const float* from, int64_t n, uint16_t* to) {
    int64_t i = 0;
#if EMA_EXT_VECTOR_BYTES >= 32
    for (; i + 8 <= n; i += 8)
      store(to + i, _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < n; ++i) to[i] = put(from[i]);
  }
  static EMA_EXT_INLINE Pairs split(PairBits bits) {
#if EMA_EXT_VECTOR_BYTES == 64
    const auto halves = (__m512i)bits;
    return {(Pairs::Lanes)_mm512_cvtph_ps(_mm512_cvtepi32_epi16(halves)),
            (Pairs::Lanes)_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(halves, 16)))};
#elif EMA_EXT_VECTOR_BYTES == 32
    const auto order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    const auto sorted = _mm256_permute4x64_epi64(_mm256_shuffle_epi8((__m256i)bits, order), 0xd8);
    return {(Pairs::Lanes)_mm256_cvtph_ps(_mm256_castsi256_si128(sorted)),
            (Pairs::Lanes)_mm256_cvtph_ps(_mm256_extracti128_si256(sorted, 1))};
#else
    Pairs pairs;
    for (int i = 0; i < kLanes<float>; ++i) {
      pairs.low[i] = get(static_cast<uint16_t>(bits[i]));
      pairs.high[i] = get(static_cast<uint16_t>(bits[i] >> 16));
    }
    return pairs;
#endif
  }
  static EMA_EXT_INLINE PairBits unite(Pairs pairs) {
#if EMA_EXT_VECTOR_BYTES == 64
    const auto low = _mm512_cvtps_ph((__m512)pairs.low, _MM_FROUND_TO_NEAREST_INT);
    const auto high = _mm512_cvtps_ph((__m512)pairs.high, _MM_FROUND_TO_NEAREST_INT);
    return (PairBits)_mm512_or_si512(_mm512_cvtepu16_epi32(low),
                                     _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
#elif EMA_EXT_VECTOR_BYTES == 32
    const auto low = _mm256_cvtps_ph((__m256)pairs.low, _MM_FROUND_TO_NEAREST_INT);
    const auto high = _mm256_cvtps_ph((__m256)pairs.high, _MM_FROUND_TO_NEAREST_INT);
    return (PairBits)_mm256_set_m128i(_mm_unpackhi_epi16(low, high), _mm_unpacklo_epi16(low, high));
#else
    PairBits bits;
    for (int i = 0; i < kLanes<float>; ++i)
      bits[i] = put(pairs.low[i]) | static_cast<uint32_t>(put(pairs.high[i])) << 16;
    return bits;
#endif
  }
};

}  // namespace ema_ext::cpu::EMA_EXT_LEVEL
