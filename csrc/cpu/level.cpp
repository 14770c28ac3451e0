// Detection of the CPU's level; see level.h.

#include "cpu/level.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace ema_ext::cpu {
namespace {

constexpr const char* kNames[] = {"x86-64", "x86-64-v3", "x86-64-v4"};

Level highest_level() {
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("x86-64-v3");
  const bool v4 = v3 && __builtin_cpu_supports("x86-64-v4");
  return v4 ? Level::kV4 : v3 ? Level::kV3 : Level::kBaseline;
}

Level choose_level() {
  const Level highest = highest_level();
  const char* forced = std::getenv("EMA_EXT_CPU_LEVEL");
  if (forced == nullptr || *forced == '\0') return highest;
  for (int i = 0; i < 3; ++i) {
    if (std::string(forced) != kNames[i]) continue;
    if (i <= static_cast<int>(highest)) return static_cast<Level>(i);
    throw std::runtime_error("EMA_EXT_CPU_LEVEL is " + std::string(forced) +
                             ", and this CPU reaches only " + kNames[static_cast<int>(highest)]);
  }
  throw std::runtime_error("EMA_EXT_CPU_LEVEL must be x86-64, x86-64-v3 or x86-64-v4, and is " +
                           std::string(forced));
}

}  // namespace

Level level() {
  static const Level chosen = choose_level();
  return chosen;
}

const char* level_name() { return kNames[static_cast<int>(level())]; }

}  // namespace ema_ext::cpu
