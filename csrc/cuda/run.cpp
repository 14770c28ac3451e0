// See run.h.

#include "cuda/run.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cuda/kernels.h"
#include "cuda/strategy.h"
#include "cuda/tuning.h"

namespace ema_ext::cuda {
namespace {

const Kernels& kernels_for(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64:
      return kKernelsFloat64;
    case Dtype::kFloat16:
      return kKernelsFloat16;
    case Dtype::kBFloat16:
      return kKernelsBFloat16;
    default:
      return kKernelsFloat32;
  }
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// The axis along which rows walk side by side to the last place, the others keeping their order.
void move_lanes_last(Problem& problem) {
  const int axis = lane_axis(problem);
  if (axis < 0) return;
  const auto rotate = [&](int64_t* axes) {
    std::rotate(axes + axis, axes + axis + 1, axes + problem.ndim);
  };
  rotate(problem.sizes);
  problem.for_each_operand([&](Operand& operand) { rotate(operand.row_strides); });
}

// The operand's last `ndim` row axes, at one index of those before.
View view_of(const Operand& operand, int64_t offset, int first, int ndim) {
  View view{operand.data, operand.time_stride, {}, operand.dtype};
  if (view.data != nullptr)
    view.data = static_cast<char*>(view.data) + offset * bytes_of(operand.dtype);
  std::copy_n(operand.row_strides + first, ndim, view.row_strides);
  return view;
}

// The rows of the innermost kRowDims axes at the `outer`'th index of the others.
Scan scan_of(const Problem& problem, int64_t outer) {
  const int first = std::max(0, problem.ndim - kRowDims), ndim = problem.ndim - first;
  Scan scan{};
  const auto view = [&](const Operand& operand) {
    int64_t offset = 0, rest = outer;
    for (int d = first - 1; d >= 0; --d) {
      offset += rest % problem.sizes[d] * operand.row_strides[d];
      rest /= problem.sizes[d];
    }
    return view_of(operand, offset, first, ndim);
  };
  scan.x = view(problem.x);
  scan.y = view(problem.y);
  scan.coefficient = view(problem.coefficient);
  scan.start = view(problem.start);
  scan.state = view(problem.state);
  scan.forward_x = view(problem.forward_x);
  scan.forward_y = view(problem.forward_y);
  scan.forward_start = view(problem.forward_start);
  scan.grad_coefficient = view(problem.grad_coefficient);
  scan.length = problem.length;
  scan.rows = 1;
  for (int d = 0; d < ndim; ++d) scan.rows *= scan.sizes[d] = problem.sizes[first + d];
  scan.value = problem.value;
  scan.ndim = ndim;
  scan.op = problem.op;
  scan.varying = problem.varying;
  scan.has_initial_state = problem.has_initial_state;
  return scan;
}

Sum sum_over_tiles(const Scan& scan, const Plan& plan, const void* partials) {
  Sum sum{partials, Dtype::kFloat64, scan.grad_coefficient.data, Dtype::kFloat64, {}, {}};
  sum.summed.add(plan.tiles, 1, 0);
  int64_t stride = scan.rows * plan.tiles;
  for (int d = 0; d < scan.ndim; ++d) {
    stride /= scan.sizes[d];
    sum.kept.add(scan.sizes[d], stride, scan.grad_coefficient.row_strides[d]);
  }
  return sum;
}

void run_scan(const Scan& scan, const Device& device, cudaStream_t stream,
              const Allocate& allocate) {
  const Kernels& kernels = kernels_for(scan.x.dtype);
  const Plan plan = make_plan(scan, device);
  const Workspace workspace = kernels.workspace(scan, plan);
  void* memory = nullptr;
  if (workspace.bytes > 0) {
    memory = allocate(workspace.bytes);
    check(cudaMemsetAsync(memory, 0, workspace.cleared, stream), "ema_ext: clearing the workspace");
  }
  check(kernels.scan(scan, plan, memory, stream), "ema_ext: launching a kernel");
  if (workspace.sums > 0)
    sum(sum_over_tiles(scan, plan, static_cast<char*>(memory) + workspace.sums), device, stream,
        allocate);
}

// Whether a warp does better to lie along the terms of a result than along the results.
bool reads_along_terms(const Sum& sum) {
  if (sum.kept.elements < 2) return true;
  if (sum.summed.ndim == 0 || sum.kept.ndim == 0) return false;
  const int64_t terms = std::abs(sum.summed.from[sum.summed.ndim - 1]);
  const int64_t results = std::abs(sum.kept.from[sum.kept.ndim - 1]);
  return sum.kept.elements < kSumColumns ||
         (terms < results && sum.summed.sizes[sum.summed.ndim - 1] >= kSumColumns);
}

}  // namespace

void run(Problem& problem, const Device& device, cudaStream_t stream, const Allocate& allocate) {
  if (problem.rows == 0 || problem.length == 0) return;
  move_lanes_last(problem);
  int64_t outer = 1;
  for (int d = 0; d < problem.ndim - kRowDims; ++d) outer *= problem.sizes[d];
  for (int64_t i = 0; i < outer; ++i) run_scan(scan_of(problem, i), device, stream, allocate);
}

void sum(const Sum& sum, const Device& device, cudaStream_t stream, const Allocate& allocate) {
  if (sum.kept.elements == 0) return;
  const int64_t chunks = std::max<int64_t>(1, (sum.summed.elements + kSumTerms - 1) / kSumTerms);
  const auto launch = [&](const Sum& part) {
    check(kernels_for(part.from_dtype).sum(part, chunks, reads_along_terms(part), stream),
          "ema_ext: launching a sum");
  };
  if (chunks == 1) return launch(sum);

  // First to one float64 per chunk, those of a result side by side; then the sum of these.
  void* const partials = allocate(sum.kept.elements * chunks * 8);
  Sum part{sum.from, sum.from_dtype, partials, Dtype::kFloat64, {}, sum.summed};
  Sum rest{partials, Dtype::kFloat64, sum.to, sum.to_dtype, {}, {}};
  rest.summed.add(chunks, 1, 0);
  int64_t stride = sum.kept.elements * chunks;
  for (int d = 0; d < sum.kept.ndim; ++d) {
    const int64_t size = sum.kept.sizes[d];
    stride /= size;
    part.kept.add(size, sum.kept.from[d], stride);
    rest.kept.add(size, stride, sum.kept.to[d]);
  }
  launch(part);
  cuda::sum(rest, device, stream, allocate);
}

}  // namespace ema_ext::cuda
