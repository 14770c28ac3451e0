// The entries of the registered operators (ops.cpp), the same for every backend. Each takes the
// same steps in the same order: checks, device guard, outputs, problem, run.
//
// A Backend has
//   struct Guard { explicit Guard(const Tensor&); };   makes the tensor's device the current one
//   static void run(Problem&);                         may reorder the problem's axes
//   static void sum(const Sum&);
// whose results are there for whatever follows on the current stream.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "arguments.h"
#include "sum.h"

namespace ema_ext {

using OptionalTensor = std::optional<Tensor>;

template <class Backend>
struct Entries {
  using Two = std::tuple<Tensor, Tensor>;
  using Three = std::tuple<Tensor, Tensor, Tensor>;
  using Guard = typename Backend::Guard;

  static Tensor ema(const Tensor& x, double alpha, const OptionalTensor& initial_state, int64_t dim,
                    bool reverse) {
    return scan(Op::kEma, x, {"alpha", nullptr, alpha}, initial_state, dim, reverse, nullptr);
  }

  static Tensor ema_tensor(const Tensor& x, const Tensor& alpha,
                           const OptionalTensor& initial_state, int64_t dim, bool reverse) {
    return scan(Op::kEma, x, {"alpha", &alpha, 0}, initial_state, dim, reverse, nullptr);
  }

  static Two ema_with_state(const Tensor& x, double alpha, const OptionalTensor& initial_state,
                            int64_t dim, bool reverse) {
    Tensor state;
    Tensor y = scan(Op::kEma, x, {"alpha", nullptr, alpha}, initial_state, dim, reverse, &state);
    return {y, state};
  }

  static Two ema_with_state_tensor(const Tensor& x, const Tensor& alpha,
                                   const OptionalTensor& initial_state, int64_t dim, bool reverse) {
    Tensor state;
    Tensor y = scan(Op::kEma, x, {"alpha", &alpha, 0}, initial_state, dim, reverse, &state);
    return {y, state};
  }

  static Two ema_backward(const Tensor& grad_y, const OptionalTensor& grad_state, double alpha,
                          bool has_initial_state, int64_t dim, bool reverse) {
    check_samples(grad_y, dim);
    if (grad_state.has_value()) check_companion("grad_state", *grad_state, grad_y);

    const Guard guard(grad_y);
    Tensor grad_x = empty_output(grad_y);
    Tensor grad_initial_state = empty_state(grad_y, dim);

    ProblemBuilder builder =
        adjoint(grad_y, grad_state, grad_x, grad_initial_state, has_initial_state, dim, reverse);
    builder.problem.value = alpha;

    Backend::run(builder.finish());
    if (grad_y.size(dim) == 0) hand_on(grad_state, grad_initial_state);
    return {grad_x, grad_initial_state};
  }

  static Three ema_backward_tensor(const Tensor& grad_y, const OptionalTensor& grad_state,
                                   const Tensor& x, const Tensor& alpha,
                                   const OptionalTensor& initial_state, int64_t dim, bool reverse) {
    check_samples(grad_y, dim);
    if (grad_state.has_value()) check_companion("grad_state", *grad_state, grad_y);
    check_like("x", x, grad_y);
    check_companion("alpha", alpha, grad_y);
    if (initial_state.has_value()) check_companion("initial_state", *initial_state, grad_y);

    const Guard guard(grad_y);
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

    Backend::run(builder.finish());
    if (grad_y.size(dim) == 0) {
      hand_on(grad_state, grad_initial_state);
      torch::stable::zero_(grad_alpha_rows);
    }
    return {grad_x, sum(torch::stable::unsqueeze(grad_alpha_rows, dim), alpha), grad_initial_state};
  }

  static Tensor linear_recurrence(const Tensor& a, const Tensor& b,
                                  const OptionalTensor& initial_state, int64_t dim, bool reverse) {
    return scan(Op::kLinearRecurrence, b, {"a", &a, 0}, initial_state, dim, reverse, nullptr);
  }

 private:
  // An alpha or a: a tensor, or one number for all rows.
  struct Coefficient {
    const char* name;
    const Tensor* tensor;
    double value;
  };

  static void set(ProblemBuilder& builder, const Coefficient& coefficient) {
    if (coefficient.tensor == nullptr)
      builder.problem.value = coefficient.value;
    else
      builder.coefficient(*coefficient.tensor, coefficient.name);
  }

  // With `state`, the state after the last sample goes there.
  static Tensor scan(Op op, const Tensor& x, const Coefficient& coefficient,
                     const OptionalTensor& initial_state, int64_t dim, bool reverse,
                     Tensor* state) {
    check_samples(x, dim);
    if (coefficient.tensor != nullptr) check_companion(coefficient.name, *coefficient.tensor, x);
    if (initial_state.has_value()) check_companion("initial_state", *initial_state, x);
    STD_TORCH_CHECK(state == nullptr || initial_state.has_value() || x.size(dim) > 0,
                    "x has length 0 and there is no initial_state to hand on");

    const Guard guard(x);
    Tensor y = empty_output(x);
    if (state != nullptr) *state = empty_state(x, dim);

    ProblemBuilder builder(op, x, dim, reverse);
    builder.samples(&Problem::y, y);
    set(builder, coefficient);
    if (initial_state.has_value())
      builder.per_row(&Problem::start, *initial_state, "initial_state");
    if (state != nullptr) builder.per_row(&Problem::state, *state, "state");

    Backend::run(builder.finish());
    if (state != nullptr && x.size(dim) == 0) torch::stable::copy_(*state, *initial_state);
    return y;
  }

  // The problem of the adjoint: the scan of grad_y along the other direction of time.
  static ProblemBuilder adjoint(const Tensor& grad_y, const OptionalTensor& grad_state,
                                const Tensor& grad_x, const Tensor& grad_initial_state,
                                bool has_initial_state, int64_t dim, bool reverse) {
    ProblemBuilder builder(Op::kEmaBackward, grad_y, dim, !reverse);
    builder.problem.has_initial_state = has_initial_state;
    builder.samples(&Problem::y, grad_x);
    builder.per_row(&Problem::state, grad_initial_state, "grad_initial_state");
    if (grad_state.has_value()) builder.per_row(&Problem::start, *grad_state, "grad_state");
    return builder;
  }

  // The gradient of an empty row's state is that of its initial state.
  static void hand_on(const OptionalTensor& grad_state, Tensor& grad_initial_state) {
    if (grad_state.has_value())
      torch::stable::copy_(grad_initial_state, *grad_state);
    else
      torch::stable::zero_(grad_initial_state);
  }

  // The terms summed into the shape and dtype of `like`, which broadcasts to theirs.
  static Tensor sum(const Tensor& terms, const Tensor& like) {
    Tensor result = torch::stable::new_empty(like, like.sizes());
    Backend::sum(sum_of(terms, result));
    return result;
  }
};

// Registers the entries for the dispatch key of `m`.
template <class Backend, class Library>
void register_entries(Library& m) {
  using E = Entries<Backend>;
  m.impl("ema", TORCH_BOX(&E::ema));
  m.impl("ema.Tensor", TORCH_BOX(&E::ema_tensor));
  m.impl("ema_with_state", TORCH_BOX(&E::ema_with_state));
  m.impl("ema_with_state.Tensor", TORCH_BOX(&E::ema_with_state_tensor));
  m.impl("ema_backward", TORCH_BOX(&E::ema_backward));
  m.impl("ema_backward.Tensor", TORCH_BOX(&E::ema_backward_tensor));
  m.impl("linear_recurrence", TORCH_BOX(&E::linear_recurrence));
}

}  // namespace ema_ext
