// See arguments.h.

#include "arguments.h"

#include <torch/csrc/stable/ops.h>

#include <string>
#include <vector>

namespace ema_ext {
namespace {

using torch::headeronly::ScalarType;

// What torch's shims know of a tensor by a number. The enums that Tensor's own methods make of it
// cost them a call for each value that there is.
template <class Get>
int32_t number(const Get& get, const Tensor& tensor) {
  int32_t value;
  STABLE_TORCH_ERROR_CODE_CHECK(get(tensor.get(), &value));
  return value;
}

std::optional<Dtype> supported_dtype(const Tensor& tensor) {
  const int32_t dtype = number(aoti_torch_get_dtype, tensor);
  if (dtype == aoti_torch_dtype_float32()) return Dtype::kFloat32;
  if (dtype == aoti_torch_dtype_float64()) return Dtype::kFloat64;
  if (dtype == aoti_torch_dtype_float16()) return Dtype::kFloat16;
  if (dtype == aoti_torch_dtype_bfloat16()) return Dtype::kBFloat16;
  return {};
}

// A sixth of the time of a call by name.
Tensor empty_strided(const Tensor& like, int32_t dtype,
                     torch::headeronly::IntHeaderOnlyArrayRef sizes,
                     torch::headeronly::IntHeaderOnlyArrayRef strides) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               dtype, number(aoti_torch_get_device_type, like),
                               number(aoti_torch_get_device_index, like), &handle));
  return Tensor(handle);
}

// Contiguous, of x's shape without dim.
Tensor empty_without_dim(const Tensor& x, int64_t dim, ScalarType dtype) {
  const auto from = x.sizes();
  std::vector<int64_t> sizes(from.begin(), from.end());
  sizes.erase(sizes.begin() + dim);
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= sizes[d] > 0 ? sizes[d] : 1) strides[d] = stride;
  return empty_strided(x, static_cast<int32_t>(dtype), sizes, strides);
}

}  // namespace

void check_tensor(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(supported_dtype(tensor).has_value(), name,
                  " must be float32, float64, float16 or bfloat16");
  STD_TORCH_CHECK(number(aoti_torch_get_layout, tensor) == aoti_torch_layout_strided(), name,
                  " must be a strided tensor");
  STD_TORCH_CHECK(tensor.dim() <= kMaxDims, name, " has ", tensor.dim(), " dimensions, more than ",
                  kMaxDims);
  // Storage that was resized away leaves a tensor its shape, and no address.
  STD_TORCH_CHECK(tensor.data_ptr() != nullptr || tensor.numel() == 0, name, " has ",
                  tensor.numel(), " elements and no memory: its storage was freed");
}

int64_t check_samples(const Tensor& x, int64_t dim) {
  check_tensor("x", x);
  const int64_t ndim = x.dim();
  STD_TORCH_CHECK(-ndim <= dim && dim < ndim, "dim must lie in [", -ndim, ", ", ndim, "), and is ",
                  dim);
  return dim < 0 ? dim + ndim : dim;
}

void check_companion(const char* name, const Tensor& tensor, const Tensor& x) {
  check_tensor(name, tensor);
  STD_TORCH_CHECK(tensor.device() == x.device(), name, " must be on x's device");
}

void check_optional(const char* name, const std::optional<Tensor>& tensor, const Tensor& x) {
  if (tensor.has_value()) check_companion(name, *tensor, x);
}

void check_like(const char* name, const Tensor& tensor, const Tensor& x) {
  check_companion(name, tensor, x);
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), name, " must have x's dtype");
  STD_TORCH_CHECK(tensor.dim() == x.dim(), name, " must have x's shape");
  for (int64_t d = 0; d < x.dim(); ++d)
    STD_TORCH_CHECK(tensor.size(d) == x.size(d), name, " must have x's shape, and has ",
                    tensor.size(d), " in place of ", x.size(d), " in dimension ", d);
}

Dtype dtype_of(const Tensor& tensor) { return supported_dtype(tensor).value(); }

Tensor empty_output(const Tensor& x) {
  if (!x.is_contiguous()) return torch::stable::empty_like(x);
  return empty_strided(x, number(aoti_torch_get_dtype, x), x.sizes(), x.strides());
}

Tensor empty_state(const Tensor& x, int64_t dim) {
  const bool wide = x.scalar_type() == ScalarType::Double;
  return empty_without_dim(x, dim, wide ? ScalarType::Double : ScalarType::Float);
}

Tensor empty_terms(const Tensor& x, const Tensor& coefficient, int64_t dim) {
  if (!varies(coefficient, x, dim))
    return torch::stable::unsqueeze(empty_without_dim(x, dim, ScalarType::Double), dim);
  ScalarType dtype = coefficient.scalar_type();
  if (!same_shape(coefficient, x) && dtype != ScalarType::Double) dtype = ScalarType::Float;
  return torch::stable::new_empty(x, x.sizes(), dtype);
}

bool same_shape(const Tensor& one, const Tensor& other) {
  if (one.dim() != other.dim()) return false;
  for (int64_t d = 0; d < one.dim(); ++d)
    if (one.size(d) != other.size(d)) return false;
  return true;
}

ProblemBuilder::ProblemBuilder(Op op, const Tensor& x, int64_t dim, bool reverse)
    : problem(op, x.size(dim), static_cast<int>(x.dim()) - 1), x_(x), dim_(dim), reverse_(reverse) {
  const auto sizes = x.sizes();
  for (int64_t d = 0, row_axis = 0; d <= problem.ndim; ++d) {
    if (d == dim) continue;
    problem.sizes[row_axis++] = sizes[d];
    problem.rows *= sizes[d];
  }
  samples(&Problem::x, x);
}

void ProblemBuilder::add_strides(Operand& operand, const Tensor& tensor, int64_t ndim,
                                 bool has_time, const char* name) {
  operand.data = tensor.data_ptr();
  operand.dtype = dtype_of(tensor);
  const int64_t missing = ndim - tensor.dim();
  STD_TORCH_CHECK(missing >= 0, name, " has more dimensions than it can broadcast to");
  int row_axis = 0;
  for (int64_t axis = 0; axis < ndim; ++axis) {
    const bool is_time = has_time && axis == dim_;
    const int64_t size = axis < missing ? 1 : tensor.size(axis - missing);
    const int64_t stride = size == 1 ? 0 : tensor.stride(axis - missing);
    if (is_time) {
      STD_TORCH_CHECK(size == 1 || size == problem.length, name, " has ", size,
                      " samples in place of ", problem.length);
      operand.time_stride = stride;
    } else {
      const int64_t full = problem.sizes[row_axis];
      STD_TORCH_CHECK(size == 1 || size == full, name, " of size ", size, " does not broadcast to ",
                      full);
      operand.row_strides[row_axis++] = stride;
    }
  }
}

void ProblemBuilder::samples(Operand Problem::* operand, const Tensor& tensor) {
  Operand& to = problem.*operand;
  to.data = tensor.data_ptr();
  to.dtype = dtype_of(tensor);
  const auto strides = tensor.strides();
  for (int64_t d = 0, row_axis = 0; d <= problem.ndim; ++d) {
    if (d == dim_)
      to.time_stride = strides[d];
    else
      to.row_strides[row_axis++] = strides[d];
  }
  turn(to);
}

// Time backwards, if that is how the scan runs.
void ProblemBuilder::turn(Operand& operand) const {
  if (!reverse_ || problem.length == 0) return;
  const int64_t last = (problem.length - 1) * operand.time_stride;
  operand.data = static_cast<char*>(operand.data) + last * bytes_of(operand.dtype);
  operand.time_stride = -operand.time_stride;
}

void ProblemBuilder::coefficient(const Tensor& tensor, const char* name) {
  add_strides(problem.coefficient, tensor, x_.dim(), /*has_time=*/true, name);
  problem.varying = varies(tensor, x_, dim_);
  turn(problem.coefficient);
}

void ProblemBuilder::per_row(Operand Problem::* operand, const Tensor& tensor, const char* name) {
  add_strides(problem.*operand, tensor, x_.dim() - 1, /*has_time=*/false, name);
}

void ProblemBuilder::grad_coefficient(const Tensor& terms) {
  add_strides(problem.grad_coefficient, terms, x_.dim(), /*has_time=*/true, "grad_coefficient");
  turn(problem.grad_coefficient);
}

Problem& ProblemBuilder::finish() {
  int kept = 0;
  for (int d = 0; d < problem.ndim; ++d) {
    if (problem.sizes[d] == 1) continue;
    bool merge = kept > 0;
    problem.for_each_operand([&](const Operand& operand) {
      merge = merge && operand.row_strides[kept - 1] == operand.row_strides[d] * problem.sizes[d];
    });
    const int to = merge ? kept - 1 : kept++;
    problem.sizes[to] = merge ? problem.sizes[to] * problem.sizes[d] : problem.sizes[d];
    problem.for_each_operand(
        [=](Operand& operand) { operand.row_strides[to] = operand.row_strides[d]; });
  }
  problem.ndim = kept;
  return problem;
}

bool varies(const Tensor& coefficient, const Tensor& x, int64_t dim) {
  const int64_t axis = dim - (x.dim() - coefficient.dim());
  return axis >= 0 && coefficient.size(axis) != 1;
}

Sum sum_of(const Tensor& terms, const Tensor& result) {
  Sum sum{terms.data_ptr(), dtype_of(terms), result.data_ptr(), dtype_of(result), {}, {}};
  const int64_t missing = terms.dim() - result.dim();
  STD_TORCH_CHECK(missing >= 0, "the terms have fewer dimensions than their sum");
  for (int64_t d = 0; d < terms.dim(); ++d) {
    const int64_t size = terms.size(d), kept = d < missing ? 1 : result.size(d - missing);
    STD_TORCH_CHECK(kept == size || kept == 1, "a sum of size ", kept, " over terms of size ", size,
                    " in dimension ", d);
    if (kept == size)
      sum.kept.add(size, terms.stride(d), d < missing ? 0 : result.stride(d - missing));
    else
      sum.summed.add(size, terms.stride(d), 0);
  }
  return sum;
}

}  // namespace ema_ext
