// The memory that kernels may touch, and for each two bytes of it who did.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace cuda_executor {

constexpr size_t kCell = 2;  // bytes: the smallest that a kernel reads or writes

struct Access {
  uint32_t thread;     // Machine::identity
  uint32_t clock = 0;  // of that thread; 0: no access
  uint32_t where;      // offset of the code in this library, doubled, + 1 for volatile

  bool is_volatile() const { return where & 1; }
};

struct Cell {
  Access write;
  Access reads[2];  // of those that the last write did not follow; which two is left to chance
  uint8_t read_count = 0, write_count = 0;  // up to 255
  bool element = true;
};

// A tensor, workspace, or a block's shared memory.
struct Range {
  std::string name;
  char* base = nullptr;
  size_t bytes = 0;
  bool initialised = false;
  bool writable = true;
  bool output = false;  // every element must be written
  std::vector<Cell> cells;

  bool contains(const void* address) const {
    return static_cast<size_t>(static_cast<const char*>(address) - base) < bytes;
  }
};

enum class Kind { kRead, kWrite, kUpdate };

class Memory {
 public:
  // Overlapping ranges become one.
  Range& add(Range range);
  void clear();
  Range* find(const void* address);
  const std::vector<Range>& ranges() const { return ranges_; }

 private:
  std::vector<Range> ranges_;
};

Memory& memory();

// An access by the running thread, about to be made. Nothing outside of kernels.
void access(const void* address, size_t bytes, Kind kind, bool is_volatile, const void* where);

}  // namespace cuda_executor
