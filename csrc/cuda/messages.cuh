// What blocks tell each other: float64 values, in global memory that is zero before the launch.
//
// A value travels as two words, each with half of its bits and a mark beside them, so a word that
// has the mark has its half, and no fence is needed. The words are volatile: such an access is a
// relaxed one in PTX's memory model.
#pragma once

#include "cuda/storage.cuh"

namespace ema_ext::cuda {

struct Message {
  unsigned long long words[2];
};

__device__ inline void send(Message& message, double value) {
  constexpr unsigned long long kMark = 1ull << 32;
  const auto bits = static_cast<unsigned long long>(__double_as_longlong(value));
  auto* const words = static_cast<volatile unsigned long long*>(message.words);
  words[0] = kMark | (bits & 0xffffffff);
  words[1] = kMark | (bits >> 32);
}

// Waits for all of them. Whoever sends must have been started before: see the tickets of
// split_rows.cuh.
template <int kCount>
__device__ __forceinline__ void receive(const Message* messages, double (&values)[kCount]) {
  unsigned long long words[kCount][2];
  for (;;) {
    unsigned long long marks = ~0ull;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      auto* const from = static_cast<const volatile unsigned long long*>(messages[i].words);
      words[i][0] = from[0];
      words[i][1] = from[1];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) marks &= words[i][0] & words[i][1];
    if (marks >> 32 != 0) break;
    __nanosleep(32);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    values[i] = __longlong_as_double(
        static_cast<long long>(words[i][1] << 32 | (words[i][0] & 0xffffffff)));
}
__device__ inline double receive(const Message& message) {
  double value[1];
  receive(&message, value);
  return value[0];
}

}  // namespace ema_ext::cuda
