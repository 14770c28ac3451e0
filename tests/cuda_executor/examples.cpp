// A look-back scan as the project's kernels do it, small, and one broken in each way that a check
// is there for: what the checks miss here they would miss in the kernels.
//
// y[n] = c * y[n-1] + x[n]. One block takes one tile, by a ticket; its last thread waits for the
// state after the tile before and sends on the state after its own.

#include <string>
#include <vector>

#include "control.h"
#include "cuda/launch.cuh"
#include "shadow.h"

namespace {

enum Fault {
  kNone,
  kNoBarrier,         // the ends of warps are read without waiting for them
  kNoRelease,         // flag and value in two words, without fences
  kFlagFirst,         // with fences, but the flag is sent before the value
  kBlockOrder,        // the tile is taken from blockIdx
  kForgetsInfinity,   // a carry too old to count is left out, though it may be inf or NaN
  kGarbageLanes,      // lanes behind the end return before the shuffles
  kOutOfBounds,       // the last tile is read as if it were whole
  kUninitialised,     // the first tile reads a carry that nobody wrote
  kDivergentBarrier,  // only threads with a sample wait
  kTwoBarriers,       // half of the threads wait at another one
  kDeadlock,          // a warp waits for a lane that waits for the block
  kMisaligned,        // two samples are read at once, at any address
  kArrivalOrder,      // the ends of warps are added as they come
  kSkipsSample,       // one sample is not written
  kWritesInput,
  kNoBarrierAfter,  // shared memory is used again while others still read it
  kSpins,           // a loop without memory
};

constexpr int kTile = 128;

struct Arguments {
  const float* x;
  float* y;
  int64_t n;
  float c;
  bool two_words;
  unsigned* ticket;
  unsigned long long* messages;  // flag and value in one word
  float* values;                 // or in two: the flag is the message
};

struct Shared {
  unsigned tile;
  unsigned arrived;
  float ends[kTile / 32];
  float shares[kTile / 32];
  float carry;
};

__device__ float power(float c, int n) {
  float result = 1;
  for (; n > 0; --n) result *= c;
  return result;
}

__device__ void send(const Arguments& a, int64_t tile, float value, Fault fault) {
  volatile unsigned long long* message = a.messages + tile;
  if (!a.two_words) {
    *message = 1ull << 32 | __float_as_uint(value);
    return;
  }
  if (fault == kFlagFirst) *message = 1;
  if (fault == kFlagFirst) __threadfence();
  a.values[tile] = value;
  if (fault != kNoRelease) __threadfence();
  if (fault != kFlagFirst) *message = 1;
}

__device__ float receive(const Arguments& a, int64_t tile, Fault fault) {
  volatile unsigned long long* message = a.messages + tile;
  unsigned long long word;
  while ((word = *message) == 0) __nanosleep(20);
  if (!a.two_words) return __uint_as_float(static_cast<unsigned>(word));
  if (fault != kNoRelease) __threadfence();
  return a.values[tile];
}

template <Fault kFault>
struct Scan {
  using Arguments = ::Arguments;
  using Shared = ::Shared;
  static constexpr int kThreads = kTile, kMinBlocks = 1;

  static __device__ void run(const Arguments& a, Shared& shared) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    if (thread == 0) {
      shared.tile = kFault == kBlockOrder ? blockIdx.x : atomicAdd(a.ticket, 1u);
      shared.arrived = 0;
    }
    __syncthreads();
    const int64_t tile = shared.tile, i = tile * kTile + thread;
    const bool there = i < a.n;
    if (kFault == kGarbageLanes && !there) return;
    if (kFault == kSpins)
      for (bool forever = true; forever;) asm volatile("" : "+r"(forever));
    if (kFault == kWritesInput && thread == 0) const_cast<float*>(a.x)[i] = 0;
    float s = there || kFault == kOutOfBounds ? a.x[i] : 0;
    if (kFault == kMisaligned && i > 0 && i + 1 < a.n)
      s += 0 * reinterpret_cast<const float2*>(a.x + i)->y;

    float factor = a.c;
    for (int d = 1; d < 32; d *= 2, factor *= factor) {
      const float before = __shfl_up_sync(~0u, s, d);
      if (lane >= d) s += factor * before;
    }
    if (lane == 31) {
      shared.ends[warp] = s;
      const float share = power(a.c, kTile - 32 - 32 * warp) * s;
      if (kFault == kArrivalOrder) shared.shares[atomicAdd(&shared.arrived, 1u)] = share;
    }
    if (kFault == kDeadlock && warp == 0 && lane > 0) __syncwarp();
    if (kFault == kTwoBarriers && thread % 2)
      __syncthreads();
    else if (kFault != kNoBarrier && (kFault != kDivergentBarrier || there))
      __syncthreads();

    float end = 0;  // the state after the warps before
    for (int w = 0; w < warp; ++w) end = power(a.c, 32) * end + shared.ends[w];
    s += power(a.c, lane + 1) * end;
    if (kFault == kNoBarrierAfter && thread == 0) shared.ends[1] = 0;

    if (thread == kTile - 1) {
      float carry = tile == 0 ? 0 : receive(a, tile - 1, kFault);
      const float reach = power(a.c, kTile);
      if (kFault == kForgetsInfinity && reach < 1e-30f) carry = 0;
      float aggregate = s;
      if (kFault == kArrivalOrder) {
        aggregate = 0;
        for (float share : shared.shares) aggregate += share;
      }
      send(a, tile, reach * carry + aggregate, kFault);
      if (kFault != kUninitialised || tile > 0) shared.carry = carry;
    }
    __syncthreads();
    if (kFault == kSkipsSample && i == 5) return;
    if (there) a.y[i] = s + power(a.c, thread + 1) * shared.carry;
  }
};

template <int kFault = kSpins>
void start(int fault, const Arguments& arguments, int64_t tiles) {
  if (fault == kFault)
    ema_ext::cuda::launch<Scan<static_cast<Fault>(kFault)>>({tiles, nullptr}, arguments);
  else if constexpr (kFault > 0)
    start<kFault - 1>(fault, arguments, tiles);
}

// What every lane of one warp gets from one shuffle or vote.
struct Exchange {
  struct Arguments {
    int kind, operand, width;
    const double* from;
    double* to;
  };
  struct Shared {};
  static constexpr int kThreads = 32, kMinBlocks = 1;

  static __device__ void run(const Arguments& a, Shared&) {
    const int lane = static_cast<int>(threadIdx.x);
    const double mine = a.from[lane];
    a.to[lane] = a.kind == 0   ? __shfl_sync(~0u, mine, a.operand + lane, a.width)
                 : a.kind == 1 ? __shfl_up_sync(~0u, mine, a.operand, a.width)
                 : a.kind == 2 ? __shfl_down_sync(~0u, mine, a.operand, a.width)
                 : a.kind == 3 ? __shfl_xor_sync(~0u, mine, a.operand, a.width)
                 : a.kind == 4 ? __ballot_sync(~0u, mine > 0)
                 : a.kind == 5 ? __any_sync(~0u, mine > 0)
                               : __all_sync(~0u, mine > 0);
  }
};

// The last block to finish adds what all blocks found: fences, an atomic and barriers together.
struct LastBlock {
  struct Arguments {
    const float* x;
    float* y;
    float* partials;
    unsigned* finished;
    bool fences;
  };
  struct Shared {
    float values[64];
    unsigned place;
  };
  static constexpr int kThreads = 64, kMinBlocks = 1;

  static __device__ void run(const Arguments& a, Shared& shared) {
    const unsigned thread = threadIdx.x;
    shared.values[thread] = a.x[blockIdx.x * kThreads + thread];
    __syncthreads();
    if (thread == 0) {
      float sum = 0;
      for (float value : shared.values) sum += value;
      a.partials[blockIdx.x] = sum;
      if (a.fences) __threadfence();
      shared.place = atomicAdd(a.finished, 1u);
      if (a.fences) __threadfence();
    }
    __syncthreads();
    if (shared.place != gridDim.x - 1 || thread != 33) return;
    float sum = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += a.partials[b];
    *a.y = sum;
  }
};

template <class T>
void declare(const char* name, const T* data, size_t count, bool initialised, bool writable) {
  cuda_executor::Range range;
  range.name = name;
  range.base = reinterpret_cast<char*>(const_cast<T*>(data));
  range.bytes = count * sizeof(T);
  range.initialised = initialised;
  range.writable = writable;
  range.output = range.name == "y";
  range.cells.resize(range.bytes / cuda_executor::kCell);
  cuda_executor::memory().add(std::move(range));
}

}  // namespace

EXPORT int example_scan(int fault, bool two_words, const float* x, float* y, int64_t n, float c) {
  return cuda_executor::guarded([&] {
    const int64_t tiles = (n + kTile - 1) / kTile;
    std::vector<unsigned long long> messages(tiles);
    std::vector<float> values(tiles);
    unsigned ticket = 0;
    declare("x", x, n, true, false);
    declare("y", y, n, false, true);
    declare("messages", messages.data(), tiles, true, true);
    declare("values", values.data(), tiles, false, true);
    declare("ticket", &ticket, 1, true, true);
    start(fault, {x, y, n, c, two_words, &ticket, messages.data(), values.data()}, tiles);
  });
}

EXPORT int example_exchange(int kind, int operand, int width, const double* from, double* to) {
  return cuda_executor::guarded([&] {
    declare("from", from, 32, true, false);
    declare("to", to, 32, false, true);
    ema_ext::cuda::launch<Exchange>({1, nullptr}, {kind, operand, width, from, to});
  });
}

EXPORT int example_last_block(const float* x, float* y, int64_t blocks, bool fences) {
  return cuda_executor::guarded([&] {
    std::vector<float> partials(blocks);
    unsigned finished = 0;
    declare("x", x, blocks * LastBlock::kThreads, true, false);
    declare("y", y, 1, false, true);
    declare("partials", partials.data(), blocks, false, true);
    declare("finished", &finished, 1, true, true);
    ema_ext::cuda::launch<LastBlock>({blocks, nullptr}, {x, y, partials.data(), &finished, fences});
  });
}
