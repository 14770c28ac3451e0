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

  static Tensor ema_samples(const Tensor& x, double alpha, int64_t dim, bool reverse) {
    return scan(Op::kEma, x, {"alpha", nullptr, alpha}, {}, dim, reverse, nullptr);
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
    dim = check_samples(grad_y, dim);
    check_optional("grad_state", grad_state, grad_y);

    const Guard guard(grad_y);
    Tensor grad_x = empty_output(grad_y);
    Tensor grad_initial_state = empty_state(grad_y, dim);

    ProblemBuilder builder = adjoint(Op::kEmaBackward, grad_y, grad_x, dim, reverse);
    add_states(builder, grad_state, grad_initial_state, has_initial_state);
    builder.problem.value = alpha;

    Backend::run(builder.finish());
    if (grad_y.size(dim) == 0) hand_on(grad_state, grad_initial_state);
    return {grad_x, grad_initial_state};
  }

  static Tensor ema_backward_samples(const Tensor& grad_y, double alpha, int64_t dim,
                                     bool reverse) {
    dim = check_samples(grad_y, dim);

    const Guard guard(grad_y);
    Tensor grad_x = empty_output(grad_y);

    ProblemBuilder builder = adjoint(Op::kEmaBackward, grad_y, grad_x, dim, reverse);
    builder.problem.value = alpha;

    Backend::run(builder.finish());
    return grad_x;
  }

  static Three ema_backward_tensor(const Tensor& grad_y, const OptionalTensor& grad_state,
                                   const Tensor& x, const Tensor& alpha,
                                   const OptionalTensor& initial_state, int64_t dim, bool reverse) {
    dim = check_samples(grad_y, dim);
    STD_TORCH_CHECK(!varies(alpha, grad_y, dim), "alpha must be constant in time");
    return backward(Op::kEmaBackward, grad_y, grad_state, {"alpha", &alpha, 0}, &x, nullptr,
                    initial_state, dim, reverse);
  }

  static Three ema_backward_varying(const Tensor& grad_y, const OptionalTensor& grad_state,
                                    const Tensor& x, const Tensor& alpha, const Tensor& y,
                                    const OptionalTensor& initial_state, int64_t dim,
                                    bool reverse) {
    dim = check_samples(grad_y, dim);
    STD_TORCH_CHECK(varies(alpha, grad_y, dim), "alpha must vary in time");
    return backward(Op::kEmaBackward, grad_y, grad_state, {"alpha", &alpha, 0}, &x, &y,
                    initial_state, dim, reverse);
  }

  static Tensor linear_recurrence(const Tensor& a, const Tensor& b,
                                  const OptionalTensor& initial_state, int64_t dim, bool reverse) {
    return scan(Op::kLinearRecurrence, b, {"a", &a, 0}, initial_state, dim, reverse, nullptr);
  }

  static Two linear_recurrence_with_state(const Tensor& a, const Tensor& b,
                                          const OptionalTensor& initial_state, int64_t dim,
                                          bool reverse) {
    Tensor state;
    Tensor y = scan(Op::kLinearRecurrence, b, {"a", &a, 0}, initial_state, dim, reverse, &state);
    return {y, state};
  }

  static Three linear_recurrence_backward(const Tensor& grad_y, const OptionalTensor& grad_state,
                                          const Tensor& a, const Tensor& y,
                                          const OptionalTensor& initial_state, int64_t dim,
                                          bool reverse) {
    dim = check_samples(grad_y, dim);
    auto [grad_b, grad_a, grad_initial_state] =
        backward(Op::kLinearRecurrenceBackward, grad_y, grad_state, {"a", &a, 0}, nullptr, &y,
                 initial_state, dim, reverse);
    return {grad_a, grad_b, grad_initial_state};
  }

  static Tensor sum_to(const Tensor& terms, const Tensor& like) {
    check_tensor("terms", terms);
    check_companion("like", like, terms);
    const Guard guard(terms);
    return sum(terms, like);
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
    dim = check_samples(x, dim);
    if (coefficient.tensor != nullptr) check_companion(coefficient.name, *coefficient.tensor, x);
    check_optional("initial_state", initial_state, x);
    STD_TORCH_CHECK(
        state == nullptr || op != Op::kEma || initial_state.has_value() || x.size(dim) > 0,
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
    if (state != nullptr && x.size(dim) == 0) hand_on(initial_state, *state);
    return y;
  }

  // The gradients to the samples, to the coefficient and to the initial state. x and y are the
  // forward's, where the operation wants them.
  static Three backward(Op op, const Tensor& grad_y, const OptionalTensor& grad_state,
                        const Coefficient& coefficient, const Tensor* x, const Tensor* y,
                        const OptionalTensor& initial_state, int64_t dim, bool reverse) {
    const Tensor& alpha = *coefficient.tensor;
    check_optional("grad_state", grad_state, grad_y);
    check_companion(coefficient.name, alpha, grad_y);
    if (x != nullptr) check_like("x", *x, grad_y);
    if (y != nullptr) check_like("y", *y, grad_y);
    check_optional("initial_state", initial_state, grad_y);

    const Guard guard(grad_y);
    Tensor grad_x = empty_output(grad_y);
    Tensor grad_initial_state = empty_state(grad_y, dim);
    Tensor terms = empty_terms(grad_y, alpha, dim);

    ProblemBuilder builder = adjoint(op, grad_y, grad_x, dim, reverse);
    add_states(builder, grad_state, grad_initial_state, initial_state.has_value());
    builder.coefficient(alpha, coefficient.name);
    builder.grad_coefficient(terms);
    if (x != nullptr) builder.samples(&Problem::forward_x, *x);
    if (y != nullptr) builder.samples(&Problem::forward_y, *y);
    if (initial_state.has_value())
      builder.per_row(&Problem::forward_start, *initial_state, "initial_state");

    Backend::run(builder.finish());
    if (grad_y.size(dim) == 0) {
      hand_on(grad_state, grad_initial_state);
      torch::stable::zero_(terms);
    }
    return {grad_x, sum_like(terms, alpha), grad_initial_state};
  }

  // The problem of the adjoint: the scan of grad_y along the other direction of time.
  static ProblemBuilder adjoint(Op op, const Tensor& grad_y, const Tensor& grad_x, int64_t dim,
                                bool reverse) {
    ProblemBuilder builder(op, grad_y, dim, !reverse);
    builder.samples(&Problem::y, grad_x);
    return builder;
  }

  static void add_states(ProblemBuilder& builder, const OptionalTensor& grad_state,
                         const Tensor& grad_initial_state, bool has_initial_state) {
    builder.problem.has_initial_state = has_initial_state;
    builder.per_row(&Problem::state, grad_initial_state, "grad_initial_state");
    if (grad_state.has_value()) builder.per_row(&Problem::start, *grad_state, "grad_state");
  }

  // What an empty row hands on: the state it was given, or 0.
  static void hand_on(const OptionalTensor& from, Tensor& to) {
    if (from.has_value())
      torch::stable::copy_(to, *from);
    else
      torch::stable::zero_(to);
  }

  // The terms summed into the shape and dtype of `like`, which broadcasts to theirs.
  static Tensor sum(const Tensor& terms, const Tensor& like) {
    Tensor result = torch::stable::new_empty(like, like.sizes());
    Backend::sum(sum_of(terms, result));
    return result;
  }

  // The same for terms from empty_terms, which may be the result already.
  static Tensor sum_like(const Tensor& terms, const Tensor& like) {
    return same_shape(terms, like) && terms.scalar_type() == like.scalar_type() ? terms
                                                                                : sum(terms, like);
  }
};

// Registers the entries for the dispatch key of `m`.
template <class Backend, class Library>
void register_entries(Library& m) {
  using E = Entries<Backend>;
  m.impl("ema", TORCH_BOX(&E::ema));
  m.impl("ema.Samples", TORCH_BOX(&E::ema_samples));
  m.impl("ema.Tensor", TORCH_BOX(&E::ema_tensor));
  m.impl("ema_with_state", TORCH_BOX(&E::ema_with_state));
  m.impl("ema_with_state.Tensor", TORCH_BOX(&E::ema_with_state_tensor));
  m.impl("ema_backward", TORCH_BOX(&E::ema_backward));
  m.impl("ema_backward.Samples", TORCH_BOX(&E::ema_backward_samples));
  m.impl("ema_backward.Tensor", TORCH_BOX(&E::ema_backward_tensor));
  m.impl("ema_backward.Varying", TORCH_BOX(&E::ema_backward_varying));
  m.impl("linear_recurrence", TORCH_BOX(&E::linear_recurrence));
  m.impl("linear_recurrence_with_state", TORCH_BOX(&E::linear_recurrence_with_state));
  m.impl("linear_recurrence_backward", TORCH_BOX(&E::linear_recurrence_backward));
  m.impl("sum_to", TORCH_BOX(&E::sum_to));
}

}  // namespace ema_ext
