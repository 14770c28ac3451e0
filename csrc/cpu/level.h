// The instruction set level that the CPU kernels run at, chosen once when the library is loaded.
#pragma once

namespace ema_ext::cpu {

enum class Level {
  kBaseline,  // x86-64: SSE2
  kV3,        // x86-64-v3: AVX2, FMA, F16C
  kV4,        // x86-64-v4: AVX-512 F, BW, CD, DQ, VL
};

// The highest level that this CPU has, or the one named in the environment variable
// EMA_EXT_CPU_LEVEL. Throws std::runtime_error if that name is unknown or the CPU lacks the level.
Level level();

// "x86-64", "x86-64-v3" or "x86-64-v4": the name of level(), as EMA_EXT_CPU_LEVEL takes it.
const char* level_name();

}  // namespace ema_ext::cpu
