// The operators of ops.cpp on CUDA: how entries.h runs a Problem and a Sum here.
//
// Kernels go to torch's current stream and take their workspace from torch's allocator, which keeps
// a block for that stream; nothing waits for the device. So a call may be captured in a graph.

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "cuda/run.h"
#include "entries.h"

namespace ema_ext::cuda {
namespace {

int current_device() {
  int device = 0;
  STD_TORCH_CHECK(cudaGetDevice(&device) == cudaSuccess, "ema_ext: no current CUDA device");
  return device;
}

Device properties_of(int device) {
  Device properties{};
  STD_TORCH_CHECK(cudaDeviceGetAttribute(&properties.multiprocessors,
                                         cudaDevAttrMultiProcessorCount, device) == cudaSuccess,
                  "ema_ext: CUDA device ", device, " does not answer");
  return properties;
}

// The workspace of one call: tensors that live until the call returns. The allocator then gives
// their memory only to what follows on the same stream.
class Arena {
 public:
  explicit Arena(int device) : device_(device) {}
  void* allocate(int64_t bytes) {
    AtenTensorHandle handle = nullptr;
    const int64_t stride = 1;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        1, &bytes, &stride, static_cast<int32_t>(torch::headeronly::ScalarType::Byte),
        static_cast<int32_t>(torch::headeronly::DeviceType::CUDA), device_, &handle));
    return tensors_.emplace_back(handle).data_ptr();
  }

 private:
  int device_;
  std::vector<Tensor> tensors_;
};

template <class Work, class F>
void on_current_stream(Work& work, const F& f) {
  const int device = current_device();
  const auto stream = static_cast<cudaStream_t>(
      torch::stable::accelerator::getCurrentStream(device).nativeHandle());
  Arena arena(device);
  f(work, properties_of(device), stream, [&](int64_t bytes) { return arena.allocate(bytes); });
}

}  // namespace

struct Backend {
  struct Guard {
    explicit Guard(const Tensor& tensor) : guard(tensor.get_device_index()) {}
    torch::stable::accelerator::DeviceGuard guard;
  };
  static void run(Problem& problem) { on_current_stream(problem, cuda::run); }
  static void sum(const Sum& sum) { on_current_stream(sum, cuda::sum); }
};

}  // namespace ema_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(ema_ext, CUDA, m) {
  ema_ext::register_entries<ema_ext::cuda::Backend>(m);
}
