// From an operator's tensors to the Problem that kernels receive: checks, outputs, strides.
//
// The public functions have raised on users' mistakes before (ema_ext/functional.py); the checks
// here keep a direct call of a registered operator from reading or writing out of bounds.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "problem.h"
#include "sum.h"

namespace ema_ext {

using torch::stable::Tensor;

// Throw unless a tensor is strided and of a supported dtype, and besides: for samples, -x.dim() <=
// dim < x.dim(), which is returned counted from the front; a companion is on x's device, if it is
// there at all; one like x has its dtype and shape.
void check_tensor(const char* name, const Tensor& tensor);
int64_t check_samples(const Tensor& x, int64_t dim);
void check_companion(const char* name, const Tensor& tensor, const Tensor& x);
void check_optional(const char* name, const std::optional<Tensor>& tensor, const Tensor& x);
void check_like(const char* name, const Tensor& tensor, const Tensor& x);

Dtype dtype_of(const Tensor& tensor);

// An uninitialised tensor with the sizes, strides and dtype of torch.empty_like(x).
Tensor empty_output(const Tensor& x);

// An uninitialised tensor of x's shape without `dim`, in the accumulate dtype of x.
Tensor empty_state(const Tensor& x, int64_t dim);

// Uninitialised, for the gradient to a coefficient, before it is summed to the coefficient's shape:
// for one that is constant in time float64 and contiguous, of x's shape with size 1 along `dim`;
// for one that varies contiguous, of x's shape, in the coefficient's dtype or, if it is broadcast,
// at least float32.
Tensor empty_terms(const Tensor& x, const Tensor& coefficient, int64_t dim);

bool same_shape(const Tensor& one, const Tensor& other);

// A Problem over the rows of x. Operands are added axis by axis of x, so that they can broadcast;
// `finish` then drops and merges the axes that no operand tells apart.
class ProblemBuilder {
 public:
  ProblemBuilder(Op op, const Tensor& x, int64_t dim, bool reverse);

  // A tensor of x's shape, read or written sample by sample.
  void samples(Operand Problem::* operand, const Tensor& tensor);
  // A tensor that broadcasts to x's shape. Where it has a value per sample, `varying` is set.
  void coefficient(const Tensor& tensor, const char* name);
  // A tensor that broadcasts to x's shape without `dim`.
  void per_row(Operand Problem::* operand, const Tensor& tensor, const char* name);
  // From empty_terms; the coefficient has been added before.
  void grad_coefficient(const Tensor& terms);

  Problem& finish();

  Problem problem;

 private:
  void add_strides(Operand& operand, const Tensor& tensor, int64_t ndim_to_match, bool has_time,
                   const char* name);

  void turn(Operand& operand) const;

  const Tensor& x_;
  int64_t dim_;
  bool reverse_;
};

// Whether a coefficient that broadcasts to x's shape has a time axis of its own.
bool varies(const Tensor& coefficient, const Tensor& x, int64_t dim);

// The sum of `terms` into `result`, whose shape broadcasts to theirs.
Sum sum_of(const Tensor& terms, const Tensor& result);

}  // namespace ema_ext
