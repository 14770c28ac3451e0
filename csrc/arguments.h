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

// Throw unless x is a strided tensor of a supported dtype with 0 <= dim < x.dim(), a companion is
// one on x's device, and one like x has its dtype and shape too.
void check_samples(const Tensor& x, int64_t dim);
void check_companion(const char* name, const Tensor& tensor, const Tensor& x);
void check_like(const char* name, const Tensor& tensor, const Tensor& x);

Dtype dtype_of(const Tensor& tensor);

// An uninitialised tensor with the sizes, strides and dtype of torch.empty_like(x).
Tensor empty_output(const Tensor& x);

// An uninitialised tensor of x's shape without `dim`, in the accumulate dtype of x.
Tensor empty_state(const Tensor& x, int64_t dim);

// Float64, contiguous, of x's shape without `dim`.
Tensor empty_rows(const Tensor& x, int64_t dim);

// A Problem over the rows of x. Operands are added axis by axis of x, so that they can broadcast;
// `finish` then drops and merges the axes that no operand tells apart.
class ProblemBuilder {
 public:
  ProblemBuilder(Op op, const Tensor& x, int64_t dim, bool reverse);

  // A tensor of x's shape, read or written sample by sample.
  void samples(Operand Problem::* operand, const Tensor& tensor);
  // A tensor that broadcasts to x's shape and is constant in time.
  void coefficient(const Tensor& tensor, const char* name);
  // A tensor that broadcasts to x's shape without `dim`.
  void per_row(Operand Problem::* operand, const Tensor& tensor, const char* name);

  Problem& finish();

  Problem problem;

 private:
  void add_strides(Operand& operand, const Tensor& tensor, int64_t ndim_to_match, bool has_time,
                   const char* name);

  const Tensor& x_;
  int64_t dim_;
  bool reverse_;
};

// The sum of `terms` into `result`, whose shape broadcasts to theirs.
Sum sum_of(const Tensor& terms, const Tensor& result);

}  // namespace ema_ext
