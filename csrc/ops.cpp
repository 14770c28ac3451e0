// The schemas of the registered operators, and nothing else. The public functions in
// ema_ext/functional.py document the arguments; csrc/cpu and csrc/cuda hold the implementations.
//
// `dim` counts from the front (0 <= dim < x.dim()). `reverse` in a backward is that of its forward.
// Schemas with a Tensor alpha take what broadcasts to x's shape and is constant in time.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(ema_ext, m) {
  m.def("ema(Tensor x, float alpha, Tensor? initial_state, int dim, bool reverse) -> Tensor");
  m.def(
      "ema.Tensor(Tensor x, Tensor alpha, Tensor? initial_state, int dim, bool reverse) -> Tensor");
  m.def(
      "ema_with_state(Tensor x, float alpha, Tensor? initial_state, int dim, bool reverse)"
      " -> (Tensor y, Tensor state)");
  m.def(
      "ema_with_state.Tensor(Tensor x, Tensor alpha, Tensor? initial_state, int dim, bool reverse)"
      " -> (Tensor y, Tensor state)");
  m.def(
      "ema_backward(Tensor grad_y, Tensor? grad_state, float alpha, bool has_initial_state,"
      " int dim, bool reverse) -> (Tensor grad_x, Tensor grad_initial_state)");
  m.def(
      "ema_backward.Tensor(Tensor grad_y, Tensor? grad_state, Tensor x, Tensor alpha,"
      " Tensor? initial_state, int dim, bool reverse)"
      " -> (Tensor grad_x, Tensor grad_alpha, Tensor grad_initial_state)");
  m.def(
      "linear_recurrence(Tensor a, Tensor b, Tensor? initial_state, int dim, bool reverse)"
      " -> Tensor");
}
