// The schemas of the registered operators, and nothing else. The public functions in
// ema_ext/functional.py document the arguments; csrc/cpu and csrc/cuda hold the implementations.
//
// -x.dim() <= dim < x.dim(). `reverse` in a backward is that of its forward.
// A Tensor alpha or a broadcasts to the shape of x or b. The gradients to it come back in its own
// shape. `y` in a backward is what the forward returned.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(ema_ext, m) {
  m.def("ema(Tensor x, float alpha, Tensor? initial_state, int dim, bool reverse) -> Tensor");
  // The same without states. Defaults are what the usual call need not hand over from Python.
  m.def("ema.Samples(Tensor x, float alpha, int dim=-1, bool reverse=False) -> Tensor");
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
  // The same without states, neither the initial one nor the last.
  m.def(
      "ema_backward.Samples(Tensor grad_y, float alpha, int dim=-1, bool reverse=False)"
      " -> Tensor grad_x");
  m.def(
      "ema_backward.Tensor(Tensor grad_y, Tensor? grad_state, Tensor x, Tensor alpha,"
      " Tensor? initial_state, int dim, bool reverse)"
      " -> (Tensor grad_x, Tensor grad_alpha, Tensor grad_initial_state)");
  // For an alpha that varies in time; the one above for one that does not.
  m.def(
      "ema_backward.Varying(Tensor grad_y, Tensor? grad_state, Tensor x, Tensor alpha, Tensor y,"
      " Tensor? initial_state, int dim, bool reverse)"
      " -> (Tensor grad_x, Tensor grad_alpha, Tensor grad_initial_state)");
  m.def(
      "linear_recurrence(Tensor a, Tensor b, Tensor? initial_state, int dim, bool reverse)"
      " -> Tensor");
  m.def(
      "linear_recurrence_with_state(Tensor a, Tensor b, Tensor? initial_state, int dim,"
      " bool reverse) -> (Tensor y, Tensor state)");
  m.def(
      "linear_recurrence_backward(Tensor grad_y, Tensor? grad_state, Tensor a, Tensor y,"
      " Tensor? initial_state, int dim, bool reverse)"
      " -> (Tensor grad_a, Tensor grad_b, Tensor grad_initial_state)");
  // The terms summed in float64 to the shape of `like`, which broadcasts to theirs, in its dtype.
  m.def("sum_to(Tensor terms, Tensor like) -> Tensor");
}
