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

// Waits for it. Whoever sends must have been started before: see the tickets of split_rows.cuh.
__device__ inline double receive(const Message& message) {
  auto* const words = static_cast<const volatile unsigned long long*>(message.words);
  unsigned long long low, high;
  for (;;) {
    low = words[0];
    high = words[1];
    if ((low >> 32 & high >> 32) != 0) break;
    __nanosleep(32);
  }
  return __longlong_as_double(static_cast<long long>(high << 32 | (low & 0xffffffff)));
}

}  // namespace ema_ext::cuda
