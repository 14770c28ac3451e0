// The plain struct that kernels receive: a Problem (problem.h) with as many row axes as one launch
// takes, and where a row's operands lie.
#pragma once

#include <cstdint>

#include "problem.h"

namespace ema_ext::cuda {

// Row axes that a launch takes; run.cpp launches once for each index of the axes before them. What
// the strategy merges seldom leaves more than three.
constexpr int kRowDims = 6;

// An Operand of a Problem. data == nullptr: absent.
struct View {
  void* data;
  int64_t time_stride;
  int64_t row_strides[kRowDims];
  Dtype dtype;
};

struct Scan {
  View x, y, coefficient, start, state, forward_x, forward_y, forward_start, grad_coefficient;
  int64_t sizes[kRowDims];
  int64_t length;
  int64_t rows;
  double value;
  int ndim;
  Op op;
  bool varying;
  bool has_initial_state;
};

}  // namespace ema_ext::cuda
