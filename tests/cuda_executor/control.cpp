#include "control.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "executor.h"

namespace cuda_executor {
namespace {

std::string& counts() {
  static std::string& counts = *new std::string;
  return counts;
}

// The accesses to each element of a range, as one line: name, elements in bytes, least and most
// reads and writes of one, bytes read and written in all.
void describe(const Range& range, std::ostream& out) {
  uint8_t least[2] = {255, 255}, most[2] = {0, 0};
  int64_t total[2] = {0, 0}, elements = 0;
  for (const Cell& cell : range.cells) {
    if (!cell.element) continue;
    ++elements;
    const uint8_t numbers[2] = {cell.read_count, cell.write_count};
    for (int i = 0; i < 2; ++i) {
      least[i] = std::min(least[i], numbers[i]);
      most[i] = std::max(most[i], numbers[i]);
      total[i] += numbers[i];
    }
  }
  out << range.name << '\t' << elements * kCell;
  for (int i = 0; i < 2; ++i) out << '\t' << +least[i] << '\t' << +most[i];
  for (int i = 0; i < 2; ++i) out << '\t' << total[i] * kCell;
  out << '\n';
}

}  // namespace

std::string& last_error() {
  static std::string& error = *new std::string;
  return error;
}

void conclude() {
  if (!options().checks) return;
  std::ostringstream text;
  for (const Range& range : memory().ranges()) {
    describe(range, text);
    if (!range.output) continue;
    for (size_t i = 0; i < range.cells.size(); ++i)
      if (range.cells[i].element && range.cells[i].write_count == 0)
        throw std::runtime_error("CUDA executor: " + range.name + " + " +
                                 std::to_string(i * kCell) + " bytes was never written");
  }
  counts() = text.str();
}

}  // namespace cuda_executor

EXPORT void executor_set(int schedule, uint64_t seed, int resident, bool checks, double seconds,
                         int multiprocessors) {
  cuda_executor::options() = {static_cast<cuda_executor::Schedule>(schedule),
                              seed,
                              resident,
                              checks,
                              seconds,
                              multiprocessors};
}

EXPORT void executor_plant(const char* file, int line) { cuda_executor::planted() = {file, line}; }

EXPORT const char* executor_error() { return cuda_executor::last_error().c_str(); }
EXPORT const char* executor_counts() { return cuda_executor::counts().c_str(); }
EXPORT const char* executor_kernels() { return cuda_executor::launched().c_str(); }
EXPORT uint64_t executor_trace() { return cuda_executor::trace(); }
