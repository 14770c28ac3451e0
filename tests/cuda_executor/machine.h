// The machine that a launch runs on: its blocks, warps and threads, and who runs next.
#pragma once

#include <cstdint>
#include <ctime>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "clocks.h"
#include "executor.h"
#include "fiber.h"
#include "intrinsics.h"
#include "shadow.h"

namespace cuda_executor {

struct Site {  // a line of a kernel
  const char* file = nullptr;
  int line = 0;

  bool is_planted() const;
};

enum class State { kReady, kIdle, kAtWarp, kAtBarrier, kDone };

struct Block;

struct Thread {
  Fiber fiber;
  std::unique_ptr<Stack> stack;
  Block* block = nullptr;
  int index = 0;  // in its block
  int place = 0;  // in the machine
  State state = State::kDone;
  Site site;            // where it waits
  uint64_t result = 0;  // of the shuffle or vote that it waited for

  View view;
  View fenced;  // what it knew at its last fence: what its next message hands on
  bool has_fenced = false;
  KnownPtr received;  // from messages; known after the next fence

  std::pair<const void*, uint64_t> polled[4];  // the last reads of messages, and what they gave
  int next_polled = 0;
  int polls = 0;
  const void* polls_at = nullptr;

  int lane() const { return index % kWarp; }
  uint32_t& clock() { return view.warp[lane()]; }
};

struct Meeting {  // of the lanes of a mask
  Collective kind;
  unsigned mask;
  int width;
  Site site;
  unsigned arrived = 0;
  uint64_t values[kWarp] = {};
  int lanes[kWarp] = {};
};

struct Warp {
  unsigned exited = 0;
  std::vector<Meeting> meetings;
};

struct alignas(128) Line {
  char bytes[128];
};

struct Block {
  int64_t index = 0;
  int running = 0;
  int at_barrier = 0;
  Site barrier;  // where they wait
  std::vector<Thread*> threads;
  std::vector<Warp> warps;
  std::vector<Line> shared;
  Range shared_range;
};

// A set of places.
class Places {
 public:
  void resize(int size) {
    words_.assign((size + 63) / 64, 0);
    count_ = 0;
  }
  int count() const { return count_; }
  void insert(int place) {
    words_[place / 64] |= uint64_t{1} << place % 64;
    ++count_;
  }
  void remove(int place) {
    words_[place / 64] &= ~(uint64_t{1} << place % 64);
    --count_;
  }
  int first_from(int place) const;  // the next, around the end; there is one
  int last() const;

 private:
  std::vector<uint64_t> words_;
  int count_ = 0;
};

class Machine {
 public:
  void run(const Launch& launch);
  void work();  // the whole of a thread

  // Of the running thread.
  void point();  // another thread may be next
  void wait(State state, const Site& site);
  void barrier(const Site& site);
  uint64_t meet(Collective kind, unsigned mask, uint64_t value, int lane, int width,
                const Site& site);
  void fence(const Site& site);
  void poll(const void* address, size_t bytes, const void* where);  // before a message is read
  void step_back();  // until the others have had their turn
  void receive(const void* address);
  void send(const void* address, bool adds);  // a message, to those already there or instead
  void exit();
  [[noreturn]] void fail(const std::string& message, const void* where, const Site& site = {});

  bool knows(const Access& before) const;
  uint32_t identity() const {  // of the running thread, among all launches on the present memory
    return first_identity_ + static_cast<uint32_t>(thread->block->index * launch_.threads) +
           thread->index;
  }
  std::pair<int64_t, int> thread_of(uint32_t identity) const {  // block and index
    const uint32_t n = identity - first_identity_;
    return {n / launch_.threads, n % launch_.threads};
  }
  bool is_argument(const void* address) const {
    return static_cast<size_t>(static_cast<const char*>(address) -
                               static_cast<const char*>(launch_.arguments)) <
           launch_.argument_bytes;
  }
  const Thread* owner_of_stack(const void* address) const;
  void forget_identities() { next_identity_ = 1; }
  unsigned threads() const { return static_cast<unsigned>(launch_.threads); }
  unsigned blocks() const { return static_cast<unsigned>(launch_.blocks); }
  void progress() { quiet_rounds_ = 0; }
  uint64_t random() { return generator_(); }
  uint64_t trace() const { return trace_; }

  Thread* thread = nullptr;  // that runs; null outside of kernels

 private:
  void prepare(const Launch& launch);
  void start(Block& block);
  Thread* next();
  void make(Thread& t, State state);
  void finish(const Meeting& meeting, int first);
  uint64_t result_for(const Meeting& meeting, int lane);
  void order_lanes(const Meeting& meeting, int first);
  void order_block(Block& block);
  void draw_quantum();
  void set_failure(const std::string& message);
  std::string waiting() const;

  Launch launch_{};
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<std::unique_ptr<Block>> blocks_;  // one for each that is resident
  std::vector<int64_t> start_order_;
  int64_t started_ = 0;
  int running_ = 0;  // threads
  Places ready_, idle_;
  std::mt19937_64 generator_;
  int64_t mean_quantum_ = 0, quantum_ = 0;  // in scheduling points
  int quiet_rounds_ = 0;
  uint64_t trace_ = 0;
  uint32_t first_identity_ = 1, next_identity_ = 1;
  std::string failure_;
  const void* failed_at_ = nullptr;
  Site failed_site_;
  std::unordered_map<const void*, KnownPtr> messages_;
  std::clock_t deadline_ = 0;
  int64_t turns_ = 0;
};

Machine& machine();

// "file.cuh:12" of a return address in this library.
std::string line_of(const void* where);

}  // namespace cuda_executor
