// The Python module `_ema_ext`: what was built and what it runs on, in pure pybind11.
//
// Loading it also registers the operators, by the static objects of ops.cpp and of the files that
// implement them. torch must be imported before, because that loads libtorch_cpu.

#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "cpu/level.h"
#include "cpu/strategy.h"
#ifdef EMA_EXT_CUDA
#include "cuda/probe.h"
#endif

namespace py = pybind11;

namespace {

// What setup.py recorded: version, torch, nvcc, cuda_archs, cuda_reason.
constexpr struct {
  const char* name;
  const char* fact;
} kBuildInfo[] = {
#include "build_info.inc"
};

py::dict build_info() {
  py::dict info;
  for (const auto& [name, fact] : kBuildInfo) info[name] = fact;
  info["compiler"] = "g++ " __VERSION__;
#ifdef EMA_EXT_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  return info;
}

int cuda_probe() {
#ifdef EMA_EXT_CUDA
  return ema_ext::cuda::probe();
#else
  return -1;
#endif
}

void force_cpu_strategy(const std::string& name) {
  using ema_ext::cpu::Strategy;
  const auto family = name == "rows"    ? std::optional(Strategy::kRows)
                      : name == "lanes" ? std::optional(Strategy::kLanes)
                      : name == "cut"   ? std::optional(Strategy::kCut)
                                        : std::nullopt;
  if (!family && !name.empty())
    throw py::value_error("the strategy must be 'rows', 'lanes', 'cut' or '' (none is forced)");
  ema_ext::cpu::force_strategy(family);
}

}  // namespace

PYBIND11_MODULE(_ema_ext, m) {
  ema_ext::cpu::level();  // throws, and so fails the import, if a level was forced in vain
  m.def("build_info", &build_info);
  m.def("cpu_level", &ema_ext::cpu::level_name);
  m.def("force_cpu_strategy", &force_cpu_strategy);
  m.def("cuda_probe", &cuda_probe);
}
