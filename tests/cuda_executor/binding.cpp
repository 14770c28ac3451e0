// The project's CUDA kernels as operators on CPU tensors, torch.ops.ema_ext_executor.*, whose
// schemas are those of ema_ext. Each call declares its tensors, so that the kernels may touch their
// elements and nothing else, and checks that all of each result was written.

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "control.h"
#include "cuda/run.h"
#include "entries.h"
#include "executor.h"
#include "shadow.h"

namespace {

using cuda_executor::kCell;
using cuda_executor::Range;
using ema_ext::Dtype;
using ema_ext::Operand;
using ema_ext::Problem;
using ema_ext::Sum;

struct Axis {
  int64_t size, stride;  // in elements
};

enum class Role { kInput, kOutput };

// Declares the elements at these axes and no others. What is to be written is NaN before.
void declare(const char* name, void* data, Dtype dtype, std::vector<Axis> axes, Role role) {
  if (data == nullptr) return;
  const int64_t bytes = ema_ext::bytes_of(dtype);
  int64_t low = 0, high = 0;
  for (Axis& axis : axes) {
    if (axis.size == 0) return;
    if (axis.stride == 0) axis.size = 1;
    (axis.stride < 0 ? low : high) += (axis.size - 1) * axis.stride;
  }
  Range range;
  range.name = name;
  range.base = static_cast<char*>(data) + low * bytes;
  range.bytes = static_cast<size_t>((high - low + 1) * bytes);
  range.initialised = role == Role::kInput;
  range.writable = range.output = role == Role::kOutput;
  const bool checks = cuda_executor::options().checks;
  if (checks) range.cells.resize(range.bytes / kCell);
  for (auto& cell : range.cells) cell.element = false;

  std::vector<int64_t> index(axes.size());
  int64_t at = -low;
  for (bool more = true; more;) {
    if (role == Role::kOutput) std::memset(range.base + at * bytes, 0xFF, bytes);
    if (checks)
      for (int64_t i = at * bytes; i < (at + 1) * bytes; i += kCell)
        range.cells[i / kCell].element = true;
    more = false;
    for (size_t d = axes.size(); d-- > 0 && !more;) {
      at += axes[d].stride;
      more = ++index[d] < axes[d].size;
      if (!more) {
        at -= axes[d].size * axes[d].stride;
        index[d] = 0;
      }
    }
  }
  cuda_executor::memory().add(std::move(range));
}

void declare(const Problem& problem) {
  if (problem.length == 0) return;  // no kernel runs, and what is due the entries write
  const auto operand = [&](const char* name, const Operand& o, bool per_sample, Role role) {
    std::vector<Axis> axes;
    for (int d = 0; d < problem.ndim; ++d) axes.push_back({problem.sizes[d], o.row_strides[d]});
    if (per_sample) axes.push_back({problem.length, o.time_stride});
    declare(name, o.data, o.dtype, std::move(axes), role);
  };
  operand("x", problem.x, true, Role::kInput);
  operand("coefficient", problem.coefficient, problem.varying, Role::kInput);
  operand("start", problem.start, false, Role::kInput);
  operand("forward_x", problem.forward_x, true, Role::kInput);
  operand("forward_y", problem.forward_y, true, Role::kInput);
  operand("forward_start", problem.forward_start, false, Role::kInput);
  operand("y", problem.y, true, Role::kOutput);
  operand("state", problem.state, false, Role::kOutput);
  operand("grad_coefficient", problem.grad_coefficient, problem.varying, Role::kOutput);
}

void declare(const Sum& sum) {
  std::vector<Axis> from, to;
  for (const ema_ext::Axes* axes : {&sum.kept, &sum.summed})
    for (int d = 0; d < axes->ndim; ++d) from.push_back({axes->sizes[d], axes->from[d]});
  for (int d = 0; d < sum.kept.ndim; ++d) to.push_back({sum.kept.sizes[d], sum.kept.to[d]});
  declare("terms", const_cast<void*>(sum.from), sum.from_dtype, std::move(from), Role::kInput);
  declare("result", sum.to, sum.to_dtype, std::move(to), Role::kOutput);
}

// Workspace of one call, none of it initialised.
class Arena {
 public:
  void* allocate(int64_t bytes) {
    struct alignas(256) Line {  // as torch's allocator aligns
      char bytes[256];
    };
    const std::shared_ptr<Line[]> memory(new Line[bytes / sizeof(Line) + 1]);
    std::memset(memory.get(), 0xFF, bytes);
    Range range;
    range.name = "workspace " + std::to_string(memory_.size());
    range.base = memory[0].bytes;
    range.bytes = static_cast<size_t>(bytes);
    if (cuda_executor::options().checks) range.cells.resize((range.bytes + kCell - 1) / kCell);
    cuda_executor::memory().add(std::move(range));
    memory_.push_back(memory);
    return memory.get();
  }

 private:
  std::vector<std::shared_ptr<void>> memory_;
};

template <class Work, class F>
void execute(Work& work, const F& f) {
  const bool well = cuda_executor::guarded([&] {
    declare(work);
    Arena arena;
    const ema_ext::cuda::Device device{cuda_executor::options().multiprocessors};
    f(work, device, nullptr, [&](int64_t bytes) { return arena.allocate(bytes); });
  });
  if (!well) throw std::runtime_error(cuda_executor::last_error());
}

struct Backend {
  struct Guard {
    explicit Guard(const ema_ext::Tensor&) {}
  };
  static void run(Problem& problem) { execute(problem, ema_ext::cuda::run); }
  static void sum(const Sum& sum) { execute(sum, ema_ext::cuda::sum); }
};

}  // namespace

// The runtime's functions that the host side calls, on host memory.

cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  Range* range = cuda_executor::memory().find(address);
  const size_t offset = range ? static_cast<char*>(address) - range->base : 0;
  if (bytes > 0 && (range == nullptr || !range->writable || offset + bytes > range->bytes))
    throw std::runtime_error("CUDA executor: memset out of bounds");
  std::memset(address, value, bytes);
  if (range != nullptr && !range->cells.empty())
    for (size_t i = offset / kCell; i < (offset + bytes + kCell - 1) / kCell; ++i)
      ++range->cells[i].write_count;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "an error";
}

STABLE_TORCH_LIBRARY_IMPL(ema_ext_executor, CPU, m) { ema_ext::register_entries<Backend>(m); }
