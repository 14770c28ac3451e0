// Runs CUDA kernels on the CPU, to prove what can be proven without a GPU.
//
// One CUDA thread is one fiber, all of them on one thread of the CPU. The kernels are compiled by
// g++ from the sources that ship, over the toolkit's own headers and intrinsics.h, and started by
// the launch() of include/cuda/launch.cuh; nothing else is replaced. The units with kernels are
// compiled with -fsanitize=thread, but libtsan is not linked: hooks.cpp defines what the compiler
// calls at each load and store. There a thread may be exchanged for another, and the access is
// checked. The rest follows from where a thread can wait.
//
// * include/: what kernels see: this, launch(), and in intrinsics.h what CUDA's headers lack on the
//   CPU (threadIdx, __shfl_sync, atomicAdd, ...)
// * fiber.h: stacks and the switch between them
// * machine.h: blocks, warps, threads; who runs next; barriers, shuffles, votes, messages
// * clocks.h: what a thread has behind it, the order among accesses
// * shadow.h: which bytes there are, who touched them, and how often
// * examples.cpp: a look-back scan, and broken ones that each check must catch
// * binding.cpp: the project's own kernels as torch operators
//
// A kernel that breaks a rule ends with one message: a race, an address that is no element of a
// tensor or not aligned, memory read before it was written, a barrier or a shuffle that not all
// reach, a wait without end. What it cannot show: the machine code that nvcc makes, what a GPU's
// weaker memory does to code without races by these rules, and speed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace cuda_executor {

// Which thread of those that can run does, and in which order blocks start.
enum class Schedule { kInOrder, kReversed, kRandom };

struct Options {
  Schedule schedule = Schedule::kInOrder;
  uint64_t seed = 0;
  int resident = 8;         // blocks that run at a time; the next starts when one of them ends
  bool checks = true;       // of each access; without them values only, and faster
  double seconds = 60;      // of the CPU: a launch that takes more fails
  int multiprocessors = 4;  // what the strategy is told that the device has
};

Options& options();

// To see that it is missed: the barrier, __syncwarp or fence of this line of a kernel is not there,
// or an atomicAdd gives the block's index instead. No line: nothing is planted.
struct Planted {
  std::string file;
  int line = 0;
};

Planted& planted();

struct Launch {
  const char* kernel;
  void (*body)(const void* arguments, void* shared);
  const void* arguments;
  size_t argument_bytes;
  size_t shared_bytes;
  int threads;
  int64_t blocks;
};

// Returns when all blocks have. Throws std::runtime_error for a kernel that breaks a rule.
void run(const Launch& launch);

// The names of the kernels that have run, one a line; cleared by whoever asks.
std::string& launched();

// Which of two runs went another way: a hash of all choices of the last launch.
uint64_t trace();

}  // namespace cuda_executor
