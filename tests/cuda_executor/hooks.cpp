// What the compiler calls at each access of a unit built with -fsanitize=thread, and at each
// misaligned one with -fsanitize=alignment; and the functions behind intrinsics.h.

#include "intrinsics.h"
#include "machine.h"
#include "shadow.h"

using cuda_executor::access;
using cuda_executor::Kind;
using cuda_executor::machine;

#define HOOK extern "C" __attribute__((visibility("hidden"))) void
#define HOOKS(SIZE)                                                                                \
  HOOK __tsan_read##SIZE(void* p) { access(p, SIZE, Kind::kRead, false, HERE); }                   \
  HOOK __tsan_write##SIZE(void* p) { access(p, SIZE, Kind::kWrite, false, HERE); }                 \
  HOOK __tsan_unaligned_read##SIZE(void* p) { access(p, SIZE, Kind::kRead, false, HERE); }         \
  HOOK __tsan_unaligned_write##SIZE(void* p) { access(p, SIZE, Kind::kWrite, false, HERE); }       \
  HOOK __tsan_volatile_read##SIZE(void* p) { access(p, SIZE, Kind::kRead, true, HERE); }           \
  HOOK __tsan_volatile_write##SIZE(void* p) { access(p, SIZE, Kind::kWrite, true, HERE); }         \
  HOOK __tsan_unaligned_volatile_read##SIZE(void* p) { access(p, SIZE, Kind::kRead, true, HERE); } \
  HOOK __tsan_unaligned_volatile_write##SIZE(void* p) { access(p, SIZE, Kind::kWrite, true, HERE); }
#define HERE __builtin_return_address(0)

HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
HOOK __tsan_read_range(void* p, size_t bytes) { access(p, bytes, Kind::kRead, false, HERE); }
HOOK __tsan_write_range(void* p, size_t bytes) { access(p, bytes, Kind::kWrite, false, HERE); }
HOOK __tsan_init() {}
HOOK __tsan_func_entry(void*) {}
HOOK __tsan_func_exit() {}

namespace {
struct TypeMismatch {  // libubsan's
  const char* file;
  uint32_t line, column;
  void* type;
  unsigned char log_alignment, kind;
};
}  // namespace

HOOK __ubsan_handle_type_mismatch_v1(TypeMismatch* data, uintptr_t address) {
  const uintptr_t alignment = uintptr_t{1} << data->log_alignment;
  if (machine().thread == nullptr || address % alignment == 0) return;
  machine().fail("misaligned: an address that is no multiple of " + std::to_string(alignment),
                 HERE);
}

namespace cuda_executor {

uint3 thread_index() { return {static_cast<unsigned>(machine().thread->index), 0, 0}; }
uint3 block_index() { return {static_cast<unsigned>(machine().thread->block->index), 0, 0}; }
dim3 block_size() { return dim3(machine().threads()); }
dim3 grid_size() { return dim3(machine().blocks()); }

void sync_threads(const char* file, int line) { machine().barrier({file, line}); }

uint64_t meet(Collective kind, unsigned mask, uint64_t value, int lane, int width, const char* file,
              int line) {
  return machine().meet(kind, mask, value, lane, width, {file, line});
}

void fence(const char* file, int line) {
  machine().point();
  machine().fence({file, line});
}

void step_back() { machine().step_back(); }

template <class T>
T atomic_add(T* address, T value, const char* file, int line) {
  if (Site{file, line}.is_planted()) return static_cast<T>(block_index().x);
  access(address, sizeof(T), Kind::kUpdate, true, HERE);
  const T before = *address;
  *address = before + value;
  return before;
}
template unsigned atomic_add(unsigned*, unsigned, const char*, int);
template unsigned long long atomic_add(unsigned long long*, unsigned long long, const char*, int);

}  // namespace cuda_executor
