#include "shadow.h"

#include <algorithm>

#include "machine.h"

extern "C" {
// The linker's: where this library begins and ends.
extern const char __ehdr_start[] __attribute__((visibility("hidden")));
extern const char _end[] __attribute__((visibility("hidden")));
}

namespace cuda_executor {
namespace {

const char* verb(Kind kind) {
  return kind == Kind::kRead ? "read" : kind == Kind::kWrite ? "write" : "update";
}

uint32_t coded(const void* where, bool is_volatile) {
  const auto offset = static_cast<const char*>(where) - __ehdr_start;
  return static_cast<uint32_t>(offset) << 1 | (is_volatile ? 1 : 0);
}

// What an access is, for a message. Only offsets: an address is another one in every run.
std::string description(Kind kind, size_t bytes) {
  return std::string(verb(kind)) + " of " + std::to_string(bytes) + " bytes";
}

std::string place(const Range& range, const void* address) {
  return range.name + " + " + std::to_string(static_cast<const char*>(address) - range.base) +
         " bytes";
}

[[noreturn]] void fail_outside(const void* address, size_t bytes, Kind kind, const void* where) {
  std::string text = "out of bounds: " + description(kind, bytes);
  const Range* nearest = nullptr;
  int64_t least = 4096;
  const auto look_at = [&](const Range& range) {
    const int64_t before = range.base - static_cast<const char*>(address);
    const int64_t behind = -before - static_cast<int64_t>(range.bytes);
    const int64_t distance = std::max(before, behind);
    if (distance < least) {
      least = distance;
      nearest = &range;
    }
  };
  for (const Range& range : memory().ranges()) look_at(range);
  look_at(machine().thread->block->shared_range);
  if (machine().owner_of_stack(address) != nullptr)
    text += " in the stack of another thread";
  else if (nearest != nullptr)
    text += " at " + place(*nearest, address) + ", which has " + std::to_string(nearest->bytes);
  else
    text += " in no tensor, workspace or shared memory";
  machine().fail(text, where);
}

[[noreturn]] void fail_race(const Range& range, const void* address, size_t bytes, Kind kind,
                            const Access& before, Kind kind_before, const void* where) {
  const auto [block, index] = machine().thread_of(before.thread);
  machine().fail("race: " + description(kind, bytes) + " at " + place(range, address) +
                     ", unordered with the " + verb(kind_before) + " by block " +
                     std::to_string(block) + ", thread " + std::to_string(index) + " at " +
                     line_of(__ehdr_start + (before.where >> 1)) + ";",
                 where);
}

void count(uint8_t& number) {
  if (number < 255) ++number;
}

// The read takes the place of one that it follows, or else of any.
void note_read(Cell& cell, const Access& now) {
  for (Access& read : cell.reads) {
    if (read.clock == 0 || machine().knows(read)) {
      read = now;
      return;
    }
  }
  cell.reads[machine().random() % std::size(cell.reads)] = now;
}

void check(Range& range, const void* address, size_t bytes, Kind kind, bool is_volatile,
           const void* where) {
  const Machine& m = machine();
  if (kind != Kind::kRead && !range.writable)
    machine().fail(
        "write to an input: " + description(kind, bytes) + " at " + place(range, address), where);
  const size_t offset = static_cast<const char*>(address) - range.base;
  if (offset + bytes > range.bytes) fail_outside(address, bytes, kind, where);
  const Access now{m.identity(), m.thread->clock(), coded(where, is_volatile)};
  const auto races = [&](const Access& before) {
    return !(is_volatile && before.is_volatile()) && !m.knows(before);
  };
  const size_t last = (offset + bytes - 1) / kCell;
  for (size_t i = offset / kCell; i <= last; ++i) {
    Cell& cell = range.cells[i];
    if (!cell.element)
      machine().fail("out of bounds: " + description(kind, bytes) + " at " + place(range, address) +
                         ", between its elements",
                     where);
    if (kind != Kind::kWrite && !range.initialised && cell.write_count == 0)
      machine().fail("uninitialised: " + description(kind, bytes) + " at " + place(range, address) +
                         ", which nobody has written",
                     where);
    if (races(cell.write)) fail_race(range, address, bytes, kind, cell.write, Kind::kWrite, where);
    if (kind != Kind::kWrite) count(cell.read_count);
    if (kind == Kind::kRead) {
      note_read(cell, now);
      continue;
    }
    for (const Access& read : cell.reads)
      if (races(read)) fail_race(range, address, bytes, kind, read, Kind::kRead, where);
    count(cell.write_count);
    cell.write = now;
    cell.reads[0] = cell.reads[1] = {};
  }
}

bool is_constant(const void* address) { return address >= __ehdr_start && address < _end; }

}  // namespace

Memory& memory() {
  static Memory& memory = *new Memory;
  return memory;
}

void Memory::clear() {
  ranges_.clear();
  machine().forget_identities();
}

Range& Memory::add(Range range) {
  for (size_t i = 0; i < ranges_.size();) {
    Range& other = ranges_[i];
    if (range.base >= other.base + other.bytes || other.base >= range.base + range.bytes) {
      ++i;
      continue;
    }
    // Two views of one storage: together they are as large as both, and what either holds is there.
    char* base = std::min(range.base, other.base);
    char* end = std::max(range.base + range.bytes, other.base + other.bytes);
    std::vector<Cell> cells((end - base + kCell - 1) / kCell);
    for (Cell& cell : cells) cell.element = false;
    for (const Range* part : {&range, &other})
      for (size_t k = 0; k < part->cells.size(); ++k)
        cells[(part->base - base) / kCell + k].element |= part->cells[k].element;
    range = {other.name + " and " + range.name,
             base,
             static_cast<size_t>(end - base),
             other.initialised && range.initialised,
             other.writable || range.writable,
             other.output || range.output,
             std::move(cells)};
    ranges_.erase(ranges_.begin() + static_cast<int64_t>(i));
    i = 0;
  }
  ranges_.push_back(std::move(range));
  return ranges_.back();
}

Range* Memory::find(const void* address) {
  for (Range& range : ranges_)
    if (range.contains(address)) return &range;
  return nullptr;
}

void access(const void* address, size_t bytes, Kind kind, bool is_volatile, const void* where) {
  Machine& m = machine();
  if (m.thread == nullptr) return;
  const bool checks = options().checks;
  if (!checks && !is_volatile) return;
  if (m.thread->stack->contains(address)) return;
  m.point();
  if (is_volatile && kind == Kind::kRead) m.poll(address, bytes, where);
  Range& shared = m.thread->block->shared_range;
  Range* range = shared.contains(address) ? &shared : memory().find(address);
  if (checks) {
    if (range != nullptr)
      check(*range, address, bytes, kind, is_volatile, where);
    else if (kind != Kind::kRead || !(m.is_argument(address) || is_constant(address)))
      fail_outside(address, bytes, kind, where);
    if (is_volatile && kind != Kind::kWrite) m.receive(address);
    if (is_volatile && kind != Kind::kRead) m.send(address, kind == Kind::kUpdate);
  }
  if (kind != Kind::kRead && range != &shared) m.progress();
}

}  // namespace cuda_executor
