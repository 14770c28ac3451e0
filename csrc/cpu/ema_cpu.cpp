// The operators of ops.cpp on the CPU. Every entry takes the same steps in the same order: checks,
// outputs, problem, run.

#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <tuple>

#include "arguments.h"
#include "cpu/kernels.h"
#include "cpu/level.h"
#include "cpu/strategy.h"
#include "cpu/tuning.h"

namespace ema_ext::cpu {
namespace {

using OptionalTensor = std::optional<Tensor>;

const Kernels& kernels_for(Dtype dtype) {
  static const Kernels* const table = level() == Level::kV4   ? kKernelsX86_64V4
                                      : level() == Level::kV3 ? kKernelsX86_64V3
                                                              : kKernelsX86_64;
  return table[static_cast<int>(dtype)];
}

// Calls f(begin, end) over [0, items) on torch's threads, in this thread alone if there is little.
template <class F>
void parallel(int64_t items, int64_t samples_per_item, const F& f) {
  const int64_t grain = (kGrainSamples + samples_per_item - 1) / samples_per_item;
  if (items <= grain)
    f(0, items);
  else
    torch::stable::parallel_for(0, items, grain, f);
}

void run_cut(const Problem& problem, const Kernels& kernels, const Plan& plan) {
  const std::unique_ptr<SegmentEnd[]> ends(new SegmentEnd[plan.items]);
  const std::unique_ptr<Carry[]> carries(new Carry[plan.items]);
  parallel(plan.items, plan.samples_per_item, [&](int64_t begin, int64_t end) {
    kernels.find_aggregates(problem, begin, end, ends.get());
  });
  kernels.fold_carries(problem, 0, problem.rows, ends.get(), carries.get());
  parallel(plan.items, plan.samples_per_item, [&](int64_t begin, int64_t end) {
    kernels.scan_segments(problem, begin, end, carries.get(), ends.get());
  });
  kernels.finish_rows(problem, 0, problem.rows, ends.get());
}

// Asks for huge pages under a large output that has just been mapped and not yet been touched.
void advise_huge_pages(const Problem& problem) {
  const int64_t bytes = problem.rows * problem.length * bytes_of(problem.y.dtype);
  if (bytes < kHugePageBytes) return;
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  int64_t low = std::min<int64_t>(0, problem.y.time_stride * (problem.length - 1));
  const auto data = reinterpret_cast<uintptr_t>(problem.y.data) + low * bytes_of(problem.y.dtype);
  const uintptr_t first = (data + kPage - 1) / kPage * kPage, last = (data + bytes) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

void run(Problem& problem) {
  if (problem.rows == 0 || problem.length == 0) return;
  const Kernels& kernels = kernels_for(problem.x.dtype);
  uint32_t threads = 1;
  if (problem.rows * problem.length > kGrainSamples) {
    threads = torch::stable::get_num_threads();
    advise_huge_pages(problem);
  }
  const Plan plan = make_plan(problem, static_cast<int>(threads));
  if (plan.strategy == Strategy::kCut) return run_cut(problem, kernels, plan);
  const auto scan = plan.strategy == Strategy::kLanes ? kernels.scan_lanes : kernels.scan_rows;
  parallel(plan.items, plan.samples_per_item,
           [&](int64_t begin, int64_t end) { scan(problem, begin, end); });
}

// An alpha or a: a tensor, or one number for all rows.
struct Coefficient {
  const char* name;
  const Tensor* tensor;
  double value;
};

void set(ProblemBuilder& builder, const Coefficient& coefficient) {
  if (coefficient.tensor == nullptr)
    builder.problem.value = coefficient.value;
  else
    builder.coefficient(*coefficient.tensor, coefficient.name);
}

Tensor scan(Op op, const Tensor& x, const Coefficient& coefficient,
            const OptionalTensor& initial_state, int64_t dim, bool reverse, Tensor* state) {
  check_samples(x, dim);
  if (coefficient.tensor != nullptr) check_companion(coefficient.name, *coefficient.tensor, x);
  if (initial_state.has_value()) check_companion("initial_state", *initial_state, x);
  STD_TORCH_CHECK(state == nullptr || initial_state.has_value() || x.size(dim) > 0,
                  "x has length 0 and there is no initial_state to hand on");

  Tensor y = empty_output(x);
  if (state != nullptr) *state = empty_state(x, dim);

  ProblemBuilder builder(op, x, dim, reverse);
  builder.samples(&Problem::y, y);
  set(builder, coefficient);
  if (initial_state.has_value()) builder.per_row(&Problem::start, *initial_state, "initial_state");
  if (state != nullptr) builder.per_row(&Problem::state, *state, "state");

  run(builder.finish());
  if (state != nullptr && x.size(dim) == 0) torch::stable::copy_(*state, *initial_state);
  return y;
}

}  // namespace

Tensor ema(const Tensor& x, double alpha, const OptionalTensor& initial_state, int64_t dim,
           bool reverse) {
  return scan(Op::kEma, x, {"alpha", nullptr, alpha}, initial_state, dim, reverse, nullptr);
}

Tensor ema_tensor(const Tensor& x, const Tensor& alpha, const OptionalTensor& initial_state,
                  int64_t dim, bool reverse) {
  return scan(Op::kEma, x, {"alpha", &alpha, 0}, initial_state, dim, reverse, nullptr);
}

std::tuple<Tensor, Tensor> ema_with_state(const Tensor& x, double alpha,
                                          const OptionalTensor& initial_state, int64_t dim,
                                          bool reverse) {
  Tensor state;
  Tensor y = scan(Op::kEma, x, {"alpha", nullptr, alpha}, initial_state, dim, reverse, &state);
  return {y, state};
}

std::tuple<Tensor, Tensor> ema_with_state_tensor(const Tensor& x, const Tensor& alpha,
                                                 const OptionalTensor& initial_state, int64_t dim,
                                                 bool reverse) {
  Tensor state;
  Tensor y = scan(Op::kEma, x, {"alpha", &alpha, 0}, initial_state, dim, reverse, &state);
  return {y, state};
}

Tensor linear_recurrence(const Tensor& a, const Tensor& b, const OptionalTensor& initial_state,
                         int64_t dim, bool reverse) {
  return scan(Op::kLinearRecurrence, b, {"a", &a, 0}, initial_state, dim, reverse, nullptr);
}

namespace {

// Adds each row's grad_coefficient to its coefficient.
void add_rows(const Problem& problem) {
  if (problem.rows == 0 || problem.length == 0) return;
  const auto* from = static_cast<const double*>(problem.grad_coefficient.data);
  auto* to = static_cast<double*>(problem.coefficient.data);
  int64_t index[kMaxDims] = {};
  for (int64_t row = 0; row < problem.rows; ++row) {
    *to += *from;
    for (int d = problem.ndim - 1; d >= 0; --d) {
      const bool wraps = ++index[d] == problem.sizes[d];
      const int64_t by = wraps ? 1 - problem.sizes[d] : 1;
      from += by * problem.grad_coefficient.row_strides[d];
      to += by * problem.coefficient.row_strides[d];
      if (!wraps) break;
      index[d] = 0;
    }
  }
}

// The problem of the adjoint: the scan of grad_y along the other direction of time.
ProblemBuilder adjoint(const Tensor& grad_y, const OptionalTensor& grad_state, const Tensor& grad_x,
                       const Tensor& grad_initial_state, bool has_initial_state, int64_t dim,
                       bool reverse) {
  ProblemBuilder builder(Op::kEmaBackward, grad_y, dim, !reverse);
  builder.problem.has_initial_state = has_initial_state;
  builder.samples(&Problem::y, grad_x);
  builder.per_row(&Problem::state, grad_initial_state, "grad_initial_state");
  if (grad_state.has_value()) builder.per_row(&Problem::start, *grad_state, "grad_state");
  return builder;
}

// The gradient of an empty row's state is that of its initial state.
void hand_on(const OptionalTensor& grad_state, Tensor& grad_initial_state) {
  if (grad_state.has_value())
    torch::stable::copy_(grad_initial_state, *grad_state);
  else
    torch::stable::zero_(grad_initial_state);
}

// Sums the rows' float64 gradients into alpha's shape, in the order of rows, whatever the threads.
Tensor sum_to_alpha(const Tensor& rows, const Tensor& alpha, const Tensor& x, int64_t dim) {
  const auto wide = torch::headeronly::ScalarType::Double;
  Tensor sums = torch::stable::new_zeros(alpha, alpha.sizes(), wide);
  ProblemBuilder builder(Op::kEma, x, dim, false);
  builder.coefficient(sums, "alpha");
  builder.per_row(&Problem::grad_coefficient, rows, "rows");
  add_rows(builder.finish());
  if (alpha.scalar_type() == wide) return sums;
  Tensor grad_alpha = torch::stable::new_empty(alpha, alpha.sizes());
  return torch::stable::copy_(grad_alpha, sums);
}

}  // namespace

std::tuple<Tensor, Tensor> ema_backward(const Tensor& grad_y, const OptionalTensor& grad_state,
                                        double alpha, bool has_initial_state, int64_t dim,
                                        bool reverse) {
  check_samples(grad_y, dim);
  if (grad_state.has_value()) check_companion("grad_state", *grad_state, grad_y);

  Tensor grad_x = empty_output(grad_y);
  Tensor grad_initial_state = empty_state(grad_y, dim);

  ProblemBuilder builder =
      adjoint(grad_y, grad_state, grad_x, grad_initial_state, has_initial_state, dim, reverse);
  builder.problem.value = alpha;

  run(builder.finish());
  if (grad_y.size(dim) == 0) hand_on(grad_state, grad_initial_state);
  return {grad_x, grad_initial_state};
}

std::tuple<Tensor, Tensor, Tensor> ema_backward_tensor(const Tensor& grad_y,
                                                       const OptionalTensor& grad_state,
                                                       const Tensor& x, const Tensor& alpha,
                                                       const OptionalTensor& initial_state,
                                                       int64_t dim, bool reverse) {
  check_samples(grad_y, dim);
  if (grad_state.has_value()) check_companion("grad_state", *grad_state, grad_y);
  check_like("x", x, grad_y);
  check_companion("alpha", alpha, grad_y);
  if (initial_state.has_value()) check_companion("initial_state", *initial_state, grad_y);

  Tensor grad_x = empty_output(grad_y);
  Tensor grad_initial_state = empty_state(grad_y, dim);
  Tensor grad_alpha_rows = empty_rows(grad_y, dim);

  ProblemBuilder builder = adjoint(grad_y, grad_state, grad_x, grad_initial_state,
                                   initial_state.has_value(), dim, reverse);
  builder.coefficient(alpha, "alpha");
  builder.samples(&Problem::forward_x, x);
  if (initial_state.has_value())
    builder.per_row(&Problem::forward_start, *initial_state, "initial_state");
  builder.per_row(&Problem::grad_coefficient, grad_alpha_rows, "grad_alpha");

  run(builder.finish());
  if (grad_y.size(dim) == 0) hand_on(grad_state, grad_initial_state);
  return {grad_x, sum_to_alpha(grad_alpha_rows, alpha, x, dim), grad_initial_state};
}

}  // namespace ema_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(ema_ext, CPU, m) {
  m.impl("ema", TORCH_BOX(&ema_ext::cpu::ema));
  m.impl("ema.Tensor", TORCH_BOX(&ema_ext::cpu::ema_tensor));
  m.impl("ema_with_state", TORCH_BOX(&ema_ext::cpu::ema_with_state));
  m.impl("ema_with_state.Tensor", TORCH_BOX(&ema_ext::cpu::ema_with_state_tensor));
  m.impl("ema_backward", TORCH_BOX(&ema_ext::cpu::ema_backward));
  m.impl("ema_backward.Tensor", TORCH_BOX(&ema_ext::cpu::ema_backward_tensor));
  m.impl("linear_recurrence", TORCH_BOX(&ema_ext::cpu::linear_recurrence));
}
