// What the strategy asks of a GPU.
#pragma once

namespace ema_ext::cuda {

struct Device {
  int multiprocessors;
};

}  // namespace ema_ext::cuda
