// The map y -> ratio * y + drive: what a stretch of a row does to the y before it.
#pragma once

namespace ema_ext::cpu {

struct Affine {
  double ratio = 1;
  double drive = 0;
};

}  // namespace ema_ext::cpu
