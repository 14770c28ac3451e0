// The plain struct that a backend receives to sum a tensor over the axes along which it was
// broadcast, free of torch.
#pragma once

#include <cstdint>

#include "problem.h"

namespace ema_ext {

// Some axes of a tensor; strides in elements.
struct Axes {
  int ndim = 0;
  int64_t elements = 1;  // the product of sizes
  int64_t sizes[kMaxDims];
  int64_t from[kMaxDims];  // strides of the terms
  int64_t to[kMaxDims];    // strides of the result

  // Inside those there are; axes that need not be told apart become one.
  void add(int64_t size, int64_t from_stride, int64_t to_stride) {
    if (size == 1) return;
    elements *= size;
    if (ndim > 0 && from[ndim - 1] == from_stride * size && to[ndim - 1] == to_stride * size) {
      size *= sizes[--ndim];
    }
    sizes[ndim] = size;
    from[ndim] = from_stride;
    to[ndim++] = to_stride;
  }
};

// to[i] = sum over j of from[i, j], i over the kept axes and j over the summed ones, in float64 and
// rounded once; 0 if there is nothing to sum. The order of the terms follows from the sizes alone,
// so that the result is bitwise the same for any number of threads.
struct Sum {
  const void* from;
  Dtype from_dtype;
  void* to;
  Dtype to_dtype;
  Axes kept, summed;
};

}  // namespace ema_ext
